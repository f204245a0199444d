//! What the lazy half of the snapshotter needs of the world. The mesh, the registries and containerd implement it, and
//! the tests' versions in memory.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use darter_types::{BlobDigest, ChainId, DiffId, Digest, LayerSource, LayerTask, Repository};
use futures_util::stream::BoxStream;

use crate::fs::LayerContent;
use crate::snapshot::Mount;

/// A layer that is open in the mesh; it stays so as long as somebody holds it.
pub trait OpenLayer: LayerContent {
    /// How far it is and from whom, at this moment.
    fn status(&self) -> LayerStatus;

    /// Lets what is missing arrive in the background.
    fn fill(&self);
}

/// For people: `darter status`, and the words of an error.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerStatus {
    pub pieces: u64,
    pub have: u64,
    /// Bytes by where they came from.
    pub from: BTreeMap<String, u64>,
    /// One or a few words, for example `making, 12 of 80 MB read, by seed-1`.
    pub state: String,
}

/// A layer and where its blob lies.
#[derive(Debug, Clone)]
pub struct LayerRequest {
    pub task: LayerTask,
    pub sources: Vec<LayerSource>,
}

/// What the mesh says to a layer before it is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// Somebody has it.
    Known,
    /// A source answers for it.
    Answering,
    /// It can't be had, for a reason that containerd shall find out by itself.
    Refused(String),
}

#[async_trait]
pub trait LayerMesh: Send + Sync + 'static {
    /// Cheap; joins what is open already and adds the sources.
    fn open(&self, request: LayerRequest) -> Arc<dyn OpenLayer>;

    /// From now on pieces of layers may go when there is too little room, save of those that this says are in use.
    fn keep(&self, in_use: InUse);

    /// How much room there is. May block on the disk.
    fn store(&self) -> StoreHealth;

    /// What this node may move, and what its background stands back for.
    fn traffic(&self) -> TrafficHealth;

    /// The layers that are open, for snapshots or for the manager's orders.
    fn layers(&self) -> Vec<(DiffId, LayerStatus)>;

    /// The schedulers that the manager has named.
    fn schedulers(&self) -> Vec<SchedulerHealth>;

    /// Whether the layer can probably be had; the caller bounds the time.
    async fn probe(&self, layer: &LayerRequest) -> Probe;
}

/// The layers that snapshots reach; `None` if that can't be found out now.
pub type InUse = Arc<dyn Fn() -> Option<HashSet<DiffId>> + Send + Sync>;

/// Room for pieces, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct StoreHealth {
    pub dir: PathBuf,
    pub used: u64,
    /// The most that may be used, if that is limited.
    pub quota: Option<u64>,
    /// What had to go since the start.
    pub evicted: u64,
    /// Of the file system.
    pub total: u64,
    pub available: u64,
    /// When the file system is this full, in percent, nothing comes that nobody waits for; and whether it is.
    pub high_percent: u8,
    pub beyond_mark: bool,
    /// Something did not come that nobody waits for, because there was no room for it.
    pub tight: bool,
}

/// What this node may move.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct TrafficHealth {
    pub limits: Vec<LimitHealth>,
    /// Of `disk` and `network`, what others keep busy, so that the background stands back.
    pub yields_to: Vec<&'static str>,
}

/// A limit that is in force.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct LimitHealth {
    pub kind: &'static str,
    /// Bytes per second.
    pub rate: u64,
    /// `host`, `cluster` or `member`.
    pub set_by: &'static str,
}

/// A scheduler, as this node finds it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct SchedulerHealth {
    pub node: String,
    /// `host:port`
    pub address: String,
    pub connected: bool,
    /// Why not, in words.
    pub trouble: String,
    /// How many seconds its clock was before ours when they connected.
    pub clock_ahead_seconds: Option<i64>,
}

/// The registries, as this node is configured.
pub trait Registries: Send + Sync + 'static {
    /// Where the repository `name` of `host` can be read, the best first. `host` is as containerd's label
    /// `containerd.io/distribution.source.<host>` has it, without a port; `reference` is the image's reference where known.
    fn repositories(&self, host: &str, name: &str, reference: Option<&str>) -> Vec<Repository>;
}

/// An image that is in containerd's content store, all but its layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundImage {
    pub manifest: Digest,
    pub config: Digest,
    /// `host/repository`, as containerd's labels name where the manifest came from.
    pub names: Vec<String>,
    /// The lowest first.
    pub layers: Vec<FoundLayer>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundLayer {
    pub diff_id: DiffId,
    pub blob: BlobDigest,
    pub size: u64,
    pub media_type: String,
    pub places: Vec<Place>,
}

/// A blob that is said to hold a layer, in a repository as containerd's labels name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub host: String,
    pub name: String,
    pub blob: BlobDigest,
    pub size: u64,
}

/// Why containerd couldn't do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnpackError {
    /// It refuses the image; the words are its own.
    #[error("{0}")]
    Refused(String),
    /// Another attempt may succeed.
    #[error("{0}")]
    Unavailable(String),
}

/// containerd: what it knows of images, and its own way of unpacking a layer.
#[async_trait]
pub trait Containerd: Send + Sync + 'static {
    /// An image of the namespace with this chain ID; only reads, and fails rather than wait long.
    async fn find_image(&self, namespace: &str, target: ChainId) -> Result<Option<FoundImage>, String>;

    /// Brings the blob of `layer`, of which all sources have the same, into the content store and unpacks it into `mounts`,
    /// which are empty. Writes: never to be called while
    /// containerd waits for us with its database locked.
    async fn unpack(
        &self,
        namespace: &str,
        layer: &PlainLayer,
        mounts: Vec<Mount>,
    ) -> Result<(), UnpackError>;
}

/// A layer that containerd is to unpack.
#[derive(Debug, Clone)]
pub struct PlainLayer {
    pub diff_id: DiffId,
    pub media_type: String,
    pub sources: Vec<LayerSource>,
}

impl PlainLayer {
    /// One for each blob that is said to hold it, in the order of the sources.
    pub fn by_blob(&self) -> Vec<PlainLayer> {
        let mut layers: Vec<PlainLayer> = Vec::new();
        for source in &self.sources {
            match layers.iter_mut().find(|layer| layer.sources[0].blob == source.blob) {
                Some(layer) => layer.sources.push(source.clone()),
                None => layers.push(PlainLayer { sources: vec![source.clone()], ..self.clone() }),
            }
        }
        layers
    }
}

/// The bytes of a blob, as they come.
pub type BlobBytes = BoxStream<'static, Result<Bytes, UnpackError>>;

/// Blobs as the registries have them.
#[async_trait]
pub trait Blobs: Send + Sync + 'static {
    /// Whether this source's registry has ever said anything. One that has not may be a wrong guess.
    fn has_answered(&self, source: &LayerSource) -> bool;

    async fn blob(&self, source: &LayerSource) -> Result<BlobBytes, UnpackError>;
}
