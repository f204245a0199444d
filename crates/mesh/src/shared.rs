//! What all parts of one peer share.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use darter_daemon::tasks::Tasks;
use darter_identity::Identity;
use darter_identity::attend::ClusterMembers;
use darter_proto::v1::peer_client::PeerClient;
use darter_store::Store;
use darter_types::{LayerTask, Role};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;
use tonic::transport::Channel;

use crate::background::Background;
use crate::cache::PieceCache;
use crate::control::Control;
use crate::layer::{Handle, Open, Renew};
use crate::limits::Limits;
use crate::load::Load;
use crate::make::Makes;
use crate::metrics::Metrics;
use crate::options::{Deps, Options};
use crate::origin::Origin;
use crate::parents::Links;
use crate::reach::Reach;
use crate::right::Proving;
use crate::shelf::Shelf;
use crate::start::Starts;
use crate::upkeep::Upkeep;
use crate::work::Work;

/// gRPC channels to other peers that are kept; one more takes the place of any.
const CHANNELS_MAX: usize = 256;

pub(crate) struct Shared {
    pub options: Options,
    /// Where others reach this peer.
    pub address: String,
    pub identity: Identity,
    pub store: Arc<Store>,
    pub origin: Arc<dyn Origin>,
    /// Set once, where somebody knows credentials.
    pub renewal: OnceLock<Arc<dyn Renew>>,
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
    pub limits: Limits,
    pub load: Load,
    pub starts: Starts,
    pub upkeep: Upkeep,
    pub work: Work,
    pub read_ahead: Arc<Semaphore>,
    pub metrics: Metrics,
    pub large_maps: Arc<Semaphore>,
    channels: Mutex<HashMap<(String, bool), Channel>>,
}

/// Pieces read ahead of what was asked for, of all layers together; hints beyond are dropped.
const READ_AHEAD_MAX: usize = 16;

/// Large maps that come at the same time.
const LARGE_MAPS_MAX: usize = 2;

impl Shared {
    pub(crate) fn new(options: Options, address: String, deps: Deps, origin: Arc<dyn Origin>) -> Self {
        let Deps { identity, store, registry: _, members, limits, tasks } = deps;
        let limits = Limits::new(options.rates, *limits.borrow());
        Self {
            cache: PieceCache::new(options.cache_bytes),
            background: Background::default(),
            limits,
            load: Load::new(&options.background, store.root(), &address),
            options,
            address,
            identity,
            store,
            origin,
            renewal: OnceLock::new(),
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
            starts: Starts::default(),
            upkeep: Upkeep::default(),
            work: Work::default(),
            read_ahead: Arc::new(Semaphore::new(READ_AHEAD_MAX)),
            metrics: Metrics::default(),
            large_maps: Arc::new(Semaphore::new(LARGE_MAPS_MAX)),
            channels: Mutex::default(),
        }
    }

    /// The layer, if somebody has it open.
    pub(crate) fn open_layer(&self, task: LayerTask) -> Option<Arc<Handle>> {
        self.layers.lock().get(&task)?.upgrade()
    }

    /// All layers that somebody has open.
    pub(crate) fn open_layers(&self) -> Vec<Arc<Open>> {
        let handles: Vec<_> = self.layers.lock().values().filter_map(Weak::upgrade).collect();
        handles.iter().map(|handle| handle.open().clone()).collect()
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

/// Does `work` while it has `held`; that is let go after `patience` if the work takes longer.
pub(crate) async fn holding<T>(held: impl Sized, patience: Duration, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    if let Ok(done) = timeout(patience, work.as_mut()).await {
        return done;
    }
    drop(held);
    work.await
}

/// Knows whether some container waits for a piece, or did a moment ago.
pub(crate) struct DemandClock {
    start: Instant,
    waiting: AtomicUsize,
    last_ms: AtomicU64,
    /// When a container last read a piece from this machine's disk.
    local_ms: AtomicU64,
}

impl Default for DemandClock {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            waiting: AtomicUsize::new(0),
            last_ms: AtomicU64::new(0),
            local_ms: AtomicU64::new(0),
        }
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
        self.last_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    /// A container reads what is here: it needs the processors, if not the link.
    pub(crate) fn touch_local(&self) {
        self.local_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    fn now_ms(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    /// How long no container has read a piece from the disk.
    pub(crate) fn idle_local(&self) -> Duration {
        Duration::from_millis(self.now_ms().saturating_sub(self.local_ms.load(Ordering::Relaxed)))
    }

    /// How long nobody has waited.
    pub(crate) fn idle(&self) -> Duration {
        if self.waiting.load(Ordering::Relaxed) > 0 {
            return Duration::ZERO;
        }
        Duration::from_millis(self.now_ms().saturating_sub(self.last_ms.load(Ordering::Relaxed)))
    }
}
