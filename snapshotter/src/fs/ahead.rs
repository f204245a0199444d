//! Read-ahead: which pieces will be read next, judged by those that were read.
//!
//! A start of a container touches a little of many files, so a first touch asks for one piece more at most. Whoever reads
//! on in order gets 4, then 16 pieces ahead within the file; and if he goes on from file to file in the order of the
//! layer, as `tar` does, across files.

use std::collections::VecDeque;
use std::ops::Range;

/// Readers that are followed at a time in one layer; the one that was heard of last for the longest time is forgotten.
const STREAMS_MAX: usize = 8;
/// The most pieces that are asked for ahead.
const WINDOW_MAX: u32 = 16;
/// A reader who has gone on for so many pieces in order is expected to go on past the end of the file.
const STEPS_ACROSS_FILES: u32 = 4;

/// A read, as pieces of its layer.
#[derive(Debug, Clone)]
pub(super) struct Touched {
    pub(super) pieces: Range<u32>,
    /// It began at the file's first byte.
    pub(super) from_start: bool,
    /// The piece after the file's last one.
    pub(super) file_end: u32,
    pub(super) layer_end: u32,
    /// Some piece was not on this machine.
    pub(super) missed: bool,
}

struct Stream {
    /// The piece after the last one that was read.
    next: u32,
    /// Pieces that were read in order after the first.
    steps: u32,
    /// The first piece that was not asked for yet.
    wanted: u32,
    /// It has met a missing piece, so what follows is probably missing too.
    cold: bool,
}

impl Stream {
    /// Requests of one reader may overtake each other a little.
    fn continues_with(&self, pieces: &Range<u32>) -> bool {
        pieces.start <= self.next && pieces.start + 2 >= self.next
    }

    fn advance(&mut self, touched: &Touched) {
        if touched.pieces.end > self.next {
            self.steps = self.steps.saturating_add(touched.pieces.end - self.next);
            self.next = touched.pieces.end;
        }
        self.cold |= touched.missed;
    }

    fn window(&self, touched: &Touched) -> u32 {
        let across = touched.file_end <= self.next;
        match self.steps {
            0 => u32::from(touched.from_start),
            1..STEPS_ACROSS_FILES if across => 0,
            1 => 4,
            STEPS_ACROSS_FILES..8 if across => 4,
            _ => WINDOW_MAX,
        }
    }

    /// What to ask for now. Asking again waits until half of the window is used up, so that it is done seldom.
    fn want(&mut self, touched: &Touched) -> Option<Range<u32>> {
        let window = self.window(touched);
        let limit = if self.steps >= STEPS_ACROSS_FILES { touched.layer_end } else { touched.file_end };
        let (from, to) = (self.wanted.max(self.next), (self.next + window).min(limit));
        if !self.cold || from >= to || (!touched.missed && to - from < window.div_ceil(2)) {
            return None;
        }
        self.wanted = to;
        Some(from..to)
    }
}

/// The readers of one layer.
#[derive(Default)]
pub(super) struct Ahead {
    /// The one that was heard of last comes first.
    streams: VecDeque<Stream>,
}

impl Ahead {
    /// Takes note of a read, and says which pieces to fetch ahead.
    pub(super) fn touched(&mut self, touched: &Touched) -> Option<Range<u32>> {
        let known = self.streams.iter().position(|stream| stream.continues_with(&touched.pieces));
        let mut stream = match known.and_then(|position| self.streams.remove(position)) {
            Some(mut stream) => {
                stream.advance(touched);
                stream
            }
            None => Stream { next: touched.pieces.end, steps: 0, wanted: 0, cold: touched.missed },
        };
        let want = stream.want(touched);
        self.streams.truncate(STREAMS_MAX - 1);
        self.streams.push_front(stream);
        want
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pieces: Range<u32>, file: Range<u32>, missed: bool) -> Touched {
        let from_start = pieces.start == file.start;
        Touched { pieces, from_start, file_end: file.end, layer_end: 1000, missed }
    }

    #[test]
    fn first_touch_asks_for_one_piece_of_the_file() {
        assert_eq!(Ahead::default().touched(&read(5..6, 5..40, true)), Some(6..7));
        assert_eq!(Ahead::default().touched(&read(5..6, 5..6, true)), None, "nothing of the next file");
        assert_eq!(Ahead::default().touched(&read(9..10, 5..40, true)), None, "nothing from the middle");
    }

    #[test]
    fn reading_on_in_order_opens_the_window() {
        let mut ahead = Ahead::default();
        ahead.touched(&read(0..1, 0..100, true));
        assert_eq!(ahead.touched(&read(1..2, 0..100, true)), Some(2..6));
        assert_eq!(ahead.touched(&read(2..3, 0..100, false)), Some(6..19));
        assert_eq!(ahead.touched(&read(3..4, 0..100, false)), None, "the window is still nearly full");
    }

    #[test]
    fn small_files_in_order_are_followed_across_files() {
        let mut ahead = Ahead::default();
        for piece in 0..4 {
            assert_eq!(ahead.touched(&read(piece..piece + 1, piece..piece + 1, true)), None);
        }
        assert_eq!(ahead.touched(&read(4..5, 4..5, true)), Some(5..9));
    }

    #[test]
    fn what_is_on_this_machine_is_not_asked_for() {
        let mut ahead = Ahead::default();
        for piece in 0..50 {
            assert_eq!(ahead.touched(&read(piece..piece + 1, 0..100, false)), None);
        }
    }

    #[test]
    fn random_reads_stay_first_touches() {
        let mut ahead = Ahead::default();
        for piece in [50, 3, 80, 20, 60, 31, 7, 90, 44, 12] {
            assert_eq!(ahead.touched(&read(piece..piece + 1, 0..100, true)), None);
        }
        assert!(ahead.streams.len() <= STREAMS_MAX);
    }

    #[test]
    fn nothing_past_the_layer_is_asked_for() {
        let mut ahead = Ahead::default();
        let last = |piece| Touched { layer_end: 12, ..read(piece..piece + 1, 0..12, true) };
        let wanted: Vec<_> = (0..12).filter_map(|piece| ahead.touched(&last(piece))).collect();
        assert_eq!(wanted.last().map(|range| range.end), Some(12));
    }
}
