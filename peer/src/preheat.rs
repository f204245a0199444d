//! The manager's orders to preheat: every layer of an image is made here, or found in the mesh, before anybody asks.
//!
//! An order is carried out by a task of its own; a few run at the same time, the others wait their turn. The manager
//! is told how far each is whenever that changes, twice a second at most, and how it ended. An order that comes again
//! (the manager was away) replaces the one that runs; layers that are there already cost nothing.

mod order;
mod progress;

use std::collections::HashMap;
use std::sync::Arc;

use darter_daemon::tasks::{Tasks, alone};
use darter_identity::attend::{PreheatCommand, PreheatUpdate};
use darter_mesh::Mesh;
use darter_registry::Client;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use order::Order;

/// Orders carried out at the same time.
const RUNNING_MAX: usize = 4;

/// Orders that run or wait; one more is refused.
const ORDERS_MAX: usize = 256;

/// What orders are carried out with.
#[derive(Clone)]
pub struct Seed {
    pub mesh: Mesh,
    pub registry: Arc<Client>,
}

/// Carries out `commands` until the tasks stop, and reports to `updates`.
pub fn serve(
    seed: Seed,
    commands: mpsc::Receiver<PreheatCommand>,
    updates: mpsc::Sender<PreheatUpdate>,
    tasks: &Tasks,
) {
    let desk = Desk {
        seed,
        updates,
        running: Arc::new(Semaphore::new(RUNNING_MAX)),
        orders: HashMap::new(),
        tasks: tasks.clone(),
    };
    tasks.spawn_until_stop("preheat orders", desk.run(commands));
}

struct Desk {
    seed: Seed,
    updates: mpsc::Sender<PreheatUpdate>,
    running: Arc<Semaphore>,
    /// Cancelled by the desk, or by the order's task when it ends.
    orders: HashMap<String, CancellationToken>,
    tasks: Tasks,
}

impl Desk {
    async fn run(mut self, mut commands: mpsc::Receiver<PreheatCommand>) {
        while let Some(command) = commands.recv().await {
            match command {
                PreheatCommand::Start { id, image, platform, credential } => {
                    self.start(Order { id, image, platform, credential }).await;
                }
                PreheatCommand::Cancel { id } => self.cancel(&id),
            }
        }
    }

    async fn start(&mut self, order: Order) {
        self.cancel(&order.id);
        self.orders.retain(|_, token| !token.is_cancelled());
        if self.orders.len() >= ORDERS_MAX {
            let error = format!("this seed has {ORDERS_MAX} orders already");
            // Fails only when the peer stops.
            let _ = self.updates.send(order.failed(error)).await;
            return;
        }
        tracing::info!(id = order.id, image = order.image, "an order to preheat");
        let token = CancellationToken::new();
        self.orders.insert(order.id.clone(), token.clone());
        let work = carry_out(order, self.seed.clone(), self.updates.clone(), self.running.clone());
        self.tasks.spawn_until_stop("preheat", async move {
            token.run_until_cancelled(work).await;
            token.cancel();
        });
    }

    /// What was made stays; a layer that is being made is finished only if somebody else wants it.
    fn cancel(&mut self, id: &str) {
        if let Some(token) = self.orders.remove(id).filter(|token| !token.is_cancelled()) {
            tracing::info!(id, "a preheat is cancelled");
            token.cancel();
        }
    }
}

async fn carry_out(order: Order, seed: Seed, updates: mpsc::Sender<PreheatUpdate>, running: Arc<Semaphore>) {
    let _turn = running.acquire().await.expect("the semaphore is never closed");
    let work = async {
        match order.resolve(&seed).await {
            Ok(layers) => order.fetch(layers, &seed, &updates).await,
            Err(error) => order.failed(error),
        }
    };
    let last = alone("preheat", work).await.unwrap_or_else(|broken| order.failed(broken.to_string()));
    match &last.error {
        Some(error) => tracing::warn!(id = order.id, image = order.image, error, "a preheat failed"),
        None => tracing::info!(id = order.id, image = order.image, "an image is preheated"),
    }
    // Fails only when the peer stops.
    let _ = updates.send(last).await;
}
