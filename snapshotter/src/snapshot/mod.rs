//! The tree of snapshots: which exist, what lies on what, and how each is mounted.
//!
//! [`Snapshots`] follows containerd's reference (`core/snapshots/snapshotter.go` and its test suite). A snapshot is either
//! *plain*, with directories of its own below `<root>/s/<id>/`, or *lazy*: committed without any, shown by the file system
//! of merged layers as directory `<root>/s/m/<chain>`, and as `<root>/s/n/<chain>` without extended attributes. What is recorded ([`Records`]) survives a crash at any moment;
//! directories without a record are garbage.
//!
//! Everything here is synchronous, keeps no lock while it scans a disk, and knows neither gRPC nor the mesh.

mod error;
mod filter;
mod mounts;
mod records;
mod remove;
mod reserve;
mod room;
mod tree;
mod usage;

pub use error::SnapshotError;
pub use filter::Filter;
pub use mounts::{Mount, MountPlan, Overlay, Via};
pub use records::{Chain, ChainLayer, DecidedLayer, Decision, Records, RecordsError, Row, Source};
pub use tree::{LazySnapshot, NewSnapshot, REF_LABEL, Snapshots, UsageOf};
pub use usage::{Usage, disk_usage};

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub type Labels = BTreeMap<String, String>;

/// What a snapshot may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    View,
    Active,
    Committed,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::View => "view",
            Kind::Active => "active",
            Kind::Committed => "committed",
        }
    }
}

/// What containerd may know of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    pub name: String,
    /// Empty for one without a parent.
    pub parent: String,
    pub kind: Kind,
    /// Nanoseconds since 1970.
    pub created_ns: i64,
    pub updated_ns: i64,
    pub labels: Labels,
}
