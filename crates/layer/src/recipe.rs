//! The recipe of a tar stream: every byte of it that is no file's content, and where the contents go.
//!
//! It is the map's section `tar`: records of literal bytes, a number of zeros, and a number of bytes that follow in the
//! content stream. With it and the pieces the exact stream can be put together again, and its digest checked. It is
//! written while the stream is read, and only its compressed form is kept.

use std::io::{self, Write};

use darter_types::Hash;

use crate::wire;

/// A record is written once it has so many literal bytes. Part of the format: it decides where records end.
const LITERAL_MAX: usize = 1 << 20;
/// Bytes behind the end of the archive that are not zero, which a map keeps at most.
const TRAILING_MAX: u64 = 64 << 20;
/// The whole section, uncompressed.
pub(crate) const RECIPE_MAX: u64 = 8 << 30;
/// Its compressed form, which is held in memory until the whole map is there. An entry's headers take some fifty bytes
/// of it; only archives made for it, with headers of noise, come near.
const STORED_MAX: usize = 512 << 20;
/// Fast: this runs beside the reader, and headers are mostly zeros.
const LEVEL: i32 = 3;

/// A limit was passed; names it.
#[derive(Debug)]
pub(crate) struct TooMuch(pub(crate) &'static str);

pub(crate) struct Recipe {
    encoder: zstd::stream::write::Encoder<'static, Vec<u8>>,
    hasher: blake3::Hasher,
    plain_len: u64,
    tar_size: u64,
    literal: Vec<u8>,
    zeros: u64,
    trailing: u64,
    stored_max: usize,
}

/// The section `tar`, ready to be stored.
#[derive(Debug)]
pub(crate) struct FinishedRecipe {
    pub(crate) stored: Vec<u8>,
    pub(crate) plain_len: u64,
    pub(crate) hash: Hash,
    pub(crate) tar_size: u64,
}

impl Recipe {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            encoder: zstd::stream::write::Encoder::new(Vec::new(), LEVEL)?,
            hasher: blake3::Hasher::new(),
            plain_len: 0,
            tar_size: 0,
            literal: Vec::new(),
            zeros: 0,
            trailing: 0,
            stored_max: STORED_MAX,
        })
    }

    pub(crate) fn literal(&mut self, mut bytes: &[u8]) -> Result<(), TooMuch> {
        if self.zeros > 0 && !bytes.is_empty() {
            self.record(0)?;
        }
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(LITERAL_MAX - self.literal.len()));
            self.literal.extend_from_slice(now);
            self.tar_size += now.len() as u64;
            bytes = later;
            if self.literal.len() == LITERAL_MAX {
                self.record(0)?;
            }
        }
        Ok(())
    }

    pub(crate) fn content(&mut self, len: u64) -> Result<(), TooMuch> {
        if len > 0 {
            self.tar_size = self.tar_size.checked_add(len).ok_or(TooMuch("bytes in the stream"))?;
            self.record(len)?;
        }
        Ok(())
    }

    /// What stands behind the end of the archive, block by block.
    pub(crate) fn trailing(&mut self, block: &[u8]) -> Result<(), TooMuch> {
        if block.iter().all(|byte| *byte == 0) {
            self.zeros += block.len() as u64;
            self.tar_size += block.len() as u64;
            return Ok(());
        }
        self.trailing += block.len() as u64;
        if self.trailing > TRAILING_MAX {
            return Err(TooMuch("bytes behind the end of the archive"));
        }
        self.literal(block)
    }

    pub(crate) fn finish(mut self) -> Result<FinishedRecipe, io::Error> {
        if !self.literal.is_empty() || self.zeros > 0 {
            self.record(0).map_err(|error| io::Error::other(error.0))?;
        }
        Ok(FinishedRecipe {
            stored: self.encoder.finish()?,
            plain_len: self.plain_len,
            hash: Hash::from_bytes(*self.hasher.finalize().as_bytes()),
            tar_size: self.tar_size,
        })
    }

    fn record(&mut self, content: u64) -> Result<(), TooMuch> {
        let mut head = Vec::with_capacity(10);
        wire::put(&mut head, self.literal.len() as u64);
        let mut tail = Vec::with_capacity(20);
        wire::put(&mut tail, self.zeros);
        wire::put(&mut tail, content);
        let literal = std::mem::take(&mut self.literal);
        for part in [&head, &literal, &tail] {
            self.hasher.update(part);
            self.plain_len += part.len() as u64;
            self.encoder.write_all(part).expect("writing to memory does not fail");
        }
        self.literal = literal;
        self.literal.clear();
        self.zeros = 0;
        let too_much = self.plain_len > RECIPE_MAX || self.encoder.get_ref().len() > self.stored_max;
        if too_much { Err(TooMuch("bytes of tar headers")) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What doesn't compress: the hashes of numbers.
    fn noise(len: usize) -> Vec<u8> {
        (0..len as u64 / 32).flat_map(|i| *blake3::hash(&i.to_le_bytes()).as_bytes()).collect()
    }

    #[test]
    fn recipe_that_does_not_compress_is_given_up_before_it_takes_the_memory() {
        let bounded = || Recipe { stored_max: 4 << 20, ..Recipe::new().unwrap() };
        assert!(bounded().literal(&vec![0; 64 << 20]).is_ok());
        let refused = bounded().literal(&noise(16 << 20));
        assert_eq!(refused.unwrap_err().0, "bytes of tar headers");
    }
}
