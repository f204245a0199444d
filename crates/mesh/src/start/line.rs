//! Decoding what a container will read next while it works on what it has.
//!
//! The line is what was fetched in the order of earlier starts. A container that reads a piece of it has those behind it
//! decoded, a few only: so they are in memory when it asks, and the memory stays small.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Weak};

use darter_types::{LayerTask, PieceIndex};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::layer::Open;

/// Pieces that are decoded behind the one that was read last: 2 MiB.
const AHEAD: u64 = 8;
/// Pieces remembered; with one more the oldest is forgotten.
const LINE_MAX: usize = 4096;
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
    fn follow(&self, task: LayerTask, piece: u32) -> Option<Range<u64>> {
        let position = *self.positions.get(&(task, piece))?;
        let end = (position + 1 + AHEAD).min(self.first + self.line.len() as u64);
        let from = self.next.max(position + 1);
        // Whoever starts anew, another container for example, is followed from where it is.
        let from = if from > end { position + 1 } else { from };
        (from < end).then_some(from..end)
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
        let mut pieces = self.pieces.lock();
        let Some(range) = pieces.follow(open.task, piece) else { return };
        let Ok(permit) = self.decoding.clone().try_acquire_owned() else { return };
        pieces.next = range.end;
        let behind = pieces.get(&range);
        drop(pieces);
        let shared = open.shared.clone();
        open.shared.tasks.spawn_until_stop("decode ahead", async move {
            let decode = move || behind.iter().for_each(|(open, piece)| open.decode(*piece));
            shared.work.run(decode).await;
            drop(permit);
        });
    }

    /// Whether the piece will be read so soon that it shall stay in memory when it comes.
    pub(super) fn is_near(&self, task: LayerTask, piece: u32) -> bool {
        let pieces = self.pieces.lock();
        let near = pieces.next..pieces.next + AHEAD;
        pieces.positions.get(&(task, piece)).is_some_and(|position| near.contains(position))
    }
}

impl Open {
    /// Puts a piece that is on the disk into memory.
    fn decode(&self, piece: u32) {
        let _ = self.read_local(PieceIndex(piece));
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
        let mut pieces = line(30);
        assert_eq!(pieces.follow(task(), 0), Some(1..9));
        pieces.next = 9;
        assert_eq!(pieces.follow(task(), 10), Some(9..10));
        pieces.next = 10;
        assert_eq!(pieces.follow(task(), 10), None);
        assert_eq!(pieces.follow(task(), 5), None, "it is not in the line");
        assert_eq!(pieces.follow(task(), 280), Some(29..30));
    }

    #[test]
    fn a_second_reader_is_followed_from_its_start() {
        let pieces = Pieces { next: 25, ..line(30) };
        assert_eq!(pieces.follow(task(), 0), Some(1..9));
    }
}
