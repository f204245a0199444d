//! The file system without a kernel: waits that end, and what only an export or a race would ask.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use darter_layer::LayerMap;
use darter_snapshotter::fs::{
    Answer, ContentError, FileSystem, FsError, LayerContent, Lifetime, Limits, Lookup, MemoryNumbers,
    ROOT_INO,
};
use darter_types::PieceIndex;

use crate::archive::{Archive, OPEN, PLAIN};
use crate::server::Pieces;

type Failure = Option<ContentError>;

/// A layer that fails so many times before it works; or never answers.
struct Moody {
    map: Arc<LayerMap>,
    pieces: Vec<Bytes>,
    map_fails: (usize, Failure),
    piece_fails: (usize, Failure),
    asked: AtomicUsize,
    /// Whether its pieces are in memory.
    decoded: AtomicBool,
}

impl Moody {
    fn new(tar: &[u8]) -> Self {
        let mut pieces = Pieces::default();
        let made = darter_layer::make(tar, &mut pieces).unwrap();
        let (map_fails, piece_fails) = ((0, None), (0, None));
        let (asked, decoded) = (AtomicUsize::new(0), AtomicBool::new(false));
        Self { map: Arc::new(made.map), pieces: pieces.0, map_fails, piece_fails, asked, decoded }
    }

    async fn mood(&self, fails: &(usize, Failure)) -> Result<(), ContentError> {
        if self.asked.fetch_add(1, Ordering::Relaxed) >= fails.0 {
            return Ok(());
        }
        match &fails.1 {
            Some(error) => Err(error.clone()),
            None => std::future::pending().await,
        }
    }
}

#[async_trait]
impl LayerContent for Moody {
    fn map_now(&self) -> Option<Arc<LayerMap>> {
        None
    }

    async fn map(&self) -> Result<Arc<LayerMap>, ContentError> {
        self.mood(&self.map_fails).await?;
        Ok(self.map.clone())
    }

    fn read_local(&self, _piece: PieceIndex) -> Option<Bytes> {
        None
    }

    fn in_memory(&self, piece: PieceIndex) -> Option<Bytes> {
        self.decoded.load(Ordering::Relaxed).then(|| self.pieces[piece.0 as usize].clone())
    }

    async fn read(&self, piece: PieceIndex) -> Result<Bytes, ContentError> {
        self.mood(&self.piece_fails).await?;
        Ok(self.pieces[piece.0 as usize].clone())
    }

    fn want(&self, _first: PieceIndex, _count: u32) {}
}

const DIR: u32 = 7;
const DIR_INO: u64 = 1007;

fn small() -> Vec<u8> {
    Archive::default().directory("etc", OPEN).file("etc/hosts", PLAIN, b"content").finish()
}

fn file_system(layer: Moody) -> Arc<FileSystem> {
    let bound = Duration::from_millis(50);
    let limits = Limits { map_wait: bound, read_wait: bound, ..Limits::default() };
    let runtime = tokio::runtime::Handle::current();
    let fs = FileSystem::new(Arc::new(MemoryNumbers::default()), runtime, limits);
    fs.add(DIR, vec![Arc::new(layer)]);
    fs
}

async fn settle<T: Send + 'static>(mut answer: Answer<T>) -> T {
    loop {
        match answer {
            Answer::Ready(value) => return value,
            Answer::Work(job) => answer = job(),
            Answer::Wait(future) => return future.await,
        }
    }
}

async fn lookup(fs: &Arc<FileSystem>, parent: u64, name: &[u8]) -> Result<u64, FsError> {
    match settle(fs.lookup(parent, name)).await? {
        Lookup::Found(entry) => Ok(entry.attributes.ino),
        Lookup::Absent(_) => panic!("there is no {name:?} in {parent}"),
    }
}

async fn read(fs: &Arc<FileSystem>, ino: u64) -> Result<Vec<u8>, FsError> {
    settle(fs.read(ino, 0, 4096)).await.map(|data| data.into_parts().concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn dots_are_answered_for_file_handles() {
    let fs = file_system(Moody::new(&small()));
    let etc = lookup(&fs, DIR_INO, b"etc").await.unwrap();
    let hosts = lookup(&fs, etc, b"hosts").await.unwrap();
    for (ino, name, expected) in [
        (hosts, &b"."[..], hosts),
        (etc, b".", etc),
        (etc, b"..", DIR_INO),
        (DIR_INO, b".", DIR_INO),
        (DIR_INO, b"..", ROOT_INO),
        (ROOT_INO, b".", ROOT_INO),
        (ROOT_INO, b"..", ROOT_INO),
        (ROOT_INO, b"7", DIR_INO),
    ] {
        assert_eq!(lookup(&fs, ino, name).await, Ok(expected), "{ino} {name:?}");
    }
    assert_eq!(lookup(&fs, hosts, b"..").await, Err(FsError::NotDirectory));
    assert_eq!(lookup(&fs, hosts, b"below").await, Err(FsError::NotDirectory));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_waits_with_another_that_waits_for_a_piece_which_was_decoded_meanwhile() {
    let later = Some(ContentError::Unavailable("it is a test".to_owned()));
    // The map is asked for first.
    let layer = Arc::new(Moody { piece_fails: (2, later), ..Moody::new(&small()) });
    let runtime = tokio::runtime::Handle::current();
    let fs = FileSystem::new(Arc::new(MemoryNumbers::default()), runtime, Limits::default());
    fs.add(DIR, vec![layer.clone()]);
    let etc = lookup(&fs, DIR_INO, b"etc").await.unwrap();
    let hosts = lookup(&fs, etc, b"hosts").await.unwrap();
    let owner = fs.clone();
    let first = tokio::spawn(async move { read(&owner, hosts).await });
    while layer.asked.load(Ordering::Relaxed) < 2 {
        tokio::task::yield_now().await;
    }
    layer.decoded.store(true, Ordering::Relaxed);
    assert_eq!(read(&fs, hosts).await.unwrap(), b"content");
    assert_eq!(first.await.unwrap().unwrap(), b"content");
    let elsewhere = Archive::default().file("other", PLAIN, b"other content").finish();
    let there = Moody::new(&elsewhere);
    there.decoded.store(true, Ordering::Relaxed);
    fs.add(DIR + 1, vec![Arc::new(there)]);
    let other = lookup(&fs, DIR_INO + 1, b"other").await.unwrap();
    assert!(matches!(fs.read(other, 0, 4096), Answer::Ready(Ok(_))), "memory answers at once");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_kernel_knows_from_before_a_restart_waits_for_its_tree() {
    let bound = Duration::from_secs(20);
    let later = Some(ContentError::Unavailable("it is a test".to_owned()));
    let layer = Moody { map_fails: (1, later), ..Moody::new(&small()) };
    let limits = Limits { map_wait: bound, ..Limits::default() };
    let runtime = tokio::runtime::Handle::current();
    let fs = FileSystem::new(Arc::new(MemoryNumbers::default()), runtime, limits);
    fs.add(DIR, vec![Arc::new(layer)]);
    fs.recover(vec![DIR]);
    // The first entry of the first layer, by the number that it had before.
    let (hosts, stranger) = ((1 << 32) + 3, 5 << 32);
    assert!(fs.is_recovering());
    assert!(!fs.is_found(hosts, None) && !fs.is_found(DIR_INO, None) && !fs.is_found(ROOT_INO, Some(b"7")));
    assert!(fs.is_found(ROOT_INO, None) && fs.is_found(ROOT_INO, Some(b"8")));
    tokio::time::timeout(bound, fs.found(hosts, None)).await.unwrap();
    assert_eq!(read(&fs, hosts).await, Ok(b"content".to_vec()));
    tokio::time::timeout(bound, fs.found(stranger, None)).await.unwrap();
    assert!(!fs.is_found(stranger, None) && !fs.is_recovering());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_that_takes_more_memory_than_it_may_is_impossible() {
    let limits = Limits { tree_memory: 500, ..Limits::default() };
    let fs = FileSystem::new(Arc::new(MemoryNumbers::default()), tokio::runtime::Handle::current(), limits);
    fs.add(DIR, vec![Arc::new(Moody::new(&small()))]);
    let error = fs.ready(DIR).await.unwrap_err();
    assert!(matches!(&error, ContentError::Impossible(why) if why.contains("more memory")), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn absent_names_are_kept_only_where_nothing_changes() {
    let fs = file_system(Moody::new(&small()));
    let answer = settle(fs.lookup(ROOT_INO, b"8")).await;
    assert_eq!(answer, Ok(Lookup::Absent(Lifetime::None)));
    let answer = settle(fs.lookup(DIR_INO, b"none")).await;
    assert_eq!(answer, Ok(Lookup::Absent(Lifetime::Forever)));
}

#[tokio::test(flavor = "multi_thread")]
async fn directory_may_be_kept_once_its_tree_is_there() {
    let fs = file_system(Moody::new(&small()));
    assert_eq!(fs.attributes(DIR_INO).unwrap().lifetime, Lifetime::None);
    assert!(fs.tree_now(DIR).is_none());
    fs.ready(DIR).await.unwrap();
    assert_eq!(fs.attributes(DIR_INO).unwrap().lifetime, Lifetime::Forever);
    assert!(fs.tree_now(DIR).is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_map_that_is_not_available_is_asked_for_again() {
    let error = ContentError::Unavailable("not now".to_owned());
    let fs = file_system(Moody { map_fails: (1, Some(error)), ..Moody::new(&small()) });
    assert_eq!(lookup(&fs, DIR_INO, b"etc").await, Err(FsError::Io), "the bound is shorter than the pause");
    fs.ready(DIR).await.unwrap();
    assert!(lookup(&fs, DIR_INO, b"etc").await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_impossible_map_is_told_to_who_waits() {
    let error = ContentError::Impossible("a lie".to_owned());
    let fs = file_system(Moody { map_fails: (1, Some(error.clone())), ..Moody::new(&small()) });
    assert_eq!(fs.ready(DIR).await.err(), Some(error));
    assert_eq!(lookup(&fs, DIR_INO, b"etc").await, Err(FsError::Io));
    assert!(fs.attributes(DIR_INO).is_ok(), "the directory itself is still there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_that_containerd_refuses_is_impossible() {
    let mut archive = Archive::default();
    archive.file("a", PLAIN, b"").file("a/below", PLAIN, b"");
    let fs = file_system(Moody::new(&archive.finish()));
    assert!(matches!(fs.ready(DIR).await, Err(ContentError::Impossible(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_wait_has_an_end() {
    let never = usize::MAX;
    let fs = file_system(Moody { map_fails: (never, None), ..Moody::new(&small()) });
    assert_eq!(lookup(&fs, DIR_INO, b"etc").await, Err(FsError::Io));
    for failure in [None, Some(ContentError::Unavailable("never".to_owned()))] {
        let fs = file_system(Moody { piece_fails: (never, failure), ..Moody::new(&small()) });
        fs.ready(DIR).await.unwrap();
        let etc = lookup(&fs, DIR_INO, b"etc").await.unwrap();
        let hosts = lookup(&fs, etc, b"hosts").await.unwrap();
        assert_eq!(read(&fs, hosts).await, Err(FsError::Io));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_piece_of_the_wrong_length_is_never_shown() {
    let mut layer = Moody::new(&small());
    layer.pieces = vec![Bytes::from_static(b"contents")];
    let fs = file_system(layer);
    let etc = lookup(&fs, DIR_INO, b"etc").await.unwrap();
    let hosts = lookup(&fs, etc, b"hosts").await.unwrap();
    assert_eq!(read(&fs, hosts).await, Err(FsError::Io));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_in_a_directory_that_is_removed_is_told() {
    let fs = file_system(Moody { map_fails: (usize::MAX, None), ..Moody::new(&small()) });
    let (waiting, removed) = tokio::join!(fs.ready(DIR), async { fs.remove(DIR) });
    assert!(matches!(waiting, Err(ContentError::Impossible(_))));
    assert_eq!(removed, ());
    assert_eq!(lookup(&fs, DIR_INO, b"etc").await, Err(FsError::Stale));
    assert_eq!(fs.attributes(DIR_INO), Err(FsError::Stale));
    assert_eq!(fs.attributes(5 << 32 | 2), Err(FsError::Stale));
}
