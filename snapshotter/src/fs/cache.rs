//! Decoded pieces in memory: several files share a piece, and the kernel reads a piece in several requests.

use std::collections::HashMap;
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
    used: u64,
}

#[derive(Default)]
struct Slots {
    by_hash: HashMap<PieceHash, Slot>,
    clock: u64,
}

/// Keeps the pieces that were used last. Past the limit the one that was not used for the longest time goes, but never
/// one that somebody waits for: so the limit can be passed by what is being read right now, and by no more.
pub(super) struct PieceCache {
    slots: Mutex<Slots>,
    limit: usize,
}

impl PieceCache {
    pub(super) fn new(limit: usize) -> Self {
        Self { slots: Mutex::default(), limit }
    }

    /// The cell of that piece, made empty if there is none.
    pub(super) fn cell(&self, hash: PieceHash) -> Arc<Cell> {
        let mut slots = self.slots.lock();
        slots.clock += 1;
        let used = slots.clock;
        let slot = slots.by_hash.entry(hash).or_insert_with(|| Slot { cell: Arc::default(), used });
        slot.used = used;
        let cell = slot.cell.clone();
        if slots.by_hash.len() > self.limit {
            slots.evict();
        }
        cell
    }
}

impl Slots {
    fn evict(&mut self) {
        let unused = self.by_hash.iter().filter(|(_, slot)| Arc::strong_count(&slot.cell) == 1);
        let oldest = unused.min_by_key(|(_, slot)| slot.used).map(|(hash, _)| *hash);
        if let Some(hash) = oldest {
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
        assert!(Arc::ptr_eq(&waiting, &cache.cell(hash(1))));
    }
}
