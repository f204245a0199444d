//! Drives preheat orders: one task owns the jobs, applies [`crate::core::job`]'s rules, tells seeds and writes down.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use darter_daemon::tasks::Tasks;
use darter_identity::attend::PreheatUpdate;
use darter_proto::v1::manager_message::Message;
use darter_proto::v1::{Credential, PreheatCancel, PreheatOrder};
use darter_types::{NodeName, Role};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{MissedTickBehavior, interval};

use crate::core::job::{Job, Part, Seat, State};
use crate::core::order::{self, OrderError, Preheat, Scope};
use crate::db::{StorageError, Store};
use crate::root::now;
use crate::roster::{NotSent, Roster};

/// Orders that are not over, and their parts. One more is refused: seeds work on a few at a time anyway.
const OPEN_MAX: usize = 1_000;
const OPEN_PARTS_MAX: usize = 10_000;

/// Parts that a seed has at a time: it works on four, the next ones are at hand.
const AT_SEED_MAX: usize = 8;

/// How late an order that is out of time may be ended.
const LOOK_AT_CLOCK_EVERY: Duration = Duration::from_secs(1);

/// Orders of one list.
const LIST_MAX: usize = 100;

/// Requests and reports on their way to the task; who sends waits.
const COMMANDS_MAX: usize = 256;

#[derive(Debug, thiserror::Error)]
pub(crate) enum PreheatError {
    #[error(
        "{OPEN_MAX} preheats, or {OPEN_PARTS_MAX} images at seeds, are waiting or under way: order again when some are over"
    )]
    TooMany,
    #[error(transparent)]
    Order(#[from] OrderError),
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error("the manager is stopping")]
    Stopping,
}

/// What somebody wants to have preheated.
pub(crate) struct Wish {
    pub(crate) id: String,
    pub(crate) images: Vec<String>,
    /// `None`: the seed's own.
    pub(crate) platform: Option<String>,
    pub(crate) scope: Scope,
    pub(crate) timeout_seconds: Option<u64>,
    pub(crate) credential: Option<Credential>,
}

enum Command {
    Order(Preheat, Option<Credential>, oneshot::Sender<Result<Preheat, PreheatError>>),
    Cancel(String, oneshot::Sender<Result<Option<Preheat>, PreheatError>>),
    Update(Seat, PreheatUpdate),
}

/// The handle to the task.
#[derive(Clone)]
pub(crate) struct Preheats {
    commands: mpsc::Sender<Command>,
    seats: watch::Receiver<Vec<Seat>>,
    store: Store,
}

impl Preheats {
    pub(crate) fn start(store: Store, roster: Roster, unfinished: Vec<Preheat>, tasks: &Tasks) -> Self {
        let (commands, received) = mpsc::channel(COMMANDS_MAX);
        let seats = roster.seats();
        let desk = Desk { store: store.clone(), seats: seats.clone(), roster, orders: HashMap::new() };
        tasks.spawn_until_stop("preheats", desk.run(unfinished, received));
        Self { commands, seats, store }
    }

    /// Takes an order; each part goes to a seed as soon as the right one attends and has room.
    pub(crate) async fn order(&self, wish: Wish) -> Result<Preheat, PreheatError> {
        let attending: Vec<NodeName> = self.seats.borrow().iter().map(|seat| seat.node.clone()).collect();
        let joined = self.joined_seeds(&wish.scope).await?;
        wish.platform.as_deref().map_or(Ok(()), order::checked_platform)?;
        let preheat = Preheat {
            parts: order::parts(&wish.images, &wish.scope, &attending, &joined)?,
            timeout_seconds: order::checked_timeout(wish.timeout_seconds)?,
            id: wish.id,
            platform: wish.platform,
            scope: wish.scope,
            private: wish.credential.is_some(),
            state: State::Pending,
            error: None,
            created_at: now(),
            ended_at: None,
        };
        self.ask(|reply| Command::Order(preheat, wish.credential, reply)).await?
    }

    /// Asked for only where an order names seeds.
    async fn joined_seeds(&self, scope: &Scope) -> Result<BTreeSet<NodeName>, PreheatError> {
        if !matches!(scope, Scope::Seeds(_)) {
            return Ok(BTreeSet::new());
        }
        let members = self.store.call(|storage| storage.members()).await?;
        let seeds = members.into_iter().filter(|member| member.role == Role::Seed && !member.revoked);
        Ok(seeds.map(|member| member.node).collect())
    }

    /// Ends an order and says what became of it; `None` if there is no such order.
    pub(crate) async fn cancel(&self, id: String) -> Result<Option<Preheat>, PreheatError> {
        self.ask(|reply| Command::Cancel(id, reply)).await?
    }

    /// `None` if there is no such order.
    pub(crate) async fn get(&self, id: String) -> Result<Option<Preheat>, PreheatError> {
        Ok(self.store.call(move |storage| storage.preheat(&id)).await?)
    }

    /// The newest orders, without layers.
    pub(crate) async fn list(&self) -> Result<Vec<Preheat>, PreheatError> {
        Ok(self.store.call(move |storage| storage.preheats(LIST_MAX)).await?)
    }

    pub(crate) async fn report(&self, seat: Seat, update: PreheatUpdate) {
        // It fails only while stopping; the seed is asked again by the next manager.
        let _ = self.commands.send(Command::Update(seat, update)).await;
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, PreheatError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| PreheatError::Stopping)?;
        answer.await.map_err(|_| PreheatError::Stopping)
    }
}

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
}

/// How a part is named to its seed.
fn part_id(id: &str, at: usize) -> String {
    format!("{id}.{at}")
}

fn part_of(id: &str) -> Option<(&str, usize)> {
    let (id, at) = id.rsplit_once('.')?;
    Some((id, at.parse().ok()?))
}

struct Desk {
    store: Store,
    roster: Roster,
    seats: watch::Receiver<Vec<Seat>>,
    orders: HashMap<String, Entry>,
}

impl Desk {
    async fn run(mut self, unfinished: Vec<Preheat>, mut commands: mpsc::Receiver<Command>) {
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
                _ = clock.tick() => self.end_late(now()).await,
            }
        }
    }

    /// What a former process left undone: orders with credentials can't go on, as those were in its memory only.
    async fn resume(&mut self, unfinished: Vec<Preheat>) {
        for preheat in unfinished {
            let mut entry = Entry::new(preheat, None);
            for job in entry.jobs.iter_mut().filter(|job| !job.is_over()) {
                job.part.state = State::Pending;
                if entry.preheat.private {
                    let words = "the manager restarted, and credentials are not kept: order it again";
                    job.stop(State::Failed, words);
                }
            }
            let preheat = entry.now();
            self.write(&preheat).await;
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
        self.place(std::slice::from_ref(&id));
        let entry = self.orders.get(&id).expect("it was put there");
        let preheat = entry.now();
        self.close(preheat.clone()).await;
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

    /// Ends what is left of an order, tells the seeds that have parts of it, and gives others their room.
    async fn stop(&mut self, id: &str, state: State, words: &str) -> Option<Preheat> {
        let mut entry = self.orders.remove(id)?;
        for (at, job) in entry.jobs.iter_mut().enumerate() {
            if let Some(seat) = job.stop(state, words) {
                self.tell_to_stop(&seat, &part_id(id, at));
            }
        }
        let preheat = entry.now();
        self.close(preheat.clone()).await;
        self.place_all().await;
        Some(preheat)
    }

    /// A seed that can't be told goes on for nothing, which harms nobody; it is told again when it reports.
    fn tell_to_stop(&self, seat: &Seat, id: &str) {
        if let Err(reason) = self.roster.send(seat, Message::Cancel(PreheatCancel { id: id.to_owned() })) {
            tracing::debug!(id, seed = %seat.node, ?reason, "a seed could not be told to stop");
        }
    }

    async fn update(&mut self, seat: &Seat, update: PreheatUpdate) {
        let (name, done) = (update.id.clone(), update.done);
        let attending = self.seats.borrow().clone();
        let found = part_of(&name).and_then(|(id, at)| Some((at, self.orders.get_mut(id)?)));
        let job = found.and_then(|(at, entry)| Some((at, entry.jobs.get_mut(at)?)));
        let Some((at, job)) = job else {
            // Cancelled, or out of time: this seed need not go on.
            if !done {
                self.tell_to_stop(seat, &name);
            }
            return;
        };
        if !job.update(seat, update, &attending) {
            return;
        }
        let (id, _) = part_of(&name).expect("it has just been one");
        let entry = self.orders.get(id).expect("its job was just found");
        let preheat = entry.now();
        if done {
            self.close(preheat).await;
            self.place_all().await;
        } else {
            self.write_part(preheat, at).await;
        }
    }

    /// Gives every part that waits to a seed that has room, and writes down what changed.
    async fn place_all(&mut self) {
        let ids: Vec<String> = self.orders.keys().cloned().collect();
        for preheat in self.place(&ids) {
            self.close(preheat).await;
        }
    }

    /// Gives these orders' parts to seeds; returns the orders of which something changed.
    fn place(&mut self, ids: &[String]) -> Vec<Preheat> {
        let attending = self.seats.borrow().clone();
        let mut load: HashMap<u64, usize> = HashMap::new();
        for job in self.orders.values().flat_map(|entry| &entry.jobs) {
            if let Some(seat) = job.seat() {
                *load.entry(seat.visit).or_default() += 1;
            }
        }
        let mut changed = Vec::new();
        for id in ids {
            let Some(entry) = self.orders.get_mut(id) else { continue };
            let before = entry.now();
            for at in 0..entry.jobs.len() {
                give(entry, at, &attending, &mut load, &self.roster);
            }
            changed.extend(Some(entry.now()).filter(|after| *after != before));
        }
        changed
    }

    /// Writes an order down, and forgets it if it is over.
    async fn close(&mut self, preheat: Preheat) {
        self.write(&preheat).await;
        if preheat.state.is_over() {
            self.orders.remove(&preheat.id);
            let (images, state) = (preheat.images().join(" "), preheat.state.as_str());
            tracing::info!(id = preheat.id, images, state, error = preheat.error, "preheat over");
        }
    }

    /// An order goes on even if it can't be written down.
    async fn write(&self, preheat: &Preheat) {
        let written = preheat.clone();
        if let Err(error) = self.store.call(move |storage| storage.put_preheat(&written)).await {
            tracing::error!(%error, id = preheat.id, "can't write down the state of a preheat");
        }
    }

    async fn write_part(&self, preheat: Preheat, at: usize) {
        let id = preheat.id.clone();
        if let Err(error) = self.store.call(move |storage| storage.put_part(&preheat, at)).await {
            tracing::error!(%error, id, "can't write down the state of a preheat");
        }
    }
}

/// Gives a part to a seed that takes it, if it waits for one. `load` counts the parts at each stay of a seed.
fn give(entry: &mut Entry, at: usize, attending: &[Seat], load: &mut HashMap<u64, usize>, roster: &Roster) {
    let Entry { preheat, jobs, credential } = entry;
    let has_room = |load: &HashMap<u64, usize>, seat: &Seat| {
        load.get(&seat.visit).is_none_or(|count| *count < AT_SEED_MAX)
    };
    while let Some(seat) = jobs[at].place(attending, |seat| has_room(load, seat)) {
        let order = Message::Preheat(PreheatOrder {
            id: part_id(&preheat.id, at),
            image: jobs[at].part.image.clone(),
            platform: preheat.platform.clone().unwrap_or_default(),
            credential: credential.clone(),
        });
        match roster.send(&seat, order) {
            // A seed that is gone gives the part back with the change of seats that follows.
            Ok(()) | Err(NotSent::Gone) => {
                *load.entry(seat.visit).or_default() += 1;
                return;
            }
            Err(NotSent::Full) => {
                jobs[at].failed_at(&seat, "the seed takes no more orders".to_owned(), attending);
            }
        }
    }
}
