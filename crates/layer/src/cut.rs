//! Where the content stream is cut into pieces. Frozen with the format's version: see `docs/formats.md`.

use std::io;

use darter_types::{Hash, PieceHash, PieceIndex};

use crate::{MakeError, PIECE_LEN, PieceSink};

/// A file with more content starts a piece of its own.
const LARGE: u64 = 64 * 1024;
/// A group of smaller files with less than this is not ended by a file's content.
const GROUP_MIN: usize = 64 * 1024;
/// Bits of a small file's hash that must be zero for the group to end behind it: one file in eight.
const BOUNDARY_MASK: u8 = 0b111;

/// A piece as the map has it.
pub(crate) struct Cut {
    pub(crate) hash: PieceHash,
    pub(crate) len: u32,
}

/// Takes the files' contents in order and gives pieces to the sink.
pub(crate) struct Cutter<'a> {
    sink: &'a mut dyn PieceSink,
    cuts: Vec<Cut>,
    /// The piece that is being filled.
    piece: Vec<u8>,
    /// Where the current file starts in `piece`, if it is a small one.
    small: Option<usize>,
}

impl<'a> Cutter<'a> {
    pub(crate) fn new(sink: &'a mut dyn PieceSink) -> Self {
        Self { sink, cuts: Vec::new(), piece: Vec::with_capacity(PIECE_LEN), small: None }
    }

    /// A file with so much content begins.
    pub(crate) fn begin(&mut self, len: u64) -> Result<(), MakeError> {
        let large = len > LARGE;
        if large || self.piece.len() as u64 + len > PIECE_LEN as u64 {
            self.cut()?;
        }
        self.small = (!large).then_some(self.piece.len());
        Ok(())
    }

    pub(crate) fn feed(&mut self, mut bytes: &[u8]) -> Result<(), MakeError> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(PIECE_LEN - self.piece.len()));
            self.piece.extend_from_slice(now);
            bytes = later;
            if self.small.is_none() && self.piece.len() == PIECE_LEN {
                self.cut()?;
            }
        }
        Ok(())
    }

    /// The file ends.
    pub(crate) fn end(&mut self) -> Result<(), MakeError> {
        match self.small.take() {
            None => self.cut(),
            Some(start) if self.ends_group(start) => self.cut(),
            Some(_) => Ok(()),
        }
    }

    pub(crate) fn finish(mut self) -> Result<Vec<Cut>, MakeError> {
        self.cut()?;
        Ok(self.cuts)
    }

    /// By content, not by position: a change before this file does not move the cut behind it.
    fn ends_group(&self, start: usize) -> bool {
        let file = &self.piece[start..];
        self.piece.len() >= GROUP_MIN
            && !file.is_empty()
            && blake3::hash(file).as_bytes()[0] & BOUNDARY_MASK == 0
    }

    fn cut(&mut self) -> Result<(), MakeError> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let too_many = |_| MakeError::Sink(io::Error::other("more pieces than the map can number"));
        let index = PieceIndex(u32::try_from(self.cuts.len()).map_err(too_many)?);
        let hash = PieceHash(Hash::from_bytes(*blake3::hash(&self.piece).as_bytes()));
        self.sink.piece(index, hash, &self.piece).map_err(MakeError::Sink)?;
        self.cuts.push(Cut { hash, len: self.piece.len() as u32 });
        self.piece.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Pieces;

    fn cuts(files: &[Vec<u8>]) -> Vec<u32> {
        let mut pieces = Pieces::default();
        let mut cutter = Cutter::new(&mut pieces);
        for file in files {
            cutter.begin(file.len() as u64).unwrap();
            file.chunks(1000).for_each(|part| cutter.feed(part).unwrap());
            cutter.end().unwrap();
        }
        cutter.finish().unwrap().iter().map(|cut| cut.len).collect()
    }

    fn file(seed: u32, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
        out
    }

    #[test]
    fn large_file_has_pieces_of_its_own() {
        let files = [file(1, 100), file(2, PIECE_LEN + 10), file(3, 100)];
        assert_eq!(cuts(&files), [100, PIECE_LEN as u32, 10, 100]);
    }

    #[test]
    fn file_of_the_exact_length_leaves_no_empty_piece() {
        assert_eq!(cuts(&[file(1, PIECE_LEN)]), [PIECE_LEN as u32]);
        assert_eq!(cuts(&[Vec::new(), file(1, 2 * PIECE_LEN)]), [PIECE_LEN as u32; 2]);
        assert_eq!(cuts(&[]), []);
    }

    #[test]
    fn group_never_exceeds_a_piece() {
        let files: Vec<_> = (0..200).map(|i| file(i, 60_000)).collect();
        let cuts = cuts(&files);
        assert!(cuts.iter().all(|len| *len as usize <= PIECE_LEN && len % 60_000 == 0));
        assert!(cuts.len() > 50);
    }

    #[test]
    fn change_in_front_moves_few_cuts() {
        let files: Vec<_> = (0..3000).map(|i| file(i, 3000 + (i as usize * 37) % 5000)).collect();
        let hashes = |files: &[Vec<u8>]| {
            let mut pieces = Pieces::default();
            let mut cutter = Cutter::new(&mut pieces);
            for file in files {
                cutter.begin(file.len() as u64).unwrap();
                cutter.feed(file).unwrap();
                cutter.end().unwrap();
            }
            cutter.finish().unwrap().into_iter().map(|cut| cut.hash).collect::<Vec<_>>()
        };
        let before = hashes(&files);
        let mut changed = files.clone();
        changed.insert(5, file(9999, 4000));
        let after = hashes(&changed);
        let new = after.iter().filter(|hash| !before.contains(hash)).count();
        assert!(new <= 4, "{new} of {} pieces are new", after.len());
    }
}
