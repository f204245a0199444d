//! What a directory takes on disk, counted as containerd counts it.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::{fs, io};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    pub size: i64,
    pub inodes: i64,
}

/// Blocks of all files and directories below `root`, itself included; a file with several names counts once. What
/// vanishes during the scan is left out: containers go on writing.
pub fn disk_usage(root: &Path) -> io::Result<Usage> {
    let mut seen = HashSet::new();
    let mut size = 0;
    let mut pending = vec![root.to_owned()];
    while let Some(path) = pending.pop() {
        let Some(meta) = present(fs::symlink_metadata(&path))? else { continue };
        if seen.insert((meta.dev(), meta.ino())) {
            size += meta.blocks() as i64 * 512;
        }
        if meta.is_dir() {
            let Some(entries) = present(fs::read_dir(&path))? else { continue };
            for entry in entries {
                pending.push(entry?.path());
            }
        }
    }
    Ok(Usage { size, inodes: seen.len() as i64 })
}

fn present<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_two_names_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), vec![1; 100_000]).unwrap();
        let one = disk_usage(dir.path()).unwrap();
        fs::hard_link(dir.path().join("a"), dir.path().join("b")).unwrap();
        assert_eq!(disk_usage(dir.path()).unwrap(), one);
        assert_eq!(one.inodes, 2);
        assert!(one.size >= 100_000);
    }
}
