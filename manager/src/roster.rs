//! Who attends now. It is memory only: after a restart members attend again within seconds.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use darter_identity::Member;
use darter_identity::attend::{ClusterMembers, Hello, MemberInfo};
use darter_proto::v1::manager_message::Message;
use darter_types::{NodeName, Role};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::core::job::Seat;
use crate::db::Sighting;

/// Messages for one member that its stream has not taken yet. One that finds no room is refused to who sends it.
const ORDERS_MAX: usize = 64;

type Key = (Role, NodeName);

struct Present {
    visit: u64,
    hello: Hello,
    heard: Instant,
    orders: mpsc::Sender<Message>,
    /// Cancelled when the member must go: the same member attends anew, or was revoked.
    leave: CancellationToken,
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
    pub(crate) leave: CancellationToken,
}

impl Roster {
    pub(crate) fn new() -> Self {
        let view = watch::Sender::new(ClusterMembers::default());
        Self(Arc::new(Shared { state: Mutex::default(), view, seats: watch::Sender::new(Vec::new()) }))
    }

    /// `member` attends from now on. An older stream of the same member ends: it is a rest of a lost connection.
    pub(crate) fn enter(&self, member: &Member, hello: Hello) -> Presence {
        let (sender, orders) = mpsc::channel(ORDERS_MAX);
        let key = (member.role, member.node.clone());
        let leave = CancellationToken::new();
        let mut state = self.0.state.lock();
        state.visits += 1;
        let visit = state.visits;
        let present = Present { visit, hello, heard: Instant::now(), orders: sender, leave: leave.clone() };
        if let Some(before) = state.present.insert(key.clone(), present) {
            before.leave.cancel();
        }
        self.publish(&state);
        drop(state);
        Presence { roster: self.clone(), key, visit, orders, view: self.0.view.subscribe(), leave }
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

    /// Ends a member's stream, if it has one.
    pub(crate) fn expel(&self, role: Role, node: &NodeName) {
        if let Some(present) = self.0.state.lock().present.get(&(role, node.clone())) {
            present.leave.cancel();
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
        let mut seed = roster.enter(&member("seed", "s"), hello("s:1"));
        seed.view.mark_unchanged();
        drop(roster.enter(&member("node", "n"), hello("n:1")));
        assert!(!seed.view.has_changed().unwrap());
        let scheduler = roster.enter(&member("scheduler", "c"), hello("c:1"));
        assert!(seed.view.has_changed().unwrap());
        assert_eq!(seed.view.borrow_and_update().schedulers.len(), 1);
        drop(scheduler);
        assert!(seed.view.borrow_and_update().schedulers.is_empty());
    }

    #[test]
    fn member_that_attends_again_replaces_its_lost_stream() {
        let roster = Roster::new();
        let seats = roster.seats();
        let old = roster.enter(&member("seed", "s"), hello("s:1"));
        let new = roster.enter(&member("seed", "s"), hello("s:2"));
        assert!(old.leave.is_cancelled() && !new.leave.is_cancelled());
        assert_eq!(*seats.borrow(), [new.seat()]);
        assert_eq!(roster.send(&old.seat(), Message::Cancel(Default::default())), Err(NotSent::Gone));
        drop(old);
        assert_eq!(new.view.borrow().seeds[0].address, "s:2");
    }
}
