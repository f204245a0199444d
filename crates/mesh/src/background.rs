//! The rest of a layer, that nobody waits for: fetched when no container waits for anything, then verified as a whole.
//!
//! One layer at a time. How many pieces are under way follows how quickly they come, so that the first read after a pause
//! finds the link nearly free. While others keep the host's disk or link busy it only trickles.

mod verify;

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use darter_daemon::tasks::alone;
use darter_types::{PieceIndex, RateKind};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::sleep;

use crate::layer::{Open, Priority};
use crate::limits::Urgency;
use crate::shared::Shared;
use crate::upkeep;

/// Layers that wait for their turn; beyond, those that are added are fetched as they are read.
const LAYERS_MAX: usize = 1024;
/// Pieces under way at the same time.
const WINDOW_MAX: usize = 16;
/// A piece that comes sooner lets the window grow, one that comes later halves it.
const QUICK: Duration = Duration::from_millis(50);
const SLOW: Duration = Duration::from_millis(150);
/// How long a layer is left alone whose pieces nobody gives.
const REST: Duration = Duration::from_secs(10);
/// How long until somebody may have what a layer is verified with that nobody had.
const VERIFY_AGAIN: Duration = Duration::from_secs(3600);
/// How long a piece that nobody waits for stands back behind containers that read only what is here.
const STAND_BACK_MAX: Duration = Duration::from_secs(1);
/// How often it is looked whether containers are still at rest, and the host's disk and link busy.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// While disk or link are busy, so often a piece comes all the same: on a host that is always busy it ends some day.
const TRICKLE: Duration = Duration::from_secs(2);

#[derive(Default)]
pub(crate) struct Background {
    layers: Mutex<VecDeque<Weak<Open>>>,
    added: Notify,
}

impl Background {
    /// Fetches the layer when its map is known and its turn comes.
    pub(crate) fn add(&self, shared: &Arc<Shared>, open: &Arc<Open>) {
        if open.filling.swap(true, Ordering::AcqRel) {
            return;
        }
        // A container is about to start: its reads come first.
        shared.demand.touch();
        let (owner, layer) = (shared.clone(), Arc::downgrade(open));
        let stop = open.stop.clone();
        shared.tasks.spawn_until_stop("background", async move {
            let known = stop.run_until_cancelled(map_known(&layer)).await;
            if known != Some(true) {
                return;
            }
            if let Some(open) = layer.upgrade().filter(|_| owner.options.prefetch) {
                owner.starts.fetch(&open);
            }
            owner.background.push(layer);
        });
    }

    fn push(&self, layer: Weak<Open>) {
        let mut layers = self.layers.lock();
        if layers.len() < LAYERS_MAX {
            layers.push_back(layer);
        }
        drop(layers);
        self.added.notify_one();
    }

    async fn next(&self) -> Arc<Open> {
        loop {
            let first = self.layers.lock().pop_front();
            match first {
                Some(layer) => {
                    if let Some(open) = layer.upgrade().filter(|open| !open.stop.is_cancelled()) {
                        return open;
                    }
                }
                None => self.added.notified().await,
            }
        }
    }
}

/// Waits for the map; false if it will never come.
async fn map_known(layer: &Weak<Open>) -> bool {
    let Some(mut found) = layer.upgrade().map(|open| open.found.subscribe()) else { return false };
    loop {
        match &*found.borrow_and_update() {
            crate::layer::Found::Ready(_) => return true,
            crate::layer::Found::Impossible(_) => return false,
            crate::layer::Found::Searching { .. } => {}
        }
        if found.changed().await.is_err() {
            return false;
        }
    }
}

/// Works until the program stops.
pub(crate) async fn run(shared: Arc<Shared>) {
    loop {
        let open = shared.background.next().await;
        let stop = open.stop.clone();
        let worked = stop.run_until_cancelled(alone("fill", fill_and_verify(&shared, &open))).await;
        if let Some(Ok(Some(pause))) = worked {
            again_later(&shared, &open, pause);
        }
    }
}

/// How long to leave the layer alone, if it isn't done with then.
async fn fill_and_verify(shared: &Arc<Shared>, open: &Arc<Open>) -> Option<Duration> {
    if !fill(shared, open).await {
        return Some(REST);
    }
    let is_done = verify::run(shared, open).await;
    // Where a piece was lost meanwhile it is fetched first.
    let pause = if open.is_complete() { VERIFY_AGAIN } else { REST };
    (!is_done).then_some(pause)
}

/// The same for an order, which waits for it; false if not all pieces came, or verifying has found one lost. What a layer is
/// verified with may come later.
pub(crate) async fn bring(shared: &Arc<Shared>, open: &Arc<Open>) -> bool {
    if !fill(shared, open).await {
        return false;
    }
    verify::run(shared, open).await;
    open.is_complete()
}

fn again_later(shared: &Arc<Shared>, open: &Arc<Open>, pause: Duration) {
    let (owner, layer, stop) = (shared.clone(), Arc::downgrade(open), open.stop.clone());
    shared.tasks.spawn_until_stop("background rest", async move {
        if stop.run_until_cancelled(sleep(pause)).await.is_some() {
            owner.background.push(layer);
        }
    });
}

/// Until no container has waited for a piece for a while; nor read one from the disk, but that may go on for ever.
pub(super) async fn rest(shared: &Shared) {
    let (pause, begun) = (shared.options.background.idle_before, Instant::now());
    loop {
        let mut idle = shared.demand.idle();
        if begun.elapsed() < STAND_BACK_MAX {
            idle = idle.min(shared.demand.idle_local());
        }
        if idle >= pause {
            return;
        }
        sleep((pause - idle).max(LOOK_AGAIN)).await;
    }
}

/// Waits while the host is busy with other things, up to [`TRICKLE`]; false if it still is.
async fn host_is_calm(shared: &Shared) -> bool {
    let begun = Instant::now();
    loop {
        let busy = shared.load.look();
        if !busy.any() {
            return true;
        }
        if begun.elapsed() >= TRICKLE {
            return false;
        }
        let since = Instant::now();
        sleep(LOOK_AGAIN).await;
        shared.load.yielded(busy, since.elapsed());
    }
}

/// Fetches what is missing; whether all of it is here.
async fn fill(shared: &Arc<Shared>, open: &Arc<Open>) -> bool {
    let Some(map) = open.map_now() else { return false };
    let len = |index: u32| u64::from(map.piece(PieceIndex(index)).plain_len);
    if !upkeep::room_to_grow(shared, open.missing().into_iter().map(len).sum()).await {
        return false;
    }
    let mut window = 1;
    let mut under_way = FuturesUnordered::new();
    for index in open.missing() {
        rest(shared).await;
        if !host_is_calm(shared).await {
            window = 1;
        }
        if !upkeep::may_grow(shared, len(index)) {
            return false;
        }
        // Who else fills the layer, or reads it, may have brought it.
        let paid = open.missing_len(index).unwrap_or(0);
        if paid > 0 {
            shared.limits.of(RateKind::Background).take(paid, Urgency::Background).await;
        }
        under_way.push(fetch(open, index, paid));
        while under_way.len() >= window {
            match under_way.next().await {
                Some(Some(took)) => window = next_window(window, took),
                Some(None) => return false,
                None => break,
            }
        }
    }
    while let Some(fetched) = under_way.next().await {
        if fetched.is_none() {
            return false;
        }
    }
    open.is_complete()
}

fn next_window(window: usize, took: Duration) -> usize {
    if took < QUICK {
        (window + 1).min(WINDOW_MAX)
    } else if took > SLOW {
        (window / 2).max(1)
    } else {
        window
    }
}

/// How long the piece took; `None` if nobody gave it. The limit gets back what was `paid` for it if it didn't come for that.
async fn fetch(open: &Arc<Open>, index: u32, paid: u64) -> Option<Duration> {
    let (begun, limit) = (Instant::now(), open.shared.limits.of(RateKind::Background));
    match open.keep(PieceIndex(index), Priority::Background).await {
        Ok(is_ours) => {
            if !is_ours {
                limit.give_back(paid);
            }
            Some(begun.elapsed())
        }
        Err(error) => {
            limit.give_back(paid);
            tracing::debug!(task = %open.task, index, %error, "a piece did not come in the background");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn window_follows_how_quickly_pieces_come() {
        assert_eq!(next_window(1, Duration::from_millis(5)), 2);
        assert_eq!(next_window(WINDOW_MAX, Duration::from_millis(5)), WINDOW_MAX);
        assert_eq!(next_window(8, Duration::from_millis(100)), 8);
        assert_eq!(next_window(8, Duration::from_millis(300)), 4);
        assert_eq!(next_window(1, Duration::from_secs(3)), 1);
    }
}
