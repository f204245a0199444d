//! A store's folder is for one process at a time.

use std::fs::{File, Permissions, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::{StoreError, create_dir};

/// The folder of a store, which nobody else can open as long as this lives.
pub struct StoreLock {
    pub(crate) root: PathBuf,
    // Unlocked when it is closed.
    _file: File,
}

impl StoreLock {
    /// Makes the folder if it isn't there. Waits for nobody.
    pub fn take(root: &Path) -> Result<Self, StoreError> {
        create_dir(root)?;
        let path = path(root);
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let mut file = file.map_err(|error| StoreError::write(&path, error, 4096))?;
        // Whoever may read it may lock it.
        file.set_permissions(Permissions::from_mode(0o600)).map_err(|error| StoreError::io(&path, error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(StoreError::Locked { root: root.to_owned(), holder: holder(&path) });
            }
            Err(TryLockError::Error(error)) => return Err(StoreError::io(&path, error)),
        }
        // For people alone: on a full disk it is missing.
        let _ = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
        Ok(Self { root: root.to_owned(), _file: file })
    }
}

fn path(root: &Path) -> PathBuf {
    root.join("lock")
}

/// The process that has it, ` (process 7)`; empty if it can't be told.
fn holder(path: &Path) -> String {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(16).read_to_string(&mut text));
    match read.ok().and_then(|_| text.parse::<u32>().ok()) {
        Some(pid) => format!(" (process {pid})"),
        None => String::new(),
    }
}
