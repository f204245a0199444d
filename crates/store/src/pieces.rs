//! The pieces of all layers: pack files, and an index in memory that is rebuilt from their headers.

mod anew;
mod sweep;

pub use sweep::{Fresh, Sweep, Swept};

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::thread;

use bytes::Bytes;
use darter_types::PieceHash;
use parking_lot::{Mutex, RwLock};

use crate::StoreStats;
use crate::error::StoreError;
use crate::pack::{HEADER_LEN, Header, punch, scan};
use crate::piece::{Encoding, MAX_PIECE_LEN, PieceError, StoredPiece};
use crate::room::Room;
use crate::space::{Limits, Space};

#[derive(Debug, Clone, Copy)]
struct Location {
    pack: u32,
    encoding: Encoding,
    plain_len: u32,
    stored_len: u32,
    /// Of the record's header.
    offset: u64,
    /// Of the stored bytes, as this process has put them or found them to be the piece.
    sum: Option<Sum>,
    /// Whether they were ever decoded by this process, and are the piece.
    checked: bool,
    /// When it was put or claimed, by [`Pieces::clock`].
    since: u32,
    /// Whether the sweep that goes on has found somebody who needs it.
    kept: bool,
}

type Index = HashMap<PieceHash, Location>;

/// Packs whose headers are read at the same time when the store is opened. Each header is a read of its own, of a place that
/// nobody can foresee, and a disk answers several as fast as one.
const LOADS_MAX: usize = 8;

/// Wrong pieces that are remembered until somebody asks; with one more all are forgotten.
const WRONG_MAX: usize = 1024;

/// The first bytes of a BLAKE3 hash: enough to notice what a disk spoils.
type Sum = [u8; 8];

fn sum(stored: &[u8]) -> Sum {
    let hash = blake3::hash(stored);
    *hash.as_bytes().first_chunk().expect("a hash has more than 8 bytes")
}

impl Location {
    fn is_same_record(&self, other: &Location) -> bool {
        (self.pack, self.offset) == (other.pack, other.offset)
    }

    /// Bytes of the record.
    fn len(&self) -> u64 {
        HEADER_LEN as u64 + u64::from(self.stored_len)
    }
}

/// The pack that is appended to.
struct Active {
    number: u32,
    end: u64,
}

pub(crate) struct Pieces {
    dir: PathBuf,
    pack_bytes_max: u64,
    /// The most bytes that are held.
    quota: Option<u64>,
    index: RwLock<Index>,
    packs: RwLock<HashMap<u32, Arc<File>>>,
    active: Mutex<Active>,
    /// Of the records that are held.
    bytes: AtomicU64,
    damaged: AtomicU64,
    /// Bytes that were evicted.
    evicted: AtomicU64,
    /// Counts up with each [`Fresh`].
    clock: AtomicU32,
    /// When those that live began.
    fresh: Mutex<BTreeSet<u32>>,
    /// Held by the sweep that goes on.
    sweeping: Mutex<()>,
    /// What was put unchecked, and was another piece.
    wrong: Mutex<HashSet<PieceHash>>,
}

impl Pieces {
    pub(crate) fn open(dir: &Path, pack_bytes_max: u64, quota: Option<u64>) -> Result<Self, StoreError> {
        crate::create_dir(dir)?;
        let index = Mutex::default();
        let mut packs = HashMap::new();
        let mut active = Active { number: 0, end: 0 };
        for (number, file, end) in load_all(dir, &pack_numbers(dir)?, &index)? {
            packs.insert(number, Arc::new(file));
            active = Active { number, end };
        }
        let index = index.into_inner();
        if packs.is_empty() {
            packs.insert(0, Arc::new(open_pack(&pack_path(dir, 0))?));
        }
        let bytes = index.values().map(Location::len).sum();
        let pieces = Self {
            dir: dir.to_owned(),
            pack_bytes_max,
            quota,
            index: RwLock::new(index),
            packs: RwLock::new(packs),
            active: Mutex::new(active),
            bytes: AtomicU64::new(bytes),
            damaged: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
            clock: AtomicU32::new(0),
            fresh: Mutex::default(),
            sweeping: Mutex::default(),
            wrong: Mutex::default(),
        };
        pieces.remove_empty_packs();
        Ok(pieces)
    }

    pub(crate) fn has(&self, hash: &PieceHash) -> bool {
        self.index.read().contains_key(hash)
    }

    /// The piece's plain bytes; what fails the check, or can't be read, is dropped.
    pub(crate) fn read(&self, hash: &PieceHash) -> Option<Bytes> {
        self.checked(hash, |location| {
            let piece = self.load(location)?;
            piece.decode(hash).map_err(|error| self.refused(hash, location, &piece, error))
        })
    }

    /// The bytes are not the piece. If the disk has kept them as they were put, whoever gave them is to blame.
    fn refused(
        &self,
        hash: &PieceHash,
        location: Location,
        piece: &StoredPiece,
        error: PieceError,
    ) -> io::Error {
        if !location.checked && location.sum == Some(sum(&piece.bytes)) {
            let mut wrong = self.wrong.lock();
            if wrong.len() >= WRONG_MAX {
                wrong.clear();
            }
            wrong.insert(*hash);
        }
        invalid(error)
    }

    /// Whether the piece was put unchecked and found to be another's since this was last asked.
    pub(crate) fn was_wrong(&self, hash: &PieceHash) -> bool {
        self.wrong.lock().remove(hash)
    }

    /// The piece as it rests, checked too: by a sum where this process has put or checked it before, which costs a fraction
    /// of decoding it, and else like [`Self::read`].
    pub(crate) fn read_stored(&self, hash: &PieceHash) -> Option<StoredPiece> {
        self.checked(hash, |location| {
            self.load(location).and_then(|piece| self.check_stored(hash, location, piece))
        })
    }

    /// What `read` makes of the piece's record; one that it finds damaged is dropped.
    fn checked<T>(&self, hash: &PieceHash, read: impl Fn(Location) -> io::Result<T>) -> Option<T> {
        let location = *self.index.read().get(hash)?;
        let found = read(location);
        let now = self.index.read().get(hash).copied();
        match now.filter(|now| found.is_err() && !now.is_same_record(&location)) {
            // It was packed anew while it was read.
            Some(now) => self.unless_damaged(hash, now, read(now)),
            None => self.unless_damaged(hash, location, found),
        }
    }

    fn check_stored(
        &self,
        hash: &PieceHash,
        location: Location,
        piece: StoredPiece,
    ) -> io::Result<StoredPiece> {
        let found = sum(&piece.bytes);
        if location.sum.is_some_and(|known| known != found) {
            return Err(invalid(PieceError::Hash));
        }
        if !location.checked {
            piece.decode(hash).map_err(|error| self.refused(hash, location, &piece, error))?;
            let mut index = self.index.write();
            if let Some(indexed) = index.get_mut(hash).filter(|other| other.is_same_record(&location)) {
                (indexed.sum, indexed.checked) = (Some(found), true);
            }
        }
        Ok(piece)
    }

    fn load(&self, location: Location) -> io::Result<StoredPiece> {
        let Location { pack, encoding, plain_len, stored_len, offset, .. } = location;
        let file = self.pack(pack).ok_or(io::ErrorKind::NotFound)?;
        let mut bytes = Room::for_len(stored_len as usize);
        bytes.resize(stored_len as usize, 0);
        file.read_exact_at(&mut bytes, offset + HEADER_LEN as u64)?;
        Ok(StoredPiece { encoding, plain_len, bytes: bytes.freeze() })
    }

    fn unless_damaged<T>(&self, hash: &PieceHash, location: Location, read: io::Result<T>) -> Option<T> {
        read.inspect_err(|error| self.drop_damaged(hash, location, error)).ok()
    }

    fn pack(&self, number: u32) -> Option<Arc<File>> {
        self.packs.read().get(&number).cloned()
    }

    /// Forgets a record, now and for the next scan. One that isn't the piece's any more was evicted while it was read.
    fn drop_damaged(&self, hash: &PieceHash, location: Location, error: &io::Error) {
        let mut index = self.index.write();
        if !index.get(hash).is_some_and(|other| other.is_same_record(&location)) {
            return;
        }
        index.remove(hash);
        drop(index);
        tracing::warn!(piece = %hash, %error, "a stored piece is damaged and will be fetched again");
        self.damaged.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_sub(location.len(), Ordering::Relaxed);
        self.erase(hash, location, location.stored_len);
    }

    /// `is_checked`: the bytes are known to be the piece. False if it is there already.
    pub(crate) fn put(
        &self,
        hash: &PieceHash,
        piece: &StoredPiece,
        is_checked: bool,
    ) -> Result<bool, StoreError> {
        let len = piece.bytes.len().max(piece.plain_len as usize);
        if len > MAX_PIECE_LEN {
            return Err(StoreError::TooLong { len, max: MAX_PIECE_LEN });
        }
        if self.has(hash) {
            return Ok(false);
        }
        let header = Header::of(hash, piece);
        let (sum, checked) = (Some(sum(&piece.bytes)), is_checked);
        let mut active = self.active.lock();
        // Two that downloaded the same piece must not both append it.
        if self.has(hash) {
            return Ok(false);
        }
        let (pack, offset) = self.append(&mut active, &header.encode(), &piece.bytes)?;
        let Header { encoding, plain_len, stored_len, .. } = header;
        let since = self.clock.load(Ordering::Relaxed);
        let kept = true;
        let location = Location { pack, encoding, plain_len, stored_len, offset, sum, checked, since, kept };
        self.index.write().insert(*hash, location);
        Ok(true)
    }

    /// Fails if so many bytes more would be more than the quota, or than what pieces may take of the disk.
    fn check_room(&self, len: u64) -> Result<(), StoreError> {
        let limits = Limits { quota: self.quota, ..Limits::default() };
        let space = Space::of(&self.dir, self.bytes.load(Ordering::Relaxed))?;
        match limits.missing(&space, len) {
            0 => Ok(()),
            missing => Err(StoreError::Full { dir: self.dir.clone(), needed: len, missing }),
        }
    }

    fn append(&self, active: &mut Active, header: &[u8], stored: &[u8]) -> Result<(u32, u64), StoreError> {
        let len = (header.len() + stored.len()) as u64;
        // With the pack locked, so that several who write at once keep the quota together.
        self.check_room(len)?;
        if active.end > 0 && active.end + len > self.pack_bytes_max {
            let number = active.number + 1;
            let file = open_pack(&pack_path(&self.dir, number))?;
            self.packs.write().insert(number, Arc::new(file));
            *active = Active { number, end: 0 };
        }
        let file = self.pack(active.number).expect("the active pack is open");
        // A header without all of its bytes is no record: the scan looks at the pack's length.
        let written = file
            .write_all_at(header, active.end)
            .and_then(|()| file.write_all_at(stored, active.end + header.len() as u64));
        if let Err(error) = written {
            // Half a record on a full disk would only take space.
            let _ = file.set_len(active.end);
            return Err(StoreError::write(&pack_path(&self.dir, active.number), error, len));
        }
        let offset = active.end;
        active.end += len;
        self.bytes.fetch_add(len, Ordering::Relaxed);
        Ok((active.number, offset))
    }

    /// Bytes that are held.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn stats(&self) -> StoreStats {
        StoreStats {
            pieces: self.index.read().len() as u64,
            bytes: self.bytes(),
            damaged: self.damaged.load(Ordering::Relaxed),
            evicted: self.evicted.load(Ordering::Relaxed),
        }
    }
}

fn invalid(error: PieceError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

fn pack_path(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("{number:06}.pack"))
}

fn open_pack(path: &Path) -> Result<File, StoreError> {
    let file = File::options().create(true).truncate(false).read(true).write(true).open(path);
    // A new name may take a block of its folder.
    file.map_err(|error| StoreError::write(path, error, 4096))
}

fn pack_numbers(dir: &Path) -> Result<Vec<u32>, StoreError> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir).map_err(|error| StoreError::io(dir, error))? {
        let entry = entry.map_err(|error| StoreError::io(dir, error))?;
        let name = entry.file_name();
        let number: Option<u32> =
            name.to_str().and_then(|name| name.strip_suffix(".pack")).and_then(|n| n.parse().ok());
        numbers.extend(number);
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Fills the index from all packs; gives each with its number and length, in the order of the numbers.
fn load_all(dir: &Path, numbers: &[u32], index: &Mutex<Index>) -> Result<Vec<(u32, File, u64)>, StoreError> {
    let next = AtomicUsize::new(0);
    let some = || {
        let mut loaded = Vec::new();
        while let Some(number) = numbers.get(next.fetch_add(1, Ordering::Relaxed)) {
            let path = pack_path(dir, *number);
            let file = open_pack(&path)?;
            let end = load(&file, *number, index).map_err(|error| StoreError::io(&path, error))?;
            loaded.push((*number, file, end));
        }
        Ok::<_, StoreError>(loaded)
    };
    let loaded: Result<Vec<_>, StoreError> = thread::scope(|scope| {
        let threads: Vec<_> = (0..LOADS_MAX.min(numbers.len())).map(|_| scope.spawn(some)).collect();
        threads.into_iter().map(|thread| thread.join().expect("loading does not panic")).collect()
    });
    let mut loaded: Vec<_> = loaded?.into_iter().flatten().collect();
    loaded.sort_unstable_by_key(|(number, ..)| *number);
    Ok(loaded)
}

/// Of two records of a piece the one in the later pack counts, or the later one in a pack.
fn enter(index: &Mutex<Index>, hash: PieceHash, location: Location) {
    let mut index = index.lock();
    let known = index.entry(hash).or_insert(location);
    if (known.pack, known.offset) < (location.pack, location.offset) {
        *known = location;
    }
}

/// Fills the index from one pack, cuts off what a killed process left half-written, and returns the pack's length.
fn load(file: &File, pack: u32, index: &Mutex<Index>) -> io::Result<u64> {
    let end = scan(file, &mut |header, offset| {
        if header.dropped {
            // Whoever dropped it may have been killed before it came so far.
            punch(file, offset, header.stored_len);
            return;
        }
        let Header { encoding, plain_len, stored_len, hash, .. } = header;
        let (sum, checked, since, kept) = (None, false, 0, false);
        let location = Location { pack, encoding, plain_len, stored_len, offset, sum, checked, since, kept };
        enter(index, hash, location);
    })?;
    if end < file.metadata()?.len() {
        file.set_len(end)?;
    }
    Ok(end)
}
