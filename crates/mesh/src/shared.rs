//! What all parts of one peer share.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use darter_daemon::tasks::Tasks;
use darter_identity::Identity;
use darter_identity::attend::ClusterMembers;
use darter_proto::v1::peer_client::PeerClient;
use darter_store::Store;
use darter_types::{LayerTask, Role};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};
use tonic::transport::Channel;

use crate::background::Background;
use crate::cache::PieceCache;
use crate::control::Control;
use crate::layer::Handle;
use crate::make::Makes;
use crate::options::Options;
use crate::origin::Origin;
use crate::parents::Links;
use crate::reach::Reach;
use crate::right::Proving;
use crate::shelf::Shelf;

/// gRPC channels to other peers that are kept; one more takes the place of any.
const CHANNELS_MAX: usize = 256;

pub(crate) struct Shared {
    pub options: Options,
    /// Where others reach this peer.
    pub address: String,
    pub identity: Identity,
    pub store: Arc<Store>,
    pub origin: Arc<dyn Origin>,
    pub members: watch::Receiver<ClusterMembers>,
    pub tasks: Tasks,
    pub layers: Mutex<HashMap<LayerTask, Weak<Handle>>>,
    pub shelf: Shelf,
    pub makes: Makes,
    pub proving: Proving,
    pub reach: Reach,
    pub links: Links,
    pub control: Control,
    pub cache: PieceCache,
    pub demand: DemandClock,
    pub background: Background,
    pub work: Work,
    pub read_ahead: Arc<Semaphore>,
    channels: Mutex<HashMap<(String, bool), Channel>>,
}

/// Pieces read ahead of what was asked for, of all layers together; hints beyond are dropped.
const READ_AHEAD_MAX: usize = 16;

impl Shared {
    pub(crate) fn new(
        options: Options,
        address: String,
        identity: Identity,
        store: Arc<Store>,
        origin: Arc<dyn Origin>,
        members: watch::Receiver<ClusterMembers>,
        tasks: Tasks,
    ) -> Self {
        Self {
            cache: PieceCache::new(options.cache_bytes),
            background: Background::new(options.background.rate),
            options,
            address,
            identity,
            store,
            origin,
            members,
            tasks,
            layers: Mutex::default(),
            shelf: Shelf::default(),
            makes: Makes::default(),
            proving: Proving::default(),
            reach: Reach::default(),
            links: Links::default(),
            control: Control::default(),
            demand: DemandClock::default(),
            work: Work::default(),
            read_ahead: Arc::new(Semaphore::new(READ_AHEAD_MAX)),
            channels: Mutex::default(),
        }
    }

    /// The layer, if somebody has it open.
    pub(crate) fn open_layer(&self, task: LayerTask) -> Option<Arc<Handle>> {
        self.layers.lock().get(&task)?.upgrade()
    }

    /// A client of another peer's gRPC service. With `seed` the peer must be one.
    pub(crate) fn peer_client(&self, address: &str, seed: bool) -> PeerClient<Channel> {
        let key = (address.to_owned(), seed);
        let mut channels = self.channels.lock();
        if channels.len() >= CHANNELS_MAX && !channels.contains_key(&key) {
            let any = channels.keys().next().cloned();
            any.and_then(|any| channels.remove(&any));
        }
        let roles: &[Role] = if seed { &[Role::Seed] } else { &[Role::Seed, Role::Node] };
        let channel = channels.entry(key).or_insert_with(|| self.identity.channel(address, roles));
        PeerClient::new(channel.clone())
    }

    pub(crate) fn is_seed(&self) -> bool {
        self.options.seed
    }
}

/// Knows whether some container waits for a piece, or did a moment ago.
pub(crate) struct DemandClock {
    start: Instant,
    waiting: AtomicUsize,
    last_ms: AtomicU64,
}

impl Default for DemandClock {
    fn default() -> Self {
        Self { start: Instant::now(), waiting: AtomicUsize::new(0), last_ms: AtomicU64::new(0) }
    }
}

/// Somebody waits as long as this lives.
pub(crate) struct Waiting<'a>(&'a DemandClock);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.touch();
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

impl DemandClock {
    pub(crate) fn wait(&self) -> Waiting<'_> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        Waiting(self)
    }

    /// Counts as if somebody had just stopped waiting.
    pub(crate) fn touch(&self) {
        self.last_ms.store(self.start.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// How long nobody has waited.
    pub(crate) fn idle(&self) -> Duration {
        if self.waiting.load(Ordering::Relaxed) > 0 {
            return Duration::ZERO;
        }
        self.start.elapsed().saturating_sub(Duration::from_millis(self.last_ms.load(Ordering::Relaxed)))
    }
}

/// Work on pieces that takes a processor or waits for the disk: not more of it at once than makes sense, because each
/// thread that has ever decoded a piece keeps memory for the next.
pub(crate) struct Work(Semaphore);

impl Default for Work {
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(2, usize::from);
        Self(Semaphore::new((2 * processors).max(4)))
    }
}

impl Work {
    /// Runs `work` on a thread for it; a panic in there goes on in the caller.
    pub(crate) async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let _permit = self.0.acquire().await.expect("the semaphore is never closed");
        match tokio::task::spawn_blocking(work).await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is shutting down: nobody will look at an answer.
                Err(_) => std::future::pending().await,
            },
        }
    }
}
