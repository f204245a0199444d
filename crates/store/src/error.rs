//! What can go wrong with a store as a whole. A damaged piece or map is no error: it reads as absent.

use std::io;
use std::path::{Path, PathBuf};

use crate::space::{Space, in_words};

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk is full, or the quota reached.
    #[error("no space is left in {}: {} needed, {} missing", dir.display(), in_words(*needed), in_words(*missing))]
    Full { dir: PathBuf, needed: u64, missing: u64 },
    /// `holder` is the other's process, if it has said so: behind a space, in brackets.
    #[error("{} is in use by another process of Darter{holder}: stop it first", root.display())]
    Locked { root: PathBuf, holder: String },
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("a piece of {len} bytes is longer than the {max} that a store takes")]
    TooLong { len: usize, max: usize },
}

impl StoreError {
    pub(crate) fn io(path: &Path, error: io::Error) -> Self {
        StoreError::Io { path: path.to_owned(), error }
    }

    /// `error` on writing `needed` bytes to `path`; a full disk or quota names the directory, and what is missing there.
    pub(crate) fn write(path: &Path, error: io::Error, needed: u64) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                let dir = path.parent().unwrap_or(path).to_owned();
                let available = Space::of(&dir, 0).map_or(0, |space| space.available);
                // A quota of the file system's own doesn't show there.
                let missing = needed.saturating_sub(available).max(1);
                StoreError::Full { dir, needed, missing }
            }
            _ => StoreError::io(path, error),
        }
    }

    pub fn is_full(&self) -> bool {
        matches!(self, StoreError::Full { .. })
    }
}
