//! Places for what is being sent, or read to be sent. Where uploads are limited there are fewer to send: each of those who have one
//! then hears something before it loses patience, and gets all of what it waits for. Many at once would all get too little, and
//! begin again.
//!
//! No member has more than a quarter of them, and who had one waits behind the others: one that asks for much, or reads slowly,
//! doesn't keep them from theirs.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use darter_identity::Member;
use darter_types::RateKind;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::shared::Shared;

/// Bytes per second of the limit for each place. A child gives a map up that comes with less than half of it.
const RATE_OF_ONE: u64 = 128 << 10;

/// Members that have all places, if each has its share of them; with fewer places each has one.
const SHARES: usize = 4;

/// What one member may have of so many.
fn share(places: usize) -> usize {
    (places / SHARES).max(1)
}

pub(super) struct Slots {
    max: usize,
    /// Bytes per second that may be sent; `None`: no limit.
    rate: Box<dyn Fn() -> Option<u64> + Send + Sync>,
    turns: Mutex<Turns>,
}

#[derive(Default)]
struct Turns {
    /// Places that members have.
    taken: HashMap<Member, usize>,
    /// Who came first is first.
    waiting: VecDeque<Waiter>,
}

struct Waiter {
    member: Member,
    place: oneshot::Sender<Slot>,
}

/// A place, free again when it is dropped.
pub(super) struct Slot {
    slots: Arc<Slots>,
    member: Member,
}

impl Turns {
    /// Whose turn it is, if one of so many places is free; it counts as taken then.
    fn next(&mut self, places: usize) -> Option<Waiter> {
        self.waiting.retain(|waiter| !waiter.place.is_closed());
        if self.taken.values().sum::<usize>() >= places {
            return None;
        }
        let share = share(places);
        let has = |member| self.taken.get(member).copied().unwrap_or(0);
        let at = self.waiting.iter().position(|waiter| has(&waiter.member) < share)?;
        let first = self.waiting.remove(at)?;
        *self.taken.entry(first.member.clone()).or_default() += 1;
        Some(first)
    }

    /// The member had its turn: what else it waits for comes behind the others.
    fn give_back(&mut self, member: &Member) {
        if let Some(taken) = self.taken.get_mut(member) {
            *taken -= 1;
        }
        self.taken.retain(|_, taken| *taken > 0);
        let waiting = std::mem::take(&mut self.waiting).into_iter();
        let (own, others): (Vec<_>, Vec<_>) = waiting.partition(|waiter| waiter.member == *member);
        self.waiting = others.into_iter().chain(own).collect();
    }
}

impl Slots {
    /// So many at most; as many as this peer's limit of uploads, which may change, has room for.
    pub(super) fn of_uploads(shared: &Arc<Shared>, max: usize) -> Arc<Self> {
        let owner = shared.clone();
        Self::new(max, move || owner.limits.of(RateKind::Upload).rate())
    }

    /// So many, whatever the limits.
    pub(super) fn fixed(max: usize) -> Arc<Self> {
        Self::new(max, || None)
    }

    fn new(max: usize, rate: impl Fn() -> Option<u64> + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { max, rate: Box::new(rate), turns: Mutex::default() })
    }

    /// How many there should be now. What is taken stays taken.
    fn places(&self) -> usize {
        let enough_for = |rate: u64| usize::try_from(rate / RATE_OF_ONE).unwrap_or(self.max);
        (self.rate)().map_or(self.max, |rate| enough_for(rate).clamp(1, self.max))
    }

    /// How many of them one member may have now.
    pub(super) fn share(&self) -> usize {
        share(self.places())
    }

    /// Gives what is free to those whose turn it is.
    fn give(self: &Arc<Self>) {
        loop {
            let places = self.places();
            let next = self.turns.lock().next(places);
            let Some(Waiter { member, place }) = next else { return };
            // Not under the lock: whoever has gone in this moment gives it back.
            drop(place.send(Slot { slots: self.clone(), member }));
        }
    }

    /// Waits for one; who came first is first, but nobody has more than its share.
    pub(super) async fn wait(self: &Arc<Self>, member: &Member) -> Slot {
        let (place, given) = oneshot::channel();
        self.turns.lock().waiting.push_back(Waiter { member: member.clone(), place });
        self.give();
        given.await.expect("only who has gone is not given one")
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.turns.lock().give_back(&self.member);
        self.slots.give();
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::sync::atomic::{AtomicU64, Ordering};

    use futures_util::FutureExt;

    use super::*;

    fn member(name: impl std::fmt::Display) -> Member {
        format!("spiffe://darter/here/node/{name}").parse().unwrap()
    }

    /// How many can be had at once, all of them given back at the end; each by another member.
    fn free(slots: &Arc<Slots>) -> usize {
        let each = |number| slots.wait(&member(format!("free-{number}"))).now_or_never();
        let taken: Vec<Slot> = (0..).map_while(each).collect();
        taken.len()
    }

    type Place = Pin<Box<dyn Future<Output = Slot>>>;

    /// Whoever waits, in the order in which they asked.
    type Waiting = Vec<(&'static str, Place)>;

    fn place(slots: &Arc<Slots>, name: &'static str) -> Place {
        let slots = slots.clone();
        Box::pin(async move { slots.wait(&member(name)).await })
    }

    fn wait(slots: &Arc<Slots>, names: &[&'static str]) -> Waiting {
        names.iter().map(|name| (*name, place(slots, name))).collect()
    }

    /// Those who have been given a place since the last look.
    fn given(waiting: &mut Waiting) -> Vec<(&'static str, Slot)> {
        let mut given = Vec::new();
        waiting.retain_mut(|(name, place)| match place.now_or_never() {
            Some(slot) => {
                given.push((*name, slot));
                false
            }
            None => true,
        });
        given
    }

    fn names(given: &[(&'static str, Slot)]) -> Vec<&'static str> {
        given.iter().map(|(name, _)| *name).collect()
    }

    fn limited(max: usize) -> (Arc<Slots>, Arc<AtomicU64>) {
        let rate = Arc::<AtomicU64>::default();
        let now = rate.clone();
        let slots = Slots::new(max, move || Some(now.load(Ordering::Relaxed)).filter(|rate| *rate > 0));
        (slots, rate)
    }

    #[test]
    fn there_are_as_many_as_the_limit_has_room_for() {
        let (slots, rate) = limited(16);
        for (limit, count) in
            [(0, 16), (100_000, 1), (4 * RATE_OF_ONE, 4), (1 << 40, 16), (2 * RATE_OF_ONE, 2), (0, 16)]
        {
            rate.store(limit, Ordering::Relaxed);
            assert_eq!(free(&slots), count, "at {limit}");
        }
    }

    #[test]
    fn places_that_are_too_many_go_to_nobody_and_more_of_them_to_who_waits() {
        let (slots, rate) = limited(4);
        let mut taken = given(&mut wait(&slots, &["a", "b", "c", "d"]));
        rate.store(2 * RATE_OF_ONE, Ordering::Relaxed);
        let mut waiting = wait(&slots, &["e", "f", "g"]);
        assert!(given(&mut waiting).is_empty());
        taken.truncate(2);
        assert!(given(&mut waiting).is_empty(), "two are taken still");
        taken.truncate(1);
        taken.extend(given(&mut waiting));
        assert_eq!(names(&taken), ["a", "e"]);
        rate.store(0, Ordering::Relaxed);
        taken.truncate(1);
        assert_eq!(free(&slots), 1, "one is taken, and two wait");
    }

    #[test]
    fn nobody_has_more_than_a_quarter_however_few_others_there_are() {
        for (places, share) in [(16, 4), (8, 2), (4, 1), (2, 1), (1, 1)] {
            let (slots, rate) = limited(16);
            rate.store(places * RATE_OF_ONE, Ordering::Relaxed);
            let mut greedy = wait(&slots, &["greedy"; 16]);
            let taken = given(&mut greedy);
            assert_eq!(taken.len(), share, "of {places}");
            let others = given(&mut wait(&slots, &["b", "c"]));
            assert_eq!(others.len(), (places as usize - share).min(2), "of {places}");
        }
    }

    #[test]
    fn a_single_place_goes_round() {
        let (slots, rate) = limited(16);
        rate.store(1, Ordering::Relaxed);
        let mut waiting = wait(&slots, &["a", "a", "a", "b", "c", "b"]);
        let mut order = Vec::new();
        loop {
            let now = given(&mut waiting);
            if now.is_empty() {
                break;
            }
            order.extend(names(&now));
        }
        assert!(waiting.is_empty(), "{} wait for ever", waiting.len());
        assert_eq!(order, ["a", "b", "c", "a", "b", "a"]);
    }

    #[test]
    fn who_has_gone_keeps_nothing() {
        let (slots, rate) = limited(16);
        rate.store(1, Ordering::Relaxed);
        let first = slots.wait(&member("a")).now_or_never();
        let mut waiting = wait(&slots, &["gone", "late", "here"]);
        assert!(given(&mut waiting).is_empty());
        drop(waiting.remove(0));
        drop(first);
        // It was given one, and never heard of it.
        drop(waiting.remove(0));
        assert_eq!(names(&given(&mut waiting)), ["here"]);
        assert!(slots.turns.lock().waiting.is_empty());
    }
}
