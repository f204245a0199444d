//! Decoding what a container will read next while it works on what it has.
//!
//! The line is what was fetched in the order of earlier starts. When a container is made of it the first pieces are decoded, and
//! with each piece that it reads those behind it, a few only: so they are in memory when it asks, and the memory stays small.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use darter_types::{LayerTask, PieceIndex};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::layer::Open;
use crate::shared::Shared;

/// Pieces that are decoded behind the one that was read last: 2 MiB.
const AHEAD: u64 = 8;
/// Pieces remembered; with one more the oldest is forgotten.
const LINE_MAX: usize = 4096;
/// Without a read for so long, the next one may begin anew anywhere. Until then who comes back to a piece goes on from where he was.
const PAUSE: Duration = Duration::from_secs(1);
/// Threads that decode ahead; what finds none free is decoded when it is read.
const DECODING_MAX: usize = 2;

pub(super) struct Line {
    pieces: Mutex<Pieces>,
    decoding: Arc<Semaphore>,
}

impl Default for Line {
    fn default() -> Self {
        Self { pieces: Mutex::default(), decoding: Arc::new(Semaphore::new(DECODING_MAX)) }
    }
}

#[derive(Default)]
struct Pieces {
    line: VecDeque<(Weak<Open>, LayerTask, u32)>,
    /// Positions count from the first piece that ever was in the line.
    positions: HashMap<(LayerTask, u32), u64>,
    /// The position of the line's first piece.
    first: u64,
    /// The first position that nobody has seen to.
    next: u64,
    /// The position behind the piece that was read last.
    read: u64,
    read_at: Option<Instant>,
    /// Whether a container was ever made of what is in the line.
    is_read: bool,
}

impl Pieces {
    fn push(&mut self, open: &Arc<Open>, piece: u32) {
        if self.line.len() == LINE_MAX
            && let Some((_, task, piece)) = self.line.pop_front()
        {
            self.positions.remove(&(task, piece));
            self.first += 1;
        }
        self.positions.insert((open.task, piece), self.first + self.line.len() as u64);
        self.line.push_back((Arc::downgrade(open), open.task, piece));
    }

    /// What to decode now that this piece is read.
    fn follow(&mut self, task: LayerTask, piece: u32, now: Instant) -> Option<Range<u64>> {
        let read = self.positions.get(&(task, piece))? + 1;
        let goes_on = self.read_at.replace(now).is_some_and(|last| now.duration_since(last) < PAUSE);
        self.read = if goes_on { self.read.max(read) } else { read };
        self.is_read = true;
        self.due()
    }

    /// What to decode before the first of it is read.
    fn begin(&mut self) -> Option<Range<u64>> {
        self.is_read = true;
        self.read = self.read.max(self.next);
        self.due()
    }

    fn due(&self) -> Option<Range<u64>> {
        let end = (self.read + AHEAD).min(self.first + self.line.len() as u64);
        let from = self.next.max(self.read);
        // Whoever starts anew, another container for example, is followed from where it is.
        let from = if from > end { self.read } else { from };
        (from < end).then_some(from..end)
    }

    /// Whether it is among those that are decoded as soon as they are here.
    fn is_near(&self, task: LayerTask, piece: u32) -> bool {
        let near = self.read..self.read + AHEAD;
        self.is_read && self.positions.get(&(task, piece)).is_some_and(|position| near.contains(position))
    }

    fn get(&self, range: &Range<u64>) -> Vec<(Arc<Open>, u32)> {
        let at = |position: u64| self.line.get(usize::try_from(position.checked_sub(self.first)?).ok()?);
        range
            .clone()
            .filter_map(|position| at(position).and_then(|(open, _, piece)| Some((open.upgrade()?, *piece))))
            .collect()
    }
}

impl Line {
    /// The piece is fetched next.
    pub(super) fn push(&self, open: &Arc<Open>, piece: u32) {
        self.pieces.lock().push(open, piece);
    }

    /// A container reads this piece.
    pub(super) fn follow(&self, open: &Arc<Open>, piece: u32) {
        self.decode(&open.shared, |pieces| pieces.follow(open.task, piece, Instant::now()));
    }

    /// A container is made of what comes next in the line.
    pub(super) fn begin(&self, shared: &Arc<Shared>) {
        self.decode(shared, Pieces::begin);
    }

    fn decode(&self, shared: &Arc<Shared>, which: impl FnOnce(&mut Pieces) -> Option<Range<u64>>) {
        let mut pieces = self.pieces.lock();
        let Some(range) = which(&mut pieces) else { return };
        let Ok(permit) = self.decoding.clone().try_acquire_owned() else { return };
        pieces.next = range.end;
        let behind = pieces.get(&range);
        drop(pieces);
        let owner = shared.clone();
        shared.tasks.spawn_alone("decode ahead", async move {
            let decode =
                move || behind.iter().for_each(|(open, piece)| open.decode_ahead(PieceIndex(*piece)));
            owner.work.run(decode).await;
            drop(permit);
        });
    }

    /// Whether the piece will be read so soon that it shall stay in memory when it comes.
    pub(super) fn is_near(&self, task: LayerTask, piece: u32) -> bool {
        self.pieces.lock().is_near(task, piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use darter_types::{DiffId, Digest};

    fn task() -> LayerTask {
        LayerTask::current(DiffId(Digest::of(b"layer")))
    }

    fn line(count: u32) -> Pieces {
        let mut pieces = Pieces::default();
        for piece in 0..count {
            pieces.line.push_back((Weak::new(), task(), piece * 10));
            pieces.positions.insert((task(), piece * 10), u64::from(piece));
        }
        pieces
    }

    #[test]
    fn a_reader_has_the_next_pieces_decoded_and_no_piece_twice() {
        let (mut pieces, now) = (line(60), Instant::now());
        assert_eq!(pieces.follow(task(), 0, now), Some(1..1 + AHEAD));
        pieces.next = 1 + AHEAD;
        assert_eq!(pieces.follow(task(), 10, now), Some(1 + AHEAD..2 + AHEAD));
        pieces.next = 2 + AHEAD;
        assert_eq!(pieces.follow(task(), 10, now), None);
        assert_eq!(pieces.follow(task(), 0, now), None, "he comes back to it, and goes on");
        assert_eq!(pieces.follow(task(), 5, now), None, "it is not in the line");
        assert_eq!(pieces.follow(task(), 580, now), Some(59..60));
    }

    #[test]
    fn a_second_reader_is_followed_from_its_start() {
        let now = Instant::now();
        let mut pieces = Pieces { next: 45, read: 45, read_at: Some(now), ..line(60) };
        assert_eq!(pieces.follow(task(), 0, now + PAUSE), Some(1..1 + AHEAD));
    }

    #[test]
    fn a_container_that_is_made_has_the_first_pieces_decoded_and_those_that_come_late() {
        let mut pieces = line(60);
        assert!(!pieces.is_near(task(), 0), "nobody makes a container");
        assert_eq!(pieces.begin(), Some(0..AHEAD));
        pieces.next = AHEAD;
        assert!(pieces.is_near(task(), 0) && pieces.is_near(task(), 10 * (AHEAD as u32 - 1)));
        assert!(!pieces.is_near(task(), 10 * AHEAD as u32));
        pieces.follow(task(), 30, Instant::now());
        assert!(!pieces.is_near(task(), 30) && pieces.is_near(task(), 10 * AHEAD as u32));
    }
}
