//! Pieces that were decoded a moment ago, or ahead: a container reads a file in runs shorter than a piece, and files that share one.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use darter_types::PieceHash;
use parking_lot::{Condvar, Mutex};

/// At most so many bytes; what was used longest ago goes first.
pub(crate) struct PieceCache {
    bytes_max: usize,
    inner: Mutex<Inner>,
    /// What is being decoded.
    decoding: Mutex<HashSet<PieceHash>>,
    decoded: Condvar,
}

#[derive(Default)]
struct Inner {
    pieces: HashMap<PieceHash, (Bytes, u64)>,
    bytes: usize,
    clock: u64,
}

/// Who has it decodes the piece; others who want it wait until it is dropped.
pub(crate) struct Turn<'a> {
    cache: &'a PieceCache,
    hash: PieceHash,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.cache.decoding.lock().remove(&self.hash);
        self.cache.decoded.notify_all();
    }
}

impl PieceCache {
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { bytes_max, inner: Mutex::default(), decoding: Mutex::default(), decoded: Condvar::new() }
    }

    /// Blocks while another thread decodes the piece.
    pub(crate) fn turn(&self, hash: PieceHash) -> Turn<'_> {
        let mut decoding = self.decoding.lock();
        while !decoding.insert(hash) {
            self.decoded.wait(&mut decoding);
        }
        Turn { cache: self, hash }
    }

    pub(crate) fn get(&self, hash: &PieceHash) -> Option<Bytes> {
        let mut inner = self.inner.lock();
        inner.clock += 1;
        let clock = inner.clock;
        let (bytes, used) = inner.pieces.get_mut(hash)?;
        *used = clock;
        Some(bytes.clone())
    }

    pub(crate) fn put(&self, hash: PieceHash, bytes: Bytes) {
        let mut inner = self.inner.lock();
        inner.clock += 1;
        let clock = inner.clock;
        inner.bytes += bytes.len();
        if let Some((old, _)) = inner.pieces.insert(hash, (bytes, clock)) {
            inner.bytes -= old.len();
        }
        // There are some dozen pieces at most: to look at all of them is quicker than it sounds.
        while inner.bytes > self.bytes_max
            && let Some(oldest) =
                inner.pieces.iter().min_by_key(|(_, (_, used))| *used).map(|(hash, _)| *hash)
        {
            let (gone, _) = inner.pieces.remove(&oldest).expect("it was found a moment ago");
            inner.bytes -= gone.len();
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
    fn what_was_used_longest_ago_goes_first() {
        let cache = PieceCache::new(10);
        cache.put(hash(1), Bytes::from_static(b"1111"));
        cache.put(hash(2), Bytes::from_static(b"2222"));
        assert!(cache.get(&hash(1)).is_some());
        cache.put(hash(3), Bytes::from_static(b"3333"));
        assert!(cache.get(&hash(2)).is_none());
        assert!(cache.get(&hash(1)).is_some() && cache.get(&hash(3)).is_some());
    }

    #[test]
    fn piece_larger_than_the_cache_is_not_kept() {
        let cache = PieceCache::new(3);
        cache.put(hash(1), Bytes::from_static(b"1111"));
        assert!(cache.get(&hash(1)).is_none());
    }

    #[test]
    fn who_wants_what_another_decodes_waits_for_it() {
        let cache = PieceCache::new(10);
        let turn = cache.turn(hash(1));
        drop(cache.turn(hash(2)));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| {
                let _turn = cache.turn(hash(1));
                cache.get(&hash(1))
            });
            cache.put(hash(1), Bytes::from_static(b"11"));
            drop(turn);
            assert_eq!(waits.join().unwrap().unwrap(), "11");
        });
    }
}
