//! The life of the program: start, join, serve, stop.
//!
//! A node that has a certificate, expired or not, begins with what is on its disk, and needs nobody for it. One that has none and
//! can't join, for want of a manager or of a token, serves plain snapshots until it can: containers start as they would without Darter.

use std::time::Duration;

use darter_daemon::numbers::Numbers;
use darter_daemon::shutdown;
use darter_daemon::tasks::Tasks;
use darter_mesh::assemble::AssembleError;

use crate::config::Config;
use crate::membership::Membership;
use crate::outlive::RootLock;
use crate::start::{Deps, Handle, StartError, start};

/// How long the start waits for the mesh. A node that has a certificate waits for no manager.
const JOIN_WAIT: Duration = Duration::from_secs(5);

/// How long the program's tasks may take to end.
const STOP_GRACE: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("can't start: {0}")]
    Start(#[from] StartError),
    #[error("can't join the mesh: {0}")]
    Join(#[from] AssembleError),
}

/// Runs until it is told to stop, or one of `tasks` fails.
pub async fn run(config: &Config, tasks: &Tasks) -> Result<(), RunError> {
    darter_daemon::run::keep_private();
    let mut handle = None;
    let outcome = tokio::select! {
        outcome = serve(config, tasks, &mut handle) => outcome,
        () = shutdown::wanted(tasks) => Ok(()),
    };
    if let Some(handle) = handle {
        handle.stop().await;
    }
    tasks.clone().stop(STOP_GRACE).await;
    outcome
}

/// Ends only when it fails. What runs is left in `handle`.
async fn serve(config: &Config, tasks: &Tasks, handle: &mut Option<Handle>) -> Result<(), RunError> {
    // Before ports and store: a second daemon on one root ends with words about that.
    let root = RootLock::take(&config.root).await.map_err(StartError::Root)?;
    let numbers = Numbers::default();
    numbers.serve(config.metrics_listen, tasks).await;
    let membership = Membership::default();
    let mut joining = std::pin::pin!(config.peer(tasks, &numbers, &membership));
    let joined = tokio::time::timeout(JOIN_WAIT, &mut joining).await;
    let (late, peer) = match joined {
        Ok(peer) => (false, peer?),
        Err(_) => (true, None),
    };
    let deps =
        Deps { root, peer, tasks: tasks.clone(), numbers: numbers.clone(), membership: membership.clone() };
    let running = handle.insert(start(config.options(), deps).await?);
    if late {
        numbers.not_ready("the node is in no mesh yet, and its log says why: every snapshot is plain");
    } else {
        numbers.ready();
    }
    if late && let Some(peer) = joining.await? {
        running.attach(peer).await?;
        numbers.ready();
        tracing::info!("joined the mesh: images are pulled lazily from now on");
    }
    std::future::pending().await
}
