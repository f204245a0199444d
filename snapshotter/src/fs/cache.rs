//! Decoded pieces in memory: several files share a piece, and the kernel reads a piece in several requests.

use std::collections::{BTreeMap, HashMap};
use std::ops::Deref;
use std::sync::Arc;

use bytes::Bytes;
use darter_types::PieceHash;
use parking_lot::Mutex;
use tokio::sync::OnceCell;

/// The plain bytes of one piece, or the place where all who want them wait for them.
#[derive(Default)]
pub(super) struct Cell {
    pub(super) bytes: OnceCell<Bytes>,
    /// Held while the piece is read from this machine's disk, so that it is decoded once.
    pub(super) decoding: Mutex<()>,
}

struct Slot {
    cell: Arc<Cell>,
    users: usize,
    /// When the last user let it go.
    left: u64,
}

#[derive(Default)]
struct Slots {
    by_hash: HashMap<PieceHash, Slot>,
    /// Those without users, by when they were let go: whatever is in use, the next to go is found at once.
    unused: BTreeMap<u64, PieceHash>,
    clock: u64,
}

/// Keeps the pieces that were used last. Past the limit the one that was not used for the longest time goes, but never
/// one that somebody uses or waits for: so the limit can be passed by what is being read right now, and by no more.
pub(super) struct PieceCache {
    slots: Mutex<Slots>,
    limit: usize,
}

/// A cell in use.
pub(super) struct Held {
    cache: Arc<PieceCache>,
    hash: PieceHash,
    cell: Arc<Cell>,
}

impl Deref for Held {
    type Target = Cell;

    fn deref(&self) -> &Cell {
        &self.cell
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.cache.slots.lock().leave(self.hash, self.cache.limit);
    }
}

impl PieceCache {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { slots: Mutex::default(), limit })
    }

    /// The cell of that piece, made empty if there is none.
    pub(super) fn cell(self: &Arc<Self>, hash: PieceHash) -> Held {
        let cell = self.slots.lock().enter(hash, self.limit);
        Held { cache: self.clone(), hash, cell }
    }
}

impl Slots {
    fn enter(&mut self, hash: PieceHash, limit: usize) -> Arc<Cell> {
        let fresh = || Slot { cell: Arc::default(), users: 0, left: 0 };
        let slot = self.by_hash.entry(hash).or_insert_with(fresh);
        slot.users += 1;
        let (cell, left) = (slot.cell.clone(), slot.left);
        self.unused.remove(&left);
        self.shrink(limit);
        cell
    }

    fn leave(&mut self, hash: PieceHash, limit: usize) {
        self.clock += 1;
        let slot = self.by_hash.get_mut(&hash).expect("what is in use stays");
        slot.users -= 1;
        if slot.users == 0 {
            slot.left = self.clock;
            self.unused.insert(self.clock, hash);
            self.shrink(limit);
        }
    }

    fn shrink(&mut self, limit: usize) {
        while self.by_hash.len() > limit
            && let Some((_, hash)) = self.unused.pop_first()
        {
            self.by_hash.remove(&hash);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(n: u8) -> PieceHash {
        PieceHash::from_bytes([n; 32])
    }

    #[test]
    fn least_recently_used_piece_goes_first() {
        let cache = PieceCache::new(2);
        for n in [1, 2] {
            cache.cell(hash(n)).bytes.set(Bytes::from_static(b"x")).unwrap();
        }
        cache.cell(hash(1));
        cache.cell(hash(3));
        assert!(cache.cell(hash(1)).bytes.initialized());
        assert!(!cache.cell(hash(2)).bytes.initialized());
    }

    #[test]
    fn a_piece_that_is_waited_for_stays() {
        let cache = PieceCache::new(1);
        let waiting = cache.cell(hash(1));
        for n in 2..10 {
            cache.cell(hash(n));
        }
        assert!(Arc::ptr_eq(&waiting.cell, &cache.cell(hash(1)).cell));
    }

    #[test]
    fn after_a_burst_no_more_is_kept_than_before() {
        let cache = PieceCache::new(3);
        let mut burst: Vec<_> = (0..100).map(|n| cache.cell(hash(n))).collect();
        let again = cache.cell(hash(7));
        assert_eq!(cache.slots.lock().by_hash.len(), 100);
        burst.truncate(10);
        assert_eq!(cache.slots.lock().by_hash.len(), 10);
        drop(burst);
        assert_eq!(cache.slots.lock().by_hash.len(), 3);
        assert!(Arc::ptr_eq(&again.cell, &cache.cell(hash(7)).cell), "somebody still uses it");
    }
}
