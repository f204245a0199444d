//! Look-up, attributes, links, extended attributes: what can be answered from the trees alone.

use std::sync::Arc;

use darter_layer::{FileKind, Tree};

use super::dirs::{Dir, Place};
use super::shown::Node;
use super::{Answer, Attributes, Entry, FileSystem, FsError, Ino, Lifetime, Listing, Lookup, ROOT_INO};

/// Only root goes through the mount's root: what is below shows every image of the node.
const ROOT_PERMISSIONS: u32 = 0o700;
/// What containerd's snapshotters give the root of a snapshot.
const DIR_PERMISSIONS: u32 = 0o755;

type Result<T> = std::result::Result<T, FsError>;

/// How much is shown, for `statfs`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// In units of 512 bytes, of trees that are there.
    pub blocks: u64,
    pub files: u64,
}

/// The number of a directory as it is named: decimal, without leading zeros or signs.
pub(super) fn parse_dir(name: &[u8]) -> Option<u32> {
    let digits = name.iter().all(u8::is_ascii_digit) && (name.first() != Some(&b'0') || name.len() == 1);
    digits.then(|| std::str::from_utf8(name).ok()?.parse().ok()).flatten()
}

impl FileSystem {
    /// The file `name` in the directory `parent`. `.` and `..` are answered, `.` for every kind of file.
    pub fn lookup(self: &Arc<Self>, parent: u64, name: &[u8]) -> Answer<Result<Lookup>> {
        let found = |entry| Answer::Ready(Ok(Lookup::Found(entry)));
        match (self.place(parent), name) {
            (Place::Root, b"." | b"..") | (Place::Pending(_), b"..") => found(self.root_entry()),
            (Place::Node(node), b"..") if node.index == Tree::ROOT => found(self.root_entry()),
            (Place::Root, _) => Answer::Ready(Ok(self.lookup_dir(name))),
            (Place::Pending(dir), b".") => found(pending_entry(&dir)),
            (place, _) => {
                let name = name.to_vec();
                self.within(place, move |node| lookup_below(node, &name))
            }
        }
    }

    pub fn attributes(&self, ino: u64) -> Result<Entry> {
        match self.place(ino) {
            Place::Root => Ok(self.root_entry()),
            Place::Pending(dir) => Ok(pending_entry(&dir)),
            Place::Node(node) => Ok(node.entry()),
            Place::Unknown => Err(FsError::Stale),
        }
    }

    /// The target of a symbolic link.
    pub fn readlink(&self, ino: u64) -> Result<Vec<u8>> {
        let node = self.node(ino)?;
        let is_link = node.tree().attr(node.index).kind == FileKind::Symlink;
        is_link.then(|| node.tree().readlink(node.index).to_vec()).ok_or(FsError::WrongKind)
    }

    /// The value of an extended attribute. Never waits: the root of a tree has none.
    pub fn xattr(&self, ino: u64, name: &[u8]) -> Result<Vec<u8>> {
        let Place::Node(node) = self.place(ino) else { return Err(FsError::NoAttribute) };
        let mut xattrs = node.tree().xattrs(node.index);
        xattrs.find(|(key, _)| *key == name).map(|(_, value)| value.to_vec()).ok_or(FsError::NoAttribute)
    }

    /// The names of all extended attributes.
    pub fn xattr_names(&self, ino: u64) -> Result<Vec<Vec<u8>>> {
        match self.place(ino) {
            Place::Node(node) => Ok(node.tree().xattrs(node.index).map(|(name, _)| name.to_vec()).collect()),
            Place::Root | Place::Pending(_) => Ok(Vec::new()),
            Place::Unknown => Err(FsError::Stale),
        }
    }

    /// What is in a directory.
    pub fn list(self: &Arc<Self>, ino: u64) -> Answer<Result<Listing>> {
        match self.place(ino) {
            Place::Root => Answer::Ready(Ok(Listing::of_dirs(self.root_entry(), self.dir_entries()))),
            place => {
                let root = self.root_entry();
                self.within(place, move |node| Ok(Listing::of_node(node.directory()?.clone(), root)))
            }
        }
    }

    /// What `statfs` adds up.
    pub fn usage(&self) -> Usage {
        let table = self.table.read();
        table.dirs().filter_map(|dir| dir.now()).fold(Usage::default(), |sum, shown| Usage {
            blocks: sum.blocks + shown.blocks(),
            files: sum.files + u64::from(shown.tree().node_count()),
        })
    }

    pub(super) fn place(&self, ino: u64) -> Place {
        self.table.read().resolve(ino)
    }

    /// The node with that number, if there is one in a tree that is there.
    pub(super) fn node(&self, ino: u64) -> Result<Node> {
        match self.place(ino) {
            Place::Node(node) => Ok(node),
            Place::Root | Place::Pending(_) => Err(FsError::IsDirectory),
            Place::Unknown => Err(FsError::Stale),
        }
    }

    /// What `then` makes of the node at `place`, once its tree is there.
    fn within<T: Send + 'static>(
        self: &Arc<Self>,
        place: Place,
        then: impl FnOnce(&Node) -> Result<T> + Send + 'static,
    ) -> Answer<Result<T>> {
        match place {
            Place::Node(node) => Answer::Ready(then(&node)),
            Place::Root | Place::Unknown => Answer::Ready(Err(FsError::Stale)),
            Place::Pending(dir) => {
                self.start(&dir);
                let limit = self.limits.map_wait;
                Answer::wait(async move { then(&root_of(&dir, limit).await?) })
            }
        }
    }

    /// It may be kept, because a notice is sent when it changes: else the kernel would ask for it with every path.
    fn root_entry(&self) -> Entry {
        let links = 2 + self.table.read().count() as u32;
        let attributes = Attributes::directory(ROOT_INO, ROOT_PERMISSIONS, links);
        Entry { attributes, lifetime: Lifetime::Forever }
    }

    fn lookup_dir(&self, name: &[u8]) -> Lookup {
        let dir = parse_dir(name).and_then(|number| self.table.read().dir(number));
        dir.map_or(Lookup::Absent(Lifetime::None), |dir| Lookup::Found(dir_entry(&dir)))
    }

    fn dir_entries(&self) -> Vec<(u32, Entry)> {
        self.table.read().dirs().map(|dir| (dir.number, dir_entry(dir))).collect()
    }
}

async fn root_of(dir: &Dir, limit: std::time::Duration) -> Result<Node> {
    match tokio::time::timeout(limit, dir.wait()).await {
        Ok(Ok(shown)) => Ok(shown.root()),
        Ok(Err(None)) => Err(FsError::Stale),
        Ok(Err(Some(_))) | Err(_) => Err(FsError::Io),
    }
}

/// `..` of the tree's root isn't below it.
fn lookup_below(node: &Node, name: &[u8]) -> Result<Lookup> {
    let tree = node.tree();
    let index = match name {
        b"." => Some(node.index),
        b".." => Some(tree.parent(node.directory()?.index)),
        _ => tree.lookup(node.directory()?.index, name),
    };
    let found = |index| Lookup::Found(node.shown.entry(index));
    Ok(index.map_or(Lookup::Absent(Lifetime::Forever), found))
}

fn dir_entry(dir: &Dir) -> Entry {
    dir.now().map_or_else(|| pending_entry(dir), |shown| shown.root().entry())
}

/// What is said of a tree's root before it is known; nobody may keep it.
fn pending_entry(dir: &Dir) -> Entry {
    let attributes = Attributes::directory(Ino::Dir(dir.number).encode(), DIR_PERMISSIONS, 1);
    Entry { attributes, lifetime: Lifetime::None }
}

#[cfg(test)]
mod tests {
    use super::parse_dir;

    #[test]
    fn directories_are_named_in_plain_decimal() {
        assert_eq!(parse_dir(b"0"), Some(0));
        assert_eq!(parse_dir(b"120"), Some(120));
        for bad in [&b""[..], b"01", b"+1", b"-1", b"1 ", b"99999999999", b"\xff"] {
            assert_eq!(parse_dir(bad), None, "{bad:?}");
        }
    }
}
