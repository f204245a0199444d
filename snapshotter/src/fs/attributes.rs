//! Attributes of a file, and how long they may be believed.

/// How long the kernel may keep what it was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// It never changes.
    Forever,
    /// It can be different the next time.
    None,
}

/// What `stat` shows. Times are seconds and nanoseconds since the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    pub ino: u64,
    /// File type and permissions, as `st_mode` has them.
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub size: u64,
    /// In units of 512 bytes.
    pub blocks: u64,
    pub atime: (i64, u32),
    pub mtime: (i64, u32),
    pub ctime: (i64, u32),
}

/// A file that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub attributes: Attributes,
    pub lifetime: Lifetime,
}

/// The answer to a look-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lookup {
    Found(Entry),
    /// There is no such name, and that may be remembered so long.
    Absent(Lifetime),
}

const DIRECTORY: u32 = 0o040000;

impl Attributes {
    /// A directory of which nothing is known yet but that it will be there.
    pub(super) fn directory(ino: u64, permissions: u32, nlink: u32) -> Self {
        let epoch = (0, 0);
        Self {
            ino,
            mode: DIRECTORY | permissions,
            nlink,
            uid: 0,
            gid: 0,
            rdev: 0,
            size: 4096,
            blocks: 8,
            atime: epoch,
            mtime: epoch,
            ctime: epoch,
        }
    }
}
