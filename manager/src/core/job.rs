//! One part of a preheat order and what becomes of it: which seed has it, when it goes to another, when it is over.

use std::collections::BTreeSet;

use darter_identity::attend::{PreheatLayer, PreheatUpdate};
use darter_types::NodeName;

use super::seeds;

/// Seeds that are given one order, however often they leave and come back: an order that kills seeds must not go round for
/// ever.
const ATTEMPTS_MAX: u32 = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Waits for a seed.
    Pending,
    Running,
    Succeeded,
    Failed,
    Cancelled,
}

impl State {
    pub(crate) const ALL: [State; 5] =
        [State::Pending, State::Running, State::Succeeded, State::Failed, State::Cancelled];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            State::Pending => "pending",
            State::Running => "running",
            State::Succeeded => "succeeded",
            State::Failed => "failed",
            State::Cancelled => "cancelled",
        }
    }

    pub(crate) fn is_over(self) -> bool {
        matches!(self, State::Succeeded | State::Failed | State::Cancelled)
    }
}

/// One image at one seed: the smallest thing that is ordered. The database has the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) image: String,
    /// The seed that is to have it; `None`: one that the manager chooses, and another when that can't.
    pub(crate) pinned: Option<NodeName>,
    pub(crate) state: State,
    /// The seed that has it or had it last.
    pub(crate) seed: Option<NodeName>,
    pub(crate) error: Option<String>,
    pub(crate) layers: Vec<PreheatLayer>,
}

impl Part {
    pub(crate) fn new(image: String, pinned: Option<NodeName>) -> Self {
        Self { image, pinned, state: State::Pending, seed: None, error: None, layers: Vec::new() }
    }
}

/// One stay of a seed: a seed that leaves and comes back does not remember its orders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seat {
    pub(crate) node: NodeName,
    pub(crate) visit: u64,
}

/// A part that is not over yet, or just became so.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) part: Part,
    seat: Option<Seat>,
    /// Seeds that said that they can't.
    tried: BTreeSet<NodeName>,
    attempts: u32,
}

impl Job {
    pub(crate) fn new(part: Part) -> Self {
        Self { part, seat: None, tried: BTreeSet::new(), attempts: 0 }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.part.state.is_over()
    }

    /// Where it is now.
    pub(crate) fn seat(&self) -> Option<&Seat> {
        self.seat.as_ref()
    }

    fn may_be_at(&self, node: &NodeName) -> bool {
        self.part.pinned.as_ref().is_none_or(|pinned| pinned == node)
    }

    /// Takes it from a seed that left, and chooses the seed to give it to now, if there is anything to give and anybody
    /// with room for it.
    pub(crate) fn place(&mut self, attending: &[Seat], has_room: impl Fn(&Seat) -> bool) -> Option<Seat> {
        if self.is_over() || self.seat.as_ref().is_some_and(|seat| attending.contains(seat)) {
            return None;
        }
        self.seat = None;
        self.part.state = State::Pending;
        let fit = attending.iter().filter(|seat| self.may_be_at(&seat.node) && has_room(seat));
        let chosen = seeds::choose(&self.part.image, fit.map(|seat| &seat.node), &self.tried)?;
        if self.attempts == ATTEMPTS_MAX {
            self.end(State::Failed, Some(format!("given up: {ATTEMPTS_MAX} seeds left while they had it")));
            return None;
        }
        self.attempts += 1;
        let seat = attending.iter().find(|seat| seat.node == *chosen).cloned();
        self.part.state = State::Running;
        self.part.seed = Some(chosen.clone());
        self.part.layers.clear();
        self.seat.clone_from(&seat);
        seat
    }

    /// The seed at `from` says how far it is. `false`: the part is not at that seed (any more).
    pub(crate) fn update(&mut self, from: &Seat, update: PreheatUpdate, attending: &[Seat]) -> bool {
        if self.is_over() || self.seat.as_ref() != Some(from) {
            return false;
        }
        self.part.layers = update.layers;
        let layer =
            self.part.layers.iter().find_map(|layer| {
                layer.error.as_ref().map(|error| format!("layer {}: {error}", layer.diff_id))
            });
        match update.error.or(layer.filter(|_| update.done)) {
            Some(error) => self.failed_at(from, error, attending),
            None if update.done => self.end(State::Succeeded, None),
            None => {}
        }
        true
    }

    /// The seed can't: another one that attends may; when there is none left, the part failed with its words.
    pub(crate) fn failed_at(&mut self, seat: &Seat, error: String, attending: &[Seat]) {
        self.tried.insert(seat.node.clone());
        self.seat = None;
        let mut others = attending.iter().filter(|other| self.may_be_at(&other.node));
        if others.all(|other| self.tried.contains(&other.node)) {
            self.end(State::Failed, Some(error));
        } else {
            self.part.state = State::Pending;
            self.part.error = Some(error);
        }
    }

    /// Ends it with `state`, unless it is over; the seed that has it is to be told.
    pub(crate) fn stop(&mut self, state: State, error: &str) -> Option<Seat> {
        let seat = self.seat.take();
        if !self.is_over() {
            self.end(state, Some(error.to_owned()));
        }
        seat
    }

    fn end(&mut self, state: State, error: Option<String>) {
        self.seat = None;
        self.part.state = state;
        self.part.error = error;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> Job {
        Job::new(Part::new("r.example/a:1".to_owned(), None))
    }

    fn anybody(_: &Seat) -> bool {
        true
    }

    fn seats(count: u64) -> Vec<Seat> {
        (0..count).map(|i| Seat { node: format!("seed-{i}").parse().unwrap(), visit: i }).collect()
    }

    fn failure() -> PreheatUpdate {
        PreheatUpdate { error: Some("disk full".to_owned()), done: true, ..PreheatUpdate::default() }
    }

    fn success() -> PreheatUpdate {
        PreheatUpdate { done: true, ..PreheatUpdate::default() }
    }

    #[test]
    fn order_waits_for_a_seed_and_is_given_once() {
        let mut job = job();
        assert_eq!(job.place(&[], anybody), None);
        assert_eq!(job.part.state, State::Pending);
        let seats = seats(2);
        assert!(job.place(&seats, anybody).is_some());
        assert_eq!(job.part.state, State::Running);
        assert_eq!(job.place(&seats, anybody), None);
    }

    #[test]
    fn failure_goes_to_the_next_seed_and_ends_with_the_last() {
        let (mut job, seats) = (job(), seats(2));
        let first = job.place(&seats, anybody).unwrap();
        assert!(job.update(&first, failure(), &seats));
        let second = job.place(&seats, anybody).unwrap();
        assert_ne!(first.node, second.node);
        assert!(job.update(&second, failure(), &seats));
        assert_eq!((job.part.state, job.part.error.as_deref()), (State::Failed, Some("disk full")));
    }

    #[test]
    fn order_of_a_seed_that_came_back_is_given_again() {
        let mut job = job();
        let before = seats(1);
        let old = job.place(&before, anybody).unwrap();
        let after = vec![Seat { visit: 9, ..before[0].clone() }];
        let new = job.place(&after, anybody).unwrap();
        assert_eq!(new.visit, 9);
        assert!(!job.update(&old, success(), &after), "the word of the former stay counted");
        assert!(job.update(&new, success(), &after));
        assert_eq!(job.part.state, State::Succeeded);
    }

    #[test]
    fn layer_that_failed_fails_the_order() {
        let (mut job, seats) = (job(), seats(1));
        let seat = job.place(&seats, anybody).unwrap();
        let digest = darter_types::Digest::of(b"x");
        let layer = PreheatLayer {
            diff_id: darter_types::DiffId(digest),
            blob: darter_types::BlobDigest(digest),
            size: 1,
            read: 0,
            done: false,
            error: Some("404".to_owned()),
        };
        job.update(&seat, PreheatUpdate { layers: vec![layer], ..success() }, &seats);
        assert_eq!(job.part.state, State::Failed);
        assert!(job.part.error.unwrap().contains("404"));
    }

    #[test]
    fn order_that_makes_seeds_leave_is_given_up() {
        let mut job = job();
        let mut visit = 0;
        while !job.is_over() {
            visit += 1;
            assert!(visit < 100, "it goes round for ever");
            job.place(&[Seat { visit, ..seats(1).remove(0) }], anybody);
        }
        assert_eq!(job.part.state, State::Failed);
    }

    #[test]
    fn cancelled_order_names_the_seed_to_tell_and_hears_no_more() {
        let (mut job, seats) = (job(), seats(1));
        let seat = job.place(&seats, anybody).unwrap();
        assert_eq!(job.stop(State::Cancelled, "cancelled"), Some(seat.clone()));
        assert!(!job.update(&seat, success(), &seats));
        assert_eq!(job.part.state, State::Cancelled);
    }

    #[test]
    fn pinned_part_waits_for_its_seed_and_goes_to_no_other() {
        let mut job = Job::new(Part::new("r.example/a:1".to_owned(), Some("seed-1".parse().unwrap())));
        assert_eq!(job.place(&seats(1), anybody), None);
        let seat = job.place(&seats(3), anybody).unwrap();
        assert_eq!(seat.node.as_str(), "seed-1");
        assert!(job.update(&seat, failure(), &seats(3)));
        assert_eq!(job.part.state, State::Failed);
    }

    #[test]
    fn seed_without_room_is_given_nothing_until_it_has_some() {
        let (mut job, seats) = (job(), seats(2));
        assert_eq!(job.place(&seats, |_| false), None);
        assert_eq!(job.part.state, State::Pending);
        let free = seats[1].clone();
        assert_eq!(job.place(&seats, |seat| *seat == free), Some(free.clone()));
    }
}
