//! Unpacked layers stacked as overlayfs stacks directories, flattened into a [`Tree`].
//!
//! Breadth first, names in order: that gives directories their ordinals, which are part of their inode numbers.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use darter_types::Hash;

use super::apply::apply;
use super::budget::Budget;
use super::upper::{NONE, ROOT, Upper};
use super::{ApplyError, Directory, Dirent, FileKind, Node, Tree, XattrSet};
use crate::{LayerMap, Time};

/// Changes when the same layers give another tree or other ordinals.
const RULES: &[u8] = b"darter tree, rules 1";
/// What ext4 shows for a directory that is not large.
const DIRECTORY_SIZE: u64 = 4096;

pub(super) fn merge(layers: &[Arc<LayerMap>], memory: u64) -> Result<Tree, ApplyError> {
    let budget = Rc::new(Budget::new(memory));
    let mut uppers = Vec::with_capacity(layers.len());
    for map in layers {
        let upper = apply(map, &uppers, &budget)?;
        uppers.push(upper);
    }
    if uppers.is_empty() {
        uppers.push(Upper::new(budget));
    }
    let mut merge = Merge::new(&uppers);
    let mut next = 0;
    while next < merge.stacks.len() {
        let why = |why: &str| ApplyError { layer: layers.len().saturating_sub(1), reason: why.to_owned() };
        merge.directory(next).map_err(why)?;
        next += 1;
    }
    merge.number_others();
    Ok(merge.finish(fingerprint(layers)))
}

fn fingerprint(layers: &[Arc<LayerMap>]) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(RULES);
    for map in layers {
        hasher.update(map.root_hash().as_bytes());
    }
    Hash::from_bytes(*hasher.finalize().as_bytes())
}

/// An inode of one of the layers.
#[derive(Clone, Copy)]
struct Place {
    layer: u32,
    inode: u32,
}

/// A name that leads to something other than a directory.
struct Other {
    place: Place,
    entry: u32,
    dirent: u32,
}

struct Merge<'a> {
    uppers: &'a [Upper],
    /// For each directory of the tree, the directories that show through in it, the topmost first: a range of `places`.
    stacks: Vec<(usize, usize)>,
    places: Vec<Place>,
    others: Vec<Other>,
    atimes: Vec<(u32, (i64, u32))>,
    /// The number of each set, by where it lies.
    sets: HashMap<*const XattrSet, u32>,
    tree: Tree,
}

impl<'a> Merge<'a> {
    fn new(uppers: &'a [Upper]) -> Self {
        let places: Vec<_> =
            (0..uppers.len() as u32).rev().map(|layer| Place { layer, inode: ROOT }).collect();
        let tree = Tree {
            nodes: Vec::new(),
            directories: vec![Directory { parent: 0, first: 0 }],
            dirents: Vec::new(),
            names: Vec::new(),
            targets: Vec::new(),
            xattrs: Vec::new(),
            xattr_sets: Vec::new(),
            atimes: Vec::new(),
            sparse: Vec::new(),
            fingerprint: Hash::from_bytes([0; 32]),
        };
        // A root is merged with all that is below it, opaque or not: overlayfs does not look.
        let stacks = vec![(0, places.len())];
        Self { uppers, stacks, places, others: Vec::new(), atimes: Vec::new(), sets: HashMap::new(), tree }
    }

    fn directory(&mut self, ordinal: usize) -> Result<(), &'static str> {
        let (start, end) = self.stacks[ordinal];
        let merged = end - start > 1;
        self.tree.directories[ordinal].first = self.tree.dirents.len() as u32;
        self.push_directory(self.places[start], merged);
        let uppers = self.uppers;
        let mut found: Vec<(&[u8], usize, Place)> = Vec::new();
        for (depth, place) in self.places[start..end].iter().enumerate() {
            let layer = place.layer;
            for child in uppers[layer as usize].children(place.inode) {
                let (name, inode) = child?;
                found.push((name, depth, Place { layer, inode }));
            }
        }
        found.sort_unstable_by_key(|(name, depth, _)| (*name, *depth));
        for group in found.chunk_by(|a, b| a.0 == b.0) {
            self.name(ordinal, group, merged);
        }
        Ok(())
    }

    /// All that has this name in the directory's layers, the topmost first.
    fn name(&mut self, parent: usize, group: &[(&[u8], usize, Place)], merged: bool) {
        let (name, _, top) = group[0];
        let inode = self.uppers[top.layer as usize].inode(top.inode);
        // In a directory of one layer overlayfs lists whiteouts: what is mounted above this tree hides them.
        if inode.is_whiteout() && merged {
            return;
        }
        let dirent = self.tree.dirents.len() as u32;
        let node = if inode.kind == FileKind::Directory {
            self.stack(parent, group)
        } else {
            self.others.push(Other { place: top, entry: inode.entry, dirent });
            NONE
        };
        let at = u32::try_from(self.tree.names.len()).expect("the budget bounds the bytes of all names");
        self.tree.dirents.push(Dirent { name: at, len: name.len() as u8, node });
        self.tree.names.extend_from_slice(name);
    }

    /// Directories of one name merge down to the first that is opaque or on top of something else.
    fn stack(&mut self, parent: usize, group: &[(&[u8], usize, Place)]) -> u32 {
        let start = self.places.len();
        for (_, _, place) in group {
            let inode = self.uppers[place.layer as usize].inode(place.inode);
            if inode.kind != FileKind::Directory {
                break;
            }
            self.places.push(*place);
            if inode.opaque {
                break;
            }
        }
        self.stacks.push((start, self.places.len()));
        self.tree.directories.push(Directory { parent: parent as u32, first: 0 });
        (self.stacks.len() - 1) as u32
    }

    fn push_directory(&mut self, place: Place, merged: bool) {
        let subdirectories = self.uppers[place.layer as usize].inode(place.inode).links;
        let node = self.push(place);
        let node = &mut self.tree.nodes[node as usize];
        node.nlink = if merged { 1 } else { 2 + subdirectories };
        node.size = DIRECTORY_SIZE;
    }

    /// All that is no directory, numbered by layer and entry; hard links are one node.
    fn number_others(&mut self) {
        let mut others = std::mem::take(&mut self.others);
        others.sort_unstable_by_key(|other| (other.place.layer, other.entry));
        for links in others.chunk_by(|a, b| (a.place.layer, a.entry) == (b.place.layer, b.entry)) {
            let node = self.push_other(links[0].place);
            links.iter().for_each(|link| self.tree.dirents[link.dirent as usize].node = node);
        }
    }

    fn push_other(&mut self, place: Place) -> u32 {
        let upper = &self.uppers[place.layer as usize];
        let node = self.push(place);
        match upper.inode(place.inode).kind {
            FileKind::Symlink => {
                self.tree.nodes[node as usize].data = self.tree.targets.len() as u64;
                self.tree.targets.extend_from_slice(upper.target(place.inode));
            }
            FileKind::File => {
                if let Ok(at) = upper.sparse.binary_search_by_key(&place.inode, |(inode, _)| *inode) {
                    self.tree.sparse.push((node, upper.sparse[at].1.clone()));
                }
            }
            _ => {}
        }
        node
    }

    fn push(&mut self, place: Place) -> u32 {
        let index = self.tree.nodes.len() as u32;
        let upper = &self.uppers[place.layer as usize];
        let inode = upper.inode(place.inode);
        self.tree.nodes.push(Node {
            mtime: pair(inode.mtime),
            size: inode.size,
            data: inode.data,
            uid: inode.uid,
            gid: inode.gid,
            nlink: inode.links,
            rdev: inode.rdev,
            layer: place.layer,
            entry: inode.entry,
            mode: inode.mode,
            kind: inode.kind,
        });
        if inode.atime != inode.mtime {
            self.atimes.push((index, pair(inode.atime)));
        }
        if let Some(set) = &inode.xattrs {
            let sets = &mut self.tree.xattr_sets;
            let number = *self.sets.entry(Arc::as_ptr(set)).or_insert_with(|| {
                sets.push(set.clone());
                (sets.len() - 1) as u32
            });
            self.tree.xattrs.push((index, number));
        }
        index
    }

    fn finish(self, fingerprint: Hash) -> Tree {
        let mut tree = self.tree;
        tree.atimes = self.atimes;
        tree.fingerprint = fingerprint;
        tree.nodes.shrink_to_fit();
        tree.dirents.shrink_to_fit();
        tree.names.shrink_to_fit();
        tree
    }
}

fn pair(time: Time) -> (i64, u32) {
    (time.seconds, time.nanos)
}
