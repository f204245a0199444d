//! The file system: look-up, attributes, directories, extended attributes and reads over merged trees of layers.
//!
//! The mount's root has one directory for each snapshot that is served lazily, named by its number in decimal; below it is
//! the merged tree ([`darter_layer::Tree`]) of that snapshot's layers. Nothing here knows FUSE: every operation is a plain
//! function that answers at once or says how to get the answer ([`Answer`]), and `crate::fuse` translates.
//!
//! Promises: what is below a tree that is ready never changes, so it may be cached for ever, names that don't exist
//! included. The directory of a snapshot can be looked up and has its inode number before any map is there; only what is
//! below waits, without holding a thread, and every wait has an end. A tree is merged when it is first needed, since of
//! an image's snapshots as a rule only the topmost is mounted.
//!
//! Non-goals: writing, and keeping count of what the kernel remembers. Inode numbers mean something by themselves
//! ([`numbers`]), so nothing has to be kept for a file that the kernel knows.

mod ahead;
mod answer;
mod attributes;
mod cache;
mod content;
mod dirs;
mod extents;
mod listing;
mod numbers;
mod operations;
mod read;
mod recovery;
mod shown;
mod stats;
mod trace;

use std::sync::{Arc, Weak};
use std::time::Duration;

use darter_layer::Tree;
use parking_lot::{Mutex, RwLock};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};

pub use answer::{Answer, FsError};
pub use attributes::{Attributes, Entry, Lifetime, Lookup};
pub use content::{ContentError, LayerContent};
pub use listing::{Listed, Listing};
pub use numbers::{DIR_MAX, Ino, MemoryNumbers, NUMBER_LIMIT, NumberKey, Numbers, ROOT_INO, tree_key};
pub use operations::Usage;
pub use read::Data;
pub use stats::{Operation, Stats};
pub use trace::TracedRead;

use cache::PieceCache;
use dirs::{Dir, Table};

/// Trees that are merged at the same time; others wait. Each may take [`Limits::tree_memory`], and a thread that can't be
/// called off.
const MERGES_MAX: usize = 2;

/// Bounds of the file system.
#[derive(Debug, Clone)]
pub struct Limits {
    /// How long a look-up waits for the maps of a tree before it fails with an I/O error.
    pub map_wait: Duration,
    /// How long a read waits for its pieces before it fails with an I/O error.
    pub read_wait: Duration,
    /// Decoded pieces kept in memory, since one piece serves several reads.
    pub cached_pieces: usize,
    /// Bytes that a merge of layers may take, about; what takes more is impossible. It also bounds the time.
    pub tree_memory: u64,
}

impl Default for Limits {
    fn default() -> Self {
        let wait = Duration::from_secs(300);
        Self { map_wait: wait, read_wait: wait, cached_pieces: 32, tree_memory: Tree::MEMORY_DEFAULT }
    }
}

/// What the kernel should forget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// The entry of that name in the directory `parent`.
    Entry { parent: u64, name: Vec<u8> },
    /// Attributes and contents of that inode.
    Inode { ino: u64 },
}

/// Where notices go. It must not wait: a notice that finds no room may be dropped.
pub type NoticeSink = Arc<dyn Fn(Notice) + Send + Sync>;

/// See the module's head.
pub struct FileSystem {
    numbers: Arc<dyn Numbers>,
    runtime: Handle,
    limits: Limits,
    table: RwLock<Table>,
    cache: Arc<PieceCache>,
    merges: Arc<Semaphore>,
    notices: Mutex<Vec<Weak<dyn Fn(Notice) + Send + Sync>>>,
    stats: Stats,
    /// Trees that the kernel may know from an earlier process and that aren't there yet.
    awaited: watch::Sender<usize>,
}

impl FileSystem {
    /// An empty file system. Maps and pieces are waited for on `runtime`.
    pub fn new(numbers: Arc<dyn Numbers>, runtime: Handle, limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            numbers,
            runtime,
            table: RwLock::default(),
            cache: PieceCache::new(limits.cached_pieces),
            merges: Arc::new(Semaphore::new(MERGES_MAX)),
            limits,
            notices: Mutex::default(),
            stats: Stats::default(),
            awaited: watch::Sender::new(0),
        })
    }

    /// Shows the merged tree of `layers`, lowest first, as `<mount>/<dir>`. Returns at once; replaces what was shown there.
    /// `dir` is at most [`DIR_MAX`]; more is refused by a panic, since it comes from our own counter.
    pub fn add(self: &Arc<Self>, dir: u32, layers: Vec<Arc<dyn LayerContent>>) {
        assert!(dir <= DIR_MAX, "the number of a directory is out of range");
        let replaced = self.table.write().insert(Arc::new(Dir::new(dir, layers)));
        self.changed(dir, replaced);
    }

    /// Takes `<mount>/<dir>` away. Who still holds files of it gets ESTALE for what the kernel hasn't cached, unless another
    /// directory shows the same layer.
    pub fn remove(&self, dir: u32) {
        let removed = self.table.write().remove(dir);
        self.changed(dir, removed);
    }

    /// Waits until the tree of `dir` is merged, however long that takes: the caller sets the bound, dropping is safe.
    /// Fails when it is found to be impossible, or when the directory isn't there (any more).
    pub async fn ready(self: &Arc<Self>, dir: u32) -> Result<Arc<Tree>, ContentError> {
        let gone = || ContentError::Impossible(format!("the directory {dir} is not shown"));
        let entry = self.table.read().dir(dir).ok_or_else(gone)?;
        self.start(&entry);
        let shown = entry.wait().await.map_err(|error| error.unwrap_or_else(gone))?;
        Ok(shown.tree().clone())
    }

    /// The tree of `dir` if it is merged already.
    pub fn tree_now(&self, dir: u32) -> Option<Arc<Tree>> {
        Some(self.table.read().dir(dir)?.now()?.tree().clone())
    }

    /// The runtime that waits on behalf of this file system.
    pub fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// How often each operation was asked for.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Sends what the kernel should forget to `sink` as well, until that is dropped.
    pub fn send_notices_to(&self, sink: &NoticeSink) {
        self.notices.lock().push(Arc::downgrade(sink));
    }

    /// Tells the kernel that the list of directories is another, and, if it knew `dir`, that that is gone.
    fn changed(&self, dir: u32, known: bool) {
        self.notify(Notice::Inode { ino: ROOT_INO });
        if known {
            self.notify(Notice::Entry { parent: ROOT_INO, name: dir.to_string().into_bytes() });
            self.notify(Notice::Inode { ino: Ino::Dir(dir).encode() });
        }
    }

    fn notify(&self, notice: Notice) {
        self.notices.lock().retain(|sink| {
            let sink = sink.upgrade();
            sink.inspect(|sink| sink(notice.clone())).is_some()
        });
    }
}
