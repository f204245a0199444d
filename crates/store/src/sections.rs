//! A small file with a checksum, and how it is replaced: whole or not at all.
//!
//! Little-endian: magic `DARTERSF` (8), version (4), number of sections (4), for each its length (8) and its bytes; at the end
//! the BLAKE3 hash of all that (32).

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use bytes::{Buf, Bytes};

const MAGIC: &[u8; 8] = b"DARTERSF";
const VERSION: u32 = 1;
const SUM_LEN: usize = 32;
/// More than any file here has.
const SECTIONS_MAX: u32 = 16;

pub(crate) fn encode(sections: &[&[u8]]) -> Vec<u8> {
    let mut out = Vec::with_capacity(64 + sections.iter().map(|section| section.len() + 8).sum::<usize>());
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&(sections.len() as u32).to_le_bytes());
    for section in sections {
        out.extend_from_slice(&(section.len() as u64).to_le_bytes());
        out.extend_from_slice(section);
    }
    let sum = blake3::hash(&out);
    out.extend_from_slice(sum.as_bytes());
    out
}

/// `None` if the file is damaged, cut off, or of another version.
pub(crate) fn decode(file: Vec<u8>) -> Option<Vec<Bytes>> {
    let body_len = file.len().checked_sub(SUM_LEN)?;
    if file[body_len..] != blake3::hash(&file[..body_len]).as_bytes()[..] {
        return None;
    }
    let mut body = Bytes::from(file).slice(..body_len);
    if body.len() < 16 || body.split_to(8) != MAGIC[..] || body.get_u32_le() != VERSION {
        return None;
    }
    let count = body.get_u32_le();
    if count > SECTIONS_MAX {
        return None;
    }
    let mut sections = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let len = usize::try_from(body.try_get_u64_le().ok()?).ok()?;
        if len > body.len() {
            return None;
        }
        sections.push(body.split_to(len));
    }
    body.is_empty().then_some(sections)
}

/// Puts the sections into `path`; they are durable when this returns.
pub(crate) fn write(path: &Path, sections: &[&[u8]]) -> io::Result<()> {
    let temporary = path.with_added_extension("tmp");
    let written = write_synced(&temporary, &encode(sections)).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
        return written;
    }
    File::open(path.parent().expect("a file in a directory"))?.sync_all()
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// What a path holds.
pub(crate) enum Found {
    Sections(Vec<Bytes>),
    Absent,
    Damaged,
}

pub(crate) fn read(path: &Path) -> io::Result<Found> {
    match fs::read(path) {
        Ok(file) => Ok(decode(file).map_or(Found::Damaged, Found::Sections)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Found::Absent),
        Err(error) => Err(error),
    }
}
