//! A folder's tree, taken down in every detail so that two can be compared.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Debug;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What one file looks like from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub mode: u32,
    pub owner: (u32, u32),
    /// Not of directories: file systems count them differently.
    pub size: Option<u64>,
    pub links: u64,
    pub device: u64,
    pub mtime: (i64, i64),
    pub target: Option<PathBuf>,
    pub content: Option<blake3::Hash>,
    pub xattrs: BTreeMap<OsString, Vec<u8>>,
}

impl Seen {
    fn of(path: &Path) -> Seen {
        let meta = fs::symlink_metadata(path).unwrap();
        let kind = meta.file_type();
        let is_device = kind.is_char_device() || kind.is_block_device();
        Seen {
            mode: meta.mode(),
            owner: (meta.uid(), meta.gid()),
            size: (!kind.is_dir()).then(|| meta.size()),
            links: meta.nlink(),
            device: if is_device { meta.rdev() } else { 0 },
            mtime: (meta.mtime(), meta.mtime_nsec()),
            target: kind.is_symlink().then(|| fs::read_link(path).unwrap()),
            content: kind.is_file().then(|| blake3::hash(&fs::read(path).unwrap())),
            xattrs: xattrs(path),
        }
    }
}

fn xattrs(path: &Path) -> BTreeMap<OsString, Vec<u8>> {
    let names = xattr::list(path).unwrap();
    names.map(|name| (name.clone(), xattr::get(path, &name).unwrap().unwrap())).collect()
}

/// Every file below `root` by its relative path. The root itself is not in it.
pub fn take_down(root: &Path) -> BTreeMap<PathBuf, Seen> {
    walk(root)
        .into_iter()
        .map(|path| (path.strip_prefix(root).unwrap().to_owned(), Seen::of(&path)))
        .collect()
}

/// The inode number of every file below `root`.
pub fn inodes(root: &Path) -> BTreeMap<PathBuf, u64> {
    let ino = |path: &Path| fs::symlink_metadata(path).unwrap().ino();
    walk(root).into_iter().map(|path| (path.strip_prefix(root).unwrap().to_owned(), ino(&path))).collect()
}

fn walk(root: &Path) -> Vec<PathBuf> {
    let (mut found, mut open) = (Vec::new(), vec![root.to_owned()]);
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path());
            }
            found.push(entry.path());
        }
    }
    found
}

/// Fails with the differences, if there are any.
pub fn assert_same<T: PartialEq + Debug>(ours: &BTreeMap<PathBuf, T>, theirs: &BTreeMap<PathBuf, T>) {
    let names = ours.keys().chain(theirs.keys());
    let differing = names.filter(|name| ours.get(*name) != theirs.get(*name));
    let told: Vec<String> = differing
        .take(10)
        .map(|name| format!("{name:?}:\n  ours   {:?}\n  theirs {:?}", ours.get(name), theirs.get(name)))
        .collect();
    assert!(told.is_empty(), "the trees differ:\n{}", told.join("\n"));
}
