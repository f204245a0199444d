//! What is in a directory, from any position on.

use super::Entry;
use super::shown::Node;
use darter_layer::Tree;

/// Positions 0 and 1 are `.` and `..`; the others follow.
const FIRST_CHILD: u64 = 2;

/// One name in a directory.
pub struct Listed<'a> {
    pub name: &'a [u8],
    pub entry: Entry,
    /// Where to go on after this one.
    pub next: u64,
}

enum Source {
    Dirs(Vec<(u32, Entry)>),
    Node(Node),
}

/// The names in a directory, in an order that stays the same.
pub struct Listing {
    itself: Entry,
    parent: Entry,
    source: Source,
}

impl Listing {
    pub(super) fn of_dirs(root: Entry, dirs: Vec<(u32, Entry)>) -> Self {
        Self { itself: root, parent: root, source: Source::Dirs(dirs) }
    }

    /// `root` is the mount's root, the parent of a tree's root.
    pub(super) fn of_node(node: Node, root: Entry) -> Self {
        let parent =
            if node.index == Tree::ROOT { root } else { node.shown.entry(node.tree().parent(node.index)) };
        Self { itself: node.entry(), parent, source: Source::Node(node) }
    }

    /// Shows the names from position `from` on, until `visit` has no room for one.
    pub fn visit(&self, from: u64, mut visit: impl FnMut(Listed<'_>) -> bool) {
        let dots = [(&b"."[..], self.itself, 1), (b"..", self.parent, FIRST_CHILD)];
        for (name, entry, next) in dots.into_iter().skip(from.min(FIRST_CHILD) as usize) {
            if !visit(Listed { name, entry, next }) {
                return;
            }
        }
        self.visit_children(from.saturating_sub(FIRST_CHILD), visit);
    }

    fn visit_children(&self, from: u64, mut visit: impl FnMut(Listed<'_>) -> bool) {
        match &self.source {
            // The position follows from the number, so it stays right while others come and go.
            Source::Dirs(dirs) => {
                for (dir, entry) in dirs.iter().filter(|(dir, _)| u64::from(*dir) >= from) {
                    let name = dir.to_string();
                    let next = u64::from(*dir) + 1 + FIRST_CHILD;
                    if !visit(Listed { name: name.as_bytes(), entry: *entry, next }) {
                        return;
                    }
                }
            }
            Source::Node(node) => {
                let from = usize::try_from(from).unwrap_or(usize::MAX);
                for (next, name, child) in node.tree().children(node.index, from) {
                    let next = next as u64 + FIRST_CHILD;
                    if !visit(Listed { name, entry: node.shown.entry(child), next }) {
                        return;
                    }
                }
            }
        }
    }
}
