//! The task that owns the orders which are not over: it applies [`crate::core::job`]'s rules, tells members, and writes down.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use darter_identity::attend::{FETCH_LAYERS_MAX, PreheatUpdate};
use darter_proto::v1::manager_message::Message;
use darter_proto::v1::{Credential, FetchLayer, FetchOrder, PreheatCancel, PreheatOrder};
use darter_types::{NodeName, Role};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};

use super::{Command, OPEN_MAX, OPEN_PARTS_MAX, PreheatError};
use crate::core::job::{Job, Part, Seat, State, held_to};
use crate::core::order::Preheat;
use crate::db::Store;
use crate::root::now;
use crate::roster::{NotSent, Roster};

/// Parts that a member has at a time: it works on a few, the next ones are at hand.
const AT_MEMBER_MAX: usize = 8;

/// Parts that all nodes together have at a time, but for those with which they don't get on. The first ones are parents for those
/// that come later, and what they report is written down.
const AT_NODES_MAX: usize = 64;

/// How much longer than the order a node works on it, in seconds: as a rule it is told to stop.
const NODE_SLACK: u64 = 10;

/// How late an order that is out of time may be ended, or a node that is gone noticed.
const LOOK_AT_CLOCK_EVERY: Duration = Duration::from_secs(1);

/// An order that is not over. Its parts are in the jobs; `preheat` has them while it is written down.
struct Entry {
    preheat: Preheat,
    jobs: Vec<Job>,
    /// Never written down; gone with the order.
    credential: Option<Credential>,
}

impl Entry {
    fn new(mut preheat: Preheat, credential: Option<Credential>) -> Self {
        let jobs = std::mem::take(&mut preheat.parts).into_iter().map(Job::new).collect();
        Self { preheat, jobs, credential }
    }

    /// How far the order is, with all its parts.
    fn now(&self) -> Preheat {
        let parts: Vec<Part> = self.jobs.iter().map(|job| job.part.clone()).collect();
        let mut preheat = Preheat { parts, ..self.preheat.clone() };
        preheat.refold(now());
        preheat
    }

    fn is_over(&self) -> bool {
        self.jobs.iter().all(Job::is_over)
    }

    /// What a member says of this part, as far as it is to say anything; `None` if the order has no such part.
    fn held(&self, at: usize, update: PreheatUpdate) -> Option<PreheatUpdate> {
        let part = &self.jobs.get(at)?.part;
        if part.role == Role::Seed {
            return Some(update);
        }
        let mut parts = self.jobs.iter().map(|job| &job.part);
        let made = parts.find(|made| made.image == part.image && can_be_fetched(made));
        made.map(|made| held_to(made, update))
    }

    /// Parts that no member has that is there.
    fn waiting(&self, attending: &[Seat]) -> Vec<usize> {
        (0..self.jobs.len()).filter(|at| self.jobs[*at].waits(attending)).collect()
    }

    /// What has become at their seeds of the images that nodes wait for: they fetch what one of those has made.
    fn made(&self, waiting: &[usize]) -> HashMap<String, Made> {
        let parts = waiting.iter().map(|at| &self.jobs[*at].part).filter(|part| part.role == Role::Node);
        let wanted: HashSet<&str> = parts.map(|part| part.image.as_str()).collect();
        let is_wanted = |part: &&Part| part.role == Role::Seed && wanted.contains(part.image.as_str());
        let mut images = HashMap::new();
        for part in self.jobs.iter().map(|job| &job.part).filter(is_wanted) {
            let made = images.entry(part.image.clone()).or_insert(Made::Never(String::new()));
            match (&made, part.state) {
                (Made::Yes(_), _) => {}
                (_, State::Succeeded) => *made = order_of(part),
                (Made::Never(_), State::Pending | State::Running) => *made = Made::NotYet,
                (Made::Never(words), State::Failed | State::Cancelled) if words.is_empty() => {
                    *made = Made::Never(part.error.clone().unwrap_or_else(|| "it was not made".to_owned()));
                }
                (Made::Never(_) | Made::NotYet, _) => {}
            }
        }
        images
    }
}

/// Whether nodes can fetch an image.
enum Made {
    /// What they are told, but for what is each one's own.
    Yes(FetchOrder),
    NotYet,
    /// Why not.
    Never(String),
}

/// Whether a seed has made it, and said all that nodes have to know.
fn can_be_fetched(part: &Part) -> bool {
    let is_made = part.role == Role::Seed && part.state == State::Succeeded;
    is_made && part.repository.is_some() && part.layers.len() <= FETCH_LAYERS_MAX
}

fn order_of(part: &Part) -> Made {
    let Some(repository) = part.repository.as_ref().filter(|_| can_be_fetched(part)) else {
        return Made::Never("the seed does not say where it found the layers, or names too many".to_owned());
    };
    let layer = |layer: &darter_identity::attend::PreheatLayer| FetchLayer {
        diff_id: layer.diff_id.as_bytes().to_vec(),
        blob: layer.blob.as_bytes().to_vec(),
        size: layer.size,
    };
    Made::Yes(FetchOrder {
        image: part.image.clone(),
        repository: repository.to_string(),
        layers: part.layers.iter().map(layer).collect(),
        ..FetchOrder::default()
    })
}

/// How a part is named to its member.
fn part_id(id: &str, at: usize) -> String {
    format!("{id}.{at}")
}

fn part_of(id: &str) -> Option<(&str, usize)> {
    let (id, at) = id.rsplit_once('.')?;
    Some((id, at.parse().ok()?))
}

pub(super) struct Desk {
    store: Store,
    roster: Roster,
    seats: watch::Receiver<Vec<Seat>>,
    orders: HashMap<String, Entry>,
    /// Parts at nodes that tell nothing new, as of the last look at the clock.
    quiet: usize,
}

/// An order of which these parts have changed.
struct Changed {
    preheat: Preheat,
    parts: Vec<usize>,
}

/// What members have: parts at each stay of one, and at all nodes together.
#[derive(Default)]
struct Load {
    at: HashMap<u64, usize>,
    at_nodes: usize,
}

impl Load {
    /// All that is at members now.
    fn of<'a>(jobs: impl Iterator<Item = &'a Job>, now: u64) -> Self {
        let mut load = Self::default();
        for job in jobs {
            job.seat().into_iter().for_each(|seat| load.add(seat, job.is_quiet(now)));
        }
        load
    }

    /// Who has a part without getting on keeps nobody else from having one.
    fn add(&mut self, seat: &Seat, is_quiet: bool) {
        *self.at.entry(seat.visit).or_default() += 1;
        self.at_nodes += usize::from(seat.role == Role::Node && !is_quiet);
    }

    fn has_room(&self, seat: &Seat) -> bool {
        let at_member = self.at.get(&seat.visit).copied().unwrap_or_default();
        at_member < AT_MEMBER_MAX && (seat.role != Role::Node || self.at_nodes < AT_NODES_MAX)
    }
}

impl Desk {
    pub(super) fn new(store: Store, seats: watch::Receiver<Vec<Seat>>, roster: Roster) -> Self {
        Self { store, roster, seats, orders: HashMap::new(), quiet: 0 }
    }

    pub(super) async fn run(mut self, unfinished: Vec<Preheat>, mut commands: mpsc::Receiver<Command>) {
        self.resume(unfinished).await;
        let mut clock = interval(LOOK_AT_CLOCK_EVERY);
        clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => self.handle(command).await,
                    None => return,
                },
                changed = self.seats.changed() => {
                    changed.expect("the desk holds the roster, which sends");
                    self.place_all().await;
                }
                _ = clock.tick() => {
                    self.end_late(now()).await;
                    self.look_for_nodes(now()).await;
                    self.look_for_quiet(now()).await;
                }
            }
        }
    }

    /// What a former process left undone. Seeds need the credential of an order that came with one, which was in that
    /// process's memory only; nodes don't.
    async fn resume(&mut self, unfinished: Vec<Preheat>) {
        for preheat in unfinished {
            let mut entry = Entry::new(preheat, None);
            for job in entry.jobs.iter_mut().filter(|job| !job.is_over()) {
                job.part.state = State::Pending;
                if entry.preheat.private && job.part.role == Role::Seed {
                    let words = "the manager restarted, and credentials are not kept: order it again";
                    job.stop(State::Failed, words);
                }
            }
            let preheat = entry.now();
            let all: Vec<usize> = (0..preheat.parts.len()).collect();
            self.write(&preheat, &all).await;
            if !entry.is_over() {
                self.orders.insert(preheat.id, entry);
            }
        }
        self.place_all().await;
    }

    async fn handle(&mut self, command: Command) {
        match command {
            Command::Order(preheat, credential, reply) => {
                let taken = self.order(preheat, credential).await;
                let _caller_left = reply.send(taken);
            }
            Command::Cancel(id, reply) => {
                let cancelled = self.cancel(&id).await;
                let _caller_left = reply.send(cancelled);
            }
            Command::Update(seat, update) => self.update(&seat, update).await,
        }
    }

    async fn order(
        &mut self,
        preheat: Preheat,
        credential: Option<Credential>,
    ) -> Result<Preheat, PreheatError> {
        let parts: usize = self.orders.values().map(|entry| entry.jobs.len()).sum();
        if self.orders.len() >= OPEN_MAX || parts + preheat.parts.len() > OPEN_PARTS_MAX {
            return Err(PreheatError::TooMany);
        }
        let written = preheat.clone();
        self.store.call(move |storage| storage.put_preheat(&written)).await?;
        let id = preheat.id.clone();
        self.orders.insert(id.clone(), Entry::new(preheat, credential));
        let changed = self.place(std::slice::from_ref(&id)).pop();
        let preheat = self.orders.get(&id).expect("it was put there").now();
        if let Some(Changed { parts, .. }) = changed {
            self.close(preheat.clone(), &parts).await;
        }
        Ok(preheat)
    }

    async fn cancel(&mut self, id: &str) -> Result<Option<Preheat>, PreheatError> {
        if let Some(preheat) = self.stop(id, State::Cancelled, "cancelled").await {
            return Ok(Some(preheat));
        }
        let id = id.to_owned();
        Ok(self.store.call(move |storage| storage.preheat(&id)).await?)
    }

    async fn end_late(&mut self, now: u64) {
        let late = |entry: &&Entry| entry.preheat.ends_by() <= now;
        let late: Vec<_> = self.orders.values().filter(late).map(|entry| entry.preheat.id.clone()).collect();
        for id in late {
            let seconds = self.orders.get(&id).map_or(0, |entry| entry.preheat.timeout_seconds);
            self.stop(&id, State::Failed, &format!("not done within {seconds} s")).await;
        }
    }

    /// Notices nodes that are away for too long, and those that came back.
    async fn look_for_nodes(&mut self, now: u64) {
        if self.orders.is_empty() {
            return;
        }
        let is_node = |seat: &&Seat| seat.role == Role::Node;
        let here: HashSet<NodeName> =
            self.seats.borrow().iter().filter(is_node).map(|seat| seat.node.clone()).collect();
        let mut changed = Vec::new();
        for entry in self.orders.values_mut() {
            let mut parts = Vec::new();
            for (at, job) in entry.jobs.iter_mut().enumerate().filter(|(_, job)| !job.is_over()) {
                let before = job.mark();
                job.look(job.part.pinned.as_ref().is_some_and(|node| here.contains(node)), now);
                parts.extend(Some(at).filter(|_| job.mark() != before));
            }
            if !parts.is_empty() {
                changed.push(Changed { preheat: entry.now(), parts });
            }
        }
        for Changed { preheat, parts } in changed {
            self.close(preheat, &parts).await;
        }
    }

    /// Gives others the places of nodes that don't get on.
    async fn look_for_quiet(&mut self, now: u64) {
        let jobs = self.orders.values().flat_map(|entry| &entry.jobs);
        let quiet = jobs.filter(|job| job.part.role == Role::Node && job.is_quiet(now)).count();
        let is_more = quiet > std::mem::replace(&mut self.quiet, quiet);
        if is_more {
            tracing::info!(
                quiet,
                "nodes tell nothing new of what they were ordered: others have their places"
            );
            self.place_all().await;
        }
    }

    /// Ends what is left of an order, tells the members that have parts of it, and gives others their room.
    async fn stop(&mut self, id: &str, state: State, words: &str) -> Option<Preheat> {
        let mut entry = self.orders.remove(id)?;
        for (at, job) in entry.jobs.iter_mut().enumerate() {
            if let Some(seat) = job.stop(state, words) {
                self.tell_to_stop(&seat, &part_id(id, at));
            }
        }
        let preheat = entry.now();
        let all: Vec<usize> = (0..preheat.parts.len()).collect();
        self.close(preheat.clone(), &all).await;
        self.place_all().await;
        Some(preheat)
    }

    /// A member that can't be told goes on for nothing, which harms nobody; it is told again when it reports.
    fn tell_to_stop(&self, seat: &Seat, id: &str) {
        if let Err(reason) = self.roster.send(seat, Message::Cancel(PreheatCancel { id: id.to_owned() })) {
            tracing::debug!(id, member = %seat.node, ?reason, "a member could not be told to stop");
        }
    }

    async fn update(&mut self, seat: &Seat, update: PreheatUpdate) {
        let (name, done) = (update.id.clone(), update.done);
        let attending = self.seats.borrow().clone();
        let found = part_of(&name).and_then(|(id, at)| Some((at, self.orders.get_mut(id)?)));
        let found = found.and_then(|(at, entry)| Some((at, entry.held(at, update)?, entry)));
        let Some((at, update, entry)) = found else {
            // Cancelled, or out of time: this member need not go on.
            if !done {
                self.tell_to_stop(seat, &name);
            }
            return;
        };
        if !entry.jobs[at].update(seat, update, &attending, now()) {
            return;
        }
        let preheat = entry.now();
        self.close(preheat, &[at]).await;
        if done {
            self.place_all().await;
        }
    }

    /// Gives every part that waits to a member that has room, and writes down what changed.
    async fn place_all(&mut self) {
        let ids: Vec<String> = self.orders.keys().cloned().collect();
        for Changed { preheat, parts } in self.place(&ids) {
            self.close(preheat, &parts).await;
        }
    }

    /// Gives these orders' parts to members; returns the orders of which something changed.
    fn place(&mut self, ids: &[String]) -> Vec<Changed> {
        let attending = self.seats.borrow().clone();
        let mut load = Load::of(self.orders.values().flat_map(|entry| &entry.jobs), now());
        let mut changed = Vec::new();
        for id in ids {
            let Some(entry) = self.orders.get_mut(id) else { continue };
            let waiting = entry.waiting(&attending);
            let made = entry.made(&waiting);
            let mut parts = Vec::new();
            for at in waiting {
                let before = entry.jobs[at].mark();
                give(entry, at, &made, &attending, &mut load, &self.roster);
                parts.extend(Some(at).filter(|_| entry.jobs[at].mark() != before));
            }
            if !parts.is_empty() {
                changed.push(Changed { preheat: entry.now(), parts });
            }
        }
        changed
    }

    /// Writes down how far an order is, and of its parts these; forgets it if it is over.
    async fn close(&mut self, preheat: Preheat, parts: &[usize]) {
        self.write(&preheat, parts).await;
        if preheat.state.is_over() {
            self.orders.remove(&preheat.id);
            let (images, state) = (preheat.images().join(" "), preheat.state.as_str());
            tracing::info!(id = preheat.id, images, state, error = preheat.error, "preheat over");
        }
    }

    /// An order goes on even if it can't be written down.
    async fn write(&self, preheat: &Preheat, parts: &[usize]) {
        let (written, parts) = (preheat.clone(), parts.to_vec());
        if let Err(error) = self.store.call(move |storage| storage.put_parts(&written, &parts)).await {
            tracing::error!(%error, id = preheat.id, "can't write down the state of a preheat");
        }
    }
}

/// Gives a part to a member that takes it, if it waits for one.
fn give(
    entry: &mut Entry,
    at: usize,
    made: &HashMap<String, Made>,
    attending: &[Seat],
    load: &mut Load,
    roster: &Roster,
) {
    let Entry { preheat, jobs, credential } = entry;
    let job = &mut jobs[at];
    let fetch = match made.get(&job.part.image).filter(|_| job.part.role == Role::Node) {
        Some(Made::NotYet) => return,
        Some(Made::Never(words)) => {
            // It was not given to anybody.
            job.stop(State::Failed, &format!("no seed has made it: {words}"));
            return;
        }
        Some(Made::Yes(order)) => Some(order),
        None => None,
    };
    while let Some(seat) = job.place(attending, |seat| load.has_room(seat)) {
        let id = part_id(&preheat.id, at);
        let order = match fetch {
            Some(order) => {
                let seconds = preheat.ends_by().saturating_sub(now()) + NODE_SLACK;
                Message::Fetch(FetchOrder { id, seconds, ..order.clone() })
            }
            None => Message::Preheat(PreheatOrder {
                id,
                image: job.part.image.clone(),
                platform: preheat.platform.clone().unwrap_or_default(),
                credential: credential.clone(),
            }),
        };
        match roster.send(&seat, order) {
            // A member that is gone gives the part back with the change of seats that follows.
            Ok(()) | Err(NotSent::Gone) => {
                job.stir(now());
                load.add(&seat, false);
                return;
            }
            Err(NotSent::Full) => job.failed_at(&seat, "it takes no more orders".to_owned(), attending),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::order::Scope;

    #[test]
    fn what_seeds_have_made_is_looked_for_only_where_a_node_waits_for_it() {
        let (running, seat) = at_node(1, 0);
        let (mut pending, _) = at_node(2, 0);
        pending.part.image = "r.example/b:1".to_owned();
        let seeds = ["r.example/a:1", "r.example/b:1"].map(|image| {
            let mut part = Part::new(image.to_owned(), Role::Seed, None);
            (part.state, part.repository) = (State::Succeeded, Some("https://r.example/x".parse().unwrap()));
            Job::new(part)
        });
        let preheat = Preheat {
            id: "p".to_owned(),
            platform: None,
            scope: Scope::AllNodes,
            private: false,
            timeout_seconds: 60,
            parts: Vec::new(),
            away: Vec::new(),
            state: State::Running,
            error: None,
            created_at: 0,
            ended_at: None,
        };
        let jobs = seeds.into_iter().chain([running, pending]).collect();
        let entry = Entry { preheat, jobs, credential: None };
        // The second one's node is not there.
        let waiting = entry.waiting(&[seat]);
        assert_eq!(waiting, [3]);
        let made = entry.made(&waiting);
        assert!(matches!(made.get("r.example/b:1"), Some(Made::Yes(_))) && made.len() == 1);
        assert!(entry.made(&[]).is_empty());
    }

    fn at_node(number: u64, given_at: u64) -> (Job, Seat) {
        let node: NodeName = format!("node-{number}").parse().unwrap();
        let mut job = Job::new(Part::new("r.example/a:1".to_owned(), Role::Node, Some(node.clone())));
        let seat = Seat { role: Role::Node, node, visit: number };
        assert!(job.place(std::slice::from_ref(&seat), |_| true).is_some());
        job.stir(given_at);
        (job, seat)
    }

    #[test]
    fn nodes_that_do_not_get_on_keep_no_place_from_others() {
        let (jobs, seats): (Vec<_>, Vec<_>) = (0..AT_NODES_MAX as u64).map(|at| at_node(at, 1000)).unzip();
        let other = Seat { role: Role::Node, node: "other".parse().unwrap(), visit: 999 };
        assert!(!Load::of(jobs.iter(), 1060).has_room(&other));
        let mut later = Load::of(jobs.iter(), 1200);
        assert!(later.has_room(&other));
        // But each has what it has.
        (1..AT_MEMBER_MAX).for_each(|_| later.add(&seats[0], true));
        assert!(!later.has_room(&seats[0]));
    }
}
