//! One part of a preheat order and what becomes of it: which member has it, when it goes to another, when it is over.
//!
//! A seed's part begins when the seed is there, a node's when a seed has made the image's layers: the node is told what they are,
//! and fetches them from the mesh. A node that is away is waited for a minute, not as long as the order lives.

use std::collections::{BTreeSet, HashMap};

use darter_identity::attend::{PreheatLayer, PreheatUpdate};
use darter_types::{DiffId, NodeName, Repository, Role};

use super::seeds;

/// How often one part is given to a member, however often they leave and come back: an order that kills members must not go
/// round for ever.
const ATTEMPTS_MAX: u32 = 8;

/// For how many seconds a node may be away until its part has failed. It comes back sooner when its daemon was restarted, or the
/// manager.
const AWAY_MAX: u64 = 60;

/// For how many seconds a member's report may stay the same until others may have the place that it takes.
const QUIET_MAX: u64 = 120;

/// Letters of what a node says of one layer: there may be thousands of layers, at a thousand nodes.
const LAYER_WORDS_MAX: usize = 200;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Waits for a member.
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

/// One image at one member: the smallest thing that is ordered. The database has the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) image: String,
    /// Whether it is for a seed or a node.
    pub(crate) role: Role,
    /// The member that is to have it, always known of a node; `None`: a seed that the manager chooses, and another when that can't.
    pub(crate) pinned: Option<NodeName>,
    pub(crate) state: State,
    /// The member that has it or had it last.
    pub(crate) member: Option<NodeName>,
    pub(crate) error: Option<String>,
    pub(crate) layers: Vec<PreheatLayer>,
    /// Where a seed found the layers.
    pub(crate) repository: Option<Repository>,
}

impl Part {
    /// For a member of this role; a node has to be named.
    pub(crate) fn new(image: String, role: Role, pinned: Option<NodeName>) -> Self {
        Self {
            image,
            role,
            pinned,
            state: State::Pending,
            member: None,
            error: None,
            layers: Vec::new(),
            repository: None,
        }
    }

    /// Who has it, or is to have it.
    pub(crate) fn target(&self) -> Option<&NodeName> {
        self.member.as_ref().or(self.pinned.as_ref())
    }
}

/// What a node says of a part, held to `made`, the seed's part whose layers it was told to fetch: of those it says how far they
/// are, and nothing else.
pub(crate) fn held_to(made: &Part, update: PreheatUpdate) -> PreheatUpdate {
    let mut told: HashMap<DiffId, PreheatLayer> =
        update.layers.into_iter().map(|layer| (layer.diff_id, layer)).collect();
    let held = |ordered: &PreheatLayer| {
        let PreheatLayer { read, done, error, .. } = told.remove(&ordered.diff_id)?;
        let error = error.map(|words| words.chars().take(LAYER_WORDS_MAX).collect());
        Some(PreheatLayer { read: read.min(ordered.size), done, error, ..ordered.clone() })
    };
    let layers = made.layers.iter().filter_map(held).collect();
    PreheatUpdate { layers, repository: made.repository.clone(), ..update }
}

/// One stay of a member: one that leaves and comes back may have forgotten its orders, and is given them again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seat {
    pub(crate) role: Role,
    pub(crate) node: NodeName,
    pub(crate) visit: u64,
}

/// A part that is not over yet, or just became so.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) part: Part,
    seat: Option<Seat>,
    /// Members that said that they can't.
    tried: BTreeSet<NodeName>,
    attempts: u32,
    /// Since when the node is not there that is to have it.
    away_since: Option<u64>,
    /// When it was given to its member, or that last told of something new.
    stirred_at: u64,
    /// The second in which it last told how far it is.
    told_at: Option<u64>,
}

impl Job {
    pub(crate) fn new(part: Part) -> Self {
        Self {
            part,
            seat: None,
            tried: BTreeSet::new(),
            attempts: 0,
            away_since: None,
            stirred_at: 0,
            told_at: None,
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.part.state.is_over()
    }

    /// Where it is now.
    pub(crate) fn seat(&self) -> Option<&Seat> {
        self.seat.as_ref()
    }

    /// Its member has it now, or has told of something new.
    pub(crate) fn stir(&mut self, now: u64) {
        self.stirred_at = now;
    }

    /// Whether its member gets on so badly that its place is others' to have. It keeps the part.
    pub(crate) fn is_quiet(&self, now: u64) -> bool {
        self.seat.is_some() && now.saturating_sub(self.stirred_at) >= QUIET_MAX
    }

    /// What people are told of it, but for its layers: to see whether that has changed.
    pub(crate) fn mark(&self) -> (State, Option<NodeName>, Option<String>) {
        (self.part.state, self.part.member.clone(), self.part.error.clone())
    }

    fn may_be_at(&self, seat: &Seat) -> bool {
        self.part.role == seat.role && self.part.pinned.as_ref().is_none_or(|pinned| *pinned == seat.node)
    }

    /// Whether it is to be given to a member: none has it, or one that left.
    pub(crate) fn waits(&self, attending: &[Seat]) -> bool {
        !self.is_over() && !self.seat.as_ref().is_some_and(|seat| attending.contains(seat))
    }

    /// Takes it from a member that left, and chooses the one to give it to now, if there is anything to give and anybody
    /// with room for it.
    pub(crate) fn place(&mut self, attending: &[Seat], has_room: impl Fn(&Seat) -> bool) -> Option<Seat> {
        if !self.waits(attending) {
            return None;
        }
        self.seat = None;
        self.part.state = State::Pending;
        let fit = attending.iter().filter(|seat| self.may_be_at(seat) && has_room(seat));
        let chosen = seeds::choose(&self.part.image, fit.map(|seat| &seat.node), &self.tried)?.clone();
        if self.attempts == ATTEMPTS_MAX {
            let words = format!("given up: {ATTEMPTS_MAX} times a {} left while it had it", self.part.role);
            self.end(State::Failed, Some(words));
            return None;
        }
        self.attempts += 1;
        let seat = attending.iter().find(|seat| seat.node == chosen && seat.role == self.part.role).cloned();
        self.part.state = State::Running;
        self.part.member = Some(chosen);
        self.part.layers.clear();
        self.seat.clone_from(&seat);
        seat
    }

    /// Looks whether the node that is to have it is there. One that stays away fails it; until then its error says so.
    pub(crate) fn look(&mut self, is_there: bool, now: u64) {
        let Some(node) = self.part.pinned.clone().filter(|_| self.part.role == Role::Node) else { return };
        if self.is_over() {
            return;
        }
        if is_there {
            if self.away_since.take().is_some() {
                self.part.error = None;
            }
            return;
        }
        let what = if self.attempts > 0 { "left while it had the order" } else { "is away" };
        let since = *self.away_since.get_or_insert(now);
        if now.saturating_sub(since) >= AWAY_MAX {
            let words = format!("{node} {what}, and did not come back within {AWAY_MAX} s");
            self.end(State::Failed, Some(words));
        } else {
            self.part.error = Some(format!("{node} {what}; it is waited for until {AWAY_MAX} s are over"));
        }
    }

    /// The member at `from` says how far it is. `false`: the part is not there (any more), or it says nothing new.
    pub(crate) fn update(
        &mut self,
        from: &Seat,
        update: PreheatUpdate,
        attending: &[Seat],
        now: u64,
    ) -> bool {
        if self.is_over() || self.seat.as_ref() != Some(from) {
            return false;
        }
        // Each report costs a write. A node tells more seldom, and what is left out comes with the next one.
        let is_too_soon = self.told_at.replace(now) == Some(now);
        if is_too_soon && self.part.role == Role::Node && !update.done {
            return false;
        }
        let is_news = self.part.layers != update.layers || self.part.repository != update.repository;
        if !is_news && !update.done && update.error.is_none() {
            return false;
        }
        if is_news {
            self.stir(now);
        }
        self.part.layers = update.layers;
        self.part.repository = update.repository;
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

    /// The member can't: another one that attends may; when there is none left, the part failed with its words.
    pub(crate) fn failed_at(&mut self, seat: &Seat, error: String, attending: &[Seat]) {
        self.tried.insert(seat.node.clone());
        self.seat = None;
        let mut others = attending.iter().filter(|other| self.may_be_at(other));
        if others.all(|other| self.tried.contains(&other.node)) {
            self.end(State::Failed, Some(error));
        } else {
            self.part.state = State::Pending;
            self.part.error = Some(error);
        }
    }

    /// Ends it with `state`, unless it is over; the member that has it is to be told.
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
        Job::new(Part::new("r.example/a:1".to_owned(), Role::Seed, None))
    }

    fn anybody(_: &Seat) -> bool {
        true
    }

    fn seats(count: u64) -> Vec<Seat> {
        let seat = |i| Seat { role: Role::Seed, node: format!("seed-{i}").parse().unwrap(), visit: i };
        (0..count).map(seat).collect()
    }

    fn failure() -> PreheatUpdate {
        PreheatUpdate { error: Some("disk full".to_owned()), done: true, ..PreheatUpdate::default() }
    }

    fn success() -> PreheatUpdate {
        PreheatUpdate { done: true, ..PreheatUpdate::default() }
    }

    fn layer(read: u64) -> PreheatLayer {
        let digest = darter_types::Digest::of(b"x");
        PreheatLayer {
            diff_id: darter_types::DiffId(digest),
            blob: darter_types::BlobDigest(digest),
            size: 100,
            read,
            done: false,
            error: None,
        }
    }

    #[test]
    fn member_that_tells_nothing_new_for_two_minutes_takes_nobodys_place() {
        let (mut job, seats) = (job(), seats(1));
        let seat = job.place(&seats, anybody).unwrap();
        job.stir(1000);
        let mut told = |read, now| {
            let layers = vec![layer(read)];
            let update = PreheatUpdate { layers, ..PreheatUpdate::default() };
            (job.update(&seat, update, &seats, now), job.is_quiet(now))
        };
        assert_eq!(told(5, 1119), (true, false));
        assert_eq!(told(5, 1238), (false, false));
        assert_eq!(told(5, 1239), (false, true));
        assert_eq!(told(6, 1300), (true, false));
        assert!(job.update(&seat, success(), &seats, 2000) && !job.is_quiet(5000));
    }

    #[test]
    fn nodes_report_is_held_to_what_it_was_told_to_fetch() {
        let other = |text: &str| PreheatLayer {
            diff_id: darter_types::DiffId(darter_types::Digest::of(text.as_bytes())),
            ..layer(0)
        };
        let mut made = Part::new("r.example/a:1".to_owned(), Role::Seed, None);
        made.layers = vec![other("a"), other("b")];
        made.repository = Some("https://r.example/a".parse().unwrap());
        let words = Some("x".repeat(2000));
        let big = PreheatLayer { size: 9999, read: 9999, error: words, ..other("b") };
        let strange = PreheatLayer { done: true, ..other("c") };
        let repository = Some("https://evil.example/a".parse().unwrap());
        let update = PreheatUpdate { layers: vec![strange, big.clone(), big], repository, ..success() };
        let held = held_to(&made, update);
        assert!(held.done);
        assert_eq!(held.repository, made.repository);
        let [b] = &held.layers[..] else { panic!("{:?}", held.layers) };
        assert_eq!((b.diff_id, b.blob, b.size, b.read), (made.layers[1].diff_id, layer(0).blob, 100, 100));
        assert_eq!(b.error.as_ref().unwrap().len(), LAYER_WORDS_MAX);
    }

    #[test]
    fn a_node_is_heard_once_a_second_and_to_the_end() {
        let mut job = of_a_node();
        let node = Seat { role: Role::Node, ..seats(1).remove(0) };
        let both = [node.clone()];
        job.place(&both, anybody).unwrap();
        let mut told = |read, now| {
            let update = PreheatUpdate { layers: vec![layer(read)], ..PreheatUpdate::default() };
            job.update(&node, update, &both, now)
        };
        assert_eq!([told(1, 7), told(2, 7), told(3, 7), told(4, 8)], [true, false, false, true]);
        assert!(job.update(&node, success(), &both, 8) && job.is_over());
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
        assert!(job.update(&first, failure(), &seats, 0));
        let second = job.place(&seats, anybody).unwrap();
        assert_ne!(first.node, second.node);
        assert!(job.update(&second, failure(), &seats, 0));
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
        assert!(!job.update(&old, success(), &after, 0), "the word of the former stay counted");
        assert!(job.update(&new, success(), &after, 0));
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
        job.update(&seat, PreheatUpdate { layers: vec![layer], ..success() }, &seats, 0);
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
        assert!(!job.update(&seat, success(), &seats, 0));
        assert_eq!(job.part.state, State::Cancelled);
    }

    #[test]
    fn pinned_part_waits_for_its_seed_and_goes_to_no_other() {
        let mut job =
            Job::new(Part::new("r.example/a:1".to_owned(), Role::Seed, Some("seed-1".parse().unwrap())));
        assert_eq!(job.place(&seats(1), anybody), None);
        let seat = job.place(&seats(3), anybody).unwrap();
        assert_eq!(seat.node.as_str(), "seed-1");
        assert!(job.update(&seat, failure(), &seats(3), 0));
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

    fn of_a_node() -> Job {
        Job::new(Part::new("r.example/a:1".to_owned(), Role::Node, Some("seed-0".parse().unwrap())))
    }

    #[test]
    fn nodes_part_does_not_go_to_the_seed_of_the_same_name() {
        let mut job = of_a_node();
        assert_eq!(job.place(&seats(1), anybody), None);
        let node = Seat { role: Role::Node, ..seats(1).remove(0) };
        let both = [seats(1).remove(0), node.clone()];
        assert_eq!(job.place(&both, anybody), Some(node.clone()));
        assert!(job.update(&node, failure(), &both, 0));
        assert_eq!((job.part.state, job.part.error.as_deref()), (State::Failed, Some("disk full")));
    }

    #[test]
    fn node_that_is_away_is_waited_for_a_minute_and_told_of() {
        let mut job = of_a_node();
        job.look(false, 100);
        assert!(job.part.error.as_deref().unwrap().contains("seed-0 is away"), "{:?}", job.part.error);
        job.look(true, 120);
        assert_eq!((job.part.state, &job.part.error), (State::Pending, &None));
        let node = Seat { role: Role::Node, ..seats(1).remove(0) };
        job.place(std::slice::from_ref(&node), anybody).unwrap();
        assert_eq!(job.place(&[], anybody), None);
        for (now, state) in [(200, State::Pending), (259, State::Pending), (260, State::Failed)] {
            job.look(false, now);
            assert_eq!(job.part.state, state, "at {now}");
        }
        assert!(job.part.error.unwrap().contains("seed-0 left while it had the order"));
    }

    #[test]
    fn seed_that_is_away_is_waited_for_as_long_as_the_order_lives() {
        let mut job =
            Job::new(Part::new("r.example/a:1".to_owned(), Role::Seed, Some("seed-1".parse().unwrap())));
        job.look(false, 0);
        job.look(false, 1_000_000);
        assert_eq!((job.part.state, job.part.error), (State::Pending, None));
    }
}
