//! Whether there is room for what is about to be written below the root.

use std::io;
use std::path::Path;

use nix::sys::statvfs::statvfs;

use super::SnapshotError;

/// What a pull needs below the root at the least: records, and the maps of small layers.
const PULL_BYTES_MIN: u64 = 4 << 20;

/// Fails, with the directory and what is missing there, where a pull could not be written down. It would fail half-way.
pub(super) fn for_a_pull(root: &Path) -> Result<(), SnapshotError> {
    let available = available(root).map_err(SnapshotError::disk(root.display()))?;
    check(root, available, PULL_BYTES_MIN)
}

/// Bytes that can still be written there.
pub(super) fn available(root: &Path) -> io::Result<u64> {
    let found = statvfs(root)?;
    Ok(found.blocks_available() * found.fragment_size())
}

fn check(root: &Path, available: u64, needed: u64) -> Result<(), SnapshotError> {
    match needed.saturating_sub(available) {
        0 => Ok(()),
        missing => Err(SnapshotError::NoRoom { dir: root.to_owned(), needed, missing }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_with_its_directory_and_what_is_missing() {
        assert!(check(Path::new("/data"), 4_000_000, 4_000_000).is_ok());
        let words = check(Path::new("/data"), 1_000_000, 4_000_000).unwrap_err().to_string();
        assert_eq!(words, "no space is left in /data: 4.0 MB needed, 3.0 MB missing");
    }
}
