//! The merged tree: what containerd's unpacking and overlayfs show for a chain of layers.
//!
//! Each layer's entries are applied as containerd applies them to a directory of their own (`apply`), and the
//! directories are then stacked as overlayfs stacks them (`merge`). What remains is this compact, immutable tree, which
//! no longer refers to the maps. Times that containerd takes from the clock (of directories that have no entry of their
//! own, and of whiteouts) are fixed here, so that every node shows the same.
//!
//! A node is an inode: all hard links of a file are one node. Directories come first, in the order of their ordinals,
//! then the rest in the order of layer and entry, so that an [`Origin`] is found without a table.

mod apply;
mod attributes;
mod budget;
mod entry;
mod merge;
#[cfg(test)]
mod tests;
mod upper;
mod xattrs;

use std::sync::Arc;

use darter_types::Hash;

pub use self::apply::ApplyError;
use crate::{LayerMap, Segment};

/// A node of one tree. For directories it is the ordinal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeIndex(pub u32);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileKind {
    File,
    Directory,
    Symlink,
    Char,
    Block,
    Fifo,
}

/// What `stat` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    pub kind: FileKind,
    /// Permissions, set-user-ID, set-group-ID and sticky bits.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    /// Units of 512 bytes.
    pub blocks: u64,
    pub nlink: u32,
    /// As the kernel encodes it for user space: minor's low 8 bits, 12 bits of major, the rest of minor.
    pub rdev: u32,
    /// Seconds and nanoseconds.
    pub mtime: (i64, u32),
    pub atime: (i64, u32),
}

/// Where a node comes from: what its inode number is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Origin {
    /// The entry of a layer that made the inode. `base` tells whether the layer is the lowest, which containerd applies
    /// by other rules than those above it.
    Entry { layer: usize, base: bool, entry: u32 },
    /// A directory of this tree. The root has 0.
    Directory(u32),
}

/// Where a regular file's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileContent<'a> {
    pub layer: usize,
    pub size: u64,
    pub content: Content<'a>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content<'a> {
    /// All bytes of the file follow each other in the layer's content stream.
    Whole { start: u64 },
    /// The segments' bytes follow each other in the content stream; what lies between segments is zeros.
    Sparse { start: u64, segments: &'a [Segment] },
}

#[derive(Debug, Clone, Copy)]
struct Node {
    mtime: (i64, u32),
    size: u64,
    /// Start in the content stream, or of a symbolic link's target in `targets`.
    data: u64,
    uid: u32,
    gid: u32,
    nlink: u32,
    rdev: u32,
    layer: u32,
    entry: u32,
    mode: u16,
    kind: FileKind,
}

#[derive(Debug, Clone, Copy)]
struct Directory {
    parent: u32,
    /// The first of its entries in `dirents`; they end where the next directory's begin.
    first: u32,
}

/// A name in a directory; sorted by name within it.
#[derive(Debug, Clone, Copy)]
struct Dirent {
    name: u32,
    len: u8,
    node: u32,
}

type XattrSet = Vec<(Box<[u8]>, Box<[u8]>)>;

/// The merged view of a chain of layers.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    directories: Vec<Directory>,
    dirents: Vec<Dirent>,
    names: Vec<u8>,
    targets: Vec<u8>,
    /// Nodes with extended attributes, sorted, and their sets.
    xattrs: Vec<(u32, u32)>,
    xattr_sets: Vec<Arc<XattrSet>>,
    /// Nodes whose access time is not their modification time, sorted.
    atimes: Vec<(u32, (i64, u32))>,
    /// Sparse files, sorted by node.
    sparse: Vec<(u32, Arc<[Segment]>)>,
    fingerprint: Hash,
}

impl Tree {
    pub const ROOT: NodeIndex = NodeIndex(0);

    /// For [`Self::merge`]: 512 MiB, some one and a half million files. The largest images that people use have about one
    /// million; a node of 4 GiB bears two such merges at a time.
    pub const MEMORY_DEFAULT: u64 = 512 << 20;

    /// Merges the layers of a chain, the lowest first, in about `memory` bytes at most. An error means that containerd
    /// would refuse that layer too, or that the layers up to it take more memory, or more time than so much memory is
    /// worth: containerd is to unpack it then.
    pub fn merge(layers: &[Arc<LayerMap>], memory: u64) -> Result<Tree, ApplyError> {
        merge::merge(layers, memory)
    }

    pub fn node_count(&self) -> u32 {
        self.nodes.len() as u32
    }

    /// Also `None` if `dir` is no directory. "." and ".." are the caller's.
    pub fn lookup(&self, dir: NodeIndex, name: &[u8]) -> Option<NodeIndex> {
        let dirents = self.dirents_of(dir);
        let found = dirents.binary_search_by(|dirent| self.name(dirent).cmp(name)).ok()?;
        Some(NodeIndex(dirents[found].node))
    }

    pub fn attr(&self, node: NodeIndex) -> Attr {
        let Node { kind, mode, uid, gid, size, nlink, rdev, mtime, .. } = *self.node(node);
        let atime = side(&self.atimes, node).copied().unwrap_or(mtime);
        Attr { kind, mode, uid, gid, size, blocks: blocks(kind, size), nlink, rdev, mtime, atime }
    }

    /// The root is its own parent. Panics unless `dir` is a directory.
    pub fn parent(&self, dir: NodeIndex) -> NodeIndex {
        NodeIndex(self.directories[dir.0 as usize].parent)
    }

    /// A path of the node from the root, with a slash in front, and of a file with several links one of them. Goes through the
    /// names of all directories: for those who ask seldom. No longer than what Linux takes as a path, like those in layers.
    pub fn path(&self, mut node: NodeIndex) -> Vec<u8> {
        let mut names: Vec<&[u8]> = Vec::new();
        while let Some((dir, name)) = self.name_of(node) {
            names.push(name);
            node = dir;
        }
        names.iter().rev().flat_map(|name| [b"/", *name].concat()).collect()
    }

    /// A directory and the name that the node has there; the root has none.
    fn name_of(&self, node: NodeIndex) -> Option<(NodeIndex, &[u8])> {
        let is_it = |dirent: &Dirent| dirent.node == node.0;
        if let Some(directory) = self.directories.get(node.0 as usize) {
            let dir = NodeIndex(directory.parent);
            return Some((dir, self.name(self.dirents_of(dir).iter().find(|dirent| is_it(dirent))?)));
        }
        let at = self.dirents.iter().position(is_it)?;
        // Empty directories begin where the next one does: the last that begins so far has it.
        let dir = self.directories.partition_point(|directory| directory.first as usize <= at) - 1;
        Some((NodeIndex(dir as u32), self.name(&self.dirents[at])))
    }

    /// The entries of a directory from a cookie on (0 at first), each with the cookie of the next.
    pub fn children(&self, dir: NodeIndex, from: usize) -> Children<'_> {
        Children { tree: self, dirents: self.dirents_of(dir), next: from }
    }

    /// The target of a symbolic link; empty for anything else.
    pub fn readlink(&self, node: NodeIndex) -> &[u8] {
        let Node { kind, data, size, .. } = *self.node(node);
        if kind == FileKind::Symlink { &self.targets[data as usize..][..size as usize] } else { &[] }
    }

    /// Names and values, in order of the names.
    pub fn xattrs(&self, node: NodeIndex) -> impl Iterator<Item = (&[u8], &[u8])> {
        let set = side(&self.xattrs, node).map_or(&[][..], |set| &self.xattr_sets[*set as usize][..]);
        set.iter().map(|(name, value)| (&**name, &**value))
    }

    /// Whether any node has extended attributes.
    pub fn has_xattrs(&self) -> bool {
        !self.xattrs.is_empty()
    }

    pub fn origin(&self, node: NodeIndex) -> Origin {
        let Node { kind, layer, entry, .. } = *self.node(node);
        match kind {
            FileKind::Directory => Origin::Directory(node.0),
            _ => Origin::Entry { layer: layer as usize, base: layer == 0, entry },
        }
    }

    /// The node with this origin.
    pub fn find(&self, origin: Origin) -> Option<NodeIndex> {
        let directories = self.directories.len();
        match origin {
            Origin::Directory(ordinal) => ((ordinal as usize) < directories).then_some(NodeIndex(ordinal)),
            Origin::Entry { layer, entry, .. } => {
                let key = |node: &Node| (node.layer as usize, node.entry);
                let found = self.nodes[directories..].binary_search_by_key(&(layer, entry), key).ok()?;
                Some(NodeIndex((directories + found) as u32))
            }
        }
    }

    /// `None` unless the node is a regular file.
    pub fn file(&self, node: NodeIndex) -> Option<FileContent<'_>> {
        let Node { kind, layer, size, data: start, .. } = *self.node(node);
        let content = match side(&self.sparse, node) {
            Some(segments) => Content::Sparse { start, segments },
            None => Content::Whole { start },
        };
        (kind == FileKind::File).then_some(FileContent { layer: layer as usize, size, content })
    }

    /// Names this tree: the layers' root hashes in order, and the version of the rules by which they are merged.
    pub fn fingerprint(&self) -> Hash {
        self.fingerprint
    }

    fn node(&self, node: NodeIndex) -> &Node {
        &self.nodes[node.0 as usize]
    }

    fn dirents_of(&self, dir: NodeIndex) -> &[Dirent] {
        let i = dir.0 as usize;
        let Some(directory) = self.directories.get(i) else { return &[] };
        let end = self.directories.get(i + 1).map_or(self.dirents.len(), |next| next.first as usize);
        &self.dirents[directory.first as usize..end]
    }

    fn name(&self, dirent: &Dirent) -> &[u8] {
        &self.names[dirent.name as usize..][..usize::from(dirent.len)]
    }
}

/// The entries of a directory: the next entry's cookie, name, node.
pub struct Children<'a> {
    tree: &'a Tree,
    dirents: &'a [Dirent],
    next: usize,
}

impl<'a> Iterator for Children<'a> {
    type Item = (usize, &'a [u8], NodeIndex);

    fn next(&mut self) -> Option<Self::Item> {
        let dirent = self.dirents.get(self.next)?;
        self.next += 1;
        Some((self.next, self.tree.name(dirent), NodeIndex(dirent.node)))
    }
}

fn side<T>(table: &[(u32, T)], node: NodeIndex) -> Option<&T> {
    let found = table.binary_search_by_key(&node.0, |(node, _)| *node).ok()?;
    Some(&table[found].1)
}

/// As ext4 counts them: units of 4 KiB, none for a short symbolic link, which lies in the inode.
fn blocks(kind: FileKind, size: u64) -> u64 {
    const IN_INODE: u64 = 60;
    match kind {
        FileKind::Symlink if size < IN_INODE => 0,
        FileKind::File | FileKind::Directory | FileKind::Symlink => size.div_ceil(4096) * 8,
        FileKind::Char | FileKind::Block | FileKind::Fifo => 0,
    }
}
