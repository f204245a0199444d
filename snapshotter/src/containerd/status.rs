//! Which gRPC code an error becomes. containerd maps these codes to its own errors, others to "unknown".

use tonic::Status;

use crate::snapshot::SnapshotError;

impl From<SnapshotError> for Status {
    fn from(error: SnapshotError) -> Status {
        let text = error.to_string();
        match error {
            SnapshotError::NotFound(_) => Status::not_found(text),
            SnapshotError::AlreadyExists(_) => Status::already_exists(text),
            SnapshotError::Invalid(_) => Status::invalid_argument(text),
            SnapshotError::Precondition(_) | SnapshotError::Refused(_) => Status::failed_precondition(text),
            SnapshotError::Unavailable(_) => Status::unavailable(text),
            SnapshotError::NoRoom { .. } => Status::resource_exhausted(text),
            SnapshotError::Records(_) | SnapshotError::Disk { .. } => {
                tracing::error!(error = %text, "an operation on snapshots failed");
                Status::internal(text)
            }
        }
    }
}
