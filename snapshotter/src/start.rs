//! Putting the daemon together, and taking it apart.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use darter_daemon::tasks::Tasks;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::admin::{self, Admin, LazyParts};
use crate::containerd::{ContainerdClient, SnapshotsServer, SnapshotsService, channel};
use crate::cri::{Credentials, ImageService};
use crate::fs::{FileSystem, Limits};
use crate::fuse::{self, MountError, Session};
use crate::lazy::ports::{Blobs, LayerMesh, Registries};
use crate::lazy::{self, Lazy};
use crate::node::Node;
use crate::snapshot::{Overlay, SnapshotError, Snapshots};
use crate::socket;

/// How long requests that are being answered may hold up a stop.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// What can be set.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where snapshots and their records lie.
    pub root: PathBuf,
    /// The socket for containerd, and for CRI's image service.
    pub address: PathBuf,
    /// containerd's own socket.
    pub containerd_address: PathBuf,
    /// How long Prepare may take for all layers of an image.
    pub prepare_wait: Duration,
    /// How long Mounts may wait for the layers' maps.
    pub mount_wait: Duration,
    /// How long the answer of CRI's PullImage may be held back until the maps are there.
    pub pull_wait: Duration,
}

/// The mesh and the registries; [`Peer::new`] makes it of a running mesh.
pub struct Peer {
    pub mesh: Arc<dyn LayerMesh>,
    pub registries: Arc<dyn Registries>,
    pub blobs: Arc<dyn Blobs>,
    pub credentials: Arc<dyn Credentials>,
}

/// What the daemon is built on.
pub struct Deps {
    /// `None`: there is no mesh, and every snapshot is plain.
    pub peer: Option<Peer>,
    pub tasks: Tasks,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("{}: {error}", path.display())]
    Place { path: PathBuf, error: io::Error },
    #[error(transparent)]
    Snapshots(#[from] SnapshotError),
    #[error("cannot mount the layers: {0}")]
    Mount(#[from] MountError),
}

/// The running daemon. Dropping it leaves it running until its tasks stop; only [`Handle::stop`] stops in order.
pub struct Handle {
    serving: CancellationToken,
    served: tokio_util::task::TaskTracker,
    sockets: [PathBuf; 2],
    session: Option<Session>,
}

/// Opens the records, mounts, shows what was shown before, then serves. Neither containerd nor the mesh need be there.
pub async fn start(options: Options, deps: Deps) -> Result<Handle, StartError> {
    let Deps { peer, tasks } = deps;
    let place = |path: &PathBuf| {
        let path = path.clone();
        move |error| StartError::Place { path, error }
    };
    std::fs::create_dir_all(&options.root).map_err(place(&options.root))?;
    let overlay = Overlay::probe(&options.root);
    tracing::debug!(?overlay, "what this kernel's overlayfs takes");
    let snapshots = Arc::new(Snapshots::open(&options.root, overlay)?);
    let channel = channel(options.containerd_address.clone());
    let (lazy, session, credentials) = match peer {
        Some(peer) => {
            let credentials = peer.credentials.clone();
            let (parts, session) = start_lazy(&options, &snapshots, channel.clone(), peer, &tasks)?;
            (Some(Arc::new(parts)), Some(session), Some(credentials))
        }
        None => {
            tracing::warn!("no mesh is configured: every snapshot is plain, nothing is pulled lazily");
            (None, None, None)
        }
    };
    let engine = lazy.as_ref().map(|parts| parts.lazy.clone());
    let node = Arc::new(Node::new(snapshots.clone(), engine.clone()));
    let images = ImageService::new(channel, engine, credentials.clone(), options.pull_wait);
    let admin_socket = options.root.join("admin.sock");
    let sockets = [options.address.clone(), admin_socket.clone()];
    let handle =
        Handle { serving: tasks.token().child_token(), served: Default::default(), sockets, session };
    let listener = socket::listen(&options.address).await.map_err(place(&options.address))?;
    let router =
        Server::builder().add_service(SnapshotsServer::new(SnapshotsService::new(node))).add_service(images);
    handle.spawn(&tasks, "serve containerd", {
        let stop = handle.serving.clone().cancelled_owned();
        async move { router.serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop).await }
    });
    let listener = socket::listen(&admin_socket).await.map_err(place(&admin_socket))?;
    let router = admin::router(Admin { lazy, credentials, mount: snapshots.merged().display().to_string() });
    handle.spawn(&tasks, "serve administration", {
        let stop = handle.serving.clone().cancelled_owned();
        async move { axum::serve(listener, router).with_graceful_shutdown(stop).await }
    });
    tracing::info!(address = %options.address.display(), root = %options.root.display(), "ready");
    socket::notify_ready();
    Ok(handle)
}

fn start_lazy(
    options: &Options,
    snapshots: &Arc<Snapshots>,
    channel: tonic::transport::Channel,
    peer: Peer,
    tasks: &Tasks,
) -> Result<(LazyParts, Session), StartError> {
    let runtime = tokio::runtime::Handle::current();
    let fs = FileSystem::new(snapshots.records().clone(), runtime, Limits::default());
    let containerd = Arc::new(ContainerdClient::new(channel, peer.blobs));
    let deps = lazy::Deps {
        snapshots: snapshots.clone(),
        fs: fs.clone(),
        mesh: peer.mesh,
        registries: peer.registries,
        containerd: containerd.clone(),
        tasks: tasks.clone(),
    };
    let waits = lazy::Options { prepare_wait: options.prepare_wait, mount_wait: options.mount_wait };
    let place = snapshots.merged();
    let session = Session::mount(fs.clone(), &place, &fuse::Options::default())?;
    let (ended, program) = (session.ended(), tasks.token());
    tasks.spawn("watch the mount", async move {
        if program.run_until_cancelled(ended).await.is_some() {
            tracing::error!("the layers are no longer mounted; the program stops");
            program.cancel();
        }
    });
    let lazy = Lazy::start(waits, deps)?;
    Ok((LazyParts { lazy, fs, containerd }, session))
}

impl Handle {
    fn spawn<E: std::fmt::Display>(
        &self,
        tasks: &Tasks,
        name: &'static str,
        work: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        let (served, program) = (self.served.token(), tasks.token());
        tasks.spawn(name, async move {
            let _served = served;
            if let Err(error) = work.await {
                tracing::error!(%error, name, "can't go on serving; the program stops");
                program.cancel();
            }
        });
    }

    /// Stops serving, then unmounts. Containers that use lazy images lose their files.
    pub async fn stop(self) {
        self.serving.cancel();
        self.served.close();
        let _ = tokio::time::timeout(STOP_GRACE, self.served.wait()).await;
        for socket in &self.sockets {
            // It may be gone already; the next start takes care of what stays.
            let _ = std::fs::remove_file(socket);
        }
        if let Some(session) = self.session {
            // Unmounting may wait for requests that our own threads answer.
            let _ = tokio::task::spawn_blocking(move || session.stop()).await;
        }
    }
}
