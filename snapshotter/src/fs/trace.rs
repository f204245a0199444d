//! What was read of a tree first: which piece, of which file, when, and how long the read waited for it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use darter_layer::{NodeIndex, Origin, Tree};
use darter_types::PieceIndex;
use parking_lot::Mutex;

use super::FileSystem;
use super::shown::Shown;

/// Reads noted of one tree; what comes after is not.
const READS_MAX: usize = 4096;

/// The first read of a piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TracedRead {
    /// After the first read of the tree.
    pub at: Duration,
    /// Until the piece was there and decoded.
    pub waited: Duration,
    /// A name of the file, from the root of the tree; bytes that are no UTF-8 are replaced.
    pub path: String,
    /// The position of the layer in its chain, the lowest is 0.
    pub layer: usize,
    pub piece: PieceIndex,
    /// The piece was on this machine when it was read.
    pub is_local: bool,
    /// The peer that it came from; `None` if it was here when its layer was opened.
    pub from: Option<String>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Noted {
    pub(super) at: Duration,
    pub(super) waited: Duration,
    pub(super) node: NodeIndex,
    pub(super) layer: usize,
    pub(super) piece: PieceIndex,
    pub(super) is_local: bool,
}

#[derive(Default)]
pub(super) struct Trace(Mutex<Reads>);

#[derive(Default)]
struct Reads {
    seen: HashSet<(usize, PieceIndex)>,
    noted: Vec<Noted>,
}

impl Trace {
    pub(super) fn note(&self, read: Noted) {
        let mut reads = self.0.lock();
        if reads.noted.len() < READS_MAX && reads.seen.insert((read.layer, read.piece)) {
            reads.noted.push(read);
        }
    }

    fn reads(&self) -> Vec<Noted> {
        let mut reads = self.0.lock().noted.clone();
        reads.sort_by_key(|read| read.at);
        reads
    }
}

impl FileSystem {
    /// What was read of the tree of `dir` first, in order; `None` if it isn't there. Goes through the whole tree for the names.
    pub fn trace(&self, dir: u32) -> Option<Vec<TracedRead>> {
        let shown = self.table.read().dir(dir)?.now()?;
        let reads = shown.trace().reads();
        let paths = paths(shown.tree(), reads.iter().map(|read| read.node).collect());
        Some(reads.into_iter().map(|read| traced(&shown, &paths, read)).collect())
    }
}

fn traced(shown: &Arc<Shown>, paths: &HashMap<NodeIndex, String>, read: Noted) -> TracedRead {
    TracedRead {
        at: read.at,
        waited: read.waited,
        path: paths.get(&read.node).cloned().unwrap_or_default(),
        layer: read.layer,
        piece: read.piece,
        is_local: read.is_local,
        from: shown.content(read.layer).giver(read.piece),
    }
}

/// A path of each of these nodes.
fn paths(tree: &Tree, mut wanted: HashSet<NodeIndex>) -> HashMap<NodeIndex, String> {
    let (mut found, mut todo) = (HashMap::new(), vec![(Tree::ROOT, String::new())]);
    while let Some((dir, path)) = todo.pop().filter(|_| !wanted.is_empty()) {
        for (_, name, node) in tree.children(dir, 0) {
            let path = format!("{path}/{}", String::from_utf8_lossy(name));
            if wanted.remove(&node) {
                found.insert(node, path);
            } else if let Origin::Directory(_) = tree.origin(node) {
                todo.push((node, path));
            }
        }
    }
    found
}
