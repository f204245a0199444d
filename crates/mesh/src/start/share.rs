//! Orders on disk, and on their way to a seed.

use std::sync::Arc;
use std::time::Duration;

use darter_proto::v1::{StartNote, StartOrder};
use darter_types::{LayerTask, PROTOCOL_VERSION, RootHash};
use prost::Message;
use tokio::time::{sleep, timeout};

use super::order::Order;
use crate::layer::{Open, seeds_now};
use crate::shared::Shared;

/// A seed that does not answer for so long hears of the start from another node.
const SEED_PATIENCE: Duration = Duration::from_secs(5);
/// Seeds that are told of a start: one, unless that can't be reached.
const SEEDS_ASKED: usize = 3;

impl Open {
    /// A container reads the piece, so long after the first read of its tree. Which is the first time for this piece is found
    /// out here.
    pub(crate) fn touched(self: &Arc<Self>, piece: u32, since_first: Duration) {
        self.shared.starts.line.follow(self, piece);
        if self.start.recorder.touched(piece, since_first) {
            let open = self.clone();
            self.shared.tasks.spawn_until_stop("start", async move {
                let stop = open.stop.clone();
                // Also of a layer that is closed meanwhile it is told what was read.
                stop.run_until_cancelled(start_is_over(&open)).await;
                told(&open).await;
            });
        }
    }
}

async fn start_is_over(open: &Open) {
    while let Some(left) = open.start.recorder.time_left() {
        sleep(left).await;
    }
}

/// Keeps what a start has read, and tells a seed.
async fn told(open: &Arc<Open>) {
    let (Some(order), Some(map)) = (open.start.recorder.end(), open.map_now()) else { return };
    let (shared, task, root, pieces) = (&open.shared, open.task, map.root_hash(), map.piece_count());
    tracing::debug!(%task, pieces = order.reads().len(), "a start has read a layer");
    let (owner, newest) = (shared.clone(), order.clone());
    shared.work.run(move || keep(&owner, task, root, pieces, &newest)).await;
    if shared.is_seed() {
        return;
    }
    let note = StartNote {
        protocol: PROTOCOL_VERSION,
        diff_id: task.diff_id.as_bytes().to_vec(),
        format: task.format,
        repository: open.repository(),
        order: Some(order.to_wire(root)),
    };
    for seed in seeds_now(open).into_iter().take(SEEDS_ASKED) {
        let mut client = shared.peer_client(&seed.address, true);
        match timeout(SEED_PATIENCE, client.note_start(note.clone())).await {
            Ok(Ok(_)) => return,
            Ok(Err(status)) => {
                tracing::debug!(%task, seed = seed.node, reason = status.message(), "a seed did not take a start's order");
            }
            Err(_) => tracing::debug!(%task, seed = seed.node, "a seed did not answer about a start's order"),
        }
    }
}

/// What is known of the layer's starts, for its map with so many pieces. Blocks on the disk.
pub(crate) fn known(shared: &Shared, task: LayerTask, root: RootHash, pieces: u32) -> Option<Order> {
    let stored = shared.store.start(task).unwrap_or_else(|error| {
        tracing::warn!(%task, %error, "what starts read first can't be read");
        None
    })?;
    Order::from_wire(&StartOrder::decode(stored).ok()?, root, pieces)
}

/// Merges one start's order into what is known. Blocks on the disk.
fn keep(shared: &Shared, task: LayerTask, root: RootHash, pieces: u32, newest: &Order) {
    let _one = shared.starts.keeping.lock();
    let mut order = known(shared, task, root, pieces).unwrap_or_default();
    order.merge(newest);
    if let Err(error) = shared.store.set_start(task, &order.to_wire(root).encode_to_vec()) {
        tracing::warn!(%task, %error, "what a start read first could not be written down");
    }
}

/// A node's word on a start. `false` if the layer is not here, if this repository may not have it, or if it is no order of it.
/// Blocks on the disk.
pub(crate) fn take(shared: &Arc<Shared>, task: LayerTask, repository: &str, order: &StartOrder) -> bool {
    let Some(shelved) = shared.shelf.get(&shared.store, task) else { return false };
    let pieces = shelved.hashes.len() as u32;
    match Order::from_wire(order, shelved.root, pieces).filter(|_| shelved.allows(repository)) {
        Some(order) => {
            keep(shared, task, shelved.root, pieces, &order.as_one_start());
            shared.starts.packing.add(shared, task);
            true
        }
        None => false,
    }
}
