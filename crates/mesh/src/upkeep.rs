//! Room on the disk: what goes when there is too little, and what doesn't come then.
//!
//! Layers go as a whole, the one that was used longest ago first; pieces that another layer needs stay. Nothing goes that
//! the owner of the snapshots says is in use, that is being made, or that was used a moment ago; and while the disk isn't full
//! but for the mark, nothing that was used in the last minutes: whoever else fills the disk must not have a seed read the same
//! layer again and again. A node keeps the map of what
//! goes, so that its pieces can be fetched again. A seed lets the map go too: whoever asks for the layer has it made anew.
//!
//! What an order to preheat has brought to a node is reached by no snapshot until its image is pulled. For a day it goes only
//! after all else that may go, and never for what nobody waits for.
//!
//! What a container waits for comes in any case; where it can't be stored it goes through memory.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use darter_store::{Space, StoreError};
use darter_types::{DiffId, LayerTask, PieceHash, PieceIndex};
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::shared::Shared;
use crate::status::StoreStatus;
use crate::work;

/// The layers that snapshots reach; `None` if that can't be found out now: then nothing goes.
pub type InUse = Arc<dyn Fn() -> Option<HashSet<DiffId>> + Send + Sync>;

/// How often it is looked whether there is too little room.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// How often it is noted beside the maps when layers were used.
const NOTE_EVERY: Duration = Duration::from_secs(60);
/// How long nothing is looked for again after nothing was found that could go; twice as long each further time.
const BARREN_MIN: Duration = Duration::from_secs(10);
const BARREN_MAX: Duration = Duration::from_secs(160);
/// What is made room for when something could not be stored.
const FULL_ROOM: u64 = 1 << 20;
/// A full disk is told once in this time.
const SAY_EVERY: Duration = Duration::from_secs(60);
/// Pieces may take more than the blob: they are compressed one by one, and for speed. One part in so many is added, and this.
const MAKE_SPARE_ONE_IN: u64 = 4;
const MAKE_SPARE_MIN: u64 = 256 << 10;
/// How often room is made for one layer: holes have whole blocks only, so the disk gains a little less than pieces had, and
/// others write meanwhile.
const MAKE_ROUNDS_MAX: u32 = 3;

pub(crate) struct Upkeep {
    /// Until it is known what is in use nothing goes.
    in_use: Mutex<Option<InUse>>,
    /// Since it was last noted on disk.
    used: Mutex<HashMap<LayerTask, SystemTime>>,
    /// Something could not be stored.
    full: Notify,
    said_at: Mutex<Option<Instant>>,
    barren: Mutex<Barren>,
    /// Pieces may be held that belong to no map: of a layer that could not be made, or whose map is gone.
    has_orphans: AtomicBool,
    /// The background stands still for want of room.
    is_tight: AtomicBool,
}

/// Nothing was found that could go: every map was looked at for that.
#[derive(Default)]
struct Barren {
    until: Option<Instant>,
    pause: Duration,
}

impl Barren {
    fn note(&mut self, freed: u64) {
        self.pause = if freed > 0 { Duration::ZERO } else { (2 * self.pause).clamp(BARREN_MIN, BARREN_MAX) };
        self.until = Some(Instant::now() + self.pause);
    }
}

impl Default for Upkeep {
    fn default() -> Self {
        Self {
            in_use: Mutex::default(),
            used: Mutex::default(),
            full: Notify::new(),
            said_at: Mutex::default(),
            barren: Mutex::default(),
            // Whatever the process before left.
            has_orphans: AtomicBool::new(true),
            is_tight: AtomicBool::new(false),
        }
    }
}

impl Upkeep {
    pub(crate) fn set_in_use(&self, in_use: InUse) {
        *self.in_use.lock() = Some(in_use);
    }

    /// The layer is used: by a container here, or by another peer.
    pub(crate) fn touch(&self, task: LayerTask) {
        self.used.lock().insert(task, SystemTime::now());
    }

    /// Pieces were stored, or are still there, without their map.
    pub(crate) fn left_orphans(&self) {
        self.has_orphans.store(true, Ordering::Relaxed);
    }

    /// Something could not be stored for want of room. It is told now and then.
    pub(crate) fn is_full(&self, error: &StoreError) {
        self.full.notify_one();
        let mut said_at = self.said_at.lock();
        if said_at.is_none_or(|at| at.elapsed() >= SAY_EVERY) {
            *said_at = Some(Instant::now());
            tracing::warn!(%error, "pieces can't be kept; what containers wait for goes through memory");
        }
    }

    fn is_barren(&self) -> bool {
        self.barren.lock().until.is_some_and(|until| Instant::now() < until)
    }
}

/// Looks after the room until the program stops.
pub(crate) async fn run(shared: Arc<Shared>) {
    let mut noted = Instant::now();
    loop {
        let was_full = tokio::time::timeout(LOOK_EVERY, shared.upkeep.full.notified()).await.is_ok();
        if noted.elapsed() >= NOTE_EVERY {
            noted = Instant::now();
            let owner = shared.clone();
            shared.work.run(move || note_uses(&owner)).await;
        }
        let Some(space) = space(&shared) else { continue };
        let limits = shared.store.limits();
        let excess = limits.excess(&space, if was_full { FULL_ROOM } else { 0 });
        if excess > 0 && !shared.upkeep.is_barren() {
            let is_needed = was_full || limits.is_over_quota(&space);
            evict(&shared, excess, Spared::goes_last(spared_for(&shared, is_needed))).await;
        }
    }
}

/// What stays although nobody reaches it.
#[derive(Clone, Copy)]
struct Spared {
    /// What was used so long ago or later.
    used_within: Duration,
    /// What an order has brought; else that goes last.
    preheated: bool,
}

impl Spared {
    fn goes_last(used_within: Duration) -> Self {
        Self { used_within, preheated: false }
    }
}

/// How long ago what may go must have been used: less if the room is needed now.
fn spared_for(shared: &Shared, is_needed: bool) -> Duration {
    let options = &shared.options;
    if is_needed { options.spared_for.min(options.keep_for) } else { options.keep_for }
}

fn space(shared: &Shared) -> Option<Space> {
    let space = shared.store.space();
    space.inspect_err(|error| tracing::warn!(%error, "it is not known how full the disk is")).ok()
}

/// What people are told.
pub(crate) fn status(shared: &Shared) -> StoreStatus {
    let (space, stats, limits) = (space(shared), shared.store.stats(), shared.store.limits());
    StoreStatus {
        dir: shared.store.root().to_owned(),
        used: stats.bytes,
        quota: limits.quota,
        evicted: stats.evicted,
        total: space.map_or(0, |space| space.total),
        available: space.map_or(0, |space| space.available),
        high_percent: limits.high_percent,
        is_beyond_mark: space.is_some_and(|space| limits.is_beyond_mark(&space)),
        is_tight: shared.upkeep.is_tight.load(Ordering::Relaxed),
    }
}

/// Sees to it that a layer can be made of a blob of `size` bytes (0: it is not known). What there is no room for fails with
/// the directory and what is missing there.
pub(crate) async fn room_to_make(shared: &Arc<Shared>, size: u64) -> Result<(), StoreError> {
    let needed = if size == 0 { 0 } else { size + size / MAKE_SPARE_ONE_IN + MAKE_SPARE_MIN };
    let limits = *shared.store.limits();
    for _ in 0..MAKE_ROUNDS_MAX {
        let space = shared.store.space()?;
        if limits.missing(&space, needed) == 0 {
            return Ok(());
        }
        let excess = limits.excess(&space, needed);
        if !limits.could_hold(&space, needed)
            || evict(shared, excess, Spared::goes_last(spared_for(shared, true))).await == 0
        {
            break;
        }
    }
    match limits.missing(&shared.store.space()?, needed) {
        0 => Ok(()),
        missing => Err(StoreError::Full { dir: shared.store.root().to_owned(), needed, missing }),
    }
}

/// Whether `needed` bytes may come that nobody waits for, if need be in the place of others.
pub(crate) async fn room_to_grow(shared: &Arc<Shared>, needed: u64) -> bool {
    if !may_grow(shared, needed)
        && let Some(space) = space(shared)
        && shared.store.limits().could_hold(&space, needed)
        && !shared.upkeep.is_barren()
    {
        let excess = shared.store.limits().excess_to_grow(&space, needed);
        // On a seed that would be an order in the place of another.
        let used_within = spared_for(shared, !shared.is_seed());
        evict(shared, excess, Spared { used_within, preheated: true }).await;
    }
    let has_room = may_grow(shared, needed);
    if shared.upkeep.is_tight.swap(!has_room, Ordering::Relaxed) == has_room {
        let dir = shared.store.root().display();
        match has_room {
            true => tracing::info!(%dir, "there is room again for what nobody waits for"),
            false => {
                tracing::warn!(%dir, needed, "no room for what nobody waits for: it comes when it is read")
            }
        }
    }
    has_room
}

/// The same, as things are.
pub(crate) fn may_grow(shared: &Shared, needed: u64) -> bool {
    space(shared).is_none_or(|space| shared.store.limits().growth(&space) >= needed)
}

/// How many of `needed` bytes may not come as things are, as nobody waits for them.
pub(crate) fn lacking(shared: &Shared, needed: u64) -> u64 {
    space(shared).map_or(0, |space| needed.saturating_sub(shared.store.limits().growth(&space)))
}

/// Frees `needed` bytes of pieces, or what can be freed; returns how many.
async fn evict(shared: &Arc<Shared>, needed: u64, spared: Spared) -> u64 {
    let owner = shared.clone();
    let freed = work::alone("evict", move || evict_now(&owner, needed, spared)).await.unwrap_or(0);
    shared.upkeep.barren.lock().note(freed);
    freed
}

fn evict_now(shared: &Shared, needed: u64, spare: Spared) -> u64 {
    note_uses(shared);
    let Some(spared) = spared(shared, spare.used_within) else { return 0 };
    let mut candidates = by_last_use(shared, &spared, spare.preheated);
    let mut victims = HashSet::new();
    let mut freed = match shared.upkeep.has_orphans.swap(false, Ordering::Relaxed) {
        true => sweep(shared, &victims),
        false => 0,
    };
    while freed < needed && !candidates.is_empty() {
        let mut expected = 0;
        while freed + expected < needed
            && let Some(task) = candidates.pop_front()
        {
            expected += held_bytes(shared, task);
            give_up(shared, task);
            victims.insert(task);
        }
        freed += sweep(shared, &victims);
    }
    victims.iter().for_each(|task| tell(shared, *task));
    if freed > 0 {
        tracing::info!(bytes = freed, layers = victims.len(), "made room: the layers used longest ago went");
    }
    freed
}

/// Notes beside the maps when layers were used.
fn note_uses(shared: &Shared) {
    let in_use = shared.upkeep.in_use.lock().clone();
    let reached = in_use.and_then(|in_use| in_use()).unwrap_or_default();
    for task in shared.store.maps().into_iter().filter(|task| reached.contains(&task.diff_id)) {
        shared.upkeep.touch(task);
    }
    let used: Vec<_> = {
        let mut used = shared.upkeep.used.lock();
        let all = used.iter().map(|(task, at)| (*task, *at)).collect();
        used.retain(|_, at| is_within(shared.options.spared_for, *at));
        all
    };
    for (task, at) in used {
        shared.store.set_last_used(task, at);
    }
}

fn is_within(time: Duration, at: SystemTime) -> bool {
    at.elapsed().is_ok_and(|age| age < time)
}

/// What may not go now.
fn spared(shared: &Shared, time: Duration) -> Option<impl Fn(LayerTask) -> bool + '_> {
    let in_use = shared.upkeep.in_use.lock().clone();
    let reached = in_use?()?;
    let making = shared.makes.under_way();
    // It was noted a moment ago when each was used.
    let is_recent = move |task| shared.store.last_used(task).is_some_and(|at| is_within(time, at));
    Some(move |task: LayerTask| making.contains(&task) || reached.contains(&task.diff_id) || is_recent(task))
}

/// What may go, in this order.
fn by_last_use(
    shared: &Shared,
    spared: &dyn Fn(LayerTask) -> bool,
    spares_preheated: bool,
) -> VecDeque<LayerTask> {
    let tasks = shared.store.maps().into_iter().filter(|task| !spared(*task));
    let tasks = tasks.map(|task| (is_preheated(shared, task), shared.store.last_used(task), task));
    let mut tasks: Vec<_> = tasks.filter(|(preheated, ..)| !(spares_preheated && *preheated)).collect();
    tasks.sort();
    tasks.into_iter().map(|(.., task)| task).collect()
}

fn is_preheated(shared: &Shared, task: LayerTask) -> bool {
    shared.shelf.peek(&shared.store, task).is_some_and(|shelved| shelved.note().is_preheated())
}

fn held_bytes(shared: &Shared, task: LayerTask) -> u64 {
    let shelved = shared.shelf.peek(&shared.store, task);
    shelved.map_or(0, |shelved| shared.store.held_bytes(shelved.hashes.iter()))
}

/// A seed forgets the layer before its pieces go, so that nobody is sent here for them.
fn give_up(shared: &Shared, task: LayerTask) {
    if !shared.is_seed() {
        return;
    }
    shared.shelf.forget(task);
    if let Err(error) = shared.store.remove_map(task) {
        tracing::warn!(%task, %error, "the map of a layer that had to go can't be removed");
    }
    shared.control.drop_task(task);
}

/// All pieces go that no layer has but these.
fn sweep(shared: &Shared, victims: &HashSet<LayerTask>) -> u64 {
    let sweep = shared.store.sweep();
    for task in shared.store.maps().into_iter().filter(|task| !victims.contains(task)) {
        if let Some(shelved) = shared.shelf.peek(&shared.store, task) {
            sweep.keep(shelved.hashes.iter());
        }
    }
    // Also those whose maps could not be stored.
    for open in shared.open_layers().into_iter().filter(|open| !victims.contains(&open.task)) {
        if let Some(map) = open.map_now() {
            let hashes: Vec<PieceHash> =
                (0..map.piece_count()).map(|index| map.piece(PieceIndex(index)).hash).collect();
            sweep.keep(hashes.iter());
        }
    }
    sweep.end().bytes
}

/// Who counts on the layer learns what is left of it.
fn tell(shared: &Shared, task: LayerTask) {
    if let Some(layer) = shared.open_layer(task)
        && let Some(map) = layer.open().map_now()
    {
        layer.open().went(&map);
    }
    if !shared.is_seed()
        && let Some(shelved) = shared.shelf.peek(&shared.store, task)
    {
        shared.control.shrink(task, shelved.proof.is_some(), &shelved.spans(&shared.store));
    }
}

/// Whatever may go, goes.
#[cfg(test)]
pub(crate) async fn evict_all(mesh: &crate::Mesh) {
    evict_some(mesh, u64::MAX).await;
}

/// So many bytes go, as for a container.
#[cfg(test)]
pub(crate) async fn evict_some(mesh: &crate::Mesh, bytes: u64) {
    evict(mesh.shared(), bytes, Spared::goes_last(Duration::ZERO)).await;
}
