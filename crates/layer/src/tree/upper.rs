//! The directory that containerd unpacks one layer into, in memory: inodes, names, and walking paths among them.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::rc::Rc;
use std::sync::Arc;

use super::budget::Budget;
use super::{FileKind, XattrSet};
use crate::{Segment, Time, path};

/// Errors in the words of Go's `syscall` package.
pub(super) const NOT_A_DIRECTORY: &str = "not a directory";
pub(super) const NAME_TOO_LONG: &str = "file name too long";
pub(super) const NO_SUCH_FILE: &str = "no such file or directory";
const TOO_MANY_LINKS: &str = "too many links";
const LINK_LOOP: &str = "too many levels of symbolic links";

pub(super) const NAME_MAX: usize = 255;
/// Bytes of a path that the kernel takes (PATH_MAX without its NUL), containerd's own part of it not counted. Without it a
/// name of a megabyte would make half a million directories.
pub(super) const PATH_MAX: usize = 4095;
/// Symbolic links that containerd follows in a path, and that the kernel does.
const LINKS_MAX: usize = 255;
const KERNEL_LINKS_MAX: usize = 40;
/// No inode, no name.
pub(super) const NONE: u32 = u32::MAX;
pub(super) const ROOT: u32 = 0;

#[derive(Debug, Clone)]
pub(super) struct Inode {
    pub(super) kind: FileKind,
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Time,
    pub(super) atime: Time,
    pub(super) size: u64,
    /// Start in the content stream, or of a link's target in `targets`.
    pub(super) data: u64,
    pub(super) rdev: u32,
    /// The entry that made the inode.
    pub(super) entry: u32,
    /// Names of a file; of a directory, its subdirectories.
    pub(super) links: u32,
    /// Shared by all inodes that have the same from one entry's set; never empty.
    pub(super) xattrs: Option<Arc<XattrSet>>,
    /// Of a directory: hides what is in the layers below.
    pub(super) opaque: bool,
    parent: u32,
    first_child: u32,
}

impl Inode {
    pub(super) fn new(kind: FileKind, entry: u32) -> Self {
        Self {
            kind,
            mode: 0,
            uid: 0,
            gid: 0,
            mtime: Time::default(),
            atime: Time::default(),
            size: 0,
            data: 0,
            rdev: 0,
            entry,
            links: 0,
            xattrs: None,
            opaque: false,
            parent: ROOT,
            first_child: NONE,
        }
    }

    /// What overlayfs takes for a whiteout, whoever made it.
    pub(super) fn is_whiteout(&self) -> bool {
        self.kind == FileKind::Char && self.rdev == 0
    }
}

/// A name in a directory. It stays when the file is removed, without inode, and is used again.
#[derive(Debug)]
struct Name {
    parent: u32,
    start: u32,
    len: u8,
    /// An entry with this name was unpacked, as opposed to a directory that was only implied.
    unpacked: bool,
    inode: u32,
    next: u32,
}

#[derive(Debug)]
pub(super) struct Upper {
    pub(super) inodes: Vec<Inode>,
    names: Vec<Name>,
    bytes: Vec<u8>,
    index: HashMap<u64, u32, Hashed>,
    hasher: RandomState,
    targets: Vec<u8>,
    /// What is made of a set of the layer's map for plain files (regular ones and directories), and for others.
    pub(super) xattrs: HashMap<(u32, bool), Option<Arc<XattrSet>>>,
    /// Sparse files, sorted by inode.
    pub(super) sparse: Vec<(u32, Arc<[Segment]>)>,
    /// Grows with every removal: what was resolved before may have changed.
    pub(super) removals: u64,
    /// One for all layers of the chain.
    pub(super) budget: Rc<Budget>,
}

impl Upper {
    pub(super) fn new(budget: Rc<Budget>) -> Self {
        let root = Inode { mode: 0o755, ..Inode::new(FileKind::Directory, NONE) };
        Self {
            inodes: vec![root],
            names: Vec::new(),
            bytes: Vec::new(),
            index: HashMap::default(),
            hasher: RandomState::new(),
            targets: Vec::new(),
            xattrs: HashMap::new(),
            sparse: Vec::new(),
            removals: 0,
            budget,
        }
    }

    pub(super) fn inode(&self, inode: u32) -> &Inode {
        &self.inodes[inode as usize]
    }

    pub(super) fn inode_mut(&mut self, inode: u32) -> &mut Inode {
        &mut self.inodes[inode as usize]
    }

    pub(super) fn is_dir(&self, inode: u32) -> bool {
        self.inode(inode).kind == FileKind::Directory
    }

    pub(super) fn lookup(&self, dir: u32, name: &[u8]) -> Option<u32> {
        let found = self.names[self.find(dir, name).ok()? as usize].inode;
        (found != NONE).then_some(found)
    }

    /// Names and inodes of a directory, in no order.
    pub(super) fn children(&self, dir: u32) -> impl Iterator<Item = Result<(&[u8], u32), &'static str>> {
        self.child_names(dir).map(|name| {
            let name = &self.names[name? as usize];
            Ok((self.bytes_of(name), name.inode))
        })
    }

    pub(super) fn is_unpacked(&self, dir: u32, name: &[u8]) -> bool {
        self.find(dir, name).is_ok_and(|name| self.names[name as usize].unpacked)
    }

    pub(super) fn set_unpacked(&mut self, dir: u32, name: &[u8]) {
        if let Ok(name) = self.find(dir, name) {
            self.names[name as usize].unpacked = true;
        }
    }

    pub(super) fn add(&mut self, inode: Inode) -> Result<u32, &'static str> {
        self.budget.inode()?;
        self.inodes.push(inode);
        Ok((self.inodes.len() - 1) as u32)
    }

    /// The place of a symbolic link's target among all of them.
    pub(super) fn add_target(&mut self, target: &[u8]) -> Result<u64, &'static str> {
        // Once for the layer, once for the tree.
        self.budget.bytes(2 * target.len())?;
        let at = self.targets.len() as u64;
        self.targets.extend_from_slice(target);
        Ok(at)
    }

    /// Gives an inode a name, which must be free and short enough.
    pub(super) fn link(&mut self, dir: u32, name: &[u8], inode: u32) -> Result<(), &'static str> {
        let at = match self.find(dir, name) {
            Ok(at) => at,
            Err(key) => self.new_name(dir, name, key)?,
        };
        assert_eq!(self.names[at as usize].inode, NONE, "a name is removed before it is given again");
        self.names[at as usize].inode = inode;
        if self.is_dir(inode) {
            self.inode_mut(inode).parent = dir;
            self.inode_mut(dir).links += 1;
        } else {
            self.inode_mut(inode).links += 1;
        }
        Ok(())
    }

    /// Removes a name and everything below it; nothing if it is not there.
    pub(super) fn remove(&mut self, dir: u32, name: &[u8]) -> Result<(), &'static str> {
        let Ok(at) = self.find(dir, name) else { return Ok(()) };
        self.removals += 1;
        let mut doomed = vec![at];
        while let Some(at) = doomed.pop() {
            let name = &mut self.names[at as usize];
            let parent = name.parent;
            let inode = std::mem::replace(&mut name.inode, NONE);
            if inode == NONE {
                continue;
            }
            if self.is_dir(inode) {
                self.inode_mut(parent).links -= 1;
                for name in self.child_names(inode) {
                    doomed.push(name?);
                }
            } else {
                self.inode_mut(inode).links -= 1;
            }
        }
        Ok(())
    }

    /// containerd's `RootPath`: the path with the symbolic links among its components resolved, confined to the root,
    /// whether or not it exists. The result is clean and rooted, without its leading slash.
    pub(super) fn root_path(&self, text: &[u8]) -> Result<Vec<u8>, &'static str> {
        if text.len() > PATH_MAX {
            return Err(NAME_TOO_LONG);
        }
        self.budget.text(text)?;
        if path::is_clean(text) && !self.has_link(text)? {
            return Ok(text.to_vec());
        }
        let mut links = 0;
        let mut text = text.to_vec();
        loop {
            let before = links;
            text = self.resolve_once(&text, &mut links)?;
            if links == before {
                return Ok(path::clean(&text, true));
            }
        }
    }

    /// The inode at a path, as `lstat` finds it: links on the way are followed, one at the end is not.
    pub(super) fn lstat(&self, text: &[u8]) -> Result<Option<u32>, &'static str> {
        self.walk(ROOT, text, false, &mut 0)
    }

    fn walk(
        &self,
        from: u32,
        text: &[u8],
        follow: bool,
        links: &mut usize,
    ) -> Result<Option<u32>, &'static str> {
        let mut at = from;
        let mut components = path::components(text).filter(|component| !component.is_empty()).peekable();
        while let Some(component) = components.next() {
            if !self.is_dir(at) {
                return Err(NOT_A_DIRECTORY);
            }
            let Some(mut next) = self.step(at, component)? else { return Ok(None) };
            if self.inode(next).kind == FileKind::Symlink && (follow || components.peek().is_some()) {
                let Some(target) = self.follow(at, next, links)? else { return Ok(None) };
                next = target;
            }
            at = next;
        }
        Ok(Some(at))
    }

    fn step(&self, dir: u32, component: &[u8]) -> Result<Option<u32>, &'static str> {
        self.budget.step()?;
        match component {
            b"." => Ok(Some(dir)),
            b".." => Ok(Some(self.inode(dir).parent)),
            _ if component.len() > NAME_MAX => Err(NAME_TOO_LONG),
            _ => Ok(self.lookup(dir, component)),
        }
    }

    /// Where a symbolic link in `dir` leads to in the end. The count of links bounds how deep this goes.
    fn follow(&self, dir: u32, link: u32, links: &mut usize) -> Result<Option<u32>, &'static str> {
        *links += 1;
        if *links > KERNEL_LINKS_MAX {
            return Err(LINK_LOOP);
        }
        let target = self.target(link);
        self.walk(if target.starts_with(b"/") { ROOT } else { dir }, target, true, links)
    }

    pub(super) fn target(&self, inode: u32) -> &[u8] {
        let link = self.inode(inode);
        &self.targets[link.data as usize..][..link.size as usize]
    }

    /// Whether a component of this clean path is a symbolic link.
    fn has_link(&self, text: &[u8]) -> Result<bool, &'static str> {
        let mut at = ROOT;
        for component in path::components(text).filter(|component| !component.is_empty()) {
            if !self.is_dir(at) {
                return Err(NOT_A_DIRECTORY);
            }
            match self.step(at, component)? {
                None => return Ok(false),
                Some(next) if self.inode(next).kind == FileKind::Symlink => return Ok(true),
                Some(next) => at = next,
            }
        }
        Ok(false)
    }

    /// One pass over the components, in which each link met is replaced by its target once.
    fn resolve_once(&self, text: &[u8], links: &mut usize) -> Result<Vec<u8>, &'static str> {
        let mut done: Option<Vec<u8>> = text.starts_with(b"/").then(Vec::new);
        for component in path::components(text).filter(|component| !component.is_empty()) {
            let joined = join(done.as_deref().unwrap_or(&[]), component);
            self.budget.text(&joined)?;
            let found = if joined.is_empty() { None } else { self.link_at(&joined, links)? };
            done = Some(match found {
                None => joined,
                Some(target) if target.starts_with(b"/") => target.to_vec(),
                Some(target) => done.map_or_else(|| target.to_vec(), |done| join(&done, target)),
            });
        }
        Ok(done.unwrap_or_default())
    }

    fn link_at(&self, text: &[u8], links: &mut usize) -> Result<Option<&[u8]>, &'static str> {
        if *links > LINKS_MAX {
            return Err(TOO_MANY_LINKS);
        }
        let Some(inode) = self.lstat(text)? else { return Ok(None) };
        if self.inode(inode).kind != FileKind::Symlink {
            return Ok(None);
        }
        *links += 1;
        Ok(Some(self.target(inode)))
    }

    /// Also a name that was removed takes a step.
    fn child_names(&self, dir: u32) -> impl Iterator<Item = Result<u32, &'static str>> {
        let first = Some(self.inode(dir).first_child).filter(|name| *name != NONE);
        let next = |name: &u32| Some(self.names[*name as usize].next).filter(|name| *name != NONE);
        std::iter::successors(first, next)
            .map(|name| self.budget.step().map(|()| name))
            .filter(|name| name.map_or(true, |name| self.names[name as usize].inode != NONE))
    }

    fn bytes_of(&self, name: &Name) -> &[u8] {
        &self.bytes[name.start as usize..][..usize::from(name.len)]
    }

    /// The name, or the free key under which it belongs.
    fn find(&self, dir: u32, name: &[u8]) -> Result<u32, u64> {
        let mut key = self.hasher.hash_one((dir, name));
        while let Some(at) = self.index.get(&key) {
            let found = &self.names[*at as usize];
            if found.parent == dir && self.bytes_of(found) == name {
                return Ok(*at);
            }
            // Two names with one hash: the next key is as good.
            key = key.wrapping_add(1);
        }
        Err(key)
    }

    fn new_name(&mut self, dir: u32, name: &[u8], key: u64) -> Result<u32, &'static str> {
        self.budget.name(name)?;
        let at = self.names.len() as u32;
        let next = std::mem::replace(&mut self.inode_mut(dir).first_child, at);
        let start = u32::try_from(self.bytes.len()).expect("the budget bounds the bytes of all names");
        let len = name.len() as u8;
        self.names.push(Name { parent: dir, start, len, unpacked: false, inode: NONE, next });
        self.bytes.extend_from_slice(name);
        self.index.insert(key, at);
        Ok(at)
    }
}

fn join(done: &[u8], rest: &[u8]) -> Vec<u8> {
    let mut out = path::clean(done, true);
    path::clean_onto(&mut out, rest, true);
    out
}

/// The keys are hashes already.
#[derive(Debug, Default, Clone, Copy)]
struct Hashed;

impl BuildHasher for Hashed {
    type Hasher = Key;
    fn build_hasher(&self) -> Key {
        Key(0)
    }
}

struct Key(u64);

impl Hasher for Key {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {
        unreachable!("the keys are u64")
    }
    fn write_u64(&mut self, key: u64) {
        self.0 = key;
    }
}
