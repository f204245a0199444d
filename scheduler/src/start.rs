//! Starting and stopping.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use darter_daemon::numbers::Numbers;
use darter_daemon::tasks::Tasks;
use darter_identity::attend::{self, Hello};
use darter_identity::enrol::{self, EnrolError};
use darter_identity::{ClientAuth, Identity, IdentityError, Incoming};
use darter_proto::v1::scheduler_server::SchedulerServer;
use darter_types::Role;
use tokio::net::TcpListener;
use tonic::transport::Server;

use crate::Config;
use crate::driver::Driver;
use crate::grpc::Service;
use crate::metrics::Metrics;
use crate::recorder::Recorder;

/// For streams to end when the scheduler stops.
const GRACE: Duration = Duration::from_secs(3);

/// A peer that vanished without a word is noticed after these two together.
const PING_EVERY: Duration = Duration::from_secs(5);
const PING_DEADLINE: Duration = Duration::from_secs(5);

/// Why the scheduler did not start.
#[derive(Debug, thiserror::Error)]
pub enum SchedulerError {
    #[error(transparent)]
    Enrol(#[from] EnrolError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("can't listen on {address}: {source}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("can't write to {}: {source}", path.display())]
    Record { path: PathBuf, source: io::Error },
}

/// A scheduler that runs.
pub struct Handle {
    address: SocketAddr,
    metrics: Arc<Metrics>,
    tasks: Tasks,
}

impl Handle {
    /// Where it listens, with the port that the kernel chose.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops everything that runs on the tasks that it was started with.
    pub async fn stop(self) {
        self.tasks.stop(GRACE).await;
    }
}

/// Joins by token, attends the manager, and serves until `tasks` stop.
pub async fn start(config: Config, tasks: Tasks) -> Result<Handle, SchedulerError> {
    let numbers = Numbers::default();
    numbers.serve(config.metrics_listen, &tasks).await;
    let identity = config.enrolment().join(Role::Scheduler).await?;
    identity.keep_fresh(config.manager.clone(), &tasks);
    let handle = start_with_identity(&config, identity.clone(), tasks.clone()).await?;
    numbers.add(|registry| handle.metrics.register(registry));
    numbers.ready();
    let hello = Hello {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        address: enrol::advertised(&config.advertise, handle.address, &config.manager).await,
        zone: String::new(),
    };
    tracing::info!(node = %identity.member().node, address = hello.address, "the scheduler is ready");
    // It only has to be listed: who else is there, it learns from its streams.
    attend::attend(&identity, config.manager, hello, &tasks);
    Ok(handle)
}

/// Serves as `identity` until `tasks` stop, and tells no manager: for `standalone`, which lists it itself, and for tests.
pub async fn start_with_identity(
    config: &Config,
    identity: Identity,
    tasks: Tasks,
) -> Result<Handle, SchedulerError> {
    let recorder = recorder(config, &tasks)?;
    let listen = |source| SchedulerError::Listen { address: config.listen, source };
    let tcp = TcpListener::bind(config.listen).await.map_err(listen)?;
    let mut listener = identity.listener(tcp, &[b"h2"], ClientAuth::Required, &tasks)?;
    let driver = Driver::start(recorder, &tasks);
    let metrics = driver.metrics().clone();
    let service = Service::new(identity.member().node.clone(), driver, tasks.clone());
    tasks.spawn("serve", serve(service, listener.grpc(), tasks.clone()));
    Ok(Handle { address: listener.address(), metrics, tasks })
}

fn recorder(config: &Config, tasks: &Tasks) -> Result<Option<Recorder>, SchedulerError> {
    if config.record.as_os_str().is_empty() {
        return Ok(None);
    }
    let recorder = Recorder::create(&config.record, tasks);
    recorder.map(Some).map_err(|source| SchedulerError::Record { path: config.record.clone(), source })
}

async fn serve(service: Service, incoming: Incoming, tasks: Tasks) {
    let served = Server::builder()
        .http2_keepalive_interval(Some(PING_EVERY))
        .http2_keepalive_timeout(Some(PING_DEADLINE))
        .add_service(SchedulerServer::new(service))
        .serve_with_incoming_shutdown(incoming, tasks.token().cancelled_owned())
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "serving ended");
    }
}
