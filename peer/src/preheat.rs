//! A seed's orders to preheat: every layer of an image is made here, or found in the mesh, before anybody asks.

mod order;

use std::sync::Arc;

use darter_daemon::tasks::Tasks;
use darter_identity::attend::{PreheatCommand, PreheatUpdate};
use darter_mesh::Mesh;
use darter_mesh::orders::{self, Worker};
use darter_registry::Client;
use tokio::sync::mpsc;

use order::Order;

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
    orders::serve(seed, commands, updates, tasks);
}

impl Worker for Seed {
    const AT_ONCE: usize = 4;

    async fn carry_out(&self, order: PreheatCommand, updates: mpsc::Sender<PreheatUpdate>) -> PreheatUpdate {
        let PreheatCommand::Start { id, image, platform, credential } = order else {
            return PreheatUpdate::failed(
                order.id(),
                "this member is a seed: it makes layers from images' names",
            );
        };
        let order = Order { id, image, platform, credential };
        match order.resolve(self).await {
            Ok(layers) => order.fetch(layers, self, &updates).await,
            Err(error) => PreheatUpdate::failed(&order.id, error),
        }
    }
}
