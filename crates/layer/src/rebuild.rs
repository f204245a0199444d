//! The exact tar stream, out of recipe and pieces.

use std::io::{self, Read, Write};

use darter_types::PieceIndex;

use crate::LayerMap;

/// Why the stream could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    /// The recipe is not the one that the map vouches for.
    #[error("the recipe of the tar stream is damaged")]
    Recipe,
    #[error("reading a piece: {0}")]
    Piece(#[source] io::Error),
    #[error("writing the tar stream: {0}")]
    Write(#[source] io::Error),
}

/// Literal bytes and zeros are written in parts of this length at most.
const PART: usize = 64 * 1024;

/// Writes the tar stream that the map was made of. `read` gives a piece's plain bytes, each once and in order;
/// `tar_section` is [`crate::EncodedMap::tar`]. The stream was right only if this succeeds; the caller compares its digest
/// with the diff ID all the same.
pub fn rebuild_tar<P: AsRef<[u8]>>(
    map: &LayerMap,
    tar_section: &[u8],
    read: &mut dyn FnMut(PieceIndex) -> io::Result<P>,
    out: &mut dyn Write,
) -> Result<(), RebuildError> {
    let (hash, plain_len) = map.tar_section();
    let mut recipe = RecipeReader::new(tar_section, plain_len)?;
    let mut content = ContentReader { map, read, next: 0, piece: None, position: 0 };
    // More zeros than the stream has bytes are a lie that would otherwise be noticed only at the end.
    let mut zeros = 0u64;
    while recipe.left > 0 {
        let literal = recipe.number()?;
        recipe.copy(literal, out)?;
        let len = recipe.number()?;
        zeros = zeros.checked_add(len).filter(|sum| *sum <= map.tar_size()).ok_or(RebuildError::Recipe)?;
        write_zeros(len, out)?;
        let len = recipe.number()?;
        content.copy(len, out)?;
    }
    if recipe.hasher.finalize().as_bytes() != hash.as_bytes() || !content.is_at_end() {
        return Err(RebuildError::Recipe);
    }
    Ok(())
}

/// Whether these bytes are the tar section that the map vouches for.
pub fn is_tar_section(map: &LayerMap, tar_section: &[u8]) -> bool {
    let (hash, plain_len) = map.tar_section();
    let Ok(decoder) = zstd::stream::read::Decoder::with_buffer(tar_section) else { return false };
    let (mut hasher, mut plain) = (blake3::Hasher::new(), decoder.take(plain_len.saturating_add(1)));
    io::copy(&mut plain, &mut hasher).is_ok_and(|len| len == plain_len)
        && hasher.finalize().as_bytes() == hash.as_bytes()
}

/// The recipe, uncompressed as it is needed.
struct RecipeReader<'a> {
    decoder: zstd::stream::read::Decoder<'static, &'a [u8]>,
    hasher: blake3::Hasher,
    left: u64,
}

impl<'a> RecipeReader<'a> {
    fn new(stored: &'a [u8], plain_len: u64) -> Result<Self, RebuildError> {
        let decoder = zstd::stream::read::Decoder::with_buffer(stored).map_err(|_| RebuildError::Recipe)?;
        Ok(Self { decoder, hasher: blake3::Hasher::new(), left: plain_len })
    }

    fn take(&mut self, bytes: &mut [u8]) -> Result<(), RebuildError> {
        self.left = self.left.checked_sub(bytes.len() as u64).ok_or(RebuildError::Recipe)?;
        self.decoder.read_exact(bytes).map_err(|_| RebuildError::Recipe)?;
        self.hasher.update(bytes);
        Ok(())
    }

    fn number(&mut self) -> Result<u64, RebuildError> {
        let mut encoded = Vec::with_capacity(10);
        loop {
            let mut byte = [0];
            self.take(&mut byte)?;
            encoded.push(byte[0]);
            if byte[0] & 0x80 == 0 {
                return crate::wire::Cursor::new(&encoded).number().map_err(|_| RebuildError::Recipe);
            }
            if encoded.len() == 10 {
                return Err(RebuildError::Recipe);
            }
        }
    }

    fn copy(&mut self, mut len: u64, out: &mut dyn Write) -> Result<(), RebuildError> {
        let mut part = [0; PART];
        while len > 0 {
            let now = len.min(PART as u64) as usize;
            self.take(&mut part[..now])?;
            out.write_all(&part[..now]).map_err(RebuildError::Write)?;
            len -= now as u64;
        }
        Ok(())
    }
}

fn write_zeros(mut len: u64, out: &mut dyn Write) -> Result<(), RebuildError> {
    let zeros = [0; PART];
    while len > 0 {
        let now = len.min(PART as u64) as usize;
        out.write_all(&zeros[..now]).map_err(RebuildError::Write)?;
        len -= now as u64;
    }
    Ok(())
}

/// The content stream, piece by piece.
struct ContentReader<'a, P> {
    map: &'a LayerMap,
    read: &'a mut dyn FnMut(PieceIndex) -> io::Result<P>,
    next: u32,
    piece: Option<P>,
    position: usize,
}

impl<P: AsRef<[u8]>> ContentReader<'_, P> {
    fn copy(&mut self, mut len: u64, out: &mut dyn Write) -> Result<(), RebuildError> {
        while len > 0 {
            if self.rest().is_empty() {
                self.next_piece()?;
            }
            let rest = self.rest();
            let now = usize::try_from(len).map_or(rest.len(), |len| len.min(rest.len()));
            out.write_all(&rest[..now]).map_err(RebuildError::Write)?;
            self.position += now;
            len -= now as u64;
        }
        Ok(())
    }

    /// What was not written yet of the piece at hand.
    fn rest(&self) -> &[u8] {
        self.piece.as_ref().map_or(&[], |piece| &piece.as_ref()[self.position..])
    }

    fn next_piece(&mut self) -> Result<(), RebuildError> {
        if self.next == self.map.piece_count() {
            return Err(RebuildError::Recipe);
        }
        let index = PieceIndex(self.next);
        let piece = (self.read)(index).map_err(RebuildError::Piece)?;
        if piece.as_ref().len() != self.map.piece(index).plain_len as usize {
            return Err(RebuildError::Piece(io::Error::other("the piece has a wrong length")));
        }
        (self.piece, self.position) = (Some(piece), 0);
        self.next += 1;
        Ok(())
    }

    fn is_at_end(&self) -> bool {
        self.next == self.map.piece_count() && self.rest().is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Item, Tar, made};

    fn rebuilt(tar: &[u8]) -> Result<Vec<u8>, RebuildError> {
        let (mut made, pieces) = made(tar);
        let encoded = made.map.encode();
        let map = LayerMap::decode(&encoded.core).unwrap();
        let mut out = Vec::new();
        rebuild_tar(&map, &encoded.tar, &mut |index| Ok(pieces.0[index.0 as usize].clone()), &mut out)?;
        Ok(out)
    }

    fn layer() -> Tar {
        let pax: &[(&str, &[u8])] = &[("SCHILY.xattr.user.a", b"b")];
        let files = (0..50)
            .fold(Tar::default(), |tar, i| tar.file(&format!("f{i}"), &vec![i; usize::from(i) * 3000]));
        files
            .dir("d")
            .item(&Item { name: b"x", data: &[1; 300_000], pax, ..Item::default() })
            .file("empty", b"")
    }

    #[test]
    fn stream_is_rebuilt_to_the_last_byte() {
        let whole = layer().end();
        let behind = [&whole[..], &[0; 100_000], &[1; 2_000_000], &[0; 77]].concat();
        for tar in
            [&whole[..], &whole[..whole.len() - 1024], &whole[..whole.len() - 512], &[], &[0; 512], &behind]
        {
            assert!(rebuilt(tar).unwrap() == tar, "a stream of {} bytes differs", tar.len());
        }
    }

    #[test]
    fn damaged_recipes_and_pieces_are_noticed() {
        let (mut made, pieces) = made(&layer().end());
        let encoded = made.map.encode();
        let mut read = |index: PieceIndex| Ok(pieces.0[index.0 as usize].clone());
        for at in (0..encoded.tar.len()).step_by(encoded.tar.len() / 40) {
            let mut tar = encoded.tar.clone();
            tar[at] ^= 0x10;
            assert!(!is_tar_section(&made.map, &tar), "a flip at {at} was taken");
            assert!(
                rebuild_tar(&made.map, &tar, &mut read, &mut io::sink()).is_err(),
                "a flip at {at} was taken"
            );
        }
        assert!(is_tar_section(&made.map, &encoded.tar));
        let mut short = |_| Ok(vec![0; 5]);
        let error = rebuild_tar(&made.map, &encoded.tar, &mut short, &mut io::sink()).unwrap_err();
        assert!(matches!(error, RebuildError::Piece(_)));
    }

    proptest! {
        #[test]
        fn any_stream_that_is_taken_is_rebuilt(
            sizes in prop::collection::vec(0usize..100_000, 0..12),
            behind in prop::collection::vec((any::<u8>(), 0usize..3000), 0..5),
        ) {
            let mut tar = sizes.iter().fold(Tar::default(), |tar, size| tar.file("f", &vec![*size as u8; *size])).end();
            behind.iter().for_each(|(byte, len)| tar.extend(vec![byte & 1; *len]));
            prop_assert!(rebuilt(&tar).unwrap() == tar);
        }
    }
}
