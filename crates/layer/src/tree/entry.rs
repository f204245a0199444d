//! One entry made in the directory that a layer is unpacked into, and its attributes.

use super::apply::show;
use super::upper::{Inode, NAME_TOO_LONG, NO_SUCH_FILE, Upper};
use super::{FileKind, attributes, xattrs};
use crate::map::{LayerMap, Row};
use crate::path;
use crate::tar::EntryKind;

const SET_GROUP_ID: u16 = 0o2000;
/// `chown` leaves an owner of this number as it is.
const KEEP: u32 = u32::MAX;
/// What ext4 and most others hold as a symbolic link's target.
const TARGET_MAX: usize = 4095;

/// An entry on its way into a directory.
pub(super) struct Unpacking<'a> {
    pub(super) map: &'a LayerMap,
    pub(super) row: &'a Row<'a>,
    pub(super) number: u32,
    pub(super) dir: u32,
    pub(super) base: &'a [u8],
    pub(super) name: &'a [u8],
}

/// What the kernel gives a new inode: in a set-group-ID directory, the directory's group.
pub(super) fn new_inode(upper: &Upper, dir: u32, kind: FileKind, entry: u32) -> Inode {
    let mut inode = Inode::new(kind, entry);
    let dir = upper.inode(dir);
    inode.gid = if dir.mode & SET_GROUP_ID != 0 { dir.gid } else { 0 };
    inode
}

pub(super) fn set_owner(inode: &mut Inode, row: &Row) {
    inode.uid = if row.uid == KEEP { inode.uid } else { row.uid };
    inode.gid = if row.gid == KEEP { inode.gid } else { row.gid };
}

/// Makes the file and gives it its name, which is free. A hard link gives the inode that it links to.
pub(super) fn create(upper: &mut Upper, unpacking: &Unpacking) -> Result<u32, String> {
    let Unpacking { row, number, dir, base, .. } = *unpacking;
    let kind = match row.kind {
        EntryKind::Hardlink => return link(upper, unpacking),
        EntryKind::Symlink => return symlink(upper, unpacking),
        EntryKind::File => FileKind::File,
        EntryKind::Directory => FileKind::Directory,
        EntryKind::Char => FileKind::Char,
        EntryKind::Block => FileKind::Block,
        EntryKind::Fifo => FileKind::Fifo,
        EntryKind::Global => unreachable!("global headers make no file"),
    };
    let mut inode = new_inode(upper, dir, kind, number);
    match kind {
        FileKind::File => (inode.size, inode.data) = (row.size, row.content),
        FileKind::Char | FileKind::Block => inode.rdev = rdev(row.major, row.minor),
        _ => {}
    }
    let inode = upper.add(inode)?;
    if let Some(segments) = &row.segments {
        upper.budget.segments(segments)?;
        upper.sparse.push((inode, segments.as_slice().into()));
    }
    upper.link(dir, base, inode)?;
    Ok(inode)
}

fn symlink(upper: &mut Upper, unpacking: &Unpacking) -> Result<u32, String> {
    let Unpacking { row, number, dir, base, name, .. } = *unpacking;
    let refused = |why| Err(format!("symlink {} {}: {why}", show(row.link), show(name)));
    if row.link.is_empty() {
        return refused(NO_SUCH_FILE);
    }
    if row.link.contains(&0) {
        return refused("invalid argument");
    }
    if row.link.len() > TARGET_MAX {
        return refused(NAME_TOO_LONG);
    }
    let mut inode = new_inode(upper, dir, FileKind::Symlink, number);
    (inode.mode, inode.size, inode.data) = (0o777, row.link.len() as u64, upper.add_target(row.link)?);
    let inode = upper.add(inode)?;
    upper.link(dir, base, inode)?;
    Ok(inode)
}

/// The link's directory is resolved, its last component is not followed, and it must be in this layer already.
fn link(upper: &mut Upper, unpacking: &Unpacking) -> Result<u32, String> {
    let Unpacking { row, dir, base, name, .. } = *unpacking;
    let refused = |why: &str| format!("link {} {}: {why}", show(row.link), show(name));
    let slashes = row.link.iter().take_while(|byte| **byte == b'/').count();
    let (parent, last) = path::split(&row.link[slashes..]);
    let mut target = upper.root_path(parent).map_err(refused)?;
    path::clean_onto(&mut target, last, true);
    let inode = upper.lstat(&target).map_err(refused)?.ok_or_else(|| refused(NO_SUCH_FILE))?;
    if upper.is_dir(inode) {
        return Err(refused("operation not permitted"));
    }
    upper.link(dir, base, inode)?;
    Ok(inode)
}

/// Owner, extended attributes, mode and times, in containerd's order. A hard link sets them for all names of its file.
pub(super) fn set_attributes(upper: &mut Upper, inode: u32, unpacking: &Unpacking) -> Result<(), String> {
    let row = unpacking.row;
    let file = upper.inode_mut(inode);
    set_owner(file, row);
    if file.kind != FileKind::Symlink {
        file.mode = row.mode;
    }
    (file.mtime, file.atime) = attributes::times(row.mtime, row.atime);
    xattrs::set(upper, inode, unpacking)
}

/// The kernel takes 12 bits of the major and 20 of the minor number.
fn rdev(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12
}
