//! `darter standalone`: manager, scheduler, seed and snapshotter in one process, on loopback, without configuration.
//!
//! The parts are those of a cluster and talk as in one, over mutual TLS with a CA that is kept in the state directory. The
//! node is its own seed (`docs/decisions/0002-standalone-is-a-seed.md`).

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use darter_daemon::numbers::{Listen, Numbers};
use darter_daemon::tasks::Tasks;
use darter_daemon::telemetry::{self, LogFormat};
use darter_daemon::traces;
use darter_mesh::assemble::{PeerConfig, assemble};
use darter_snapshotter::{Membership, RootLock};
use darter_types::Role;

use crate::snippet;

#[derive(Debug, clap::Args)]
pub struct Options {
    /// State directory: snapshots, pieces, certificates
    #[arg(long, value_name = "DIR", default_value = "/var/lib/darter", value_parser = darter_snapshotter::root_folder)]
    root: PathBuf,
    /// The socket that containerd's configuration names
    #[arg(long, value_name = "SOCKET", default_value = "/run/darter/darter.sock")]
    address: PathBuf,
    /// containerd's own socket
    #[arg(long, value_name = "SOCKET", default_value = "/run/containerd/containerd.sock")]
    containerd_address: PathBuf,
    /// Folder with a hosts.toml per registry, as containerd reads it
    #[arg(long, value_name = "DIR", default_value = "/etc/containerd/certs.d")]
    hosts_dir: PathBuf,
    /// The most bytes of pieces that are kept; 0: no limit but the marks
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    store_quota_bytes: u64,
    /// When the file system is this full, nothing is fetched that nobody waits for, and old layers go
    #[arg(long, value_name = "PERCENT", default_value_t = 80, value_parser = clap::value_parser!(u8).range(1..=100))]
    store_high_percent: u8,
    /// Old layers go until the file system is only this full
    #[arg(long, value_name = "PERCENT", default_value_t = 75, value_parser = clap::value_parser!(u8).range(1..=100))]
    store_low_percent: u8,
    /// The most bytes in a second from other peers; 0: no limit. `darter limits` sets these while it runs
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    download_rate_bytes: u64,
    /// The most bytes in a second to other peers
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    upload_rate_bytes: u64,
    /// The most bytes in a second from registries, to make layers
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    registry_rate_bytes: u64,
    /// The most bytes in a second from other peers that no container has asked for
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    background_rate_bytes: u64,
    /// What to log: error, warn, info, debug or trace, also by part (DARTER_LOG takes precedence)
    #[arg(long, default_value = "info")]
    log: String,
}

/// The name of this node, of its scheduler and of its seed: there is one of each.
const NODE: &str = "standalone";
/// Join tokens are used at once.
const TOKEN_LIFE: Duration = Duration::from_secs(60);
/// The port of `/metrics`, on loopback: the snapshotter's own.
const METRICS: u16 = 7484;
const GRACE: Duration = Duration::from_secs(5);
const MANAGER_REST: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 7480);

fn ephemeral() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

pub async fn run(options: Options) -> Result<()> {
    telemetry::init(LogFormat::Text, &options.log);
    darter_daemon::run::keep_private();
    let absolute =
        |path: &Path| std::path::absolute(path).with_context(|| format!("{} is no path", path.display()));
    let root = absolute(&options.root)?;
    let address = absolute(&options.address)?;
    // Before a second manager opens the first one's database.
    let lock = RootLock::take(&root).await?;
    let tasks = Tasks::new();
    // Without a configuration the environment says where to.
    traces::start(&traces::Settings::default(), "darter-standalone", NODE, &tasks);
    let manager = manager(&root).await?;
    let scheduler = scheduler(&root, &manager, tasks.clone()).await.context("the scheduler did not start")?;
    let config = PeerConfig {
        root: root.clone(),
        manager: manager.grpc_address().to_string(),
        join_token: token(&manager, Role::Seed)?,
        node_name: NODE.to_owned(),
        listen: ephemeral(),
        hosts_dir: absolute(&options.hosts_dir)?,
        download_rate_bytes: options.download_rate_bytes,
        upload_rate_bytes: options.upload_rate_bytes,
        registry_rate_bytes: options.registry_rate_bytes,
        background_rate_bytes: options.background_rate_bytes,
        store_quota_bytes: options.store_quota_bytes,
        store_high_percent: options.store_high_percent,
        store_low_percent: options.store_low_percent,
        ..PeerConfig::default()
    };
    let peer = assemble(&config, Role::Seed, &tasks).await.context("the seed did not start")?;
    let seed =
        darter_peer::preheat::Seed { mesh: peer.parts.mesh.clone(), registry: peer.parts.registry.clone() };
    let membership = Membership::default();
    membership.joined(peer.identity, peer.attendance.standing);
    darter_peer::preheat::serve(seed, peer.attendance.preheats, peer.attendance.updates, &tasks);
    let settings = darter_snapshotter::Config {
        root: root.clone(),
        address: address.clone(),
        containerd_address: options.containerd_address.clone(),
        ..Default::default()
    };
    // The numbers of the node and of its seed; manager and scheduler have nobody else to tell about.
    let numbers = Numbers::default();
    numbers.serve(Listen::local(METRICS), &tasks).await;
    numbers.add(|registry| peer.parts.mesh.register(registry));
    let deps = darter_snapshotter::Deps {
        root: lock,
        numbers: numbers.clone(),
        peer: Some(darter_snapshotter::Peer::new(peer.parts.mesh, peer.parts.registry, None, &tasks)),
        tasks: tasks.clone(),
        membership,
    };
    let snapshotter = darter_snapshotter::start(settings.options(), deps).await?;
    numbers.ready();
    snippet::print(&options.containerd_address, &address, &root, manager.http_address()).await;
    darter_daemon::shutdown::wanted(&tasks).await;
    eprintln!("darter: stopping");
    snapshotter.stop().await;
    drop(scheduler);
    tasks.clone().stop(GRACE).await;
    manager.stop().await;
    anyhow::ensure!(!tasks.failed(), "a part of the program failed; the log above says which");
    Ok(())
}

/// The manager on loopback; its REST API at the port that `darter preheat` asks by default, if that is free.
async fn manager(root: &Path) -> Result<darter_manager::Handle> {
    let config = |http_listen| darter_manager::Config {
        root: root.join("manager"),
        grpc_listen: ephemeral(),
        http_listen,
        metrics_listen: Listen(None),
        ..Default::default()
    };
    let taken = tokio::net::TcpListener::bind(MANAGER_REST).await.is_err();
    let http = if taken { ephemeral() } else { MANAGER_REST };
    darter_manager::start(config(http)).await.context("the manager did not start")
}

async fn scheduler(
    root: &Path,
    manager: &darter_manager::Handle,
    tasks: Tasks,
) -> Result<darter_scheduler::Handle> {
    let config = darter_scheduler::Config {
        root: root.join("scheduler"),
        manager: manager.grpc_address().to_string(),
        join_token: token(manager, Role::Scheduler)?,
        node_name: NODE.to_owned(),
        listen: ephemeral(),
        metrics_listen: Listen(None),
        ..Default::default()
    };
    Ok(darter_scheduler::start(config, tasks).await?)
}

fn token(manager: &darter_manager::Handle, role: Role) -> Result<String> {
    let token = tokio::task::block_in_place(|| manager.mint_token(role, TOKEN_LIFE, 1))?;
    Ok(token.to_string())
}
