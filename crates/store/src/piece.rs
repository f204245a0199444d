//! A piece as it rests and travels: raw, or one zstd frame.

use std::cell::RefCell;

use bytes::Bytes;
use darter_types::PieceHash;
use zstd::bulk::{Compressor, Decompressor};

use crate::room::Room;

/// The longest piece, plain or stored. The layer format cuts at a quarter of it.
pub const MAX_PIECE_LEN: usize = 1 << 20;

/// The zstd level where nobody chose another.
pub(crate) const DEFAULT_LEVEL: i32 = 3;

/// Raw is kept unless zstd saves more than one byte in this many (3 %): what it does not shrink, it would only slow down.
const WORTH_ONE_IN: usize = 33;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    Raw,
    Zstd,
}

impl Encoding {
    /// The number that stands for it on disk and on the wire.
    pub const fn code(self) -> u8 {
        match self {
            Encoding::Raw => 0,
            Encoding::Zstd => 1,
        }
    }

    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Encoding::Raw),
            1 => Some(Encoding::Zstd),
            _ => None,
        }
    }
}

/// Why stored bytes are not the piece that they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PieceError {
    #[error("a piece of {0} bytes is longer than any may be")]
    TooLong(usize),
    #[error("the piece does not decompress to {0} bytes")]
    Decompress(u32),
    #[error("the piece does not have its hash")]
    Hash,
}

/// A piece as it rests on disk and travels between peers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredPiece {
    pub encoding: Encoding,
    pub plain_len: u32,
    pub bytes: Bytes,
}

thread_local! {
    // A context of zstd's is worth keeping: to set it up costs more than to compress a small piece.
    static COMPRESSOR: RefCell<Option<Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

impl StoredPiece {
    /// Compresses `plain` where that gains something.
    pub fn encode(plain: &[u8], level: i32) -> Self {
        let plain_len = u32::try_from(plain.len()).expect("a piece is shorter than 4 GiB");
        match compress(plain, level) {
            Some(frame) if frame.len() + plain.len() / WORTH_ONE_IN < plain.len() => {
                Self { encoding: Encoding::Zstd, plain_len, bytes: frame.freeze() }
            }
            _ => Self { encoding: Encoding::Raw, plain_len, bytes: Room::holding(plain).freeze() },
        }
    }

    /// Whether [`Self::encode`] makes pieces of this length: none is longer than its plain bytes, of `plain_len`.
    pub fn has_length_of(&self, plain_len: u32) -> bool {
        let (len, plain) = (self.bytes.len(), plain_len as usize);
        self.plain_len == plain_len
            && match self.encoding {
                Encoding::Raw => len == plain,
                Encoding::Zstd => len < plain,
            }
    }

    /// The plain bytes, if they have the hash `expected`. Never uses more memory than a piece may have.
    pub fn decode(&self, expected: &PieceHash) -> Result<Bytes, PieceError> {
        let plain_len = self.plain_len as usize;
        if plain_len > MAX_PIECE_LEN || self.bytes.len() > MAX_PIECE_LEN {
            return Err(PieceError::TooLong(plain_len.max(self.bytes.len())));
        }
        let plain = match self.encoding {
            // The same bytes: nothing is copied.
            Encoding::Raw => self.bytes.clone(),
            Encoding::Zstd => {
                decompress(&self.bytes, plain_len).ok_or(PieceError::Decompress(self.plain_len))?
            }
        };
        if plain.len() != plain_len {
            return Err(PieceError::Decompress(self.plain_len));
        }
        if blake3::hash(&plain).as_bytes() != expected.as_bytes() {
            return Err(PieceError::Hash);
        }
        Ok(plain)
    }
}

fn compress(plain: &[u8], level: i32) -> Option<Room> {
    COMPRESSOR.with_borrow_mut(|slot| {
        let compressor = match slot {
            Some(compressor) => compressor,
            None => slot.insert(Compressor::new(level).ok()?),
        };
        compressor.set_compression_level(level).ok()?;
        let mut frame = Room::for_len(zstd::compress_bound(plain.len()));
        compressor.compress_to_buffer(plain, &mut *frame).ok()?;
        Some(frame)
    })
}

fn decompress(frame: &[u8], plain_len: usize) -> Option<Bytes> {
    DECOMPRESSOR.with_borrow_mut(|slot| {
        let decompressor = match slot {
            Some(decompressor) => decompressor,
            None => slot.insert(Decompressor::new().ok()?),
        };
        let mut plain = Room::for_len(plain_len);
        decompressor.decompress_to_buffer(frame, &mut *plain).ok()?;
        Some(plain.freeze())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(data: &[u8]) -> PieceHash {
        PieceHash::from_bytes(*blake3::hash(data).as_bytes())
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        blake3::Hasher::new().update(b"noise").finalize_xof().fill(&mut out);
        out
    }

    #[test]
    fn text_is_compressed_and_noise_is_not() {
        let text = b"the same again ".repeat(1000);
        let piece = StoredPiece::encode(&text, 3);
        assert_eq!(piece.encoding, Encoding::Zstd);
        assert_eq!(piece.decode(&hash(&text)).unwrap(), text);
        let noise = noise(5000);
        let piece = StoredPiece::encode(&noise, 3);
        assert_eq!(piece.encoding, Encoding::Raw);
        assert_eq!(piece.decode(&hash(&noise)).unwrap(), noise);
    }

    #[test]
    fn empty_piece_is_itself() {
        assert!(StoredPiece::encode(b"", 3).decode(&hash(b"")).unwrap().is_empty());
    }

    #[test]
    fn bomb_is_stopped_at_the_announced_length() {
        let mut piece = StoredPiece::encode(&vec![0; 900_000], 3);
        piece.plain_len = 100;
        assert_eq!(piece.decode(&hash(&[0; 100])), Err(PieceError::Decompress(100)));
        piece.plain_len = u32::MAX;
        assert_eq!(piece.decode(&hash(b"")), Err(PieceError::TooLong(u32::MAX as usize)));
    }

    #[test]
    fn only_lengths_that_encoding_makes_are_those_of_a_piece() {
        for plain in [Vec::new(), b"a".to_vec(), vec![7; 300], noise(5000)] {
            let (piece, len) = (StoredPiece::encode(&plain, 3), plain.len() as u32);
            assert!(piece.has_length_of(len) && !piece.has_length_of(len + 1));
            let longer = Bytes::from([&piece.bytes[..], &[0; 5000]].concat());
            assert!(!StoredPiece { bytes: longer, ..piece }.has_length_of(len));
        }
    }

    #[test]
    fn other_bytes_are_refused() {
        let piece = StoredPiece::encode(b"one", 3);
        assert_eq!(piece.decode(&hash(b"two")), Err(PieceError::Hash));
    }
}
