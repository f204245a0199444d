//! Compressing and storing the pieces of a layer that is being made, on threads beside the one that inflates.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use darter_layer::PieceSink;
use darter_store::{Room, Store, StoreError, StoredPiece};
use darter_types::{PieceHash, PieceIndex};
use parking_lot::Mutex;

/// Pieces that wait for a thread (4 MiB). When all places are taken, the maker waits.
const QUEUE_MAX: usize = 16;

/// More threads than this would outrun any inflater.
const THREADS_MAX: usize = 4;

/// The level while the registry is what everybody waits for, and the one while the processors are.
const LEVEL_CALM: i32 = 3;
const LEVEL_BUSY: i32 = 1;

type Job = (PieceHash, Room);

struct Common {
    store: Arc<Store>,
    jobs: Mutex<Receiver<Job>>,
    waiting: AtomicUsize,
    /// The processors are what everybody waits for.
    pressed: Arc<AtomicBool>,
    failed: AtomicBool,
    error: OnceLock<StoreError>,
}

/// The sink of a maker.
pub(super) struct Packer {
    common: Arc<Common>,
    jobs: SyncSender<Job>,
    threads: Vec<JoinHandle<()>>,
}

impl Packer {
    pub(super) fn start(store: Arc<Store>, pressed: Arc<AtomicBool>) -> io::Result<Self> {
        let (jobs, queue) = sync_channel(QUEUE_MAX);
        let (waiting, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let (jobs_left, error) = (Mutex::new(queue), OnceLock::new());
        let common = Arc::new(Common { store, jobs: jobs_left, waiting, pressed, failed, error });
        let count = std::thread::available_parallelism().map_or(2, usize::from).min(THREADS_MAX);
        let spawn = |_| {
            let common = common.clone();
            std::thread::Builder::new().name("pack".to_owned()).spawn(move || common.work())
        };
        let threads = (0..count).map(spawn).collect::<io::Result<Vec<_>>>()?;
        Ok(Self { common, jobs, threads })
    }

    /// Waits until every piece is stored.
    pub(super) fn finish(self) -> Result<(), StoreError> {
        drop(self.jobs);
        for thread in self.threads {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
        match Arc::into_inner(self.common).and_then(|common| common.error.into_inner()) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

impl PieceSink for Packer {
    fn piece(&mut self, _: PieceIndex, hash: PieceHash, plain: &[u8]) -> io::Result<()> {
        if self.common.failed.load(Ordering::Relaxed) {
            return Err(io::Error::other("a piece could not be stored"));
        }
        if self.common.store.claim(&hash) {
            return Ok(());
        }
        self.common.waiting.fetch_add(1, Ordering::Relaxed);
        self.jobs
            .send((hash, Room::holding(plain)))
            .map_err(|_| io::Error::other("the packing threads have ended"))
    }
}

impl Common {
    fn work(&self) {
        loop {
            let job = self.jobs.lock().recv();
            let Ok((hash, plain)) = job else { return };
            let is_behind = self.waiting.fetch_sub(1, Ordering::Relaxed) > QUEUE_MAX / 2;
            let is_busy = is_behind || self.pressed.load(Ordering::Relaxed);
            let piece = StoredPiece::encode(&plain, if is_busy { LEVEL_BUSY } else { LEVEL_CALM });
            if let Err(error) = self.store.put_stored(&hash, &piece) {
                // The jobs that are left are taken all the same, so that nobody waits at a full queue.
                let _ = self.error.set(error);
                self.failed.store(true, Ordering::Relaxed);
            }
        }
    }
}
