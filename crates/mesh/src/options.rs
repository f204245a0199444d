//! What can be set about the mesh, and what it needs.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use darter_daemon::tasks::Tasks;
use darter_identity::Identity;
use darter_identity::attend::{ClusterMembers, SetRates};
use darter_registry::Client;
use darter_store::Store;
use darter_types::Rates;
use tokio::sync::watch;

/// What can be set.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where other peers reach this one: gRPC and pieces on one port.
    pub listen: SocketAddr,
    /// `host:port` as others know it; empty: the address that it listens on.
    pub advertise: String,
    /// Peers of one zone are preferred to others.
    pub zone: String,
    /// Whether it makes maps for others and signs them. Its certificate must say so too.
    pub seed: bool,
    /// Pieces that are sent at the same time; a child that finds none free is told so and asks another parent.
    pub upload_slots: u32,
    /// What this host may move in a second where the manager says nothing; nothing said here either: no limit.
    pub rates: Rates,
    pub background: BackgroundOptions,
    /// Whether what earlier starts read of a layer first, here or elsewhere, is fetched before a container asks.
    pub prefetch: bool,
    /// How long a layer stays after it was used: however little room there is, and as long as only the mark is passed.
    pub spared_for: Duration,
    pub keep_for: Duration,
    /// Memory for pieces that were read ahead or decoded a moment ago. Whoever reads them keeps the same bytes, no copy.
    pub cache_bytes: usize,
}

/// When the rest of a layer arrives that nobody waits for.
#[derive(Debug, Clone)]
pub struct BackgroundOptions {
    /// How long no container may have waited for a piece before the background begins or goes on.
    pub idle_before: Duration,
    /// Whether it stands back while the host's disk or link is busy with other things.
    pub yields: bool,
    /// Bytes per second that the host's link takes, in each direction; `None`: as the kernel tells.
    pub link_rate: Option<u64>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 7420)),
            advertise: String::new(),
            zone: String::new(),
            seed: false,
            upload_slots: 64,
            rates: Rates::default(),
            background: BackgroundOptions::default(),
            prefetch: true,
            spared_for: Duration::from_secs(15),
            keep_for: Duration::from_secs(600),
            cache_bytes: 6 << 20,
        }
    }
}

impl Default for BackgroundOptions {
    fn default() -> Self {
        Self { idle_before: Duration::from_secs(3), yields: true, link_rate: None }
    }
}

/// What the mesh is built on.
pub struct Deps {
    pub identity: Identity,
    pub store: Arc<Store>,
    pub registry: Arc<Client>,
    /// Schedulers and seeds, as the manager last said.
    pub members: watch::Receiver<ClusterMembers>,
    /// The limits that the manager sets; they go before those of the options.
    pub limits: watch::Receiver<SetRates>,
    pub tasks: Tasks,
}
