//! The edge to containerd: its snapshots service on our side; its content store, leases and diff service on the other.
//! Translates only; what is decided is decided in `crate::snapshot` and `crate::lazy`.

mod client;
mod service;
mod status;
pub(crate) mod wire;

pub use client::{ContainerdClient, channel};
pub use service::SnapshotsService;
pub use wire::SnapshotsServer;
