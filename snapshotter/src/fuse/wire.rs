//! FUSE's messages as bytes: requests are taken apart, answers and notifications put together.
//!
//! The layouts are those of the kernel's `include/uapi/linux/fuse.h`, protocol 7.40, in the machine's byte order. Nothing
//! here does I/O, and a message that is too short is an error, never a panic.

use crate::fs::{Attributes, Entry, Lifetime, Listed, Usage};

/// What precedes every request (`struct fuse_in_header`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) opcode: u32,
    pub(super) unique: u64,
    pub(super) node: u64,
    /// The thread that asks; 0 for the kernel itself, or for one that this process can't see.
    pub(super) thread: u32,
}

/// What the kernel asks, as far as we know it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request<'a> {
    Lookup {
        name: &'a [u8],
    },
    Forget,
    Attributes,
    Readlink,
    Open,
    Read {
        offset: u64,
        size: u32,
    },
    StatFs,
    GetXattr {
        name: &'a [u8],
        size: u32,
    },
    ListXattr {
        size: u32,
    },
    OpenDir,
    ReadDir {
        offset: u64,
        size: u32,
    },
    ReadDirPlus {
        offset: u64,
        size: u32,
    },
    Seek,
    Init(Init),
    Interrupt {
        unique: u64,
    },
    Destroy,
    /// It would change something.
    Write,
    Other,
}

/// What the kernel offers (`struct fuse_init_in`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Init {
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) max_readahead: u32,
    /// With those that newer kernels have in a second field.
    pub(super) flags: u64,
}

/// A request that is shorter than it says, or lacks a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a request from the kernel is too short")]
pub(super) struct Short;

const IN_HEADER: usize = 40;

/// The fields of a message, one after the other.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], Short> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(Short)?;
        self.0 = rest;
        Ok(*head)
    }

    fn u32(&mut self) -> Result<u32, Short> {
        self.bytes().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Result<u64, Short> {
        self.bytes().map(u64::from_ne_bytes)
    }

    /// A name, without the NUL byte that ends it.
    fn name(&mut self) -> Result<&'a [u8], Short> {
        let end = self.0.iter().position(|byte| *byte == 0).ok_or(Short)?;
        let (name, rest) = self.0.split_at(end);
        self.0 = &rest[1..];
        Ok(name)
    }
}

/// Takes a request apart.
pub(super) fn decode(message: &[u8]) -> Result<(Header, Request<'_>), Short> {
    let mut fields = Fields(message);
    let (length, opcode) = (fields.u32()?, fields.u32()?);
    let (unique, node) = (fields.u64()?, fields.u64()?);
    let (_user, _group, thread) = (fields.u32()?, fields.u32()?, fields.u32()?);
    let header = Header { opcode, unique, node, thread };
    let body = message.get(IN_HEADER..length as usize).ok_or(Short)?;
    Ok((header, body_of(opcode, Fields(body))?))
}

fn body_of(opcode: u32, mut fields: Fields<'_>) -> Result<Request<'_>, Short> {
    Ok(match opcode {
        1 => Request::Lookup { name: fields.name()? },
        2 | 42 => Request::Forget,
        3 => Request::Attributes,
        5 => Request::Readlink,
        14 => Request::Open,
        15 => with_range(fields, |offset, size| Request::Read { offset, size })?,
        17 => Request::StatFs,
        22 => {
            let size = fields.u32()?;
            fields.u32()?;
            Request::GetXattr { name: fields.name()?, size }
        }
        23 => Request::ListXattr { size: fields.u32()? },
        26 => Request::Init(Init {
            major: fields.u32()?,
            minor: fields.u32()?,
            max_readahead: fields.u32()?,
            flags: u64::from(fields.u32()?) | u64::from(fields.u32().unwrap_or(0)) << 32,
        }),
        27 => Request::OpenDir,
        28 => with_range(fields, |offset, size| Request::ReadDir { offset, size })?,
        36 => Request::Interrupt { unique: fields.u64()? },
        38 => Request::Destroy,
        44 => with_range(fields, |offset, size| Request::ReadDirPlus { offset, size })?,
        46 => Request::Seek,
        // SETATTR, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, WRITE, SETXATTR, REMOVEXATTR, CREATE, FALLOCATE,
        // RENAME2, COPY_FILE_RANGE, TMPFILE.
        4 | 6 | 8..=13 | 16 | 21 | 24 | 35 | 43 | 45 | 47 | 51 => Request::Write,
        _ => Request::Other,
    })
}

/// `struct fuse_read_in`: the file handle, which is always 0 here, then offset and size.
fn with_range<'a>(
    mut fields: Fields<'_>,
    make: impl FnOnce(u64, u32) -> Request<'a>,
) -> Result<Request<'a>, Short> {
    fields.u64()?;
    Ok(make(fields.u64()?, fields.u32()?))
}

/// A message that is put together, field by field.
#[derive(Default)]
pub(super) struct Message(Vec<u8>);

impl Message {
    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn zeros(&mut self, count: usize) -> &mut Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.0)
    }
}

/// What precedes every answer (`struct fuse_out_header`); `errno` is positive, 0 for success.
pub(super) fn out_header(unique: u64, errno: i32, body: usize) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&(body as u32 + 16).to_ne_bytes());
    header[4..8].copy_from_slice(&(-errno).to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    header
}

/// Ten years: for the kernel's caches that is for ever, and it overflows nowhere.
const FOREVER_S: u64 = 10 * 365 * 24 * 3600;
const BLOCK_SIZE: u32 = 4096;

fn seconds(lifetime: Lifetime) -> u64 {
    match lifetime {
        Lifetime::Forever => FOREVER_S,
        Lifetime::None => 0,
    }
}

/// `struct fuse_attr`.
fn put_attr(message: &mut Message, attributes: &Attributes) {
    let Attributes { ino, size, blocks, atime, mtime, ctime, mode, nlink, uid, gid, rdev } = *attributes;
    message.u64(ino).u64(size).u64(blocks);
    message.u64(atime.0 as u64).u64(mtime.0 as u64).u64(ctime.0 as u64);
    message.u32(atime.1).u32(mtime.1).u32(ctime.1);
    message.u32(mode).u32(nlink).u32(uid).u32(gid).u32(rdev).u32(BLOCK_SIZE).u32(0);
}

/// `struct fuse_entry_out`. The generation is always 0: an inode number is never used again for another file.
fn put_entry(message: &mut Message, entry: &Entry) {
    let valid = seconds(entry.lifetime);
    message.u64(entry.attributes.ino).u64(0).u64(valid).u64(valid).u32(0).u32(0);
    put_attr(message, &entry.attributes);
}

/// The length of `struct fuse_entry_out`.
const ENTRY_OUT: usize = 128;

pub(super) fn entry(entry: &Entry) -> Vec<u8> {
    let mut message = Message::default();
    put_entry(&mut message, entry);
    message.take()
}

/// "There is no such name", to be remembered: an entry without a node.
pub(super) fn absent(lifetime: Lifetime) -> Vec<u8> {
    let mut message = Message::default();
    message.u64(0).u64(0).u64(seconds(lifetime)).zeros(ENTRY_OUT - 24);
    message.take()
}

/// `struct fuse_attr_out`.
pub(super) fn attributes(entry: &Entry) -> Vec<u8> {
    let mut message = Message::default();
    message.u64(seconds(entry.lifetime)).u32(0).u32(0);
    put_attr(&mut message, &entry.attributes);
    message.take()
}

/// `struct fuse_statfs_out`: all space is used, since nothing can be written.
pub(super) fn stat_fs(usage: Usage) -> Vec<u8> {
    const NAME_MAX: u32 = 255;
    let mut message = Message::default();
    message.u64(usage.blocks.div_ceil(u64::from(BLOCK_SIZE / 512))).u64(0).u64(0).u64(usage.files).u64(0);
    message.u32(BLOCK_SIZE).u32(NAME_MAX).u32(BLOCK_SIZE).u32(0).zeros(24);
    message.take()
}

/// `struct fuse_getxattr_out`: how much room an attribute needs.
pub(super) fn xattr_size(size: u32) -> Vec<u8> {
    let mut message = Message::default();
    message.u32(size).u32(0);
    message.take()
}

/// The names in a directory, up to the size that the kernel asked for.
pub(super) struct Names {
    message: Message,
    room: usize,
    plus: bool,
}

impl Names {
    /// With `plus`, each name brings what a look-up of it would say.
    pub(super) fn new(size: u32, plus: bool) -> Self {
        Self { message: Message::default(), room: size as usize, plus }
    }

    /// False if there was no room left for it.
    pub(super) fn push(&mut self, listed: &Listed<'_>) -> bool {
        let length = 24 + listed.name.len();
        let padded = length.next_multiple_of(8);
        let needed = padded + if self.plus { ENTRY_OUT } else { 0 };
        if self.message.0.len() + needed > self.room {
            return false;
        }
        if self.plus {
            // `.` and `..` stay without a node: the kernel knows them already.
            match listed.name {
                b"." | b".." => {
                    self.message.zeros(ENTRY_OUT);
                }
                _ => put_entry(&mut self.message, &listed.entry),
            }
        }
        let attributes = &listed.entry.attributes;
        self.message.u64(attributes.ino).u64(listed.next).u32(listed.name.len() as u32);
        self.message.u32(attributes.mode >> 12 & 0xf).bytes(listed.name).zeros(padded - length);
        true
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        self.message.take()
    }
}

/// What we answer to the kernel's offer (`struct fuse_init_out`).
#[derive(Debug, Clone, Copy)]
pub(super) struct InitAnswer {
    pub(super) max_readahead: u32,
    pub(super) flags: u64,
    pub(super) max_background: u16,
    pub(super) congestion_threshold: u16,
    pub(super) max_write: u32,
    pub(super) max_pages: u16,
}

pub(super) const MAJOR: u32 = 7;
pub(super) const MINOR: u32 = 40;

pub(super) fn init(answer: &InitAnswer) -> Vec<u8> {
    let mut message = Message::default();
    message.u32(MAJOR).u32(MINOR).u32(answer.max_readahead).u32(answer.flags as u32);
    message.bytes(&answer.max_background.to_ne_bytes()).bytes(&answer.congestion_threshold.to_ne_bytes());
    // Times have a granularity of one nanosecond.
    message.u32(answer.max_write).u32(1).bytes(&answer.max_pages.to_ne_bytes()).zeros(2);
    message.u32((answer.flags >> 32) as u32).zeros(28);
    message.take()
}

/// Has the kernel forget the attributes of an inode and all pages of it.
pub(super) fn forget_inode(ino: u64) -> Vec<u8> {
    const FUSE_NOTIFY_INVAL_INODE: i32 = 2;
    notification(FUSE_NOTIFY_INVAL_INODE, |message| {
        message.u64(ino).u64(0).u64(0);
    })
}

/// Has the kernel forget a name and what is below it.
pub(super) fn forget_entry(parent: u64, name: &[u8]) -> Vec<u8> {
    const FUSE_NOTIFY_INVAL_ENTRY: i32 = 3;
    notification(FUSE_NOTIFY_INVAL_ENTRY, |message| {
        message.u64(parent).u32(name.len() as u32).u32(0).bytes(name).zeros(1);
    })
}

/// Has the kernel send once more what was read and not answered, with the top bit of its unique number set. Since 6.9.
pub(super) fn resend() -> Vec<u8> {
    const FUSE_NOTIFY_RESEND: i32 = 7;
    notification(FUSE_NOTIFY_RESEND, |_| ())
}

/// A notification is an answer to nobody, with its kind where an answer has the error.
fn notification(kind: i32, body: impl FnOnce(&mut Message)) -> Vec<u8> {
    let mut message = Message::default();
    body(&mut message);
    let mut whole = out_header(0, -kind, message.0.len()).to_vec();
    whole.append(&mut message.0);
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, body: &[u8]) -> Vec<u8> {
        let mut message = Message::default();
        message.u32((IN_HEADER + body.len()) as u32).u32(opcode).u64(6).u64(1);
        message.u32(0).u32(0).u32(77).u32(0).bytes(body);
        message.take()
    }

    fn sample() -> Entry {
        let time = (1_700_000_000, 5);
        let attributes = Attributes {
            ino: 1 << 32 | 2,
            mode: 0o100644,
            nlink: 1,
            uid: 2,
            gid: 3,
            rdev: 0,
            size: 10,
            blocks: 8,
            atime: time,
            mtime: time,
            ctime: time,
        };
        Entry { attributes, lifetime: Lifetime::Forever }
    }

    #[test]
    fn structures_have_the_kernels_lengths() {
        assert_eq!(entry(&sample()).len(), 128);
        assert_eq!(absent(Lifetime::Forever).len(), 128);
        assert_eq!(attributes(&sample()).len(), 104);
        assert_eq!(stat_fs(Usage::default()).len(), 80);
        let answer = InitAnswer {
            max_readahead: 0,
            flags: 0,
            max_background: 0,
            congestion_threshold: 0,
            max_write: 0,
            max_pages: 0,
        };
        assert_eq!(init(&answer).len(), 64);
        assert_eq!(forget_inode(1).len(), 40);
        assert_eq!(resend()[..8], [16, 0, 0, 0, 7, 0, 0, 0]);
        assert_eq!(forget_entry(1, b"ab").len(), 16 + 16 + 3);
    }

    #[test]
    fn look_up_carries_a_name() {
        let message = request(1, b"etc\0");
        let (header, request) = decode(&message).unwrap();
        assert_eq!(header, Header { opcode: 1, unique: 6, node: 1, thread: 77 });
        assert_eq!(request, Request::Lookup { name: b"etc" });
    }

    #[test]
    fn read_carries_offset_and_size() {
        let mut body = Message::default();
        body.u64(0).u64(4096).u32(8192).u32(0).u64(0).u32(0).u32(0);
        let message = request(15, &body.take());
        assert_eq!(decode(&message).unwrap().1, Request::Read { offset: 4096, size: 8192 });
    }

    #[test]
    fn short_messages_are_errors() {
        let whole = request(15, &[0; 40]);
        for length in 0..whole.len() {
            assert_eq!(decode(&whole[..length]), Err(Short), "{length}");
        }
        assert_eq!(decode(&request(1, b"no end")), Err(Short));
        for opcode in 0..64 {
            let _ = decode(&request(opcode, b""));
        }
    }

    #[test]
    fn what_changes_something_is_known() {
        for opcode in [4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45, 47, 51] {
            assert_eq!(decode(&request(opcode, &[0; 64])).unwrap().1, Request::Write, "{opcode}");
        }
    }

    #[test]
    fn names_stop_where_the_room_ends() {
        let mut names = Names::new(64, false);
        let listed = Listed { name: b"a", entry: sample(), next: 3 };
        assert!(names.push(&listed) && names.push(&listed));
        assert!(!names.push(&listed));
        assert_eq!(names.finish().len(), 64);
        let mut names = Names::new(160, true);
        assert!(names.push(&listed));
        assert!(!names.push(&listed));
    }
}
