//! The chains that are shown, and the layers that are open for them.
//!
//! A layer is open once, however many chains have it from the same sources, and closed when the last of them goes. One that
//! proves impossible is reported once.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use darter_daemon::tasks::Tasks;
use darter_daemon::traces::Trail;
use darter_types::{DiffId, LayerSource, LayerTask};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::decide::Image;
use super::ports::{LayerMesh, LayerRequest, OpenLayer};
use super::pull::{Held, Pull};
use crate::fs::{ContentError, FileSystem, LayerContent};
use crate::snapshot::{Chain, ChainLayer};

/// The layers of so many images are kept open since one of them was asked for: the rest of the pull will want them.
const AHEAD_MAX: usize = 32;

/// Before a map that was not available is asked for again.
const MAP_RETRY: Duration = Duration::from_secs(1);

/// An open layer that is watched until its map is there.
pub(super) struct Watched {
    pub diff_id: DiffId,
    pub content: Arc<dyn OpenLayer>,
    /// Where it may come from, as it was opened.
    sources: Vec<LayerSource>,
    /// Why it is impossible, once that is known. That is said of these sources, not of the layer.
    pub failed: Arc<OnceLock<String>>,
    watcher: AbortHandle,
}

impl Watched {
    /// Exactly these: by one more it might have a right that who names only these has not.
    fn is_of(&self, sources: &[LayerSource]) -> bool {
        self.sources.len() == sources.len() && sources.iter().all(|source| self.sources.contains(source))
    }

    /// Why none of `sources` gives the layer.
    fn refuses(&self, sources: &[LayerSource]) -> Option<&String> {
        let known = sources.iter().all(|source| self.sources.contains(source));
        self.failed.get().filter(|_| known)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

/// See the module's head.
pub(super) struct Chains {
    fs: Arc<FileSystem>,
    mesh: Arc<dyn LayerMesh>,
    tasks: Tasks,
    /// Layers that turned out impossible; when it is full, the next who waits for the layer reports it again.
    impossible: mpsc::Sender<DiffId>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    shown: HashMap<u32, Vec<Arc<Watched>>>,
    open: HashMap<DiffId, Weak<Watched>>,
    ahead: VecDeque<(Arc<Image>, Vec<Arc<Watched>>)>,
}

impl Chains {
    pub fn new(
        fs: Arc<FileSystem>,
        mesh: Arc<dyn LayerMesh>,
        tasks: Tasks,
        impossible: mpsc::Sender<DiffId>,
    ) -> Arc<Self> {
        Arc::new(Self { fs, mesh, tasks, impossible, state: Mutex::default() })
    }

    pub fn fs(&self) -> &Arc<FileSystem> {
        &self.fs
    }

    /// Shows the chain's directory; once is enough, unless a layer failed and has other sources now. True if it is shown
    /// anew, so that what was known of it no longer holds.
    pub fn show(&self, chain: &Chain) -> bool {
        let mut state = self.state.lock();
        if state.shown.get(&chain.dir).is_some_and(|layers| !may_work_now(layers, &chain.layers)) {
            return false;
        }
        let layers = self.open_all(&mut state, &chain.layers, &Pull::default());
        self.fs.add(chain.dir, contents(&layers));
        state.shown.insert(chain.dir, layers);
        true
    }

    /// Shows a chain anew that nothing speaks against, unless it can be read: it may have failed for what holds no longer.
    pub fn renew(&self, chain: &Chain) {
        if self.fs.tree_now(chain.dir).is_none() {
            let layers = self.layers(chain.dir);
            self.fs.add(chain.dir, contents(&layers));
        }
    }

    /// The lowest of these layers that can't be had from where the image has it, and why.
    pub fn impossible(&self, layers: &[ChainLayer]) -> Option<(DiffId, String)> {
        let state = self.state.lock();
        layers.iter().find_map(|layer| {
            let open = state.open.get(&layer.diff_id)?.upgrade()?;
            Some((layer.diff_id, open.refuses(&layer.layer_sources())?.clone()))
        })
    }

    pub fn is_shown(&self, dir: u32) -> bool {
        self.state.lock().shown.contains_key(&dir)
    }

    /// Takes the directory away, and closes the layers that nobody else has.
    pub fn forget(&self, dir: u32) {
        self.fs.remove(dir);
        let mut state = self.state.lock();
        state.shown.remove(&dir);
        let State { shown, ahead, .. } = &mut *state;
        let used =
            |layer: &Arc<Watched>| shown.values().flatten().any(|other| other.diff_id == layer.diff_id);
        ahead.retain(|(_, layers)| layers.iter().any(used));
        state.open.retain(|_, layer| layer.strong_count() > 0);
    }

    /// Starts on all layers of an image whose lowest ones are being asked for.
    pub fn open_ahead(&self, image: &Arc<Image>) {
        let mut state = self.state.lock();
        if state.ahead.iter().any(|(known, _)| Arc::ptr_eq(known, image)) {
            return;
        }
        let opening = || self.open_all(&mut state, &image.layers, &image.pull);
        let layers = image.pull.trail().over_now(opening);
        state.ahead.retain(|(known, _)| known.found.manifest != image.found.manifest);
        state.ahead.push_back((image.clone(), layers));
        if state.ahead.len() > AHEAD_MAX {
            state.ahead.pop_front();
        }
    }

    /// The image that was lately pulled whose configuration has this digest.
    pub fn pulled(&self, config: &str) -> Option<Arc<Image>> {
        let state = self.state.lock();
        let mut images = state.ahead.iter().rev().map(|(image, _)| image);
        images.find(|image| image.found.config.to_string() == config).cloned()
    }

    /// The pull that brought all layers of a chain that is shown, if that was lately.
    pub fn trail(&self, dir: u32) -> Trail {
        let state = self.state.lock();
        let Some(shown) = state.shown.get(&dir) else { return Trail::NONE };
        let is_same = |layers: &[Arc<Watched>]| {
            layers.len() == shown.len()
                && layers.iter().zip(shown).all(|(one, other)| Arc::ptr_eq(one, other))
        };
        let mut images = state.ahead.iter().rev();
        let image = images.find(|(_, layers)| is_same(layers));
        image.map(|(image, _)| image.pull.trail()).unwrap_or_default()
    }

    /// The layers of a chain that is shown, the lowest first.
    pub fn layers(&self, dir: u32) -> Vec<Arc<Watched>> {
        self.state.lock().shown.get(&dir).cloned().unwrap_or_default()
    }

    /// The chains that are shown and for which this layer is impossible: another image may have it from elsewhere.
    pub fn failed_for(&self, diff_id: DiffId) -> Vec<u32> {
        let state = self.state.lock();
        let failed = |layer: &Arc<Watched>| layer.diff_id == diff_id && layer.failed.get().is_some();
        let has = |layers: &[Arc<Watched>]| layers.iter().any(failed);
        state.shown.iter().filter(|(_, layers)| has(layers)).map(|(dir, _)| *dir).collect()
    }

    /// All layers that are open.
    pub fn open_layers(&self) -> Vec<Arc<Watched>> {
        self.state.lock().open.values().filter_map(Weak::upgrade).collect()
    }

    fn open_all(&self, state: &mut State, layers: &[ChainLayer], pull: &Pull) -> Vec<Arc<Watched>> {
        layers.iter().map(|layer| self.open(state, layer, pull)).collect()
    }

    fn open(&self, state: &mut State, layer: &ChainLayer, pull: &Pull) -> Arc<Watched> {
        let sources = layer.layer_sources();
        // Also for one that is open: there may be new sources.
        let task = LayerTask::current(layer.diff_id);
        let content = self.mesh.open(LayerRequest { task, sources: sources.clone() });
        if let Some(open) = state.open.get(&layer.diff_id).and_then(Weak::upgrade)
            && open.is_of(&sources)
        {
            return open;
        }
        content.fill();
        let failed = Arc::new(OnceLock::new());
        let watcher = self.watch(layer.diff_id, content.clone(), failed.clone(), pull.hold());
        let open = Arc::new(Watched { diff_id: layer.diff_id, content, sources, failed, watcher });
        state.open.insert(layer.diff_id, Arc::downgrade(&open));
        open
    }

    fn watch(
        &self,
        diff_id: DiffId,
        content: Arc<dyn OpenLayer>,
        failed: Arc<OnceLock<String>>,
        pull: Option<Held>,
    ) -> AbortHandle {
        let impossible = self.impossible.clone();
        self.tasks.spawn_alone("watch layer", async move {
            // The pull lasts until the map is there.
            let _pull = pull;
            let reason = loop {
                match content.map().await {
                    Ok(_) => return,
                    Err(ContentError::Impossible(reason)) => break reason,
                    Err(ContentError::Unavailable(reason)) => {
                        tracing::debug!(layer = %diff_id, reason, "no map yet");
                        tokio::time::sleep(MAP_RETRY).await;
                    }
                }
            };
            tracing::warn!(layer = %diff_id, reason, "the layer can't be served lazily");
            // Nobody else sets it.
            let _ = failed.set(reason);
            // It fails only when the program stops.
            let _ = impossible.send(diff_id).await;
        })
    }
}

fn contents(layers: &[Arc<Watched>]) -> Vec<Arc<dyn LayerContent>> {
    layers.iter().map(|layer| layer.content.clone() as Arc<dyn LayerContent>).collect()
}

/// Whether a layer failed, and there are other places for it now.
fn may_work_now(shown: &[Arc<Watched>], wanted: &[ChainLayer]) -> bool {
    let failed = shown.iter().zip(wanted).filter(|(layer, _)| layer.failed.get().is_some());
    failed.into_iter().any(|(layer, wanted)| layer.refuses(&wanted.layer_sources()).is_none())
}
