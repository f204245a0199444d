//! Noting what a start reads of a layer.
//!
//! Only the first start after a layer has come to this peer counts: then no page of it can be in the kernel's memory, so
//! every piece that a container needs is read here. Who reads nearly all of a large layer, as a scanner or a backup does, is no
//! start: its order would put what starts need behind what they don't.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::order::{Order, PIECES_MAX};
use crate::bits::Bits;

/// A start is over when it has read no piece for the first time for so long,
const CALM: Duration = Duration::from_secs(5);
/// or so long after the container's first read.
const START_MAX: Duration = Duration::from_secs(60);

/// Of a layer with more pieces than this (64 MiB, of which an order fetches a part only), at most
const LARGE: u32 = 256;
/// so much is read by a start, in percent of its pieces.
const OF_LARGE_MAX: u64 = 90;

#[derive(Default)]
pub(crate) struct Recorder(Mutex<Recording>);

#[derive(Default)]
struct Recording {
    is_on: bool,
    seen: Bits,
    seen_count: u32,
    /// Pieces, and how many milliseconds after the first read of the container's tree.
    reads: Vec<(u32, u32)>,
    last: Option<Instant>,
}

impl Recorder {
    /// From now on it is noted what is read of the layer, which has so many pieces.
    pub(crate) fn begin(&self, pieces: u32) {
        *self.0.lock() = Recording { is_on: true, seen: Bits::new(pieces), ..Recording::default() };
    }

    /// A container reads a piece; true for the first.
    pub(super) fn touched(&self, piece: u32, since_first: Duration) -> bool {
        let mut recording = self.0.lock();
        if !recording.is_on || since_first > START_MAX || recording.seen.get(piece) {
            return false;
        }
        recording.seen.set(piece);
        recording.seen_count += 1;
        recording.last = Some(Instant::now());
        if recording.reads.len() < PIECES_MAX {
            recording.reads.push((piece, since_first.as_millis() as u32));
        }
        recording.seen_count == 1
    }

    /// How long it may still go on; `None` when the start is over.
    pub(super) fn time_left(&self) -> Option<Duration> {
        let recording = self.0.lock();
        let quiet = recording.last.map_or(CALM, |last| last.elapsed());
        CALM.checked_sub(quiet).filter(|left| recording.is_on && !left.is_zero())
    }

    /// Ends it; what was noted, unless it was no start.
    pub(super) fn end(&self) -> Option<Order> {
        let recording = std::mem::take(&mut *self.0.lock());
        (!recording.is_scan()).then(|| Order::of_start(recording.reads))
    }
}

impl Recording {
    fn is_scan(&self) -> bool {
        let pieces = self.seen.len();
        pieces > LARGE && u64::from(self.seen_count) * 100 > u64::from(pieces) * OF_LARGE_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_piece_is_noted_once_and_only_while_it_is_on() {
        let recorder = Recorder::default();
        assert!(!recorder.touched(1, Duration::ZERO), "the layer was here before");
        recorder.begin(10);
        assert!(recorder.touched(3, Duration::from_millis(1)));
        assert!(!recorder.touched(1, Duration::from_millis(2)) && !recorder.touched(3, Duration::ZERO));
        assert!(!recorder.touched(5, START_MAX * 2), "the start is long over");
        assert!(recorder.time_left().is_some());
        let noted: Vec<_> =
            recorder.end().unwrap().reads().iter().map(|read| (read.piece, read.at_ms)).collect();
        assert_eq!(noted, [(3, 1), (1, 2)]);
        assert!(!recorder.touched(7, Duration::ZERO) && recorder.time_left().is_none());
    }

    #[test]
    fn who_reads_nearly_all_of_a_large_layer_is_no_start() {
        for (pieces, read, is_start) in
            [(LARGE, LARGE, true), (1000, 900, true), (1000, 901, false), (4000, 4000, false)]
        {
            let recorder = Recorder::default();
            recorder.begin(pieces);
            for piece in 0..read {
                recorder.touched(piece, Duration::ZERO);
            }
            assert_eq!(recorder.end().is_some(), is_start, "{read} of {pieces}");
        }
    }
}
