//! Drives preheat orders: one task owns the jobs, applies [`crate::core::job`]'s rules, tells seeds and writes down.

use std::collections::HashMap;

use darter_daemon::tasks::Tasks;
use darter_identity::attend::PreheatUpdate;
use darter_proto::v1::manager_message::Message;
use darter_proto::v1::{Credential, PreheatCancel, PreheatOrder};
use tokio::sync::{mpsc, oneshot, watch};

use crate::core::job::{Job, Preheat, Seat, State};
use crate::db::{StorageError, Store};
use crate::roster::{NotSent, Roster};

/// Orders that are not over. One more is refused: seeds work on a few at a time anyway.
const JOBS_MAX: usize = 1_000;

/// Requests and reports on their way to the task; who sends waits.
const COMMANDS_MAX: usize = 256;

#[derive(Debug, thiserror::Error)]
pub(crate) enum PreheatError {
    #[error("{JOBS_MAX} preheats are waiting or under way: order again when some are over")]
    TooMany,
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error("the manager is stopping")]
    Stopping,
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
    store: Store,
}

impl Preheats {
    pub(crate) fn start(store: Store, roster: Roster, unfinished: Vec<Preheat>, tasks: &Tasks) -> Self {
        let (commands, received) = mpsc::channel(COMMANDS_MAX);
        let desk = Desk { store: store.clone(), seats: roster.seats(), roster, jobs: HashMap::new() };
        tasks.spawn_until_stop("preheats", desk.run(unfinished, received));
        Self { commands, store }
    }

    /// Takes an order; it goes to a seed as soon as one attends.
    pub(crate) async fn order(
        &self,
        preheat: Preheat,
        credential: Option<Credential>,
    ) -> Result<Preheat, PreheatError> {
        self.ask(|reply| Command::Order(preheat, credential, reply)).await?
    }

    /// Ends an order and says what became of it; `None` if there is no such order.
    pub(crate) async fn cancel(&self, id: String) -> Result<Option<Preheat>, PreheatError> {
        self.ask(|reply| Command::Cancel(id, reply)).await?
    }

    /// `None` if there is no such order.
    pub(crate) async fn get(&self, id: String) -> Result<Option<Preheat>, PreheatError> {
        Ok(self.store.call(move |storage| storage.preheat(&id)).await?)
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

struct Entry {
    job: Job,
    /// Never written down; gone with the order.
    credential: Option<Credential>,
}

struct Desk {
    store: Store,
    roster: Roster,
    seats: watch::Receiver<Vec<Seat>>,
    jobs: HashMap<String, Entry>,
}

impl Desk {
    async fn run(mut self, unfinished: Vec<Preheat>, mut commands: mpsc::Receiver<Command>) {
        self.resume(unfinished).await;
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
            }
        }
    }

    /// What a former process left undone: orders with credentials can't go on, as those were in its memory only.
    async fn resume(&mut self, unfinished: Vec<Preheat>) {
        for mut preheat in unfinished {
            preheat.state = State::Pending;
            if preheat.private {
                preheat.state = State::Failed;
                preheat.error =
                    Some("the manager restarted, and credentials are not kept: order it again".to_owned());
            }
            self.write(&preheat).await;
            if !preheat.state.is_over() {
                self.jobs.insert(preheat.id.clone(), Entry { job: Job::new(preheat), credential: None });
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
        if self.jobs.len() >= JOBS_MAX {
            return Err(PreheatError::TooMany);
        }
        let written = preheat.clone();
        self.store.call(move |storage| storage.put_preheat(&written)).await?;
        let id = preheat.id.clone();
        self.jobs.insert(id.clone(), Entry { job: Job::new(preheat.clone()), credential });
        Ok(self.settle(&id).await.unwrap_or(preheat))
    }

    async fn cancel(&mut self, id: &str) -> Result<Option<Preheat>, PreheatError> {
        let Some(mut entry) = self.jobs.remove(id) else {
            let id = id.to_owned();
            return Ok(self.store.call(move |storage| storage.preheat(&id)).await?);
        };
        if let Some(seat) = entry.job.cancel() {
            self.tell_to_stop(&seat, id);
        }
        self.write(&entry.job.preheat).await;
        Ok(Some(entry.job.preheat))
    }

    /// A seed that can't be told goes on for nothing, which harms nobody; it is told again when it reports.
    fn tell_to_stop(&self, seat: &Seat, id: &str) {
        if let Err(reason) = self.roster.send(seat, Message::Cancel(PreheatCancel { id: id.to_owned() })) {
            tracing::debug!(id, seed = %seat.node, ?reason, "a seed could not be told to stop");
        }
    }

    async fn update(&mut self, seat: &Seat, update: PreheatUpdate) {
        let id = update.id.clone();
        let attending = self.seats.borrow().clone();
        let Some(entry) = self.jobs.get_mut(&id) else {
            // Cancelled, or given to another: this seed need not go on.
            if !update.done {
                self.tell_to_stop(seat, &id);
            }
            return;
        };
        if entry.job.update(seat, update, &attending) {
            self.settle(&id).await;
        }
    }

    async fn place_all(&mut self) {
        let ids: Vec<String> = self.jobs.keys().cloned().collect();
        for id in ids {
            let before = self.jobs.get(&id).map(|entry| entry.job.preheat.clone());
            let after = self.give(&id);
            if before != after {
                self.close(&id, after).await;
            }
        }
    }

    /// Gives the order to a seed if it needs one, and writes down what became of it.
    async fn settle(&mut self, id: &str) -> Option<Preheat> {
        let preheat = self.give(id);
        self.close(id, preheat.clone()).await;
        preheat
    }

    /// Gives the order to a seed that takes it, if it waits for one.
    fn give(&mut self, id: &str) -> Option<Preheat> {
        let attending = self.seats.borrow().clone();
        let entry = self.jobs.get_mut(id)?;
        while let Some(seat) = entry.job.place(&attending) {
            let order = message(&entry.job.preheat, entry.credential.clone());
            match self.roster.send(&seat, order) {
                // A seed that is gone gives the order back with the change of seats that follows.
                Ok(()) | Err(NotSent::Gone) => break,
                Err(NotSent::Full) => {
                    entry.job.failed_at(&seat, "the seed takes no more orders".to_owned(), &attending);
                }
            }
        }
        Some(entry.job.preheat.clone())
    }

    async fn close(&mut self, id: &str, preheat: Option<Preheat>) {
        let Some(preheat) = preheat else { return };
        if preheat.state.is_over() {
            self.jobs.remove(id);
            tracing::info!(
                id,
                image = preheat.image,
                state = preheat.state.as_str(),
                error = preheat.error,
                "preheat over"
            );
        }
        self.write(&preheat).await;
    }

    /// An order goes on even if it can't be written down.
    async fn write(&self, preheat: &Preheat) {
        let written = preheat.clone();
        if let Err(error) = self.store.call(move |storage| storage.put_preheat(&written)).await {
            tracing::error!(%error, id = preheat.id, "can't write down the state of a preheat");
        }
    }
}

fn message(preheat: &Preheat, credential: Option<Credential>) -> Message {
    Message::Preheat(PreheatOrder {
        id: preheat.id.clone(),
        image: preheat.image.clone(),
        platform: preheat.platform.clone().unwrap_or_default(),
        credential,
    })
}
