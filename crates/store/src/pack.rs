//! One pack file: records one after the other, each a header and a piece.
//!
//! A header has 56 bytes, little-endian: magic `DPC1` (4), encoding (1), state (1: 0 live, 1 dropped), zero (2), plain
//! length (4), stored length (4), hash (32), and the first 8 bytes of the BLAKE3 hash of all that. The stored bytes follow.
//! A dropped header may stand for several records: its stored length reaches to the end of the last, and what it spans is a
//! hole.
//!
//! Whatever the scan of a damaged pack makes of it, it is only a hint where a piece may be: a read checks the hash.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use darter_types::PieceHash;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::piece::{Encoding, MAX_PIECE_LEN, StoredPiece};

const MAGIC: &[u8; 4] = b"DPC1";
pub(crate) const HEADER_LEN: usize = 56;
const SUM_AT: usize = 48;
/// File systems keep whole blocks of this size, or of several.
const BLOCK: u64 = 4096;
/// How much of a pack is read at once to find the next header behind a damaged one.
const SEARCH_LEN: usize = 1 << 20;

/// What a header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub encoding: Encoding,
    pub dropped: bool,
    pub plain_len: u32,
    pub stored_len: u32,
    pub hash: PieceHash,
}

fn sum(header: &[u8]) -> [u8; 8] {
    let hash = blake3::hash(&header[..SUM_AT]);
    hash.as_bytes()[..8].try_into().expect("a hash has more than 8 bytes")
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

impl Header {
    pub(crate) fn of(hash: &PieceHash, piece: &StoredPiece) -> Self {
        let stored_len = u32::try_from(piece.bytes.len()).expect("the store refuses longer pieces");
        Self { encoding: piece.encoding, dropped: false, plain_len: piece.plain_len, stored_len, hash: *hash }
    }

    pub(crate) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[..4].copy_from_slice(MAGIC);
        out[4] = self.encoding.code();
        out[5] = u8::from(self.dropped);
        out[8..12].copy_from_slice(&self.plain_len.to_le_bytes());
        out[12..16].copy_from_slice(&self.stored_len.to_le_bytes());
        out[16..48].copy_from_slice(self.hash.as_bytes());
        let sum = sum(&out);
        out[SUM_AT..].copy_from_slice(&sum);
        out
    }

    /// `None` if these bytes are no header.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() < HEADER_LEN || &bytes[..4] != MAGIC || bytes[SUM_AT..HEADER_LEN] != sum(bytes) {
            return None;
        }
        let header = Self {
            encoding: Encoding::from_code(bytes[4])?,
            dropped: bytes[5] != 0,
            plain_len: u32_at(bytes, 8),
            stored_len: u32_at(bytes, 12),
            hash: PieceHash::from_slice(&bytes[16..48]).ok()?,
        };
        let sane = header.plain_len as usize <= MAX_PIECE_LEN && header.stored_len as usize <= MAX_PIECE_LEN;
        (sane || header.dropped).then_some(header)
    }
}

/// Gives what is stored behind a dropped header back to the file system. Where that can't be done the space is free when
/// the whole pack goes.
pub(crate) fn punch(file: &File, header_at: u64, stored_len: u32) {
    let from = (header_at + HEADER_LEN as u64).next_multiple_of(BLOCK);
    let to = (header_at + HEADER_LEN as u64 + u64::from(stored_len)) / BLOCK * BLOCK;
    if from >= to {
        return;
    }
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    if let Err(error) = fallocate(file, flags, from as i64, (to - from) as i64) {
        tracing::debug!(%error, "no hole can be made in a pack");
    }
}

/// Gives every record of `file` to `found` (header and its offset), and returns where the next one goes: behind the last
/// whole record. What lies between two records because a header was damaged is passed over.
pub(crate) fn scan(file: &File, found: &mut dyn FnMut(Header, u64)) -> io::Result<u64> {
    let len = file.metadata()?.len();
    let mut at = 0;
    let mut end = 0;
    while let Some((header, offset)) = next_record(file, at, len)? {
        found(header, offset);
        at = offset + (HEADER_LEN as u64) + u64::from(header.stored_len);
        end = at;
    }
    Ok(end)
}

/// The first whole record at or behind `at`.
fn next_record(file: &File, at: u64, len: u64) -> io::Result<Option<(Header, u64)>> {
    let mut bytes = [0; HEADER_LEN];
    let whole =
        |header: &Header, offset: u64| offset + HEADER_LEN as u64 + u64::from(header.stored_len) <= len;
    if at + HEADER_LEN as u64 > len {
        return Ok(None);
    }
    file.read_exact_at(&mut bytes, at)?;
    if let Some(header) = Header::decode(&bytes).filter(|header| whole(header, at)) {
        return Ok(Some((header, at)));
    }
    search(file, at + 1, len, &whole)
}

fn search(
    file: &File,
    mut at: u64,
    len: u64,
    whole: &dyn Fn(&Header, u64) -> bool,
) -> io::Result<Option<(Header, u64)>> {
    let mut window = vec![0; SEARCH_LEN];
    while at + HEADER_LEN as u64 <= len {
        let take = usize::try_from(len - at).unwrap_or(SEARCH_LEN).min(SEARCH_LEN);
        file.read_exact_at(&mut window[..take], at)?;
        for start in 0..=take - HEADER_LEN {
            if window[start] != MAGIC[0] {
                continue;
            }
            let offset = at + start as u64;
            let header = Header::decode(&window[start..take]);
            if let Some(header) = header.filter(|header| whole(header, offset)) {
                return Ok(Some((header, offset)));
            }
        }
        // Windows overlap by a header less one byte, so that none is cut in two.
        at += (take - HEADER_LEN + 1) as u64;
    }
    Ok(None)
}
