//! One layer as its user has it: its map, its pieces, how far it is.

mod fare;
mod fetch;
mod givers;
mod local;
mod open;
mod renew;
mod search;
mod standing;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use darter_layer::LayerMap;
use darter_registry::Credential;
use darter_types::{LayerSource, LayerTask, PieceIndex};
use tokio::sync::watch;

#[cfg(test)]
pub(crate) use open::Peer as OpenPeer;
pub(crate) use open::{Found, Open, Peers};
pub use renew::Renew;
pub(crate) use search::{SLOWEST, seeds_now, tar_section};

use crate::error::LayerError;
use crate::make::Fault;
use crate::right;
use crate::shared::{Shared, holding};
use crate::shelf::Shelved;
use crate::status::{LayerStatus, Progress};

/// Who waits for a map is about to start a container, so the background stands back; for this long, in case it never comes.
const MAP_DEMAND_MAX: Duration = Duration::from_secs(60);

/// What somebody wants: a layer, and where it can come from.
#[derive(Debug, Clone)]
pub struct LayerRequest {
    pub task: LayerTask,
    /// The first is where the caller's containerd read the manifest: its right to read is judged by that repository.
    pub sources: Vec<LayerSource>,
    /// For the registry of the first source. It stays in memory.
    pub credential: Option<Credential>,
}

impl LayerRequest {
    pub(crate) fn credential_for(&self, source: &LayerSource) -> Option<Credential> {
        let first = self.sources.first().map(|source| &source.repository.registry);
        self.credential.clone().filter(|_| first == Some(&source.repository.registry))
    }
}

/// Who waits for a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    Background,
    /// Nobody yet, but earlier starts have read it.
    Recorded,
    /// Nobody yet, but a container will probably read it soon.
    Ahead,
    /// A container.
    Demand,
}

#[cfg(test)]
pub(crate) fn open_peer(node: &str, address: &str, is_seed: bool) -> OpenPeer {
    OpenPeer { node: node.to_owned(), address: address.to_owned(), is_seed }
}

/// Why a layer is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// To read it, now or later.
    Use,
    /// Somebody ordered that it be here, and may take that back.
    Order,
    /// To learn whether it can be had.
    Probe,
}

/// A layer that is open. Clones are cheap; when the last one is dropped the work for it ends, and what was fetched stays.
#[derive(Clone)]
pub struct Layer(Arc<Handle>);

/// Closes the layer when it is dropped.
pub(crate) struct Handle(Arc<Open>);

impl Handle {
    pub(crate) fn open(&self) -> &Arc<Open> {
        &self.0
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.shared.upkeep.touch(self.0.task);
        self.0.close();
    }
}

impl Layer {
    /// Joins the layer if it is open, else opens it. The search for its map begins, unless it is only a probe.
    pub(crate) fn join(shared: &Arc<Shared>, request: LayerRequest, cause: Cause) -> Self {
        shared.upkeep.touch(request.task);
        let mut layers = shared.layers.lock();
        let known = layers.get(&request.task).and_then(std::sync::Weak::upgrade);
        let layer = match known {
            Some(handle) => {
                handle.0.add(request);
                Layer(handle)
            }
            None => {
                let task = request.task;
                let handle = Arc::new(Handle(Open::new(shared, request)));
                layers.insert(task, Arc::downgrade(&handle));
                Layer(handle)
            }
        };
        drop(layers);
        if cause == Cause::Use {
            layer.open().is_wanted.store(true, Ordering::Relaxed);
        }
        if cause != Cause::Probe {
            layer.open().begin();
        }
        layer
    }

    pub(crate) fn from_handle(handle: Arc<Handle>) -> Self {
        Layer(handle)
    }

    pub(crate) fn open(&self) -> &Arc<Open> {
        &self.0.0
    }

    pub fn task(&self) -> LayerTask {
        self.0.0.task
    }

    /// Waits for the map. The search goes on when the caller stops waiting. `Unavailable` after a round in which nobody
    /// could give or make it: another round follows, for which the caller may wait again.
    pub async fn map(&self) -> Result<Arc<LayerMap>, LayerError> {
        let open = &self.0.0;
        holding(open.shared.demand.wait(), MAP_DEMAND_MAX, open.map()).await
    }

    /// The map, if it is known.
    pub fn map_now(&self) -> Option<Arc<LayerMap>> {
        self.0.0.map_now()
    }

    /// Whether an image that names these sources may have what is here: a repository of them was seen to hold the layer.
    /// May block on the disk.
    pub fn is_open_to(&self, sources: &[LayerSource]) -> bool {
        let open = self.open();
        right::is_open(open.shared.shelf.get(&open.shared.store, open.task).as_deref(), sources)
    }

    /// For an image to which the layer isn't open: one of its repositories, a request for each registry, has to show that it
    /// holds the layer's blob. Takes as long as the registries take to answer. `Impossible` if all of them say that they
    /// don't have it, or not for these credentials.
    pub async fn admit(&self, requests: &[LayerRequest]) -> Result<(), LayerError> {
        let shelved = self.shelved().await;
        let shelved = shelved.ok_or_else(|| LayerError::unavailable("the layer's map is gone"))?;
        let shared = &self.open().shared;
        match right::admit(shared, &shelved, requests).await {
            Err(Fault::Denied(reason)) => match renew::renewed_requests(shared, requests).await {
                Some(requests) => right::admit(shared, &shelved, &requests).await?,
                None => return Err(Fault::Denied(reason).into()),
            },
            shown => shown?,
        }
        self.open().name_repository(&shelved);
        Ok(())
    }

    /// For a seed that is ordered to have the layer of an image: the repository that the image names first has to show that it
    /// holds it, also if the layer is here already. A blob of which nobody knows whether it gives the layer is read.
    pub async fn prove(&self, request: &LayerRequest) -> Result<(), LayerError> {
        let shared = &self.open().shared;
        let shelved = self.shelved().await;
        let shelved = shelved.ok_or_else(|| LayerError::unavailable("the layer's map is gone"))?;
        let source = request.sources.first();
        let source = source.ok_or_else(|| LayerError::impossible("no repository was named"))?;
        let credential = request.credential_for(source);
        let read = right::Unknown::Read;
        right::prove(shared, &shelved, self.task(), source, credential.as_ref(), read).await?;
        Ok(())
    }

    /// Chooses anew by which repository others judge us: sources were added after the map was found here.
    pub async fn name_repository(&self) {
        if let Some(shelved) = self.shelved().await {
            self.open().name_repository(&shelved);
        }
    }

    /// What is noted beside the map, if it is here.
    async fn shelved(&self) -> Option<Arc<Shelved>> {
        let open = self.open().clone();
        let look = move || open.shared.shelf.get(&open.shared.store, open.task);
        self.open().shared.work.run(look).await
    }

    /// How far the map is.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.0.0.progress.subscribe()
    }

    /// The piece's plain bytes, checked. Goes on, for a while, over parents that fail; what was fetched is kept also when
    /// the caller stops waiting.
    pub async fn read(&self, index: PieceIndex, priority: Priority) -> Result<Bytes, LayerError> {
        self.0.0.read(index, priority).await
    }

    /// The piece, if it is in memory or on disk. Blocks on the disk.
    pub fn read_local(&self, index: PieceIndex) -> Option<Bytes> {
        self.0.0.read_local(index)
    }

    /// The piece, if it is in memory. Never blocks.
    pub fn in_memory(&self, index: PieceIndex) -> Option<Bytes> {
        self.0.0.in_memory(index)
    }

    /// A container reads the piece, so long after it first read anything of its tree. What the first start after the layer
    /// has come to this peer reads is noted, and told to a seed: for later starts, here and elsewhere.
    pub fn touched(&self, index: PieceIndex, since_first: Duration) {
        self.0.0.touched(index.0, since_first);
    }

    /// The peer that gave this peer the piece since the layer was opened.
    pub fn giver(&self, index: PieceIndex) -> Option<String> {
        self.0.0.giver(index.0)
    }

    /// These pieces will probably be read soon. A hint: what there is no room for is not fetched.
    pub fn want(&self, first: PieceIndex, count: u32) {
        self.0.0.want(first, count);
    }

    /// Fetches what earlier starts have read first, if that is known; and all of it in the background, when nobody waits for anything else, and then verifies it.
    pub fn fill(&self) {
        let open = &self.0.0;
        open.shared.starts.begin(open);
        open.shared.background.add(&open.shared, open);
    }

    pub fn status(&self) -> LayerStatus {
        self.0.0.status()
    }
}
