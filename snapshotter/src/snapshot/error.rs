//! Why an operation on snapshots failed; the edge turns each case into one gRPC code.

use std::io;
use std::path::PathBuf;

use super::records::RecordsError;

#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("snapshot {0:?} does not exist: not found")]
    NotFound(String),
    #[error("snapshot {0:?}: already exists")]
    AlreadyExists(String),
    #[error("{0}: invalid argument")]
    Invalid(String),
    #[error("{0}: failed precondition")]
    Precondition(String),
    /// A retry may succeed.
    #[error("{0}")]
    Unavailable(String),
    /// The image itself is at fault; the words are containerd's.
    #[error("{0}")]
    Refused(String),
    /// All is well again when there is room.
    #[error("no space is left in {}: {:.1} MB needed, {:.1} MB missing", dir.display(), *needed as f64 / 1e6, *missing as f64 / 1e6)]
    NoRoom { dir: PathBuf, needed: u64, missing: u64 },
    #[error("cannot keep the records of snapshots: {0}")]
    Records(#[from] RecordsError),
    #[error("{what}: {error}")]
    Disk { what: String, error: io::Error },
}

impl SnapshotError {
    /// Whether a full disk is the reason.
    pub(crate) fn is_full(&self) -> bool {
        match self {
            SnapshotError::Disk { error, .. } => error.kind() == io::ErrorKind::StorageFull,
            SnapshotError::Records(error) => error.is_full(),
            _ => false,
        }
    }

    /// For `map_err`: says which file or directory it was.
    pub(crate) fn disk(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> Self {
        move |error| SnapshotError::Disk { what: what.to_string(), error }
    }
}
