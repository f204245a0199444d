//! Whose turn it is to make a layer: that of the registry with the fewest turns, and of those of its layers that came at about
//! the same time the largest first, because with it begun last everybody would wait for it alone in the end.
//!
//! A turn is for the processors. A transfer so slow that it hardly needs them gives its turn to whoever waits for one.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use darter_types::{LayerSource, Registry};
use parking_lot::Mutex;
use tokio::sync::oneshot;

/// Who came within the same span of time came together: the layers of an image. A small layer waits no longer than that
/// for larger ones that came after it.
const TOGETHER: Duration = Duration::from_secs(2);

/// Slow transfers that go on without a turn. Each has some threads and a few megabytes; one more ends as soon as somebody
/// waits for its turn.
const ASIDE_MAX: usize = 8;

/// The span, the size, the order within.
type Place = (u64, Reverse<u64>, u64);

struct Waiting {
    registry: Option<Registry>,
    turn: oneshot::Sender<Turn>,
}

struct State {
    free: usize,
    aside: usize,
    /// Turns that each registry's layers have.
    held: HashMap<Option<Registry>, usize>,
    waiting: BTreeMap<Place, Waiting>,
    count: u64,
}

/// Hands out so many turns at the same time.
pub(super) struct Turns {
    start: Instant,
    state: Arc<Mutex<State>>,
}

/// Passed on when it is dropped.
pub(super) struct Turn {
    state: Arc<Mutex<State>>,
    registry: Option<Registry>,
    is_aside: bool,
}

impl Turns {
    pub(super) fn new(count: usize) -> Self {
        let (held, waiting) = (HashMap::new(), BTreeMap::new());
        let state = State { free: count, aside: 0, held, waiting, count: 0 };
        Self { start: Instant::now(), state: Arc::new(Mutex::new(state)) }
    }

    /// A turn for a layer that is to be read from this source first.
    pub(super) async fn wait(&self, source: Option<&LayerSource>) -> Turn {
        let registry = source.map(|source| source.repository.registry.clone());
        let size = source.map_or(0, |source| source.size);
        self.ask(registry, size).await.expect("a turn is passed on, never lost")
    }

    fn ask(&self, registry: Option<Registry>, size: u64) -> oneshot::Receiver<Turn> {
        let (sender, turn) = oneshot::channel();
        let mut state = self.state.lock();
        state.count += 1;
        let span = self.start.elapsed().as_millis() / TOGETHER.as_millis();
        let place = (span as u64, Reverse(size), state.count);
        state.waiting.insert(place, Waiting { registry, turn: sender });
        drop(state);
        hand_out(&self.state);
        turn
    }
}

/// Gives what is free to those who wait.
fn hand_out(shared: &Arc<Mutex<State>>) {
    loop {
        let next = shared.lock().next();
        let Some(Waiting { registry, turn }) = next else { return };
        // If nobody waits there any more the turn comes back, is dropped, and goes to another.
        let _ = turn.send(Turn { state: shared.clone(), registry, is_aside: false });
    }
}

impl State {
    fn next(&mut self) -> Option<Waiting> {
        if self.free == 0 {
            return None;
        }
        // Who has gone takes no turn.
        self.waiting.retain(|_, waiting| !waiting.turn.is_closed());
        let held = |waiting: &Waiting| self.held.get(&waiting.registry).copied().unwrap_or(0);
        let place = *self.waiting.iter().min_by_key(|(place, waiting)| (held(waiting), **place))?.0;
        let waiting = self.waiting.remove(&place)?;
        self.free -= 1;
        *self.held.entry(waiting.registry.clone()).or_default() += 1;
        Some(waiting)
    }

    fn give_back(&mut self, registry: &Option<Registry>) {
        self.free += 1;
        if let Some(held) = self.held.get_mut(registry) {
            *held -= 1;
            if *held == 0 {
                self.held.remove(registry);
            }
        }
    }
}

impl Turn {
    /// What the turn is for is slow: if somebody waits for a turn, it goes on without one. False if too many do so already.
    pub(super) fn step_aside(&mut self) -> bool {
        let mut state = self.state.lock();
        if self.is_aside || state.waiting.values().all(|waiting| waiting.turn.is_closed()) {
            return true;
        }
        if state.aside == ASIDE_MAX {
            return false;
        }
        state.aside += 1;
        state.give_back(&self.registry);
        drop(state);
        self.is_aside = true;
        hand_out(&self.state);
        true
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.is_aside {
            self.state.lock().aside -= 1;
        } else {
            self.state.lock().give_back(&self.registry);
            hand_out(&self.state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry(name: &str) -> Option<Registry> {
        Some(Registry::new(darter_types::Scheme::Https, &format!("{name}.example")).unwrap())
    }

    #[tokio::test]
    async fn the_largest_of_those_that_wait_is_next() {
        let turns = Turns::new(1);
        let first = turns.wait(None).await;
        let (mut small, mut large) = (turns.ask(None, 10), turns.ask(None, 20));
        drop(first);
        let turn = large.try_recv().unwrap();
        assert!(small.try_recv().is_err());
        drop(turn);
        small.try_recv().unwrap();
    }

    #[tokio::test]
    async fn the_registry_with_the_fewest_turns_is_next() {
        let turns = Turns::new(2);
        let mut asked: Vec<_> = (0..4).map(|_| turns.ask(registry("busy"), 20)).collect();
        let mut other = turns.ask(registry("other"), 10);
        drop(asked[0].try_recv().unwrap());
        let _turn = other.try_recv().unwrap();
        assert!(asked[2].try_recv().is_err());
    }

    #[tokio::test]
    async fn slow_ones_give_their_turns_to_those_who_wait_until_there_are_too_many() {
        let turns = Turns::new(1);
        let mut slow = turns.wait(None).await;
        assert!(slow.step_aside() && !slow.is_aside, "nobody waits");
        let mut aside = Vec::new();
        for _ in 0..ASIDE_MAX {
            let mut next = turns.ask(None, 1);
            assert!(slow.step_aside());
            aside.push(std::mem::replace(&mut slow, next.try_recv().unwrap()));
        }
        let mut next = turns.ask(None, 1);
        assert!(!slow.step_aside() && next.try_recv().is_err());
        drop(aside.pop());
        assert!(slow.step_aside());
        next.try_recv().unwrap();
    }

    #[tokio::test]
    async fn who_has_gone_takes_no_turn() {
        let turns = Turns::new(2);
        let (first, _second) = (turns.wait(None).await, turns.wait(None).await);
        drop(turns.ask(None, 30));
        let mut waiting = turns.ask(None, 10);
        drop(first);
        drop(waiting.try_recv().unwrap());
        let state = turns.state.lock();
        assert_eq!((state.free, state.held.values().sum()), (1, 1));
    }

    #[tokio::test]
    async fn a_turn_that_was_given_to_somebody_who_has_gone_comes_back() {
        let turns = Turns::new(1);
        drop(turns.ask(None, 1));
        let unread = turns.ask(None, 2);
        drop(unread);
        assert_eq!(turns.state.lock().free, 1);
        turns.wait(None).await;
    }
}
