//! What people are told of a layer.

use std::collections::BTreeMap;
use std::path::PathBuf;

use darter_types::LayerTask;

/// What a layer that has no map yet is waiting for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Stage {
    /// Looking in the store and asking peers.
    #[default]
    Searching,
    /// A seed makes the map: `read` of `size` bytes of the blob.
    Making,
    /// This peer makes the map itself.
    MakingHere,
    /// Nobody could give or make it; it is tried again after a while.
    Waiting,
    Ready,
    Impossible,
}

/// How far a layer's map is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Progress {
    /// Bytes of the blob that the maker has read.
    pub read: u64,
    /// Bytes of the blob; 0 if unknown.
    pub size: u64,
    pub stage: Stage,
    /// The peer that makes it, or why nobody does.
    pub by: String,
}

/// A scheduler of the cluster, as this peer finds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchedulerStatus {
    pub node: String,
    /// `host:port`
    pub address: String,
    pub connected: bool,
    /// Why not, in words; empty while it is connected.
    pub trouble: String,
    /// How many seconds its clock was before ours when the stream began; `None` before the first time.
    pub clock_ahead_seconds: Option<i64>,
}

/// How full the disk is, and what of it are pieces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreStatus {
    pub dir: PathBuf,
    /// Bytes of pieces.
    pub used: u64,
    /// The most bytes of pieces, if that is limited.
    pub quota: Option<u64>,
    /// Bytes that had to go since the start.
    pub evicted: u64,
    /// Bytes of the file system, and those that are free; 0 if that can't be found out.
    pub total: u64,
    pub available: u64,
    /// When the file system is this full, in percent, nothing comes that nobody waits for; and whether it is.
    pub high_percent: u8,
    pub is_beyond_mark: bool,
    /// Something did not come that nobody waits for, because there was no room for it.
    pub is_tight: bool,
}

/// What a peer has of a layer, and from whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerStatus {
    pub task: LayerTask,
    /// 0 as long as there is no map.
    pub pieces: u32,
    pub have: u32,
    /// Bytes that came over the network, by the peer's name; `origin` is the registry. It counts since the layer was opened.
    pub from: BTreeMap<String, u64>,
    pub progress: Progress,
    /// Whether the whole tar stream was put together here and had the diff ID.
    pub verified: bool,
    /// Somebody waits for a piece, and nobody in reach has it.
    pub stuck: bool,
}
