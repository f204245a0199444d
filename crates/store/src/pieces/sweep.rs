//! Throwing away what nobody needs: whoever sweeps says which pieces are to be kept, and all others go.
//!
//! A piece goes in three steps: it is forgotten, its header says so, its bytes become a hole. Killed in between, the next
//! start finds it again, or makes the hole; a reader that was faster than the hole finds bytes that lack their hash, and
//! nothing.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use darter_types::PieceHash;
use parking_lot::MutexGuard;

use super::{Location, Pieces, pack_path};
use crate::pack::{HEADER_LEN, Header, punch};

/// What was thrown away.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Swept {
    pub pieces: u64,
    pub bytes: u64,
}

/// Keeps pieces from all sweeps that were put or claimed since it was made.
pub struct Fresh<'a> {
    pieces: &'a Pieces,
    since: u32,
}

impl Drop for Fresh<'_> {
    fn drop(&mut self) {
        self.pieces.fresh.lock().remove(&self.since);
    }
}

/// A sweep that goes on. Dropped, it has changed nothing.
pub struct Sweep<'a> {
    pieces: &'a Pieces,
    /// Pieces of this age or younger stay.
    fresh_since: u32,
    _only: MutexGuard<'a, ()>,
}

impl Pieces {
    pub(crate) fn fresh(&self) -> Fresh<'_> {
        let mut fresh = self.fresh.lock();
        let since = self.clock.fetch_add(1, Ordering::Relaxed) + 1;
        fresh.insert(since);
        Fresh { pieces: self, since }
    }

    pub(crate) fn claim(&self, hash: &PieceHash) -> bool {
        let mut index = self.index.write();
        let Some(location) = index.get_mut(hash) else { return false };
        location.since = self.clock.load(Ordering::Relaxed);
        location.kept = true;
        true
    }

    pub(crate) fn held_bytes<'a>(&self, hashes: impl Iterator<Item = &'a PieceHash>) -> u64 {
        let index = self.index.read();
        hashes.filter_map(|hash| index.get(hash)).map(Location::len).sum()
    }

    pub(crate) fn sweep(&self) -> Sweep<'_> {
        let only = self.sweeping.lock();
        // What comes from here on is kept, and so is what came since the oldest who needs it began.
        let mut index = self.index.write();
        index.values_mut().for_each(|location| location.kept = false);
        let fresh_since = self.fresh.lock().first().copied().unwrap_or(u32::MAX);
        drop(index);
        Sweep { pieces: self, fresh_since, _only: only }
    }

    /// Says on disk, too, that what begins with this record and has `stored_len` bytes behind its header is gone.
    pub(super) fn erase(&self, hash: &PieceHash, location: Location, stored_len: u32) {
        let Location { encoding, plain_len, offset, pack, .. } = location;
        let Some(file) = self.pack(pack) else { return };
        let header = Header { encoding, dropped: true, plain_len, stored_len, hash: *hash };
        match file.write_all_at(&header.encode(), offset) {
            Ok(()) => punch(&file, offset, stored_len),
            // The next scan finds the record again. It may be used again, if it is right.
            Err(error) => tracing::debug!(piece = %hash, %error, "a piece can't be marked as dropped"),
        }
    }

    /// All but the one that is appended to.
    pub(super) fn remove_empty_packs(&self) {
        let active = self.active.lock();
        let used: HashSet<u32> = self.index.read().values().map(|location| location.pack).collect();
        let mut packs = self.packs.write();
        let unused = packs.extract_if(|number, _| *number != active.number && !used.contains(number));
        for (number, _) in unused {
            let path = pack_path(&self.dir, number);
            if let Err(error) = fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "an empty pack can't be removed");
            }
        }
    }
}

impl Sweep<'_> {
    /// These stay.
    pub fn keep<'h>(&self, hashes: impl Iterator<Item = &'h PieceHash>) {
        let mut index = self.pieces.index.write();
        for hash in hashes {
            if let Some(location) = index.get_mut(hash) {
                location.kept = true;
            }
        }
    }

    /// All others go.
    pub fn end(self) -> Swept {
        let mut gone: Vec<_> = {
            let mut index = self.pieces.index.write();
            let unused = |location: &Location| !location.kept && location.since < self.fresh_since;
            index.extract_if(|_, location| unused(location)).collect()
        };
        let swept =
            Swept { pieces: gone.len() as u64, bytes: gone.iter().map(|(_, location)| location.len()).sum() };
        self.pieces.bytes.fetch_sub(swept.bytes, Ordering::Relaxed);
        self.pieces.evicted.fetch_add(swept.bytes, Ordering::Relaxed);
        gone.sort_unstable_by_key(|(_, location)| (location.pack, location.offset));
        // Neighbours become one hole: a hole has whole blocks only.
        for run in gone
            .chunk_by(|(_, one), (_, next)| one.pack == next.pack && one.offset + one.len() == next.offset)
        {
            let len: u64 = run.iter().map(|(_, location)| location.len()).sum();
            let (hash, first) = run[0];
            let stored_len = u32::try_from(len - HEADER_LEN as u64).expect("a pack is shorter than 4 GiB");
            self.pieces.erase(&hash, first, stored_len);
        }
        self.pieces.remove_empty_packs();
        swept
    }
}
