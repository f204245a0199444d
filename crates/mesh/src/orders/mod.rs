//! The manager's orders to have an image's layers before anybody asks: what seeds and nodes do alike about them.
//!
//! An order is carried out by a task of its own; a few run at the same time, the others wait their turn. The manager
//! is told how far each is whenever that changes, and how it ended. An order that comes again (the manager was away) goes on,
//! with all that it has under way, and the manager is told anew how far it is; one that says something else replaces it. One
//! that is cancelled is dropped where it is.
//!
//! Seeds find an image's layers and make them: that is `darter-peer`'s. Nodes [`fetch()`] what a seed has made.

mod board;
mod fetch;

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use darter_daemon::tasks::{Tasks, alone};
use darter_identity::attend::{PreheatCommand, PreheatUpdate};
use tokio::sync::{Notify, Semaphore, mpsc};
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
    orders: HashMap<String, Given>,
    tasks: Tasks,
}

/// An order that runs, waits for its turn, or has just ended.
struct Given {
    order: PreheatCommand,
    /// Cancelled by the desk, or by the order's task when it ends.
    token: CancellationToken,
    /// The manager is to be told anew how far it is.
    again: Arc<Notify>,
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
        self.orders.retain(|_, given| !given.token.is_cancelled());
        if let Some(given) = self.orders.get(order.id()).filter(|given| order.is_repeat_of(&given.order)) {
            tracing::info!(id = order.id(), "an order to preheat came again, and goes on");
            given.again.notify_one();
            return;
        }
        self.cancel(order.id());
        if self.orders.len() >= ORDERS_MAX {
            let error = format!("this member has {ORDERS_MAX} orders already");
            // Fails only when the program stops.
            let _ = self.updates.send(PreheatUpdate::failed(order.id(), error)).await;
            return;
        }
        tracing::info!(id = order.id(), image = order.image(), "an order to preheat");
        let (token, again) = (CancellationToken::new(), Arc::<Notify>::default());
        let given = Given { order: order.clone(), token: token.clone(), again: again.clone() };
        self.orders.insert(order.id().to_owned(), given);
        let updates = self.updates.clone();
        let work = carry_out(self.worker.clone(), order, updates.clone(), again, self.running.clone());
        self.tasks.spawn_until_stop("preheat", async move {
            let Some(last) = token.run_until_cancelled(work).await else { return };
            // Before the last report, which the manager may miss: if the order comes again after that, it is begun again.
            token.cancel();
            // Fails only when the program stops.
            let _ = updates.send(last).await;
        });
    }

    /// What is here stays; a layer that is under way goes on only if somebody else wants it.
    fn cancel(&mut self, id: &str) {
        if let Some(given) = self.orders.remove(id).filter(|given| !given.token.is_cancelled()) {
            tracing::info!(id, "a preheat is cancelled");
            given.token.cancel();
        }
    }
}

/// Returns the last report.
async fn carry_out<W: Worker>(
    worker: W,
    order: PreheatCommand,
    updates: mpsc::Sender<PreheatUpdate>,
    again: Arc<Notify>,
    running: Arc<Semaphore>,
) -> PreheatUpdate {
    let (id, image) = (order.id().to_owned(), order.image().to_owned());
    // Also while it waits for its turn: who gave it doesn't wait for longer.
    let life = match &order {
        PreheatCommand::Fetch(order) => order.life,
        PreheatCommand::Start { .. } | PreheatCommand::Cancel { .. } => Duration::MAX,
    };
    let (reports, reported) = mpsc::channel(1);
    let work = async {
        let _turn = running.acquire().await.expect("the semaphore is never closed");
        // On the heap: it is large, and whoever passes it on would have it on the stack several times.
        alone("preheat", Box::pin(worker.carry_out(order, reports))).await
    };
    let done = tokio::select! {
        done = timeout(life, work) => done,
        never = pass_on(reported, &updates, &again) => match never {},
    };
    let last = match done {
        Ok(done) => done.unwrap_or_else(|broken| PreheatUpdate::failed(&id, broken)),
        Err(_) => PreheatUpdate::failed(&id, format!("not done within {} s", life.as_secs())),
    };
    match &last.error {
        Some(error) => tracing::warn!(id, image, error, "a preheat failed"),
        None => tracing::info!(id, image, "an image is preheated"),
    }
    last
}

/// Tells the manager what an order reports, and the latest of it `again` when it has forgotten that.
async fn pass_on(
    mut reported: mpsc::Receiver<PreheatUpdate>,
    updates: &mpsc::Sender<PreheatUpdate>,
    again: &Notify,
) -> Infallible {
    let mut latest = None;
    loop {
        tokio::select! {
            Some(report) = reported.recv() => latest = Some(report),
            () = again.notified() => {}
        }
        // A manager that does not take it, takes the next one.
        latest.clone().into_iter().for_each(|update| drop(updates.try_send(update)));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    /// Reports once, and ends only with images that say so.
    #[derive(Clone, Default)]
    struct Slow {
        begun: Arc<AtomicUsize>,
    }

    impl Worker for Slow {
        const AT_ONCE: usize = 1;

        async fn carry_out(
            &self,
            order: PreheatCommand,
            updates: mpsc::Sender<PreheatUpdate>,
        ) -> PreheatUpdate {
            self.begun.fetch_add(1, Ordering::Relaxed);
            let update = PreheatUpdate { id: order.id().to_owned(), ..PreheatUpdate::default() };
            if order.image() == "short" {
                return PreheatUpdate { done: true, ..update };
            }
            updates.send(update).await.unwrap();
            std::future::pending().await
        }
    }

    struct Manager {
        worker: Slow,
        commands: mpsc::Sender<PreheatCommand>,
        updates: mpsc::Receiver<PreheatUpdate>,
        _tasks: Tasks,
    }

    impl Manager {
        fn new() -> Self {
            let ((commands, received), (reports, updates)) = (mpsc::channel(8), mpsc::channel(8));
            let (worker, tasks) = (Slow::default(), Tasks::new());
            serve(worker.clone(), received, reports, &tasks);
            Self { worker, commands, updates, _tasks: tasks }
        }

        /// Gives an order of one id, and returns what is reported next.
        async fn order(&mut self, image: &str) -> PreheatUpdate {
            let (id, image) = ("an order".to_owned(), image.to_owned());
            let start = PreheatCommand::Start { id, image, platform: None, credential: None };
            self.commands.send(start).await.unwrap();
            timeout(SOON, self.updates.recv()).await.expect("it is reported").unwrap()
        }

        fn begun(&self) -> usize {
            self.worker.begun.load(Ordering::Relaxed)
        }
    }

    #[tokio::test]
    async fn order_that_comes_again_goes_on_and_is_reported_anew() {
        let mut manager = Manager::new();
        let first = manager.order("long").await;
        assert_eq!(manager.order("long").await, first);
        assert_eq!(manager.begun(), 1);
    }

    #[tokio::test]
    async fn order_that_says_something_else_replaces_the_one_that_runs() {
        let mut manager = Manager::new();
        manager.order("long").await;
        manager.order("another").await;
        assert_eq!(manager.begun(), 2);
    }

    #[tokio::test]
    async fn order_that_has_ended_is_begun_again() {
        let mut manager = Manager::new();
        for round in 1..=2 {
            assert!(manager.order("short").await.done);
            assert_eq!(manager.begun(), round);
        }
    }
}
