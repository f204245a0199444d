//! What can go wrong with a store as a whole. A damaged piece or map is no error: it reads as absent.

use std::io;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("no space is left in {}", dir.display())]
    Full { dir: PathBuf },
    #[error("{} is in use by another process of Darter", root.display())]
    Locked { root: PathBuf },
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("a piece of {len} bytes is longer than the {max} that a store takes")]
    TooLong { len: usize, max: usize },
}

impl StoreError {
    /// `error` on `path`; a full disk or quota names the directory.
    pub(crate) fn io(path: &Path, error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                StoreError::Full { dir: path.parent().unwrap_or(path).to_owned() }
            }
            _ => StoreError::Io { path: path.to_owned(), error },
        }
    }
}
