//! Whose turn it is to make a layer: of those that came at about the same time the largest first, because with it begun last
//! everybody would wait for it alone in the end.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// Who came within the same span of time came together: the layers of an image. A small layer waits no longer than that
/// for larger ones that came after it.
const TOGETHER: Duration = Duration::from_secs(2);

/// The span, the size, the order within.
type Place = (u64, Reverse<u64>, u64);

struct State {
    free: usize,
    waiting: BTreeMap<Place, oneshot::Sender<Turn>>,
    count: u64,
}

/// Hands out so many turns at the same time.
pub(super) struct Turns {
    start: Instant,
    state: Arc<Mutex<State>>,
}

/// Passed on when it is dropped.
pub(super) struct Turn(Arc<Mutex<State>>);

impl Turns {
    pub(super) fn new(count: usize) -> Self {
        let state = State { free: count, waiting: BTreeMap::new(), count: 0 };
        Self { start: Instant::now(), state: Arc::new(Mutex::new(state)) }
    }

    /// A turn for a layer of `size` bytes, compressed; 0 if that is not known.
    pub(super) async fn wait(&self, size: u64) -> Turn {
        self.ask(size).await.expect("a turn is passed on, never lost")
    }

    fn ask(&self, size: u64) -> oneshot::Receiver<Turn> {
        let (sender, turn) = oneshot::channel();
        let mut state = self.state.lock();
        state.count += 1;
        let span = self.start.elapsed().as_millis() / TOGETHER.as_millis();
        let place = (span as u64, Reverse(size), state.count);
        state.waiting.insert(place, sender);
        let is_free = state.free > 0;
        state.free -= usize::from(is_free);
        drop(state);
        if is_free {
            drop(Turn(self.state.clone()));
        }
        turn
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let first = {
            let mut state = self.0.lock();
            let first = state.waiting.pop_first();
            state.free += usize::from(first.is_none());
            first
        };
        if let Some((_, waiting)) = first {
            // If nobody waits there any more the turn comes back, is dropped, and goes to the next.
            let _ = waiting.send(Turn(self.0.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_largest_of_those_that_wait_is_next() {
        let turns = Turns::new(1);
        let first = turns.wait(1).await;
        let (mut small, mut large) = (turns.ask(10), turns.ask(20));
        drop(first);
        let turn = large.try_recv().unwrap();
        assert!(small.try_recv().is_err());
        drop(turn);
        small.try_recv().unwrap();
    }

    #[tokio::test]
    async fn who_has_gone_takes_no_turn() {
        let turns = Turns::new(2);
        let (first, _second) = (turns.wait(1).await, turns.wait(1).await);
        drop(turns.ask(30));
        let mut waiting = turns.ask(10);
        drop(first);
        drop(waiting.try_recv().unwrap());
        assert_eq!(turns.state.lock().free, 1);
    }

    #[tokio::test]
    async fn a_turn_that_was_given_to_somebody_who_has_gone_comes_back() {
        let turns = Turns::new(1);
        drop(turns.ask(1));
        let unread = turns.ask(2);
        drop(unread);
        assert_eq!(turns.state.lock().free, 1);
        turns.wait(3).await;
    }
}
