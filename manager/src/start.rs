//! Starts the manager's parts and holds them together.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::middleware::from_fn_with_state;
use darter_daemon::config::ConfigError;
use darter_daemon::http::Limits as Bounds;
use darter_daemon::numbers::Numbers;
use darter_daemon::tasks::Tasks;
use darter_identity::{ClientAuth, Identity, IdentityError, Incoming, JoinToken, Member};
use darter_proto::v1::cluster_server::ClusterServer;
use darter_proto::v1::identity_server::IdentityServer;
use darter_types::{NodeName, Role};
use tokio::net::TcpListener;
use tokio::time::interval;
use tonic::transport::Server;

use crate::Config;
use crate::core::access::{AccessError, TOKENS_MAX};
use crate::db::{StorageError, Store};
use crate::grpc::{ClusterService, IdentityService};
use crate::http::{self, Api};
use crate::limits::Limits;
use crate::metrics::{Metrics, count};
use crate::preheats::Preheats;
use crate::root::{Root, now};
use crate::roster::Roster;

/// How the manager names itself in its certificate.
const NODE: &str = "manager";

/// For open requests when the program stops.
const GRACE: Duration = Duration::from_secs(5);

/// How often it is written down that those who attend are alive.
const SIGHTINGS_EVERY: Duration = Duration::from_secs(60);

/// Of the REST API. CI's clients and a proxy before it ask; an order is a few kilobytes, and answered in milliseconds.
const REST_LIMITS: Bounds =
    Bounds { connections: 128, head: Duration::from_secs(10), answer: Duration::from_secs(30) };

/// A connection whose other end vanished is noticed after these two together.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_DEADLINE: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum ManagerError {
    #[error("no {role} {node} ever joined")]
    NoMember { role: Role, node: NodeName },
    #[error("the configuration: {0}")]
    Config(String),
    #[error(transparent)]
    ConfigFile(#[from] ConfigError),
    #[error("there is no {}: name the manager's configuration with --config", path.display())]
    NoConfig { path: PathBuf },
    #[error(
        "no manager has been started in {} yet: start it first, or name the configuration of the one that is meant with --config",
        root.display()
    )]
    NeverStarted { root: PathBuf },
    #[error("{} belongs to {owner}, who alone may do this: as root, type `runuser -u {owner} -- {command}`", root.display())]
    Owner { root: PathBuf, owner: String, command: String },
    #[error("{}: {source}", path.display())]
    Root { path: PathBuf, source: io::Error },
    #[error("can't listen on {address}: {source}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error(
        "{} is gone: put it back from a backup; without one remove {} as well, and have every member join again",
        ca.display(), database.display()
    )]
    NoCa { ca: PathBuf, database: PathBuf },
    #[error(
        "{role} {node} was there {seconds} seconds ago{}: stop it and try again in a minute and a half, or add --force; two machines of \
         one name keep throwing each other out",
        at(address)
    )]
    StillThere { role: Role, node: NodeName, seconds: u64, address: String },
    #[error("{0}")]
    Token(&'static str),
    #[error("there is an API token {0} already: give it another name, or remove that one first")]
    SameName(String),
    #[error(transparent)]
    Access(#[from] AccessError),
    #[error("there are {TOKENS_MAX} API tokens: remove some")]
    TooManyTokens,
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// Where a member was, if it said so.
fn at(address: &str) -> String {
    if address.is_empty() { String::new() } else { format!(" at {address}") }
}

/// A running manager. It runs until [`Handle::stop`].
pub struct Handle {
    grpc: SocketAddr,
    http: SocketAddr,
    root: Arc<Root>,
    api_token: Option<String>,
    tasks: Tasks,
}

impl Handle {
    /// Where members reach it, with the port that the kernel chose.
    pub fn grpc_address(&self) -> SocketAddr {
        self.grpc
    }

    /// Where the REST API is.
    pub fn http_address(&self) -> SocketAddr {
        self.http
    }

    /// A join token; it blocks for a write to the database.
    pub fn mint_token(&self, role: Role, life: Duration, uses: u32) -> Result<JoinToken, ManagerError> {
        self.root.mint_token("this program", role, life, uses)
    }

    /// The first API token; empty if its file was taken away.
    pub fn api_token(&self) -> &str {
        self.api_token.as_deref().unwrap_or_default()
    }

    pub fn tasks(&self) -> &Tasks {
        &self.tasks
    }

    /// Ends all streams and requests, and waits for that.
    pub async fn stop(self) {
        self.tasks.stop(GRACE).await;
    }
}

/// Opens the folder, listens and serves. When it returns, the manager can be reached.
pub async fn start(config: Config) -> Result<Handle, ManagerError> {
    let life = config.certificate_life()?;
    let opened = config.clone();
    let (root, api_token) = blocking(move || {
        let root = Root::open(&opened)?;
        let api_token = root.first_api_token(&opened.root)?;
        Ok((Arc::new(root), api_token))
    })
    .await?;
    let grpc = bind(config.grpc_listen).await?;
    let http = bind(config.http_listen).await?;
    let tasks = Tasks::new();
    let store = root.store.clone();
    let roster = Roster::new();
    let unfinished = store.call(|storage| storage.unfinished_preheats()).await?;
    let preheats = Preheats::start(store.clone(), roster.clone(), unfinished, &tasks);
    let limits = Limits::load(store.clone()).await?;
    let metrics = Arc::<Metrics>::default();
    let numbers = Numbers::default();
    numbers.add(|registry| metrics.register(&store, &roster, registry));
    numbers.serve(config.metrics_listen, &tasks).await;
    let http_address = local(&http, config.http_listen)?;
    let api = Api {
        root: root.clone(),
        store: store.clone(),
        roster: roster.clone(),
        preheats: preheats.clone(),
        limits: limits.clone(),
    };
    serve_http(http, Arc::new(api), metrics.clone(), &tasks);
    let certificates = IdentityService {
        authority: root.authority.clone(),
        store: store.clone(),
        life,
        metrics: metrics.clone(),
    };
    let cluster = ClusterService {
        store: store.clone(),
        roster: roster.clone(),
        preheats,
        limits,
        tasks: tasks.clone(),
    };
    let mut listener =
        identity(&root, life, &tasks)?.listener(grpc, &[b"h2"], ClientAuth::Optional, &tasks)?;
    serve_grpc(listener.grpc(), certificates, cluster, &tasks);
    tasks.spawn_until_stop("sightings", write_sightings(store.clone(), roster));
    numbers.ready_while(move || store.blocking().healthy().map_err(|error| error.to_string()));
    tracing::info!(grpc = %listener.address(), http = %http_address, cluster = config.cluster, "the manager is up");
    Ok(Handle { grpc: listener.address(), http: http_address, root, api_token, tasks })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ManagerError> + Send + 'static,
) -> Result<T, ManagerError> {
    tokio::task::spawn_blocking(work).await.expect("opening the folder does not panic")
}

async fn bind(address: SocketAddr) -> Result<TcpListener, ManagerError> {
    TcpListener::bind(address).await.map_err(|source| ManagerError::Listen { address, source })
}

fn local(listener: &TcpListener, wanted: SocketAddr) -> Result<SocketAddr, ManagerError> {
    listener.local_addr().map_err(|source| ManagerError::Listen { address: wanted, source })
}

/// The manager is a member of its own cluster, and keeps its certificate fresh itself.
fn identity(root: &Root, life: Duration, tasks: &Tasks) -> Result<Identity, ManagerError> {
    let node = NODE.parse().expect("the manager's name is a name");
    let member = Member { cluster: root.authority.cluster().clone(), role: Role::Manager, node };
    let identity = Identity::issued_by(&root.authority, &member, life)?;
    identity.keep_reissued(root.authority.clone(), life, tasks);
    Ok(identity)
}

fn serve_http(listener: TcpListener, api: Arc<Api>, metrics: Arc<Metrics>, tasks: &Tasks) {
    let router = http::router(api).layer(from_fn_with_state(metrics, count));
    tasks.spawn("REST", darter_daemon::http::serve(listener, router, REST_LIMITS, tasks.token()));
}

fn serve_grpc(incoming: Incoming, certificates: IdentityService, cluster: ClusterService, tasks: &Tasks) {
    let (stop, failed) = (tasks.token(), tasks.token());
    let server = Server::builder()
        .http2_keepalive_interval(Some(PING_EVERY))
        .http2_keepalive_timeout(Some(PING_DEADLINE))
        .add_service(IdentityServer::new(certificates))
        .add_service(ClusterServer::new(cluster));
    tasks.spawn("gRPC", async move {
        if let Err(error) = server.serve_with_incoming_shutdown(incoming, stop.cancelled_owned()).await {
            tracing::error!(%error, "gRPC ended");
            failed.cancel();
        }
    });
}

/// Never returns. It keeps `last_seen` right within a minute, should the manager die.
async fn write_sightings(store: Store, roster: Roster) {
    let mut every = interval(SIGHTINGS_EVERY);
    loop {
        every.tick().await;
        let sightings = roster.sightings(now());
        if let Err(error) = store.call(move |storage| storage.record_sightings(&sightings)).await {
            tracing::warn!(%error, "can't write down who is alive");
        }
    }
}
