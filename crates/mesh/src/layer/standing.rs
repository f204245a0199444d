//! The parents of one layer: who they are, what each has, how each has done, and which one to ask next.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use darter_daemon::backoff::Backoff;
use darter_proto::v1::ParentFault;
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::time::{sleep, timeout};

use super::open::{Open, Peer};
use super::search;
use crate::bits::Bits;
use crate::frames::Refusal;
use crate::parents::{Link, LinkError};
use crate::rendezvous;

/// Seeds that a node turns to by itself when no scheduler names any parent.
const SEEDS_UNNAMED: usize = 2;
/// How long it waits for the scheduler before that.
const SCHEDULER_PATIENCE: Duration = Duration::from_secs(1);
/// How often a parent that does not have everything is asked what it has now.
const ASK_AGAIN: Duration = Duration::from_secs(1);
const HAVE_PATIENCE: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long a parent is left alone that could not be reached: longer with each time in a row. One that is started again, or lost a
/// connection, is there in a moment.
const UNREACHED_MIN: Duration = Duration::from_millis(250);
const UNREACHED_MAX: Duration = Duration::from_secs(3);
/// How long one is left alone that answers something else, was too slow or too busy, or refused.
const PROTOCOL_FOR: Duration = Duration::from_secs(3);
const SLOW_FOR: Duration = Duration::from_secs(5);
const BUSY_FOR: Duration = Duration::from_millis(200);
/// One that keeps a request alive by a few bytes at a time is left alone for longer: each piece would wait for it anew.
const TRICKLE_FOR: Duration = Duration::from_secs(60);
const REFUSED_FOR: Duration = Duration::from_secs(60);
/// A parent whose answers take so many times as long as the quickest one's is asked only when the others can't.
const SLOW_TIMES: u32 = 4;
/// Parents whose numbers of pieces under way are so close count as equally busy: then their bytes decide.
const CLOSE: usize = 4;
/// Below this no parent counts as slow.
const SLOW_MIN: Duration = Duration::from_millis(40);

struct Standing {
    peer: Peer,
    link: Option<Arc<Link>>,
    is_connecting: bool,
    /// `None` until it has said so.
    have: Option<Bits>,
    asked_at: Option<Instant>,
    shunned_until: Option<Instant>,
    unreached: Backoff,
    bytes: u64,
}

#[derive(Default)]
pub(crate) struct Standings {
    all: Mutex<Vec<Standing>>,
    /// Somebody new can be asked, or somebody has a place free.
    pub changed: Notify,
}

/// Whom to ask for a piece.
pub(super) enum Choice {
    Ask {
        peer: Peer,
        link: Arc<Link>,
        slot: OwnedSemaphorePermit,
    },
    /// There are such parents, all of them busy.
    Busy,
    Nobody,
}

impl Standings {
    /// The best parent that has the piece and was not tried: one that is not slow, has least to do, is no seed, and has
    /// given least so far.
    pub(super) fn choose(&self, index: u32, tried: &HashSet<String>) -> Choice {
        let all = self.all.lock();
        let now = Instant::now();
        let mut able: Vec<(&Standing, &Arc<Link>)> = all
            .iter()
            .filter(|standing| {
                standing.has(index) && !standing.is_shunned(now) && !tried.contains(&standing.peer.address)
            })
            .filter_map(|standing| Some((standing, standing.live()?)))
            .collect();
        let quickest = able.iter().map(|(_, link)| link.answer_time()).filter(|time| !time.is_zero()).min();
        let slow = quickest.unwrap_or_default().saturating_mul(SLOW_TIMES).max(SLOW_MIN);
        able.sort_by_key(|(standing, link)| {
            (link.answer_time() > slow, link.in_flight() / CLOSE, standing.peer.is_seed, standing.bytes)
        });
        for (standing, link) in &able {
            if let Some(slot) = link.try_slot() {
                return Choice::Ask { peer: standing.peer.clone(), link: (*link).clone(), slot };
            }
        }
        if able.is_empty() { Choice::Nobody } else { Choice::Busy }
    }

    /// Parents that can be asked now.
    pub(crate) fn live_count(&self) -> usize {
        let now = Instant::now();
        let all = self.all.lock();
        all.iter().filter(|standing| standing.live().is_some() && !standing.is_shunned(now)).count()
    }

    /// Those who have said what they have.
    #[cfg(test)]
    pub(crate) fn names(&self) -> Vec<String> {
        let all = self.all.lock();
        let told = all.iter().filter(|standing| standing.have.is_some());
        told.map(|standing| standing.peer.node.clone()).collect()
    }

    fn change(&self, address: &str, change: impl FnOnce(&mut Standing)) {
        let mut all = self.all.lock();
        if let Some(standing) = all.iter_mut().find(|standing| standing.peer.address == address) {
            change(standing);
        }
        drop(all);
        self.changed.notify_waiters();
    }

    pub(super) fn gave(&self, address: &str, bytes: u64) {
        self.change(address, |standing| {
            standing.bytes += bytes;
            standing.unreached.reset();
        });
    }

    /// The parent did not give piece `index` and why; its fault, if it has one.
    pub(super) fn failed(&self, address: &str, index: u32, error: LinkError) -> Option<ParentFault> {
        let (shun, fault) = match error {
            LinkError::Closed => {
                self.change(address, Standing::was_unreached);
                return Some(ParentFault::Unreachable);
            }
            LinkError::Refused(Refusal::Missing) => (None, None),
            LinkError::Refused(Refusal::Busy) => (Some(BUSY_FOR), None),
            LinkError::Refused(Refusal::Refused) => (Some(REFUSED_FOR), Some(ParentFault::Refused)),
            LinkError::Slow => (Some(SLOW_FOR), Some(ParentFault::Slow)),
            LinkError::Trickle => (Some(TRICKLE_FOR), Some(ParentFault::Slow)),
            LinkError::Protocol => (Some(PROTOCOL_FOR), Some(ParentFault::Unreachable)),
        };
        self.change(address, |standing| {
            if error == LinkError::Refused(Refusal::Missing)
                && let Some(have) = &mut standing.have
            {
                have.clear(index);
            }
            standing.shunned_until = shun.map(|time| Instant::now() + time).or(standing.shunned_until);
        });
        fault
    }
}

impl Standing {
    fn new(peer: Peer) -> Self {
        Self {
            peer,
            link: None,
            is_connecting: false,
            have: None,
            asked_at: None,
            shunned_until: None,
            unreached: Backoff::new(UNREACHED_MIN, UNREACHED_MAX),
            bytes: 0,
        }
    }

    fn was_unreached(&mut self) {
        // All pieces that were on their way end with their connection, which is one time.
        if !self.is_shunned(Instant::now()) {
            self.shunned_until = Some(Instant::now() + self.unreached.next());
        }
    }

    fn live(&self) -> Option<&Arc<Link>> {
        self.link.as_ref().filter(|link| !link.is_closed())
    }

    fn is_shunned(&self, now: Instant) -> bool {
        self.shunned_until.is_some_and(|until| now < until)
    }

    fn has(&self, index: u32) -> bool {
        self.have.as_ref().is_some_and(|have| have.get(index))
    }

    fn needs_connection(&self, now: Instant) -> bool {
        self.live().is_none() && !self.is_connecting && !self.is_shunned(now)
    }

    fn needs_asking(&self, now: Instant) -> bool {
        let is_stale = self.asked_at.is_none_or(|at| now > at + ASK_AGAIN);
        let is_full = self.have.as_ref().is_some_and(|have| have.len() > 0 && have.is_full());
        self.live().is_some() && !self.is_shunned(now) && is_stale && !is_full
    }
}

/// Keeps the parents' connections and knows what each has, until the layer is complete or closed.
pub(super) async fn keep(open: Arc<Open>) {
    let begun = Instant::now();
    let mut peers = open.peers.subscribe();
    let mut found = open.found.subscribe();
    let mut members = open.shared.members.clone();
    loop {
        let wanted = wanted(&open, begun.elapsed() > SCHEDULER_PATIENCE);
        attend(&open, wanted);
        if open.is_complete() {
            open.standings.all.lock().clear();
            open.leave_mesh();
            // Who lost a piece this moment may have found that we still keep them.
            if !open.is_complete() {
                open.join_mesh();
            }
            return;
        }
        // A short wait at first, for the scheduler's patience to end.
        tokio::select! {
            _ = peers.changed() => {}
            _ = found.changed() => {}
            Ok(()) = members.changed() => {}
            () = sleep(LOOK_EVERY) => {}
        }
    }
}

/// The parents that the scheduler names; seeds of our own choice if it is silent or knows nobody.
fn wanted(open: &Open, scheduler_is_late: bool) -> Vec<Peer> {
    let told = open.peers.borrow().clone();
    let is_told = told.is_some();
    let mut wanted: Vec<Peer> = Vec::new();
    let told = told.unwrap_or_default();
    for peer in told.parents.into_iter().chain(told.seed) {
        if wanted.iter().all(|other| other.address != peer.address) {
            wanted.push(peer);
        }
    }
    let is_alone =
        wanted.is_empty() && (is_told || scheduler_is_late || !open.shared.control.has_scheduler(open.task));
    let is_stuck = !wanted.is_empty() && scheduler_is_late && open.standings.live_count() == 0;
    if is_alone || is_stuck {
        let seeds = open.shared.members.borrow().seeds.clone();
        let others = rendezvous::order(open.task, &seeds).into_iter();
        let others = others.filter(|seed| seed.address != open.shared.address).take(SEEDS_UNNAMED);
        for seed in others {
            if wanted.iter().all(|other| other.address != seed.address) {
                wanted.push(Peer { node: seed.node.to_string(), address: seed.address, is_seed: true });
            }
        }
    }
    wanted
}

/// Brings the standings up to `wanted`: drops who is not named any more, connects to the new ones, asks what they have.
fn attend(open: &Arc<Open>, wanted: Vec<Peer>) {
    let now = Instant::now();
    let (mut connect, mut ask) = (Vec::new(), Vec::new());
    // Connections are made while the map is on its way; without it there is nothing to ask for, nor a right to.
    let has_map = open.map_now().is_some();
    let mut all = open.standings.all.lock();
    all.retain(|standing| wanted.iter().any(|peer| peer.address == standing.peer.address));
    for peer in wanted {
        if open.shared.links.is_liar(&peer.address) {
            all.retain(|standing| standing.peer.address != peer.address);
        } else if all.iter().all(|standing| standing.peer.address != peer.address) {
            all.push(Standing::new(peer));
        }
    }
    for standing in all.iter_mut() {
        if standing.needs_connection(now) {
            standing.is_connecting = true;
            connect.push(standing.peer.clone());
        } else if has_map && standing.needs_asking(now) {
            standing.asked_at = Some(now);
            ask.extend(standing.live().cloned().map(|link| (standing.peer.clone(), link)));
        }
    }
    drop(all);
    for peer in connect {
        spawn(open, connect_to(open.clone(), peer));
    }
    for (peer, link) in ask {
        spawn(open, ask_have(open.clone(), peer, link));
    }
}

fn spawn(open: &Open, work: impl Future<Output = ()> + Send + 'static) {
    let stop = open.stop.clone();
    open.shared.tasks.spawn_alone("parent", async move {
        stop.run_until_cancelled(work).await;
    });
}

async fn connect_to(open: Arc<Open>, peer: Peer) {
    let link = open.shared.links.get(&open.shared, &peer.address).await;
    match link.and_then(|link| expected(&peer, link)) {
        Ok(link) => {
            let has_map = open.map_now().is_some();
            open.standings.change(&peer.address, |standing| {
                standing.link = Some(link.clone());
                standing.is_connecting = false;
                standing.asked_at = has_map.then(Instant::now);
            });
            if has_map {
                ask_have(open, peer, link).await;
            }
        }
        Err(error) => {
            tracing::debug!(parent = peer.node, %error, "a parent can't be reached");
            open.standings.change(&peer.address, |standing| {
                standing.is_connecting = false;
                standing.was_unreached();
            });
            open.shared.control.report(open.task, &peer.node, ParentFault::Unreachable);
        }
    }
}

/// An address may have gone to another member of the cluster.
fn expected(peer: &Peer, link: Arc<Link>) -> std::io::Result<Arc<Link>> {
    if link.node == peer.node {
        return Ok(link);
    }
    Err(std::io::Error::other(format!("{} answers there, not {}", link.node, peer.node)))
}

async fn ask_have(open: Arc<Open>, peer: Peer, link: Arc<Link>) {
    let repository = open.repository();
    let asked = timeout(2 * HAVE_PATIENCE, link.have(open.task, &repository, HAVE_PATIENCE)).await;
    match asked.unwrap_or(Err(LinkError::Slow)) {
        Ok(have) => open.standings.change(&peer.address, |standing| standing.have = Some(have)),
        // It has no map yet: it is asked again soon.
        Err(LinkError::Refused(Refusal::Missing)) => {}
        // A seed's proof that our repository holds the layer has aged, or it never saw one.
        Err(LinkError::Refused(Refusal::Refused)) if peer.is_seed && search::prove(&open, &peer).await => {
            open.standings.change(&peer.address, |standing| standing.asked_at = None);
        }
        Err(error) => {
            if let Some(fault) = open.standings.failed(&peer.address, 0, error) {
                open.shared.control.report(open.task, &peer.node, fault);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: &str = "seed:7420";

    fn standings() -> Standings {
        let peer = Peer { node: "seed".to_owned(), address: SEED.to_owned(), is_seed: true };
        Standings { all: Mutex::new(vec![Standing::new(peer)]), changed: Notify::new() }
    }

    /// How long from now the seed is left alone.
    fn shunned_for(standings: &Standings) -> Duration {
        let until = standings.all.lock()[0].shunned_until;
        until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()))
    }

    fn end_of_pause(standings: &Standings) {
        standings.change(SEED, |standing| standing.shunned_until = None);
    }

    #[test]
    fn who_is_not_reached_is_left_alone_for_longer_each_time() {
        let standings = standings();
        standings.failed(SEED, 0, LinkError::Closed);
        let pause = shunned_for(&standings);
        assert!(pause > Duration::ZERO && pause <= UNREACHED_MIN, "{pause:?}");
        for _ in 0..8 {
            end_of_pause(&standings);
            standings.change(SEED, Standing::was_unreached);
        }
        assert!(shunned_for(&standings) > UNREACHED_MAX / 3);
        standings.gave(SEED, 1);
        end_of_pause(&standings);
        standings.failed(SEED, 0, LinkError::Closed);
        assert!(shunned_for(&standings) <= UNREACHED_MIN);
    }

    #[test]
    fn all_pieces_of_a_lost_connection_count_once() {
        let standings = standings();
        for piece in 0..16 {
            standings.failed(SEED, piece, LinkError::Closed);
        }
        let pause = shunned_for(&standings);
        assert!(pause > Duration::ZERO && pause <= UNREACHED_MIN, "{pause:?}");
    }
}
