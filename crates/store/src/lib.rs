//! Verified pieces and layer maps on disk.
//!
//! A root directory belongs to one [`Store`] at a time (`lock`). In it:
//!
//! - `packs/NNNNNN.pack`: pieces of all layers, appended one after the other; an index in memory says where each is;
//! - `maps/<diff ID>-v<format>.map`, `.tar`, `.access`: a layer's map with its proof, the section that only verification
//!   needs, and who may read it; each a file with a checksum, written under another name and renamed;
//! - `quarantine/<diff ID>-v<format>-<root>`: maps that lied, and how that was found.
//!
//! Promised: nothing is returned that does not have its BLAKE3 hash (pieces; one that is passed on as it rests has the sum
//! of bytes that had it) or checksum (maps), whatever happened to the disk; what is damaged is dropped, counted and reads as absent, so that it is fetched again. A killed process loses at
//! most the piece it was writing; a power failure may lose pieces of the last seconds, for pieces are not synced one by
//! one. What a [`Sweep`] finds unused is forgotten, and its space given back: holes are made in packs, and packs go in which
//! nothing is left. Not here: who may read, what a map means, and what to keep when space runs out.

mod error;
mod lock;
mod maps;
mod pack;
mod piece;
mod pieces;
mod room;
mod sections;
mod space;

pub use error::StoreError;
pub use lock::StoreLock;
pub use maps::StoredMap;
pub use piece::{Encoding, MAX_PIECE_LEN, PieceError, StoredPiece};
pub use pieces::{Fresh, Sweep, Swept};
pub use room::Room;
pub use space::{Limits, Space};

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bytes::Bytes;
use darter_types::{LayerTask, PieceHash, RootHash};

use maps::Maps;
use pieces::Pieces;

/// What can be set about a store.
#[derive(Debug, Clone)]
pub struct Options {
    /// A pack file is closed and a new one begun when the next piece would make it longer than this.
    pub pack_bytes_max: u64,
    /// Only the quota binds the store by itself; to keep the marks is its owner's part.
    pub limits: Limits,
}

impl Default for Options {
    fn default() -> Self {
        Self { pack_bytes_max: 256 << 20, limits: Limits::default() }
    }
}

/// What a store holds and what it has found wrong since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StoreStats {
    pub pieces: u64,
    /// Bytes of the pieces, as they rest.
    pub bytes: u64,
    /// Pieces and map files that did not have their hash, and were dropped.
    pub damaged: u64,
    /// Bytes of pieces that had to go.
    pub evicted: u64,
}

/// A store on one directory. All methods block on the disk; none waits for anything else.
pub struct Store {
    root: PathBuf,
    limits: Limits,
    pieces: Pieces,
    maps: Maps,
    _lock: StoreLock,
}

impl Store {
    /// Opens or creates the store below `root`, and finds what is in it by the headers of its packs.
    pub fn open(root: &Path, options: Options) -> Result<Self, StoreError> {
        Self::open_locked(StoreLock::take(root)?, options)
    }

    /// The same for whoever has locked it before.
    pub fn open_locked(lock: StoreLock, options: Options) -> Result<Self, StoreError> {
        let root = &lock.root;
        let pieces = Pieces::open(&root.join("packs"), options.pack_bytes_max, options.limits.quota)?;
        let maps = Maps::open(root)?;
        Ok(Self { root: root.clone(), limits: options.limits, pieces, maps, _lock: lock })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn has(&self, hash: &PieceHash) -> bool {
        self.pieces.has(hash)
    }

    /// The piece's plain bytes, checked. A damaged record is dropped: `None`.
    pub fn read(&self, hash: &PieceHash) -> Result<Option<Bytes>, StoreError> {
        Ok(self.pieces.read(hash))
    }

    /// The piece as it rests, checked all the same: a parent must not pass on what its disk has spoiled. Whoever gets it
    /// checks its hash.
    pub fn read_stored(&self, hash: &PieceHash) -> Result<Option<StoredPiece>, StoreError> {
        Ok(self.pieces.read_stored(hash))
    }

    /// Keeps a piece that the caller has checked against `hash`. Does nothing if it is there.
    pub fn put_stored(&self, hash: &PieceHash, piece: &StoredPiece) -> Result<(), StoreError> {
        self.pieces.put(hash, piece, true)
    }

    /// Keeps a piece that nobody has decoded yet: whoever reads it first checks it, as each does after a restart, and it is gone
    /// if it is another's. Does nothing if the piece is there.
    pub fn put_unchecked(&self, hash: &PieceHash, piece: &StoredPiece) -> Result<(), StoreError> {
        self.pieces.put(hash, piece, false)
    }

    /// Whether the piece, put unchecked, has turned out to be another's, as it came: its giver was wrong, not this disk. True once.
    pub fn was_wrong(&self, hash: &PieceHash) -> bool {
        self.pieces.was_wrong(hash)
    }

    /// Compresses and keeps a piece whose hash the caller has computed.
    pub fn put_plain(&self, hash: &PieceHash, plain: &[u8]) -> Result<StoredPiece, StoreError> {
        let piece = StoredPiece::encode(plain, piece::DEFAULT_LEVEL);
        self.pieces.put(hash, &piece, true)?;
        Ok(piece)
    }

    /// Compresses a piece again, at this level of zstd, and keeps that instead if it is smaller; whether it is. Slow.
    pub fn pack_anew(&self, hash: &PieceHash, level: i32) -> Result<bool, StoreError> {
        self.pieces.pack_anew(hash, level)
    }

    /// Keeps a map and what belongs to it; it is durable when this returns.
    pub fn put_map(&self, map: &StoredMap) -> Result<(), StoreError> {
        self.maps.put(map)
    }

    /// The map without its tar section ([`Store::tar`]). A damaged one is removed: `None`.
    pub fn map(&self, task: LayerTask) -> Result<Option<StoredMap>, StoreError> {
        self.maps.get(task)
    }

    /// Whether there is a map, without reading it: it may turn out to be damaged.
    pub fn has_map(&self, task: LayerTask) -> bool {
        self.maps.has(task)
    }

    /// The tasks whose maps are held.
    pub fn maps(&self) -> Vec<LayerTask> {
        self.maps.list()
    }

    pub fn remove_map(&self, task: LayerTask) -> Result<(), StoreError> {
        self.maps.remove(task)
    }

    /// The section that only verification needs, if it is held.
    pub fn tar(&self, task: LayerTask) -> Result<Option<Bytes>, StoreError> {
        self.maps.tar(task)
    }

    /// Whether that section is held, without reading it.
    pub fn has_tar(&self, task: LayerTask) -> bool {
        self.maps.has_tar(task)
    }

    pub fn set_tar(&self, task: LayerTask, tar: &[u8]) -> Result<(), StoreError> {
        self.maps.set_tar(task, tar)
    }

    pub fn set_access(&self, task: LayerTask, access: &[u8]) -> Result<(), StoreError> {
        self.maps.set_access(task, access)
    }

    /// What starts have read of the layer first, if that was noted.
    pub fn start(&self, task: LayerTask) -> Result<Option<Bytes>, StoreError> {
        self.maps.start(task)
    }

    pub fn set_start(&self, task: LayerTask, start: &[u8]) -> Result<(), StoreError> {
        self.maps.set_start(task, start)
    }

    /// Removes a map that lied and remembers its root hash, so that it is not taken again.
    pub fn quarantine(&self, task: LayerTask, root: RootHash, reason: &str) -> Result<(), StoreError> {
        self.maps.quarantine(task, root, reason)
    }

    /// Why the map with this root hash may not be used, if it may not.
    pub fn quarantined(&self, task: LayerTask, root: RootHash) -> Option<String> {
        self.maps.quarantined(task, root)
    }

    /// When the layer was last used, to a minute or so; `None` if there is no map.
    pub fn last_used(&self, task: LayerTask) -> Option<SystemTime> {
        self.maps.last_used(task)
    }

    pub fn set_last_used(&self, task: LayerTask, at: SystemTime) {
        self.maps.set_last_used(task, at);
    }

    /// From now on pieces that are put or claimed survive every sweep, until this is dropped: for a layer whose map comes
    /// last.
    pub fn fresh(&self) -> Fresh<'_> {
        self.pieces.fresh()
    }

    /// Whether the piece is there. If so, it counts as put now.
    pub fn claim(&self, hash: &PieceHash) -> bool {
        self.pieces.claim(hash)
    }

    /// Begins to throw away what nobody needs. Waits for another sweep to end.
    pub fn sweep(&self) -> Sweep<'_> {
        self.pieces.sweep()
    }

    /// Bytes of these pieces, as far as they are held.
    pub fn held_bytes<'a>(&self, hashes: impl Iterator<Item = &'a PieceHash>) -> u64 {
        self.pieces.held_bytes(hashes)
    }

    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// How full it is now.
    pub fn space(&self) -> Result<Space, StoreError> {
        Space::of(&self.root, self.pieces.bytes())
    }

    pub fn stats(&self) -> StoreStats {
        let pieces = self.pieces.stats();
        StoreStats { damaged: pieces.damaged + self.maps.damaged(), ..pieces }
    }
}

fn create_dir(dir: &Path) -> Result<(), StoreError> {
    let make = || {
        fs::create_dir_all(dir)?;
        // Others could read the files of private images there.
        fs::set_permissions(dir, Permissions::from_mode(0o700))
    };
    make().map_err(|error| StoreError::write(dir, error, 4096))
}

#[cfg(test)]
mod tests;
