//! The messages and the server of containerd's snapshots service.

use std::collections::HashMap;

pub use containerd_client::services::v1::snapshots::{
    CleanupRequest, Info, Kind, ListSnapshotsRequest, ListSnapshotsResponse, MountsRequest, MountsResponse,
    PrepareSnapshotRequest, PrepareSnapshotResponse, RemoveSnapshotRequest, StatSnapshotRequest,
    StatSnapshotResponse, UpdateSnapshotRequest, UpdateSnapshotResponse, UsageRequest, UsageResponse,
    ViewSnapshotRequest, ViewSnapshotResponse,
};
pub use containerd_client::types::Mount;

/// `google.protobuf.Empty`: the generator wants a path.
pub type Empty = ();

/// Commit as containerd 2.2 and later send it: `parent` is missing in the client's copy of the message.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CommitSnapshotRequest {
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(string, tag = "3")]
    pub key: String,
    #[prost(map = "string, string", tag = "4")]
    pub labels: HashMap<String, String>,
    #[prost(string, tag = "5")]
    pub parent: String,
}

#[allow(clippy::all, clippy::pedantic)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/containerd.services.snapshots.v1.Snapshots.rs"));
}
pub use generated::snapshots_server::{Snapshots, SnapshotsServer};
