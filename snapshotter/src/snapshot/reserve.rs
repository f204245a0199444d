//! A little room that is kept back for the records: on a full disk removing a snapshot, too, is a write.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FallocateFlags, fallocate};

use super::room;

/// Hundreds of operations find room in it.
const BYTES: i64 = 1 << 20;
/// With less than this the reserve is given back to the file system, and with so much it is made again.
const LOW: u64 = 256 << 10;
const PLENTY: u64 = 16 << 20;

pub(super) struct Reserve {
    root: PathBuf,
    is_there: AtomicBool,
}

impl Reserve {
    pub fn new(root: &Path) -> Reserve {
        let reserve = Reserve { root: root.to_owned(), is_there: AtomicBool::new(false) };
        reserve.is_there.store(reserve.path().exists(), Ordering::Relaxed);
        reserve
    }

    fn path(&self) -> PathBuf {
        self.root.join("reserve")
    }

    /// Before something is written down. What fails here shows when that fails.
    pub fn see_to(&self) {
        let Ok(available) = room::available(&self.root) else { return };
        self.adjust(available);
    }

    fn adjust(&self, available: u64) {
        let is_there = self.is_there.load(Ordering::Relaxed);
        if is_there && available < LOW {
            tracing::warn!(root = %self.root.display(), available, "the disk is full: records use their reserve");
            self.is_there.store(fs::remove_file(self.path()).is_err(), Ordering::Relaxed);
        } else if !is_there && available > PLENTY {
            let made = File::create(self.path())
                .is_ok_and(|file| fallocate(file, FallocateFlags::empty(), 0, BYTES).is_ok());
            self.is_there.store(made, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn the_reserve_is_kept_while_there_is_plenty_and_given_back_when_there_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let reserve = Reserve::new(dir.path());
        let bytes = || fs::metadata(dir.path().join("reserve")).map_or(0, |found| found.blocks() * 512);
        reserve.adjust(LOW);
        assert_eq!(bytes(), 0, "what is left is not taken for it");
        reserve.adjust(PLENTY + 1);
        assert_eq!(bytes(), BYTES as u64);
        Reserve::new(dir.path()).adjust(LOW - 1);
        assert_eq!(bytes(), 0);
    }
}
