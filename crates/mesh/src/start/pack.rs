//! Packing what starts read anew, smaller: on a seed, with the processor time that nobody else wants.
//!
//! A layer is compressed as fast as it can be read, because somebody waits for it. What starts read travels to every node,
//! and is waited for there: that is worth a few hundred times the work, once.

use std::collections::HashSet;
use std::sync::Arc;

use darter_types::{LayerTask, PieceHash};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::share::known;
use crate::shared::Shared;

/// About an eighth smaller than what a seed that has time makes at first, for twenty times the work; more takes ever longer for hardly anything.
const LEVEL: i32 = 15;
/// Layers that wait. Of one more the pieces stay as they are until its next start.
const LAYERS_MAX: usize = 256;
/// Pieces that are known to be packed so; at more all are forgotten, and looked at again.
const DONE_MAX: usize = 1 << 17;

#[derive(Default)]
pub(super) struct Packing {
    layers: Mutex<Option<mpsc::Sender<LayerTask>>>,
    done: Mutex<HashSet<PieceHash>>,
}

impl Packing {
    /// What starts read of the layer has changed.
    pub(super) fn add(&self, shared: &Arc<Shared>, task: LayerTask) {
        let mut layers = self.layers.lock();
        let sender = layers.get_or_insert_with(|| {
            let (sender, queue) = mpsc::channel(LAYERS_MAX);
            shared.tasks.spawn_until_stop("pack anew", run(shared.clone(), queue));
            sender
        });
        // What finds no room is packed after a later start.
        let _ = sender.try_send(task);
    }

    fn is_new(&self, hash: PieceHash) -> bool {
        let mut done = self.done.lock();
        if done.len() >= DONE_MAX {
            done.clear();
        }
        done.insert(hash)
    }
}

async fn run(shared: Arc<Shared>, mut layers: mpsc::Receiver<LayerTask>) {
    while let Some(task) = layers.recv().await {
        let owner = shared.clone();
        let hashes = shared.work.run(move || hashes(&owner, task)).await;
        let mut smaller = 0;
        for hash in hashes.into_iter().filter(|hash| shared.starts.packing.is_new(*hash)) {
            let store = shared.store.clone();
            match shared.work.run_calmly(move || store.pack_anew(&hash, LEVEL)).await {
                Ok(is_smaller) => smaller += usize::from(is_smaller),
                Err(error) => {
                    tracing::info!(%task, %error, "what starts read of a layer stays packed as it was");
                    break;
                }
            }
        }
        tracing::debug!(%task, pieces = smaller, "what starts read of a layer is packed anew");
    }
}

/// The pieces that starts read, in order.
fn hashes(shared: &Shared, task: LayerTask) -> Vec<PieceHash> {
    let Some(shelved) = shared.shelf.get(&shared.store, task) else { return Vec::new() };
    let order = known(shared, task, shelved.root, shelved.hashes.len() as u32).unwrap_or_default();
    order.reads().iter().filter_map(|read| shelved.hashes.get(read.piece as usize).copied()).collect()
}
