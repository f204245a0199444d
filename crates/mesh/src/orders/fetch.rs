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

/// How long nobody may have given a map, or another piece, until the order is given up here.
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
        let late = format!("not done within {} s", order.life.as_secs());
        let fetched = timeout(order.life, fetch_all(&self.mesh, &order, &updates)).await;
        fetched.unwrap_or_else(|_| PreheatUpdate::failed(&order.id, late))
    }
}

/// Brings one layer after the other, and reports how far each is; returns the last report.
async fn fetch_all(mesh: &Mesh, order: &FetchOrder, updates: &mpsc::Sender<PreheatUpdate>) -> PreheatUpdate {
    let requests: Vec<LayerRequest> = requests(order);
    // All at once, so that the maps come together.
    let layers: Vec<Layer> = requests.iter().map(|request| mesh.open(request.clone())).collect();
    let mut board = Board::new(order.id.clone(), &requests);
    let bring = |(at, layer)| async move { (at, bring(layer).await) };
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

/// Map and all pieces; why not, in words.
async fn bring(layer: &Layer) -> Result<(), String> {
    let open = layer.open();
    let map = map(open).await?;
    let (mut least, mut since) = (open.missing().len(), Instant::now());
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
        if missing.len() < least {
            (least, since) = (missing.len(), Instant::now());
        } else if since.elapsed() >= PATIENCE {
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
async fn map(open: &Arc<Open>) -> Result<Arc<LayerMap>, String> {
    let (mut found, begun) = (open.found.subscribe(), Instant::now());
    loop {
        match &*found.borrow_and_update() {
            Found::Ready(map) => return Ok(map.clone()),
            Found::Impossible(reason) => return Err(reason.clone()),
            Found::Searching { rounds, last } if *rounds > 0 && begun.elapsed() >= PATIENCE => {
                return Err(last.clone());
            }
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
