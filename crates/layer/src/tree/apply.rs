//! One layer unpacked as containerd unpacks it: the lowest by its naive rules, those above by its overlay rules.
//!
//! The rules are those of containerd's `archive.Apply`; where it would fail, this fails, with its words.

use std::rc::Rc;
use std::sync::Arc;

use super::budget::Budget;
use super::entry::{self, Unpacking};
use super::upper::{NAME_MAX, NAME_TOO_LONG, NO_SUCH_FILE, NONE, NOT_A_DIRECTORY, PATH_MAX, ROOT, Upper};
use super::{FileKind, attributes};
use crate::Time;
use crate::map::{LayerMap, Row};
use crate::path::{self, WHITEOUT};
use crate::tar::EntryKind;

const OPAQUE: &[u8] = b".wh..wh..opq";

/// Why a layer of the chain can't be shown: containerd would refuse it, or the tree would pass its bounds.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct ApplyError {
    /// Which layer, from 0, the lowest.
    pub layer: usize,
    /// In containerd's words where it has some.
    pub reason: String,
}

/// A layer being applied.
struct Apply<'a> {
    upper: Upper,
    /// The layers below, the lowest first.
    lowers: &'a [Upper],
    /// Directories with an entry of their own, whose times are set when all is unpacked.
    dir_times: Vec<(Vec<u8>, Time, Time)>,
    /// The parent of the entry before: its path, its inode, and the count of removals when it was found.
    recent: Option<(Vec<u8>, u32, u64)>,
}

/// Unpacks the layer on top of `lowers`.
pub(super) fn apply(map: &Arc<LayerMap>, lowers: &[Upper], budget: &Rc<Budget>) -> Result<Upper, ApplyError> {
    let refused = |reason| ApplyError { layer: lowers.len(), reason };
    let upper = Upper::new(budget.clone());
    let mut apply = Apply { upper, lowers, dir_times: Vec::new(), recent: None };
    let mut rows = map.rows();
    let mut number = 0;
    while let Some(row) = rows.next().map_err(|error| refused(error.to_string()))? {
        budget.text(rows.name()).map_err(|why| refused(why.to_owned()))?;
        let name = path::clean(rows.name(), false);
        apply.entry(map, &name, &row, number).map_err(refused)?;
        number += 1;
    }
    apply.set_dir_times().map_err(refused)?;
    Ok(apply.upper)
}

impl Apply<'_> {
    fn is_base(&self) -> bool {
        self.lowers.is_empty()
    }

    fn entry(&mut self, map: &LayerMap, name: &[u8], row: &Row, number: u32) -> Result<(), String> {
        let (parent, base) = path::split(name);
        if matches!(base, b"" | b"." | b"..") {
            // It is the root, which containerd leaves as it is.
            return Ok(());
        }
        if name.contains(&0) {
            return Err(format!("failed to get root path: lstat {}: invalid argument", show(name)));
        }
        let dir = self.parent(parent, row)?;
        if let Some(hidden) = whiteout(base)? {
            let converted =
                if self.is_base() { self.remove(dir, hidden) } else { self.hide(dir, hidden, row, number) };
            return converted
                .map_err(|why| format!("failed to convert whiteout file {:?}: {why}", show(name)));
        }
        self.unpack(map, dir, base, name, row, number)
    }

    fn unpack(
        &mut self,
        map: &LayerMap,
        dir: u32,
        base: &[u8],
        name: &[u8],
        row: &Row,
        number: u32,
    ) -> Result<(), String> {
        let existing = self.upper.lookup(dir, base);
        let merged = existing.filter(|old| self.upper.is_dir(*old) && row.kind == EntryKind::Directory);
        if existing.is_some() && merged.is_none() {
            self.upper.remove(dir, base)?;
        }
        if row.kind == EntryKind::Global {
            return Ok(());
        }
        if base.len() > NAME_MAX || name.len() > PATH_MAX {
            return Err(format!("open {}: {NAME_TOO_LONG}", show(name)));
        }
        let unpacking = Unpacking { map, row, number, dir, base, name };
        let inode = match merged {
            Some(inode) => inode,
            None => entry::create(&mut self.upper, &unpacking)?,
        };
        entry::set_attributes(&mut self.upper, inode, &unpacking)?;
        if row.kind == EntryKind::Directory {
            let (mtime, atime) = attributes::times(row.mtime, row.atime);
            self.upper.budget.bytes(size_of_val(&self.dir_times[..0]) + name.len())?;
            self.dir_times.push((name.to_vec(), mtime, atime));
        }
        self.upper.set_unpacked(dir, base);
        Ok(())
    }

    /// The directory of an entry, made if it is not there. Entries of one directory follow each other as a rule.
    fn parent(&mut self, text: &[u8], row: &Row) -> Result<u32, String> {
        if text.is_empty() {
            return Ok(ROOT);
        }
        if let Some((recent, inode, removals)) = &self.recent
            && recent == text
            && *removals == self.upper.removals
        {
            return Ok(*inode);
        }
        let resolved = self.upper.root_path(text);
        let resolved =
            resolved.map_err(|why| format!("failed to get root path: lstat {}: {why}", show(text)))?;
        let inode = self.make_parents(&resolved, row)?;
        self.recent = Some((text.to_vec(), inode, self.upper.removals));
        Ok(inode)
    }

    fn make_parents(&mut self, resolved: &[u8], row: &Row) -> Result<u32, String> {
        let mut dir = ROOT;
        let mut end = 0;
        for component in path::components(resolved).filter(|component| !component.is_empty()) {
            self.upper.budget.step()?;
            end += component.len() + usize::from(end > 0);
            dir = match self.upper.lookup(dir, component) {
                Some(found) if self.upper.is_dir(found) => found,
                Some(_) => return Err(format!("mkparent {}: {NOT_A_DIRECTORY}", show(&resolved[..end]))),
                None => self.make_parent(dir, component, &resolved[..end], row)?,
            };
        }
        Ok(dir)
    }

    /// A directory without an entry of its own takes after the first layer below that has the path, even one that is
    /// hidden there. Its time would come from the clock: that of the entry which needs it stands for it.
    fn make_parent(&mut self, dir: u32, name: &[u8], text: &[u8], row: &Row) -> Result<u32, String> {
        if name.len() > NAME_MAX {
            return Err(format!("mkdir {}: {NAME_TOO_LONG}", show(text)));
        }
        let mut inode = entry::new_inode(&self.upper, dir, FileKind::Directory, NONE);
        inode.mode = 0o755;
        (inode.mtime, inode.atime) = attributes::times(row.mtime, None);
        if let Some((lower, found)) = self.model(text)? {
            let model = lower.inode(found);
            (inode.mode, inode.uid, inode.gid) = (model.mode, model.uid, model.gid);
            (inode.mtime, inode.atime) = (model.mtime, model.atime);
            inode.xattrs = model.xattrs.clone();
        }
        let inode = self.upper.add(inode)?;
        self.upper.link(dir, name, inode)?;
        Ok(inode)
    }

    fn model(&self, text: &[u8]) -> Result<Option<(&Upper, u32)>, String> {
        for lower in self.lowers.iter().rev() {
            let found = lower.root_path(text).and_then(|resolved| lower.lstat(&resolved));
            if let Some(found) = found.map_err(|why| format!("lstat {}: {why}", show(text)))? {
                return Ok(lower.is_dir(found).then_some((lower, found)));
            }
        }
        Ok(None)
    }

    /// Overlay rules: a whiteout is a character device 0:0, an opaque directory has a mark.
    fn hide(&mut self, dir: u32, hidden: Hidden, row: &Row, number: u32) -> Result<(), &'static str> {
        let name = match hidden {
            Hidden::Everything => {
                self.upper.inode_mut(dir).opaque = true;
                return Ok(());
            }
            Hidden::Name(name) => name,
        };
        if name.len() > NAME_MAX {
            return Err(NAME_TOO_LONG);
        }
        if self.upper.lookup(dir, name).is_some() {
            return Err("file exists");
        }
        let mut inode = entry::new_inode(&self.upper, dir, FileKind::Char, number);
        entry::set_owner(&mut inode, row);
        let inode = self.upper.add(inode)?;
        self.upper.link(dir, name, inode)
    }

    /// Naive rules: a whiteout removes what this layer unpacked before.
    fn remove(&mut self, dir: u32, hidden: Hidden) -> Result<(), &'static str> {
        match hidden {
            Hidden::Name(name) if name.len() > NAME_MAX => Err(NAME_TOO_LONG),
            Hidden::Name(name) => self.upper.remove(dir, name),
            Hidden::Everything => self.remove_implied(dir),
        }
    }

    /// Below an opaque directory only what has an entry of its own stays, and what is below that.
    fn remove_implied(&mut self, dir: u32) -> Result<(), &'static str> {
        let mut pending = vec![dir];
        while let Some(dir) = pending.pop() {
            let children =
                self.upper.children(dir).map(|child| child.map(|(name, inode)| (name.to_vec(), inode)));
            let children: Vec<_> = children.collect::<Result<_, _>>()?;
            for (name, inode) in children {
                if !self.upper.is_unpacked(dir, &name) {
                    self.upper.remove(dir, &name)?;
                } else if self.upper.is_dir(inode) {
                    pending.push(inode);
                }
            }
        }
        Ok(())
    }

    /// By path, not by inode, as containerd does it: the path may lead elsewhere by now.
    fn set_dir_times(&mut self) -> Result<(), String> {
        for (text, mtime, atime) in std::mem::take(&mut self.dir_times) {
            let found =
                self.upper.root_path(&confined(&text)).and_then(|resolved| self.upper.lstat(&resolved));
            let found = found.and_then(|found| found.ok_or(NO_SUCH_FILE));
            let inode = found.map_err(|why| format!("chtimes {}: {why}", show(&text)))?;
            let inode = self.upper.inode_mut(inode);
            (inode.mtime, inode.atime) = (mtime, atime);
        }
        Ok(())
    }
}

/// What a whiteout's name hides.
#[derive(Clone, Copy)]
enum Hidden<'a> {
    Name(&'a [u8]),
    /// All that is below in this directory.
    Everything,
}

fn whiteout(base: &[u8]) -> Result<Option<Hidden<'_>>, String> {
    if base == OPAQUE {
        return Ok(Some(Hidden::Everything));
    }
    match base.strip_prefix(WHITEOUT) {
        Some(b"" | b"." | b"..") => Err(format!("invalid whiteout name: {}: invalid archive", show(base))),
        hidden => Ok(hidden.map(Hidden::Name)),
    }
}

/// A clean path without the `..` that may stand in front.
fn confined(text: &[u8]) -> Vec<u8> {
    path::clean(text, true)
}

pub(super) fn show(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}
