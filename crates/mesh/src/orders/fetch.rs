//! A node's orders: all of some layers is fetched from the mesh, in the background, and stays for a while.
//!
//! The seed that made the layers has found out which repository holds them, and lets this node in by that name, so no registry is
//! asked and no credential needed. What comes is noted with what the seed vouches for, as if a pull had brought it: an
//! image of another repository opens nothing by it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use darter_daemon::tasks::Tasks;
use darter_identity::attend::{FetchOrder, PreheatCommand, PreheatUpdate};
use darter_layer::LayerMap;
use darter_store::StoreError;
use darter_types::{LayerTask, PieceIndex};
use futures_util::StreamExt;
use futures_util::stream;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::{Board, Worker, serve};
use crate::background;
use crate::layer::{Found, Layer, LayerRequest, Open};
use crate::mesh::Mesh;
use crate::status::LayerStatus;
use crate::upkeep;

/// How often the manager is told, at most: it may have told a thousand nodes.
const REPORT_EVERY: Duration = Duration::from_secs(2);

/// How long nobody may have given a map, or another piece, of any layer, until the order is given up here.
const PATIENCE: Duration = Duration::from_secs(120);

/// Before pieces that nobody gave are asked for again.
const REST: Duration = Duration::from_secs(2);

/// Carries out the manager's orders to a node, until the tasks stop.
pub fn fetch(
    mesh: Mesh,
    commands: mpsc::Receiver<PreheatCommand>,
    updates: mpsc::Sender<PreheatUpdate>,
    tasks: &Tasks,
) {
    serve(Fetcher { mesh }, commands, updates, tasks);
}

#[derive(Clone)]
struct Fetcher {
    mesh: Mesh,
}

impl Worker for Fetcher {
    const AT_ONCE: usize = 2;

    async fn carry_out(&self, order: PreheatCommand, updates: mpsc::Sender<PreheatUpdate>) -> PreheatUpdate {
        let PreheatCommand::Fetch(order) = order else {
            return PreheatUpdate::failed(
                order.id(),
                "this member is a node: it fetches what seeds have made",
            );
        };
        fetch_all(&self.mesh, &order, &updates).await
    }
}

/// How long an order has had nothing new: one patience for all of its layers, which come one after the other.
struct Patience {
    /// Maps and pieces that were here at once.
    most: u64,
    since: Instant,
}

impl Patience {
    fn new(now: Instant) -> Self {
        Self { most: 0, since: now }
    }

    /// So many maps and pieces are here.
    fn see(&mut self, here: u64, now: Instant) {
        if here > self.most {
            (self.most, self.since) = (here, now);
        }
    }

    fn is_over(&self, now: Instant) -> bool {
        now.duration_since(self.since) >= PATIENCE
    }
}

/// Maps and pieces of these layers that are here.
fn here(layers: &[Layer]) -> u64 {
    let here = |status: LayerStatus| u64::from(status.have) + u64::from(status.pieces > 0);
    layers.iter().map(|layer| here(layer.status())).sum()
}

/// Brings one layer after the other, and reports how far each is; returns the last report.
async fn fetch_all(mesh: &Mesh, order: &FetchOrder, updates: &mpsc::Sender<PreheatUpdate>) -> PreheatUpdate {
    let requests: Vec<LayerRequest> = requests(order);
    // All at once, so that the maps come together.
    let layers: Vec<Layer> = requests.iter().map(|request| mesh.open_ordered(request.clone())).collect();
    let mut board = Board::new(order.id.clone(), &requests);
    let patience = Mutex::new(Patience::new(Instant::now()));
    let is_over = || {
        let mut patience = patience.lock();
        patience.see(here(&layers), Instant::now());
        patience.is_over(Instant::now())
    };
    let is_over = &is_over;
    let bring = |(at, layer)| async move { (at, bring(layer, is_over).await) };
    let mut brought = std::pin::pin!(stream::iter(layers.iter().enumerate()).then(bring));
    let mut report = interval(REPORT_EVERY);
    report.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            settled = brought.next() => match settled {
                Some((at, result)) => board.settle(at, result.err()),
                None => return board.last(),
            },
            _ = report.tick() => {
                for (at, layer) in layers.iter().enumerate() {
                    // What is on its way must not go for want of room, first of all others.
                    mesh.shared.upkeep.touch(layer.task());
                    let size = requests[at].sources[0].size;
                    board.see(at, share(size, &layer.status()), size);
                }
                is_over();
                // A manager that does not take it, takes the next one.
                board.news().into_iter().for_each(|update| drop(updates.try_send(update)));
            }
        }
    }
}

/// As many of the blob's bytes as there are pieces of it here.
fn share(size: u64, status: &LayerStatus) -> u64 {
    let (have, pieces) = (u128::from(status.have), u128::from(status.pieces.max(1)));
    (u128::from(size) * have / pieces) as u64
}

fn requests(order: &FetchOrder) -> Vec<LayerRequest> {
    let layers = order.layers.iter();
    let request = |layer: &darter_identity::attend::FetchLayer| LayerRequest {
        task: LayerTask::current(layer.diff_id),
        sources: vec![layer.source.clone()],
        credential: None,
    };
    layers.map(request).collect()
}

/// Map and all pieces; why not, in words. Asks, when nobody gives anything, whether the order's patience is over.
async fn bring(layer: &Layer, is_over: &(dyn Fn() -> bool + Sync)) -> Result<(), String> {
    let open = layer.open();
    let map = map(open, is_over).await?;
    loop {
        let is_here = background::bring(&open.shared, open).await;
        // It may have proven to be a lie.
        if let Found::Impossible(reason) = &*open.found.borrow() {
            return Err(reason.clone());
        }
        if is_here {
            break;
        }
        let missing = open.missing();
        no_room(open, &map, &missing)?;
        if is_over() {
            return Err(format!("nobody in reach gives {} of {} pieces", missing.len(), map.piece_count()));
        }
        sleep(REST).await;
    }
    let (owner, task) = (open.shared.clone(), open.task);
    let note = move || owner.shelf.change_note(&owner.store, task, |note| note.preheated());
    open.shared.work.run(note).await;
    Ok(())
}

/// Waits for the map without holding the background up, as whoever starts a container does.
async fn map(open: &Arc<Open>, is_over: &(dyn Fn() -> bool + Sync)) -> Result<Arc<LayerMap>, String> {
    let mut found = open.found.subscribe();
    loop {
        match &*found.borrow_and_update() {
            Found::Ready(map) => return Ok(map.clone()),
            Found::Impossible(reason) => return Err(reason.clone()),
            Found::Searching { rounds, last } if *rounds > 0 && is_over() => return Err(last.clone()),
            Found::Searching { .. } => {}
        }
        // Also without a change: the patience may have ended.
        let _ = timeout(REST, found.changed()).await;
    }
}

/// An error if what is missing may not come: the disk is full up to the mark, or the quota reached.
fn no_room(open: &Open, map: &LayerMap, missing: &[u32]) -> Result<(), String> {
    let needed = missing.iter().map(|index| u64::from(map.piece(PieceIndex(*index)).plain_len)).sum();
    match upkeep::lacking(&open.shared, needed) {
        0 => Ok(()),
        missing => {
            let dir = open.shared.store.root().to_owned();
            Err(StoreError::Full { dir, needed, missing }.to_string())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_is_one_for_all_layers_and_begins_anew_with_each_piece_of_any() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let mut patience = Patience::new(begun);
        patience.see(0, at(119));
        assert!(!patience.is_over(at(119)) && patience.is_over(at(120)));
        patience.see(5, at(120));
        // What went and came again is no progress.
        patience.see(4, at(130));
        patience.see(5, at(140));
        assert!(!patience.is_over(at(239)) && patience.is_over(at(240)));
    }
}
