//! The manager's orders to have an image's layers before anybody asks: what seeds and nodes do alike about them.
//!
//! An order is carried out by a task of its own; a few run at the same time, the others wait their turn. The manager
//! is told how far each is whenever that changes, and how it ended. An order that comes again (the manager was away)
//! replaces the one that runs; what is there already costs nothing. One that is cancelled is dropped where it is.
//!
//! Seeds find an image's layers and make them: that is `darter-peer`'s. Nodes [`fetch()`] what a seed has made.

mod board;
mod fetch;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use darter_daemon::tasks::{Tasks, alone};
use darter_identity::attend::{PreheatCommand, PreheatUpdate};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

pub use board::Board;
pub use fetch::fetch;

/// Orders that run or wait; one more is refused.
const ORDERS_MAX: usize = 256;

/// What carries orders out.
pub trait Worker: Clone + Send + Sync + 'static {
    /// Orders at the same time.
    const AT_ONCE: usize;

    /// Does what `order` says, reports to `updates` how far it is, and returns the last report. It is dropped when the
    /// order is cancelled.
    fn carry_out(
        &self,
        order: PreheatCommand,
        updates: mpsc::Sender<PreheatUpdate>,
    ) -> impl Future<Output = PreheatUpdate> + Send;
}

/// Has `worker` carry out `commands` until the tasks stop, and reports to `updates`.
pub fn serve<W: Worker>(
    worker: W,
    commands: mpsc::Receiver<PreheatCommand>,
    updates: mpsc::Sender<PreheatUpdate>,
    tasks: &Tasks,
) {
    let desk = Desk {
        worker,
        updates,
        running: Arc::new(Semaphore::new(W::AT_ONCE)),
        orders: HashMap::new(),
        tasks: tasks.clone(),
    };
    tasks.spawn_until_stop("preheat orders", desk.run(commands));
}

struct Desk<W> {
    worker: W,
    updates: mpsc::Sender<PreheatUpdate>,
    running: Arc<Semaphore>,
    /// Cancelled by the desk, or by the order's task when it ends.
    orders: HashMap<String, CancellationToken>,
    tasks: Tasks,
}

impl<W: Worker> Desk<W> {
    async fn run(mut self, mut commands: mpsc::Receiver<PreheatCommand>) {
        while let Some(command) = commands.recv().await {
            match command {
                PreheatCommand::Cancel { id } => self.cancel(&id),
                order @ (PreheatCommand::Start { .. } | PreheatCommand::Fetch(_)) => self.start(order).await,
            }
        }
    }

    async fn start(&mut self, order: PreheatCommand) {
        self.cancel(order.id());
        self.orders.retain(|_, token| !token.is_cancelled());
        if self.orders.len() >= ORDERS_MAX {
            let error = format!("this member has {ORDERS_MAX} orders already");
            // Fails only when the program stops.
            let _ = self.updates.send(PreheatUpdate::failed(order.id(), error)).await;
            return;
        }
        tracing::info!(id = order.id(), image = order.image(), "an order to preheat");
        let token = CancellationToken::new();
        self.orders.insert(order.id().to_owned(), token.clone());
        let work = carry_out(self.worker.clone(), order, self.updates.clone(), self.running.clone());
        self.tasks.spawn_until_stop("preheat", async move {
            token.run_until_cancelled(work).await;
            token.cancel();
        });
    }

    /// What is here stays; a layer that is under way goes on only if somebody else wants it.
    fn cancel(&mut self, id: &str) {
        if let Some(token) = self.orders.remove(id).filter(|token| !token.is_cancelled()) {
            tracing::info!(id, "a preheat is cancelled");
            token.cancel();
        }
    }
}

async fn carry_out<W: Worker>(
    worker: W,
    order: PreheatCommand,
    updates: mpsc::Sender<PreheatUpdate>,
    running: Arc<Semaphore>,
) {
    let (id, image) = (order.id().to_owned(), order.image().to_owned());
    // Also while it waits for its turn: who gave it doesn't wait for longer.
    let life = match &order {
        PreheatCommand::Fetch(order) => order.life,
        PreheatCommand::Start { .. } | PreheatCommand::Cancel { .. } => Duration::MAX,
    };
    let work = async {
        let _turn = running.acquire().await.expect("the semaphore is never closed");
        // On the heap: it is large, and whoever passes it on would have it on the stack several times.
        alone("preheat", Box::pin(worker.carry_out(order, updates.clone()))).await
    };
    let last = match timeout(life, work).await {
        Ok(done) => done.unwrap_or_else(|broken| PreheatUpdate::failed(&id, broken)),
        Err(_) => PreheatUpdate::failed(&id, format!("not done within {} s", life.as_secs())),
    };
    match &last.error {
        Some(error) => tracing::warn!(id, image, error, "a preheat failed"),
        None => tracing::info!(id, image, "an image is preheated"),
    }
    // Fails only when the program stops.
    let _ = updates.send(last).await;
}
