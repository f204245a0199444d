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
pub fn rebuild_tar(
    map: &LayerMap,
    tar_section: &[u8],
    read: &mut dyn FnMut(PieceIndex) -> io::Result<Vec<u8>>,
    out: &mut dyn Write,
) -> Result<(), RebuildError> {
    let (hash, plain_len) = map.tar_section();
    let mut recipe = RecipeReader::new(tar_section, plain_len)?;
    let mut content = ContentReader { map, read, next: 0, piece: Vec::new(), position: 0 };
    while recipe.left > 0 {
        let literal = recipe.number()?;
        recipe.copy(literal, out)?;
        write_zeros(recipe.number()?, map.tar_size(), out)?;
        let len = recipe.number()?;
        content.copy(len, out)?;
    }
    if recipe.hasher.finalize().as_bytes() != hash.as_bytes() || !content.is_at_end() {
        return Err(RebuildError::Recipe);
    }
    Ok(())
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

fn write_zeros(mut len: u64, most: u64, out: &mut dyn Write) -> Result<(), RebuildError> {
    if len > most {
        return Err(RebuildError::Recipe);
    }
    let zeros = [0; PART];
    while len > 0 {
        let now = len.min(PART as u64) as usize;
        out.write_all(&zeros[..now]).map_err(RebuildError::Write)?;
        len -= now as u64;
    }
    Ok(())
}

/// The content stream, piece by piece.
struct ContentReader<'a> {
    map: &'a LayerMap,
    read: &'a mut dyn FnMut(PieceIndex) -> io::Result<Vec<u8>>,
    next: u32,
    piece: Vec<u8>,
    position: usize,
}

impl ContentReader<'_> {
    fn copy(&mut self, mut len: u64, out: &mut dyn Write) -> Result<(), RebuildError> {
        while len > 0 {
            if self.position == self.piece.len() {
                self.next_piece()?;
            }
            let rest = &self.piece[self.position..];
            let now = usize::try_from(len).map_or(rest.len(), |len| len.min(rest.len()));
            out.write_all(&rest[..now]).map_err(RebuildError::Write)?;
            self.position += now;
            len -= now as u64;
        }
        Ok(())
    }

    fn next_piece(&mut self) -> Result<(), RebuildError> {
        if self.next == self.map.piece_count() {
            return Err(RebuildError::Recipe);
        }
        let index = PieceIndex(self.next);
        self.piece = (self.read)(index).map_err(RebuildError::Piece)?;
        if self.piece.len() != self.map.piece(index).plain_len as usize {
            return Err(RebuildError::Piece(io::Error::other("the piece has a wrong length")));
        }
        self.position = 0;
        self.next += 1;
        Ok(())
    }

    fn is_at_end(&self) -> bool {
        self.next == self.map.piece_count() && self.position == self.piece.len()
    }
}
