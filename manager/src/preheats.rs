//! Preheat orders: they are taken, looked at and cancelled here; one task, the [`desk`], sees to them.

mod desk;

use std::collections::BTreeSet;

use darter_daemon::tasks::Tasks;
use darter_identity::attend::PreheatUpdate;
use darter_proto::v1::Credential;
use darter_types::{NodeName, Role};
use tokio::sync::{mpsc, oneshot, watch};

use crate::core::job::{Seat, State};
use crate::core::order::{self, Cluster, OrderError, Preheat, Scope};
use crate::db::{StorageError, Store};
use crate::root::now;
use crate::roster::Roster;
use desk::Desk;

/// Orders that are not over, and their parts. One more is refused: seeds work on a few at a time anyway.
const OPEN_MAX: usize = 1_000;
const OPEN_PARTS_MAX: usize = 10_000;

/// Orders of one list.
const LIST_MAX: usize = 100;

/// Requests and reports on their way to the task; who sends waits.
const COMMANDS_MAX: usize = 256;

#[derive(Debug, thiserror::Error)]
pub(crate) enum PreheatError {
    #[error(
        "{OPEN_MAX} preheats, or {OPEN_PARTS_MAX} images at members, are waiting or under way: order again when some are over"
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
        let desk = Desk::new(store.clone(), seats.clone(), roster);
        tasks.spawn_until_stop("preheats", desk.run(unfinished, received));
        Self { commands, seats, store }
    }

    /// Takes an order; each part goes to a member as soon as the right one attends and has room.
    pub(crate) async fn order(&self, wish: Wish) -> Result<Preheat, PreheatError> {
        let cluster = self.cluster(&wish.scope).await?;
        wish.platform.as_deref().map_or(Ok(()), order::checked_platform)?;
        let preheat = Preheat {
            parts: order::parts(&wish.images, &wish.scope, &cluster)?,
            away: cluster.away(&wish.scope),
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

    /// Who there is. The database is asked only where an order names members, or is for all nodes.
    async fn cluster(&self, scope: &Scope) -> Result<Cluster, PreheatError> {
        let mut joined = BTreeSet::new();
        if scope.is_list() || scope.has_all_nodes() {
            let members = self.store.call(|storage| storage.members()).await?;
            let members = members.into_iter().filter(|member| !member.revoked);
            joined = members.map(|member| (member.role, member.node)).collect();
        }
        let seats = self.seats.borrow();
        let attending = |role: Role| -> Vec<NodeName> {
            seats.iter().filter(|seat| seat.role == role).map(|seat| seat.node.clone()).collect()
        };
        Ok(Cluster { seeds: attending(Role::Seed), nodes: attending(Role::Node), joined })
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
        // It fails only while stopping; the member is asked again by the next manager.
        let _ = self.commands.send(Command::Update(seat, update)).await;
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, PreheatError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| PreheatError::Stopping)?;
        answer.await.map_err(|_| PreheatError::Stopping)
    }
}
