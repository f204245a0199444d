//! A merged tree as it is shown in one place: its nodes by inode number, and back.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use darter_layer::{Attr, FileKind, LayerMap, NodeIndex, Origin, Tree};
use darter_types::RootHash;
use parking_lot::Mutex;

use super::ahead::Ahead;
use super::trace::Trace;
use super::{
    Attributes, ContentError, Entry, FsError, Ino, LayerContent, Lifetime, NumberKey, Numbers, tree_key,
};

fn number(numbers: &dyn Numbers, key: &NumberKey) -> Result<u32, ContentError> {
    let unavailable = |error: io::Error| ContentError::Unavailable(format!("no number for {key:?}: {error}"));
    numbers.number(key).map_err(unavailable)
}

/// What all directories that show the same layers have in common.
pub(super) struct Merged {
    tree: Arc<Tree>,
    maps: Vec<Arc<LayerMap>>,
    /// The number of each layer.
    layers: Vec<u32>,
}

impl Merged {
    /// `memory` in bytes is what the merge may take.
    pub(super) fn new(
        maps: Vec<Arc<LayerMap>>,
        memory: u64,
        numbers: &dyn Numbers,
    ) -> Result<Self, ContentError> {
        let tree = Tree::merge(&maps, memory).map_err(|error| ContentError::Impossible(error.to_string()))?;
        let layers = (maps.iter().enumerate())
            .map(|(layer, map)| {
                number(numbers, &NumberKey::Layer { root: map.root_hash(), base: layer == 0 })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { tree: Arc::new(tree), maps, layers })
    }

    /// The node of an entry of the layer with that number. An image can have the same layer twice, and show different
    /// entries of either.
    fn entry(&self, number: u32, entry: u32) -> Option<NodeIndex> {
        let layers = self.layers.iter().enumerate().filter(|(_, known)| **known == number);
        let origin = |layer| Origin::Entry { layer, base: layer == 0, entry };
        layers.map(|(layer, _)| layer).find_map(|layer| self.tree.find(origin(layer)))
    }
}

/// The tree of one `<dir>`.
pub(super) struct Shown {
    dir: u32,
    merged: Arc<Merged>,
    contents: Vec<Arc<dyn LayerContent>>,
    ahead: Vec<Mutex<Ahead>>,
    /// The number of this tree's directories.
    number: u32,
    /// When something of it was first read.
    first_read: OnceLock<Instant>,
    trace: Trace,
}

impl Shown {
    pub(super) fn new(
        dir: u32,
        merged: Arc<Merged>,
        contents: Vec<Arc<dyn LayerContent>>,
        numbers: &dyn Numbers,
    ) -> Result<Self, ContentError> {
        let number = number(numbers, &tree_key(&merged.tree.fingerprint(), dir))?;
        let ahead = contents.iter().map(|_| Mutex::default()).collect();
        Ok(Self {
            dir,
            merged,
            contents,
            ahead,
            number,
            first_read: OnceLock::new(),
            trace: Trace::default(),
        })
    }

    pub(super) fn tree(&self) -> &Arc<Tree> {
        &self.merged.tree
    }

    pub(super) fn merged(&self) -> &Arc<Merged> {
        &self.merged
    }

    pub(super) fn roots(&self) -> Vec<RootHash> {
        self.merged.maps.iter().map(|map| map.root_hash()).collect()
    }

    /// Every number that can occur in its inode numbers, once.
    pub(super) fn numbers(&self) -> BTreeSet<u32> {
        self.merged.layers.iter().copied().chain([self.number]).collect()
    }

    /// About what it would take on a disk, in units of 512 bytes.
    pub(super) fn blocks(&self) -> u64 {
        self.merged.maps.iter().map(|map| map.unpacked_size() / 512).sum()
    }

    pub(super) fn root(self: &Arc<Self>) -> Node {
        Node { shown: self.clone(), index: Tree::ROOT }
    }

    /// The node at that position of a layer or of this tree's directories, unless it is hidden here.
    pub(super) fn node(self: &Arc<Self>, number: u32, position: u32) -> Option<Node> {
        let index = match number == self.number {
            true => self.merged.tree.find(Origin::Directory(position)),
            false => self.merged.entry(number, position),
        }?;
        Some(Node { shown: self.clone(), index })
    }

    fn ino(&self, index: NodeIndex) -> u64 {
        match self.merged.tree.origin(index) {
            Origin::Directory(_) if index == Tree::ROOT => Ino::Dir(self.dir),
            Origin::Directory(ordinal) => Ino::Numbered { number: self.number, position: ordinal },
            Origin::Entry { layer, entry, .. } => {
                Ino::Numbered { number: self.merged.layers[layer], position: entry }
            }
        }
        .encode()
    }

    pub(super) fn entry(&self, index: NodeIndex) -> Entry {
        let attributes = Attributes::of(self.ino(index), &self.merged.tree.attr(index));
        Entry { attributes, lifetime: Lifetime::Forever }
    }

    pub(super) fn map(&self, layer: usize) -> &Arc<LayerMap> {
        &self.merged.maps[layer]
    }

    pub(super) fn content(&self, layer: usize) -> &Arc<dyn LayerContent> {
        &self.contents[layer]
    }

    /// How long ago something of this tree was first read; now counts.
    pub(super) fn since_first_read(&self) -> Duration {
        self.first_read.get_or_init(Instant::now).elapsed()
    }

    pub(super) fn trace(&self) -> &Trace {
        &self.trace
    }

    pub(super) fn ahead(&self, layer: usize) -> &Mutex<Ahead> {
        &self.ahead[layer]
    }
}

impl Attributes {
    fn of(ino: u64, attr: &Attr) -> Self {
        Self {
            ino,
            mode: file_type(attr.kind) | u32::from(attr.mode),
            nlink: attr.nlink,
            uid: attr.uid,
            gid: attr.gid,
            rdev: attr.rdev,
            size: attr.size,
            blocks: attr.blocks,
            atime: attr.atime,
            mtime: attr.mtime,
            ctime: attr.mtime,
        }
    }
}

/// The file type as `st_mode` has it.
fn file_type(kind: FileKind) -> u32 {
    match kind {
        FileKind::Fifo => 0o010000,
        FileKind::Char => 0o020000,
        FileKind::Directory => 0o040000,
        FileKind::Block => 0o060000,
        FileKind::File => 0o100000,
        FileKind::Symlink => 0o120000,
    }
}

/// A file in a tree that is shown.
#[derive(Clone)]
pub(super) struct Node {
    pub(super) shown: Arc<Shown>,
    pub(super) index: NodeIndex,
}

impl Node {
    pub(super) fn tree(&self) -> &Tree {
        self.shown.tree()
    }

    pub(super) fn entry(&self) -> Entry {
        self.shown.entry(self.index)
    }

    /// From the root of the image; bytes that are no UTF-8 are replaced. Takes milliseconds in a large image.
    pub(super) fn path(&self) -> String {
        String::from_utf8_lossy(&self.tree().path(self.index)).into_owned()
    }

    pub(super) fn is_directory(&self) -> bool {
        matches!(self.tree().origin(self.index), Origin::Directory(_))
    }

    pub(super) fn directory(&self) -> Result<&Self, FsError> {
        self.is_directory().then_some(self).ok_or(FsError::NotDirectory)
    }
}
