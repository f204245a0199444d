//! Fetching in the order of earlier starts, before anything asks.
//!
//! All layers of a peer share one queue, sorted by the time at which a container that starts now would want the piece. It
//! stands back behind maps, without which nothing can start, and behind containers that wait for what no order names: the
//! image's command may have changed.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use darter_types::{PieceIndex, RateKind};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use crate::layer::{Open, Priority};
use crate::shared::Shared;
use crate::upkeep;

/// Pieces under way at the same time; fewer than one parent takes, so that what a container asks for finds a place.
const WINDOW: usize = 12;
/// Pieces that wait; of more, the layers that come last are fetched as they are read.
const QUEUE_MAX: usize = 1 << 16;
/// How long after its opening a layer's map is waited for before pieces of others are fetched.
const MAP_WAIT: Duration = Duration::from_millis(500);
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// How long after a container has waited for what no order names.
const PAUSE: Duration = Duration::from_millis(50);
/// A piece that nobody gives for so long holds up the others no longer.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(super) struct Queue {
    due: Mutex<BinaryHeap<Reverse<Due>>>,
    added: Notify,
    under_way: AtomicUsize,
}

/// A piece, and when a container will want it.
struct Due {
    at: Instant,
    /// Position within its layer's order.
    position: usize,
    piece: u32,
    layer: Weak<Open>,
}

impl Due {
    fn key(&self) -> (Instant, usize, u32) {
        (self.at, self.position, self.piece)
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

impl Queue {
    pub(super) fn add(&self, open: &Arc<Open>) {
        let Some(order) = open.start.order() else { return };
        let mut due = self.due.lock();
        let room = QUEUE_MAX.saturating_sub(due.len());
        for (position, read) in order.reads().iter().take(room).enumerate() {
            let at = open.since + Duration::from_millis(u64::from(read.at_ms));
            due.push(Reverse(Due { at, position, piece: read.piece, layer: Arc::downgrade(open) }));
        }
        drop(due);
        self.added.notify_one();
    }

    pub(super) fn is_busy(&self) -> bool {
        self.under_way.load(Ordering::Relaxed) > 0 || !self.due.lock().is_empty()
    }

    fn is_empty(&self) -> bool {
        self.due.lock().is_empty()
    }

    fn pop(&self) -> Option<Due> {
        self.due.lock().pop().map(|Reverse(due)| due)
    }
}

/// Works until the program stops.
pub(crate) async fn run(shared: Arc<Shared>) {
    let mut under_way = FuturesUnordered::new();
    loop {
        let next = next(&shared);
        tokio::select! {
            due = next, if under_way.len() < WINDOW => under_way.push(fetch(&shared, due)),
            Some(()) = under_way.next() => {}
        }
    }
}

/// The next piece, when its turn has come.
async fn next(shared: &Shared) -> Due {
    loop {
        let queue = &shared.starts.queue;
        if queue.is_empty() {
            queue.added.notified().await;
        } else if maps_are_awaited(shared) {
            sleep(LOOK_AGAIN).await;
        } else if let Some(left) = PAUSE.checked_sub(shared.starts.strangers.idle()) {
            sleep(left.max(LOOK_AGAIN)).await;
        } else if let Some(due) = queue.pop() {
            return due;
        }
    }
}

/// Whether an image is about to start that still lacks a map which may come soon.
fn maps_are_awaited(shared: &Shared) -> bool {
    shared.open_layers().iter().any(|open| {
        open.filling.load(Ordering::Relaxed) && open.since.elapsed() < MAP_WAIT && open.is_searching()
    })
}

async fn fetch(shared: &Shared, due: Due) {
    let Some(open) = due.layer.upgrade().filter(|_| upkeep::may_grow(shared, 1)) else { return };
    // A start is not to wait for that limit, but what comes for it goes from what comes in the background after it.
    if let Some(bytes) = open.missing_len(due.piece) {
        shared.limits.of(RateKind::Background).spend(bytes);
    }
    shared.starts.line.push(&open, due.piece);
    let count = &shared.starts.queue.under_way;
    count.fetch_add(1, Ordering::Relaxed);
    let stop = open.stop.clone();
    let brought = stop.run_until_cancelled(open.keep(PieceIndex(due.piece), Priority::Recorded));
    // Whoever needs it will ask for it, and see the error.
    let _ = timeout(PATIENCE, brought).await;
    count.fetch_sub(1, Ordering::Relaxed);
}
