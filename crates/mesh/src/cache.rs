//! Pieces that were decoded a moment ago, or ahead: a container reads a file in runs shorter than a piece, and files that share one.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use bytes::Bytes;
use darter_types::PieceHash;
use parking_lot::{Condvar, Mutex};

/// At most so many bytes. What was read goes first, and of that, what was read longest ago; what was decoded ahead stays for its
/// reader if it can.
pub(crate) struct PieceCache {
    bytes_max: usize,
    inner: Mutex<Inner>,
    /// What is being decoded.
    decoding: Mutex<HashSet<PieceHash>>,
    decoded: Condvar,
}

#[derive(Default)]
struct Inner {
    pieces: HashMap<PieceHash, Kept>,
    bytes: usize,
    clock: u64,
}

struct Kept {
    bytes: Bytes,
    /// Decoded ahead, and no reader had it yet.
    awaits_reader: bool,
    used: u64,
}

/// How long a piece is waited for that another thread decodes, which takes a fraction of it: after that the processor has left
/// that thread for something else, and the piece is decoded twice.
const TURN_MAX: Duration = Duration::from_millis(1);

/// Who has it decodes the piece; others who want it wait a moment until it is dropped.
pub(crate) struct Turn<'a> {
    cache: &'a PieceCache,
    hash: PieceHash,
    is_first: bool,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if self.is_first {
            self.cache.decoding.lock().remove(&self.hash);
            self.cache.decoded.notify_all();
        }
    }
}

impl PieceCache {
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { bytes_max, inner: Mutex::default(), decoding: Mutex::default(), decoded: Condvar::new() }
    }

    /// Blocks while another thread decodes the piece, unless that takes too long.
    pub(crate) fn turn(&self, hash: PieceHash) -> Turn<'_> {
        let (mut decoding, deadline) = (self.decoding.lock(), Instant::now() + TURN_MAX);
        let mut is_first = decoding.insert(hash);
        while !is_first && !self.decoded.wait_until(&mut decoding, deadline).timed_out() {
            is_first = decoding.insert(hash);
        }
        Turn { cache: self, hash, is_first }
    }

    /// For a reader.
    pub(crate) fn get(&self, hash: &PieceHash) -> Option<Bytes> {
        let mut inner = self.inner.lock();
        let used = inner.tick();
        let kept = inner.pieces.get_mut(hash)?;
        (kept.awaits_reader, kept.used) = (false, used);
        Some(kept.bytes.clone())
    }

    /// For whoever decodes ahead, who is no reader.
    pub(crate) fn has(&self, hash: &PieceHash) -> bool {
        self.inner.lock().pieces.contains_key(hash)
    }

    /// Keeps what a reader has had.
    pub(crate) fn put(&self, hash: PieceHash, bytes: Bytes) {
        self.inner.lock().put(hash, bytes, false, self.bytes_max);
    }

    /// Keeps what will be read soon.
    pub(crate) fn put_ahead(&self, hash: PieceHash, bytes: Bytes) {
        self.inner.lock().put(hash, bytes, true, self.bytes_max);
    }
}

impl Inner {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn put(&mut self, hash: PieceHash, bytes: Bytes, awaits_reader: bool, bytes_max: usize) {
        let used = self.tick();
        self.bytes += bytes.len();
        if let Some(old) = self.pieces.insert(hash, Kept { bytes, awaits_reader, used }) {
            self.bytes -= old.bytes.len();
        }
        // There are some dozen pieces at most: to look at all of them is quicker than it sounds.
        while self.bytes > bytes_max
            && let Some((hash, _)) =
                self.pieces.iter().min_by_key(|(_, kept)| (kept.awaits_reader, kept.used))
        {
            let gone = self.pieces.remove(&hash.clone()).expect("it was found a moment ago");
            self.bytes -= gone.bytes.len();
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
    fn what_was_decoded_ahead_stays_until_it_was_read() {
        let cache = PieceCache::new(10);
        cache.put_ahead(hash(1), Bytes::from_static(b"1111"));
        cache.put_ahead(hash(2), Bytes::from_static(b"2222"));
        cache.put(hash(3), Bytes::from_static(b"3333"));
        assert!(cache.has(&hash(1)) && cache.has(&hash(2)) && !cache.has(&hash(3)));
        cache.get(&hash(2));
        cache.put_ahead(hash(4), Bytes::from_static(b"4444"));
        assert!(cache.has(&hash(1)) && !cache.has(&hash(2)) && cache.has(&hash(4)));
        cache.put_ahead(hash(5), Bytes::from_static(b"5555"));
        assert!(!cache.has(&hash(1)), "nobody came for it, and what is newer is more likely to be read");
    }

    #[test]
    fn piece_larger_than_the_cache_is_not_kept() {
        let cache = PieceCache::new(3);
        cache.put(hash(1), Bytes::from_static(b"1111"));
        assert!(cache.get(&hash(1)).is_none());
    }

    #[test]
    fn who_decodes_for_too_long_holds_up_nobody() {
        let cache = PieceCache::new(10);
        let slow = cache.turn(hash(1));
        drop(cache.turn(hash(1)));
        assert!(!cache.turn(hash(1)).is_first);
        drop(slow);
        assert!(cache.turn(hash(1)).is_first);
    }

    #[test]
    fn who_wants_what_another_decodes_waits_for_it() {
        let cache = PieceCache::new(10);
        let turn = cache.turn(hash(1));
        drop(cache.turn(hash(2)));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| {
                while !cache.turn(hash(1)).is_first {}
                cache.get(&hash(1))
            });
            cache.put(hash(1), Bytes::from_static(b"11"));
            drop(turn);
            assert_eq!(waits.join().unwrap().unwrap(), "11");
        });
    }
}
