//! A peer from its settings: identity, attendance, store, registries, mesh. `darter-peer` and the node daemon start alike.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use darter_daemon::address;
use darter_daemon::numbers::Listen;
use darter_daemon::tasks::Tasks;
use darter_daemon::traces;
use darter_identity::Identity;
use darter_identity::attend::{self, Attendance, ClusterMembers, Hello, SetRates};
use darter_identity::enrol::{self, EnrolError, Enrolment};
use darter_registry::{Client, RegistryError, default_docker_config};
use darter_store::{Limits, Store, StoreError, StoreLock};
use darter_types::{RateKind, Rates, Role};
use serde::{Deserialize, Deserializer, Serialize};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::{BackgroundOptions, Deps, Mesh, MeshError, Options};

/// The settings of a peer. An empty text, path or list, and a rate of 0, mean that nothing was set.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct PeerConfig {
    /// The certificate (`identity`), pieces and maps (`store`) are kept here. Default: `/var/lib/darter-peer`.
    pub root: PathBuf,
    /// `host:port` of the manager. Default: `127.0.0.1:7400`.
    #[serde(deserialize_with = "address::host_port")]
    pub manager: String,
    /// A token for a node or a seed. Empty: it is read from `join_token_file`. Default: empty.
    pub join_token: String,
    /// Default: `/etc/darter/peer.token`.
    pub join_token_file: PathBuf,
    /// Its name in the cluster. Empty: the host's name. Default: empty.
    pub node_name: String,
    /// Where other peers reach it. Default: `0.0.0.0:7420`.
    #[serde(deserialize_with = "address::listen")]
    pub listen: SocketAddr,
    /// `host:port` that others are told. Empty: the address that this host has on its way to the manager. Default: empty.
    #[serde(deserialize_with = "address::host_port_or_empty")]
    pub advertise: String,
    /// Peers of one zone are preferred to others. Default: empty.
    pub zone: String,
    /// Where registries are described, as for containerd. Default: `/etc/containerd/certs.d`.
    pub hosts_dir: PathBuf,
    /// Docker's `config.json`, for credentials. Empty: `$DOCKER_CONFIG/config.json`, or `~/.docker/config.json`. Default: empty.
    pub docker_config: PathBuf,
    /// Registries, `host:port`, that a host's name without its port may mean. Default: none.
    pub registries: Vec<String>,
    /// Pieces that are sent at the same time. Default: 64.
    pub upload_slots: u32,
    /// Bytes per second of all that comes from other peers. The manager's word on this and the next three goes before what is set
    /// here. Default: 0, no limit.
    pub download_rate_bytes: u64,
    /// Bytes per second of all uploads together. Default: 0, no limit.
    pub upload_rate_bytes: u64,
    /// Bytes per second of the blobs that are read from registries to make layers. Default: 0, no limit.
    pub registry_rate_bytes: u64,
    /// Bytes per second of what is fetched in the background. Default: 0, no limit.
    pub background_rate_bytes: u64,
    /// How long no container may have waited for a piece before the background goes on. Default: 3000.
    pub background_idle_ms: u64,
    /// Whether the background stands back while others keep the host's disk or link busy. Default: true.
    pub background_yields: bool,
    /// Bytes per second that the host's link takes in one direction, by which it is judged whether it is busy. Default: 0, as the
    /// kernel tells.
    pub link_rate_bytes: u64,
    /// Where numbers are told (`/metrics`, `/livez`, `/readyz`). Empty: nowhere. Default: `127.0.0.1:7483`.
    pub metrics_listen: Listen,
    /// Which reads and pulls are followed, and where they are told.
    pub traces: traces::Settings,
    /// Whether what earlier starts read of a layer first is fetched before a container asks. Default: true.
    pub prefetch: bool,
    /// The most bytes of pieces that are kept. Default: 0, no limit.
    pub store_quota_bytes: u64,
    /// When the file system is this full, in percent, nothing is fetched that nobody waits for, and layers that nobody uses go.
    /// Default: 80.
    #[serde(deserialize_with = "percent")]
    pub store_high_percent: u8,
    /// They go until it is only this full; not more than the above. Default: 75.
    #[serde(deserialize_with = "percent")]
    pub store_low_percent: u8,
    /// How long a layer stays after it was used while the disk isn't full but for the mark. Default: 600.
    pub store_keep_seconds: u64,
}

/// A number from 1 to 100.
pub fn percent<'de, D: Deserializer<'de>>(from: D) -> Result<u8, D::Error> {
    let value = u8::deserialize(from)?;
    match value {
        1..=100 => Ok(value),
        _ => Err(serde::de::Error::custom(format!("{value} is no percentage from 1 to 100"))),
    }
}

impl Default for PeerConfig {
    fn default() -> Self {
        let options = Options::default();
        Self {
            root: PathBuf::from("/var/lib/darter-peer"),
            manager: "127.0.0.1:7400".to_owned(),
            join_token: String::new(),
            join_token_file: PathBuf::from("/etc/darter/peer.token"),
            node_name: String::new(),
            listen: (Ipv4Addr::UNSPECIFIED, 7420).into(),
            advertise: String::new(),
            zone: String::new(),
            hosts_dir: PathBuf::from("/etc/containerd/certs.d"),
            docker_config: PathBuf::new(),
            registries: Vec::new(),
            upload_slots: options.upload_slots,
            download_rate_bytes: 0,
            upload_rate_bytes: 0,
            registry_rate_bytes: 0,
            background_rate_bytes: 0,
            background_idle_ms: options.background.idle_before.as_millis() as u64,
            background_yields: options.background.yields,
            link_rate_bytes: 0,
            metrics_listen: Listen::local(7483),
            traces: traces::Settings::default(),
            prefetch: options.prefetch,
            store_quota_bytes: 0,
            store_high_percent: Limits::default().high_percent,
            store_low_percent: Limits::default().low_percent,
            store_keep_seconds: options.keep_for.as_secs(),
        }
    }
}

/// Why a peer did not start.
#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    #[error("can't make {}: {source}", path.display())]
    Root { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Enrol(#[from] EnrolError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Mesh(#[from] MeshError),
}

/// A peer that runs, until the tasks that it was assembled with stop.
pub struct Assembled {
    pub identity: Identity,
    pub parts: Parts,
    pub attendance: Attendance,
}

/// What a peer works with.
#[derive(Clone)]
pub struct Parts {
    pub store: Arc<Store>,
    pub registry: Arc<Client>,
    pub mesh: Mesh,
}

/// Joins as `role`, attends the manager, opens the store, starts the mesh.
pub async fn assemble(config: &PeerConfig, role: Role, tasks: &Tasks) -> Result<Assembled, AssembleError> {
    // A second peer on one root must neither use up a token nor touch the certificate of the first.
    let lock = lock_store(config)?;
    let identity = config.enrolment().join(role).await?;
    identity.keep_fresh(config.manager.clone(), tasks);
    // Store and port come before attending: a peer that can't work must not be listed as alive.
    let store = open_store(config, lock).await?;
    let (tcp, listen) = listen(config).await?;
    let address = enrol::advertised(&config.advertise, listen, &config.manager).await;
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let hello = Hello { version, address: address.clone(), zone: config.zone.clone() };
    let attendance = attend::attend(&identity, config.manager.clone(), hello, tasks);
    let config = PeerConfig { advertise: address, ..config.clone() };
    let heard = (attendance.members.clone(), attendance.limits.clone());
    let parts = start(&config, identity.clone(), store, tcp, heard, tasks).await?;
    Ok(Assembled { identity, parts, attendance })
}

/// A peer without a manager to attend: for `standalone`, which knows the members itself, and for tests. It is a seed if
/// `identity` is one.
pub async fn assemble_with(
    config: &PeerConfig,
    identity: Identity,
    members: watch::Receiver<ClusterMembers>,
    tasks: &Tasks,
) -> Result<Parts, AssembleError> {
    let store = open_store(config, lock_store(config)?).await?;
    let (tcp, _) = listen(config).await?;
    // Nobody sets any.
    let (_, limits) = watch::channel(SetRates::default());
    start(config, identity, store, tcp, (members, limits), tasks).await
}

async fn listen(config: &PeerConfig) -> Result<(TcpListener, SocketAddr), MeshError> {
    let failed = |error| MeshError::Listen { address: config.listen, error };
    let tcp = TcpListener::bind(config.listen).await.map_err(failed)?;
    let address = tcp.local_addr().map_err(failed)?;
    Ok((tcp, address))
}

fn lock_store(config: &PeerConfig) -> Result<StoreLock, AssembleError> {
    let root = config.root.clone();
    std::fs::create_dir_all(&root).map_err(|source| AssembleError::Root { path: root.clone(), source })?;
    Ok(StoreLock::take(&root.join("store"))?)
}

async fn open_store(config: &PeerConfig, lock: StoreLock) -> Result<Arc<Store>, AssembleError> {
    let options = darter_store::Options { limits: config.limits(), ..Default::default() };
    let opening = move || Store::open_locked(lock, options);
    let store = tokio::task::spawn_blocking(opening).await.expect("opening a store does not panic")?;
    Ok(Arc::new(store))
}

async fn start(
    config: &PeerConfig,
    identity: Identity,
    store: Arc<Store>,
    tcp: TcpListener,
    (members, limits): (watch::Receiver<ClusterMembers>, watch::Receiver<SetRates>),
    tasks: &Tasks,
) -> Result<Parts, AssembleError> {
    let registry = Arc::new(Client::new(config.registry_options())?);
    let seed = identity.member().role == Role::Seed;
    let deps = Deps {
        identity,
        store: store.clone(),
        registry: registry.clone(),
        members,
        limits,
        tasks: tasks.clone(),
    };
    let mesh = Mesh::start_on(tcp, config.mesh_options(seed), deps).await?;
    Ok(Parts { store, registry, mesh })
}

impl PeerConfig {
    fn enrolment(&self) -> Enrolment {
        Enrolment {
            root: self.root.clone(),
            manager: self.manager.clone(),
            join_token: self.join_token.clone(),
            join_token_file: self.join_token_file.clone(),
            node_name: self.node_name.clone(),
        }
    }

    fn limits(&self) -> Limits {
        Limits {
            quota: Some(self.store_quota_bytes).filter(|quota| *quota > 0),
            high_percent: self.store_high_percent,
            low_percent: self.store_low_percent.min(self.store_high_percent),
        }
    }

    fn registry_options(&self) -> darter_registry::Options {
        let given = |path: &PathBuf| Some(path.clone()).filter(|path| !path.as_os_str().is_empty());
        darter_registry::Options {
            hosts_dir: given(&self.hosts_dir),
            docker_config: given(&self.docker_config).or_else(default_docker_config),
            registries: self.registries.clone(),
            ..darter_registry::Options::default()
        }
    }

    fn rates(&self) -> Rates {
        Rates::default()
            .with(RateKind::Download, Some(self.download_rate_bytes))
            .with(RateKind::Upload, Some(self.upload_rate_bytes))
            .with(RateKind::Registry, Some(self.registry_rate_bytes))
            .with(RateKind::Background, Some(self.background_rate_bytes))
    }

    fn mesh_options(&self, seed: bool) -> Options {
        Options {
            listen: self.listen,
            advertise: self.advertise.clone(),
            zone: self.zone.clone(),
            seed,
            upload_slots: self.upload_slots.max(1),
            rates: self.rates(),
            background: BackgroundOptions {
                idle_before: Duration::from_millis(self.background_idle_ms),
                yields: self.background_yields,
                link_rate: Some(self.link_rate_bytes).filter(|rate| *rate > 0),
            },
            keep_for: Duration::from_secs(self.store_keep_seconds),
            prefetch: self.prefetch,
            ..Options::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use darter_identity::JoinToken;

    use super::*;

    #[tokio::test]
    async fn a_second_peer_on_one_root_asks_no_manager_for_anything() {
        let root = tempfile::tempdir().unwrap();
        let manager = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let token = JoinToken::generate("c".parse().unwrap(), Role::Seed, [1; 32]).unwrap();
        let config = PeerConfig {
            root: root.path().to_owned(),
            manager: manager.local_addr().unwrap().to_string(),
            join_token: token.to_string(),
            ..PeerConfig::default()
        };
        let _first = lock_store(&config).unwrap();
        let tasks = Tasks::new();
        let second = tokio::select! {
            second = assemble(&config, Role::Seed, &tasks) => second.map(|_| ()),
            _ = manager.accept() => panic!("it asked for a certificate"),
        };
        assert!(matches!(second, Err(AssembleError::Store(StoreError::Locked { .. }))));
    }
}
