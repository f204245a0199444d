//! gRPC: certificates for members, and the stream that each of them attends on. Only translates.

mod cluster;
mod identity;

use std::fmt::Display;

use tonic::Status;

pub(crate) use cluster::ClusterService;
pub(crate) use identity::IdentityService;

/// The manager's own trouble: the caller learns that, the log learns which.
fn internal(error: impl Display) -> Status {
    tracing::error!(%error, "a call failed");
    Status::internal("the manager can't do this now; its log says why")
}
