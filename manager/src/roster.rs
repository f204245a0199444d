//! Who attends now. It is memory only: after a restart members attend again within seconds.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use darter_identity::Member;
use darter_identity::attend::{ClusterMembers, Hello, MemberInfo};
use darter_proto::v1::manager_message::Message;
use darter_types::{NodeName, Role};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};

use crate::core::job::Seat;
use crate::db::Sighting;

/// Messages for one member that its stream has not taken yet. One that finds no room is refused to who sends it.
const ORDERS_MAX: usize = 64;

/// Members come again after 15 s at most; a member that attends from a place that it left longer ago has moved.
const TWINS_WITHIN: Duration = Duration::from_secs(300);

type Key = (Role, NodeName);

/// Why a member's stream is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leave {
    /// The same member attends on another stream.
    Replaced,
    Revoked,
}

/// Where a member attends from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// The other end of its connection.
    pub(crate) from: Option<IpAddr>,
    /// What it says itself.
    pub(crate) address: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.from {
            Some(from) => write!(f, "{} (from {from})", self.address),
            None => f.write_str(&self.address),
        }
    }
}

struct Present {
    visit: u64,
    hello: Hello,
    place: Place,
    since: Instant,
    heard: Instant,
    orders: mpsc::Sender<Message>,
    leave: watch::Sender<Option<Leave>>,
    /// The last other place from which the member attended until this one put an end to it.
    before: Option<Place>,
    /// It was said that two machines are this member.
    twins_told: bool,
}

impl Present {
    /// Whether whoever comes from `place` now is a second machine with the member's certificate: this stay put an end to that
    /// machine's own a moment ago, and here it is again. One that lost its connection, or moved, doesn't go to and fro.
    fn has_twin_at(&self, place: &Place) -> bool {
        self.place != *place && self.before.as_ref() == Some(place) && self.since.elapsed() < TWINS_WITHIN
    }

    /// What the stay after this one knows of it: the place before, and whether twins were told.
    fn remembered_at(self, place: &Place) -> (Option<Place>, bool) {
        let told = self.twins_told || self.has_twin_at(place);
        let before = if self.place == *place { self.before } else { Some(self.place) };
        (before, told)
    }
}

#[derive(Default)]
struct State {
    visits: u64,
    present: HashMap<Key, Present>,
}

#[derive(Clone)]
pub(crate) struct Roster(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    view: watch::Sender<ClusterMembers>,
    seats: watch::Sender<Vec<Seat>>,
}

/// Why a member was not sent a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotSent {
    /// That stay of it is over.
    Gone,
    Full,
}

/// A member's presence, until it is dropped.
pub(crate) struct Presence {
    roster: Roster,
    key: Key,
    visit: u64,
    pub(crate) orders: mpsc::Receiver<Message>,
    pub(crate) view: watch::Receiver<ClusterMembers>,
    pub(crate) leave: watch::Receiver<Option<Leave>>,
    /// Where the other machine is, when it has just shown that two have this member's certificate; that is said once.
    pub(crate) twin: Option<Place>,
}

impl Roster {
    pub(crate) fn new() -> Self {
        let view = watch::Sender::new(ClusterMembers::default());
        Self(Arc::new(Shared { state: Mutex::default(), view, seats: watch::Sender::new(Vec::new()) }))
    }

    /// `member` attends from now on. An older stream of the same member ends: it is a rest of a lost connection.
    pub(crate) fn enter(&self, member: &Member, hello: Hello, from: Option<IpAddr>) -> Presence {
        let (sender, orders) = mpsc::channel(ORDERS_MAX);
        let (leave, left) = watch::channel(None);
        let key = (member.role, member.node.clone());
        let place = Place { from, address: hello.address.clone() };
        let mut state = self.0.state.lock();
        state.visits += 1;
        let visit = state.visits;
        let (mut twin, mut before, mut twins_told) = (None, None, false);
        if let Some(old) = state.present.remove(&key) {
            old.leave.send_replace(Some(Leave::Replaced));
            twin = (!old.twins_told && old.has_twin_at(&place)).then(|| old.place.clone());
            (before, twins_told) = old.remembered_at(&place);
        }
        let now = Instant::now();
        let present = Present {
            visit,
            hello,
            place,
            since: now,
            heard: now,
            orders: sender,
            leave,
            before,
            twins_told,
        };
        state.present.insert(key.clone(), present);
        self.publish(&state);
        drop(state);
        Presence {
            roster: self.clone(),
            key,
            visit,
            orders,
            view: self.0.view.subscribe(),
            leave: left,
            twin,
        }
    }

    fn publish(&self, state: &State) {
        let members = members(state);
        self.0.view.send_if_modified(|known| {
            let changed = *known != members;
            known.clone_from(&members);
            changed
        });
        let seats = seats(state);
        self.0.seats.send_if_modified(|known| {
            let changed = *known != seats;
            known.clone_from(&seats);
            changed
        });
    }

    /// The seeds and nodes that attend; it changes also when one merely came back.
    pub(crate) fn seats(&self) -> watch::Receiver<Vec<Seat>> {
        self.0.seats.subscribe()
    }

    pub(crate) fn send(&self, seat: &Seat, message: Message) -> Result<(), NotSent> {
        let state = self.0.state.lock();
        let present = state.present.get(&(seat.role, seat.node.clone()));
        let present = present.filter(|present| present.visit == seat.visit).ok_or(NotSent::Gone)?;
        present.orders.try_send(message).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => NotSent::Full,
            mpsc::error::TrySendError::Closed(_) => NotSent::Gone,
        })
    }

    /// How long each attending member has been silent.
    pub(crate) fn silences(&self) -> HashMap<Key, Duration> {
        let state = self.0.state.lock();
        state.present.iter().map(|(key, present)| (key.clone(), present.heard.elapsed())).collect()
    }

    pub(crate) fn sightings(&self, at: u64) -> Vec<Sighting> {
        let state = self.0.state.lock();
        state
            .present
            .iter()
            .map(|((role, node), present)| sighting(*role, node, &present.hello, at))
            .collect()
    }

    /// Ends a revoked member's stream, if it has one.
    pub(crate) fn expel(&self, role: Role, node: &NodeName) {
        if let Some(present) = self.0.state.lock().present.get(&(role, node.clone())) {
            present.leave.send_replace(Some(Leave::Revoked));
        }
    }
}

pub(crate) fn sighting(role: Role, node: &NodeName, hello: &Hello, at: u64) -> Sighting {
    let Hello { version, address, zone } = hello.clone();
    Sighting { role, node: node.clone(), address, zone, version, at }
}

fn members(state: &State) -> ClusterMembers {
    let of = |wanted: Role| {
        let present = state.present.iter().filter(|((role, _), _)| *role == wanted);
        let mut list: Vec<_> = present.map(|((_, node), present)| info(node, &present.hello)).collect();
        list.sort();
        list
    };
    ClusterMembers { schedulers: of(Role::Scheduler), seeds: of(Role::Seed) }
}

fn info(node: &NodeName, hello: &Hello) -> MemberInfo {
    MemberInfo { node: node.clone(), address: hello.address.clone(), zone: hello.zone.clone() }
}

fn seats(state: &State) -> Vec<Seat> {
    let takers = state.present.iter().filter(|((role, _), _)| matches!(role, Role::Seed | Role::Node));
    let seat = |(role, node): &Key, visit| Seat { role: *role, node: node.clone(), visit };
    let mut seats: Vec<_> = takers.map(|(key, present)| seat(key, present.visit)).collect();
    seats.sort_by_key(|seat| seat.visit);
    seats
}

impl Presence {
    pub(crate) fn heard(&self) {
        if let Some(present) = self.roster.0.state.lock().present.get_mut(&self.key)
            && present.visit == self.visit
        {
            present.heard = Instant::now();
        }
    }

    pub(crate) fn seat(&self) -> Seat {
        Seat { role: self.key.0, node: self.key.1.clone(), visit: self.visit }
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        let mut state = self.roster.0.state.lock();
        if state.present.get(&self.key).is_some_and(|present| present.visit == self.visit) {
            state.present.remove(&self.key);
            self.roster.publish(&state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(role: &str, node: &str) -> Member {
        format!("spiffe://darter/default/{role}/{node}").parse().unwrap()
    }

    fn hello(address: &str) -> Hello {
        Hello { version: "1".to_owned(), address: address.to_owned(), zone: String::new() }
    }

    #[test]
    fn nodes_come_and_go_without_a_new_view() {
        let roster = Roster::new();
        let mut seed = roster.enter(&member("seed", "s"), hello("s:1"), None);
        seed.view.mark_unchanged();
        drop(roster.enter(&member("node", "n"), hello("n:1"), None));
        assert!(!seed.view.has_changed().unwrap());
        let scheduler = roster.enter(&member("scheduler", "c"), hello("c:1"), None);
        assert!(seed.view.has_changed().unwrap());
        assert_eq!(seed.view.borrow_and_update().schedulers.len(), 1);
        drop(scheduler);
        assert!(seed.view.borrow_and_update().schedulers.is_empty());
    }

    #[test]
    fn member_that_attends_again_replaces_its_lost_stream() {
        let roster = Roster::new();
        let seats = roster.seats();
        let old = roster.enter(&member("seed", "s"), hello("s:1"), None);
        let new = roster.enter(&member("seed", "s"), hello("s:2"), None);
        assert_eq!((*old.leave.borrow(), *new.leave.borrow()), (Some(Leave::Replaced), None));
        assert_eq!(*seats.borrow(), [new.seat()]);
        assert_eq!(roster.send(&old.seat(), Message::Cancel(Default::default())), Err(NotSent::Gone));
        drop(old);
        assert_eq!(new.view.borrow().seeds[0].address, "s:2");
    }

    #[test]
    fn revoked_member_is_told_so() {
        let roster = Roster::new();
        let node = roster.enter(&member("node", "n"), hello("n:1"), None);
        roster.expel(Role::Node, &"n".parse().unwrap());
        assert_eq!(*node.leave.borrow(), Some(Leave::Revoked));
    }

    /// Each stay stays, as those of a lost connection and of a second machine do; `true` where twins are told.
    fn twins_told(places: &[(&str, &str)]) -> Vec<bool> {
        let (roster, mut stays) = (Roster::new(), Vec::new());
        for (from, address) in places {
            let from = Some(from.parse().unwrap());
            stays.push(roster.enter(&member("node", "n"), hello(address), from));
        }
        stays.iter().map(|stay| stay.twin.is_some()).collect()
    }

    #[test]
    fn two_machines_with_one_certificate_are_told_once() {
        let (one, other) = (("10.0.0.1", "10.0.0.1:7420"), ("10.0.0.2", "10.0.0.2:7420"));
        assert_eq!(twins_told(&[one, other, one, other, one]), [false, false, true, false, false]);
        let by_port = ("10.0.0.1", "10.0.0.1:7421");
        assert_eq!(twins_told(&[one, by_port, one]), [false, false, true]);
        // A connection that was lost in between hides nothing.
        assert_eq!(twins_told(&[one, other, other, one]), [false, false, false, true]);
    }

    #[test]
    fn machine_that_connects_anew_or_moves_has_no_twin() {
        let (one, other, third) = (("10.0.0.1", "a:1"), ("10.0.0.2", "b:1"), ("10.0.0.3", "c:1"));
        assert_eq!(twins_told(&[one, one, one]), [false; 3]);
        assert_eq!(twins_told(&[one, other, third]), [false; 3]);
    }

    #[test]
    fn twins_are_told_with_both_places() {
        let roster = Roster::new();
        let enter = |address: &str| roster.enter(&member("node", "n"), hello(address), None);
        let (_first, _second, third) = (enter("a:1"), enter("b:1"), enter("a:1"));
        assert_eq!(third.twin.as_ref().unwrap().to_string(), "b:1");
    }
}
