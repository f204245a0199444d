//! Mounting, the first handshake, and taking a mount away.
//!
//! Nothing here ever looks at what is mounted: a server that touches its own mount waits for itself.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{read, write};
use serde::{Deserialize, Serialize};

use super::wire::{self, Init, InitAnswer, Request};

const DEVICE: &str = "/dev/fuse";
const SOURCE: &str = "darter";
const KIND: &str = "fuse.darter";

/// The largest request that we take, and its header: on a read-only mount that is a name or a batch of FORGETs.
const MAX_WRITE: u32 = 64 * 1024;
const HEADER_ROOM: usize = 4096;
const BUFFER_SIZE: usize = MAX_WRITE as usize + HEADER_ROOM;

/// Requests that may wait without anybody waiting for them in the kernel, which are read-ahead reads, on the whole
/// connection: all containers share it, so a piece that doesn't come must not use up the lot.
const MAX_BACKGROUND: u16 = 4096;
const CONGESTION_THRESHOLD: u16 = MAX_BACKGROUND / 4 * 3;
/// Pages of one READ. The kernel's own read-ahead is left as it is (128 KiB): the kernel reads so much around every page
/// that a mapped library touches, and a start that fetches a seventh of an image would fetch a third.
const MAX_PAGES: u16 = 256;

const ASYNC_READ: u64 = 1 << 0;
const EXPORT_SUPPORT: u64 = 1 << 4;
const DO_READDIRPLUS: u64 = 1 << 13;
const NO_OPEN_SUPPORT: u64 = 1 << 17;
const PARALLEL_DIROPS: u64 = 1 << 18;
const POSIX_ACL: u64 = 1 << 20;
const MAX_PAGES_FLAG: u64 = 1 << 22;
const CACHE_SYMLINKS: u64 = 1 << 23;
const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
const INIT_EXT: u64 = 1 << 30;
const HAS_RESEND: u64 = 1 << 39;

/// What we want of the kernel:
/// reads of one file at the same time, and look-ups in one directory at the same time, since each may wait for the mesh;
/// listings that always bring attributes, which cost us nothing and save a look-up for each name (left to choose, the
/// kernel stops asking for them after a page of names, because `tar` and others read a whole directory first); opening without a request; link
/// targets kept in memory; access control lists, which the kernel then heeds as on a disk; file
/// handles ("export"), without which an overlay above can't have inode numbers of its own on one device (`xino`); and
/// requests sent once more to the process that goes on after another has died ("resend").
///
/// Left out: AUTO_INVAL_DATA and EXPLICIT_INVAL_DATA, since contents never change and sizes neither; BIG_WRITES and the
/// like, since nothing is written; splicing, since answers come from memory.
const FLAGS: u64 = ASYNC_READ
    | EXPORT_SUPPORT
    | DO_READDIRPLUS
    | NO_OPEN_SUPPORT
    | PARALLEL_DIROPS
    | POSIX_ACL
    | MAX_PAGES_FLAG
    | CACHE_SYMLINKS
    | NO_OPENDIR_SUPPORT
    | INIT_EXT
    | HAS_RESEND;

/// A test can have it as on a kernel that sends nothing again.
const NO_RESEND: &str = "DARTER_NO_RESEND";

fn wanted() -> u64 {
    if std::env::var_os(NO_RESEND).is_some() { FLAGS & !HAS_RESEND } else { FLAGS }
}

/// Without them an open would reach us as a request each time, or an overlay above would show wrong inode numbers.
const NEEDED: u64 = EXPORT_SUPPORT | NO_OPEN_SUPPORT;

/// A connection as a later process needs to know it, which can't ask the kernel: which one it is, and what was agreed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Live {
    /// The number of the connection, as in the list of mounts.
    pub connection: u32,
    /// The version of the messages, after the 7.
    pub minor: u32,
    pub flags: u64,
    /// The longest request, in bytes without its header.
    pub max_write: u32,
}

impl Live {
    /// How much room a request needs, in bytes.
    pub(super) fn buffer_size(&self) -> usize {
        BUFFER_SIZE.max(self.max_write as usize + HEADER_ROOM)
    }

    /// Whether the kernel sends requests again.
    pub(super) fn resends(&self) -> bool {
        self.flags & HAS_RESEND != 0
    }
}

/// Why there is no mount.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    #[error("{DEVICE} can't be opened (is the kernel module fuse loaded?): {0}")]
    Device(io::Error),
    #[error("{path}: {error}")]
    Place { path: PathBuf, error: io::Error },
    #[error("{0} is a mount point of something else")]
    Occupied(PathBuf),
    #[error("{path} can't be mounted on: {error}")]
    Mount { path: PathBuf, error: nix::Error },
    #[error("the kernel's FUSE is of another kind than this program's: {0}")]
    Handshake(String),
    #[error("the threads that serve the mount can't be started: {0}")]
    Threads(io::Error),
}

/// Mounts at `place`, which is made if it isn't there, and returns the connection, ready for requests. A mount of ours that
/// an earlier process left there is taken away first.
pub(super) fn mount_at(place: &Path) -> Result<(OwnedFd, Live), MountError> {
    let fail = |error| MountError::Place { path: place.to_owned(), error };
    clear(place)?;
    std::fs::create_dir_all(place).map_err(fail)?;
    let device = OpenOptions::new().read(true).write(true).open(DEVICE).map_err(MountError::Device)?;
    // Without the permission bits the kernel would show the root as something other than a directory at first.
    let options = format!(
        "fd={},rootmode=40700,user_id=0,group_id=0,allow_other,default_permissions",
        device.as_raw_fd()
    );
    // Devices and set-user-id files work: an overlay above decides for itself, and a bind mount must not lose them.
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOATIME;
    mount(Some(SOURCE), place, Some(KIND), flags, Some(options.as_str()))
        .map_err(|error| MountError::Mount { path: place.to_owned(), error })?;
    let agreed = greet(&device).inspect_err(|_| unmount(place))?;
    let connection = mount_on(place).map_or(0, |mounted| mounted.connection);
    let live = Live { connection, minor: wire::MINOR, flags: agreed.flags, max_write: agreed.max_write };
    Ok((device.into(), live))
}

/// Answers the first request, which is the kernel's offer. Returns what was answered.
fn greet(device: &File) -> Result<InitAnswer, MountError> {
    let other = |what: &dyn std::fmt::Display| MountError::Handshake(what.to_string());
    let mut buffer = vec![0; BUFFER_SIZE];
    loop {
        let length = match read(device, &mut buffer) {
            Err(nix::Error::EINTR | nix::Error::EAGAIN | nix::Error::ENOENT) => continue,
            result => result.map_err(|error| other(&error))?,
        };
        let (header, request) = wire::decode(&buffer[..length]).map_err(|error| other(&error))?;
        let Request::Init(offer) = request else { return Err(other(&"its first request is not INIT")) };
        let agreed = accept(&offer)?;
        let answer = wire::init(&agreed);
        let mut message = wire::out_header(header.unique, 0, answer.len()).to_vec();
        message.extend(answer);
        write(device, &message).map_err(|error| other(&error))?;
        // A newer major version asks again, in ours, when it has seen our answer.
        if offer.major == wire::MAJOR {
            return Ok(agreed);
        }
    }
}

fn accept(offer: &Init) -> Result<InitAnswer, MountError> {
    if offer.major < wire::MAJOR || (offer.major == wire::MAJOR && offer.flags & NEEDED != NEEDED) {
        let text = format!("it speaks {}.{} and offers {:#x}", offer.major, offer.minor, offer.flags);
        return Err(MountError::Handshake(text));
    }
    Ok(InitAnswer {
        max_readahead: offer.max_readahead,
        flags: wanted() & offer.flags,
        max_background: MAX_BACKGROUND,
        congestion_threshold: CONGESTION_THRESHOLD,
        max_write: MAX_WRITE,
        max_pages: MAX_PAGES,
    })
}

/// Takes away what an earlier process left mounted at `place`; without looking at it, because it may be dead.
fn clear(place: &Path) -> Result<(), MountError> {
    while let Some(found) = mount_on(place) {
        if found.kind != KIND {
            return Err(MountError::Occupied(place.to_owned()));
        }
        tracing::info!(place = %place.display(), "taking a mount of an earlier process away");
        umount2(place, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            .map_err(|error| MountError::Mount { path: place.to_owned(), error })?;
    }
    Ok(())
}

/// Detaches the mount: it is gone for everybody who looks for it, and ends when the last who uses it is gone.
pub(super) fn unmount(place: &Path) {
    if mount_on(place).is_none_or(|found| found.kind != KIND) {
        return;
    }
    if let Err(error) = umount2(place, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        tracing::warn!(place = %place.display(), %error, "the mount can't be taken away");
    }
}

/// A line of the kernel's list of mounts.
struct Mounted {
    /// The number under which the connection is found in `/sys/fs/fuse/connections`.
    connection: u32,
    kind: String,
}

/// The topmost mount at `place`.
fn mount_on(place: &Path) -> Option<Mounted> {
    let place = resolve(place)?;
    let list = std::fs::read("/proc/self/mountinfo").ok()?;
    list.split(|byte| *byte == b'\n').filter_map(|line| parse_mount(line, &place)).next_back()
}

/// The path as the list of mounts has it. Its last component is left alone: it is what may be dead.
fn resolve(place: &Path) -> Option<PathBuf> {
    let parent = std::path::absolute(place).ok()?.parent()?.canonicalize().ok()?;
    Some(parent.join(place.file_name()?))
}

fn parse_mount(line: &[u8], place: &Path) -> Option<Mounted> {
    parse_line(line).filter(|(at, ..)| at == place).map(|(_, mounted, _)| mounted)
}

/// Mount point, what is there, and the options of the file system.
fn parse_line(line: &[u8]) -> Option<(PathBuf, Mounted, String)> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let at = PathBuf::from(std::ffi::OsString::from_vec(unescape(fields.get(4)?)));
    let separator = fields.iter().position(|field| *field == b"-")?;
    let text = |index: usize| std::str::from_utf8(fields.get(index)?).ok();
    let connection = text(2)?.split_once(':')?.1.parse().ok()?;
    let options = unescape(fields.get(separator + 3)?);
    let mounted = Mounted { connection, kind: text(separator + 1)?.to_owned() };
    Some((at, mounted, String::from_utf8_lossy(&options).into_owned()))
}

/// The list of mounts writes some bytes as a backslash and three octal digits.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = |digits: &[u8]| digits.iter().fold(0u32, |sum, digit| sum * 8 + u32::from(digit & 7));
        rest = match tail.split_at_checked(3) {
            Some((digits, after)) if byte == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)) => {
                plain.push(octal(digits) as u8);
                after
            }
            _ => {
                plain.push(byte);
                tail
            }
        };
    }
    plain
}

/// Whether what is mounted at `place` is this connection of ours, and goes on.
pub(super) fn is_there(place: &Path, connection: u32, device: BorrowedFd<'_>) -> bool {
    let ours = |mounted: Mounted| mounted.kind == KIND && mounted.connection == connection;
    !crate::keep::ended(device) && mount_on(place).is_some_and(ours)
}

/// A mount of ours, as the list of mounts has it.
pub struct OwnMount {
    pub path: PathBuf,
    /// Where it is used: the mount points of overlays that lie on it, and of its directories.
    pub users: Vec<PathBuf>,
    connection: u32,
}

impl OwnMount {
    /// Unmounts it and ends its connection: whoever still uses it gets errors.
    pub fn take_away(&self) {
        unmount(&self.path);
        abort(self.connection);
    }
}

/// The mounts of ours below `root`, without a look at them.
pub fn mounts_below(root: &Path) -> io::Result<Vec<OwnMount>> {
    let root = root.canonicalize()?;
    let list = std::fs::read("/proc/self/mountinfo")?;
    let all: Vec<_> = list.split(|byte| *byte == b'\n').filter_map(parse_line).collect();
    let ours = all.iter().filter(|(at, mounted, _)| mounted.kind == KIND && at.starts_with(&root));
    let own = ours.map(|(path, mounted, _)| {
        let layer = format!("{}/", path.display());
        let uses = |(at, other, options): &&(PathBuf, Mounted, String)| {
            at != path
                && ((other.kind == "overlay" && options.contains(&layer))
                    || (other.kind == KIND && other.connection == mounted.connection))
        };
        let users = all.iter().filter(uses).map(|(at, ..)| at.clone()).collect();
        OwnMount { path: path.clone(), users, connection: mounted.connection }
    });
    Ok(own.collect())
}

/// Ends a connection by force; every request on it fails. Does nothing where the control file system isn't mounted.
pub(super) fn abort(connection: u32) {
    let file = format!("/sys/fs/fuse/connections/{connection}/abort");
    if let Err(error) = std::fs::write(file, "1") {
        tracing::debug!(%error, connection, "the connection can't be aborted");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &[u8] =
        b"62 29 0:51 / /run/a\\040b/mnt ro,relatime shared:4 - fuse.darter darter ro,user_id=0";

    #[test]
    fn mounts_are_found_by_their_place() {
        let mounted = parse_mount(LINE, Path::new("/run/a b/mnt")).unwrap();
        assert_eq!((mounted.connection, mounted.kind.as_str()), (51, "fuse.darter"));
        assert!(parse_mount(LINE, Path::new("/run/a b")).is_none());
        assert!(parse_mount(b"garbage", Path::new("/run")).is_none());
        assert!(mount_on(Path::new("/proc")).is_some_and(|found| found.kind == "proc"));
    }

    #[test]
    fn a_kernel_without_what_we_need_is_refused() {
        let offer = Init { major: 7, minor: 22, max_readahead: 0, flags: ASYNC_READ };
        assert!(accept(&offer).is_err());
        assert!(accept(&Init { flags: u64::MAX, ..offer }).unwrap().flags & !FLAGS == 0);
        assert!(accept(&Init { major: 8, flags: 0, ..offer }).is_ok());
    }
}
