//! Putting the daemon together, and taking it apart.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use darter_daemon::notify;
use darter_daemon::numbers::Numbers;
use darter_daemon::tasks::Tasks;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::{Channel, Server};

use crate::admin::{self, Admin};
use crate::containerd::{ContainerdClient, SnapshotsServer, SnapshotsService, channel};
use crate::cri::{Credentials, ImageService};
use crate::fs::{FileSystem, Limits};
use crate::fuse::{self, MountError, Mounted, Mountpoint, Session};
use crate::keep::{KeepError, Launch};
use crate::lazy::ports::{Blobs, LayerMesh, Registries};
use crate::lazy::{self, Lazy};
use crate::local::Grants;
use crate::membership::Membership;
use crate::metrics::{self, Metrics};
use crate::node::Node;
use crate::outlive::{Outliving, RootError, RootLock};
use crate::snapshot::{Overlay, SnapshotError, Snapshots, Via};
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
    /// How long a container's read waits for pieces, and a look-up for maps.
    pub read_wait: Duration,
    /// Bytes that the merge of an image's layers may take; images that take more are left to containerd.
    pub tree_memory: u64,
    /// Who keeps the mounts when this process ends, where systemd doesn't. `None`: nobody, they end with it.
    pub holder: Option<Launch>,
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
    /// Of [`Options::root`].
    pub root: RootLock,
    /// `None`: there is no mesh, and every snapshot is plain.
    pub peer: Option<Peer>,
    pub tasks: Tasks,
    /// What the program tells; the daemon adds its own.
    pub numbers: Numbers,
    /// How the node stands with its cluster, for those who ask the daemon.
    pub membership: Membership,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("{}: {error}", path.display())]
    Place { path: PathBuf, error: io::Error },
    #[error(transparent)]
    Root(#[from] RootError),
    #[error(transparent)]
    Keep(#[from] KeepError),
    #[error(transparent)]
    Snapshots(#[from] SnapshotError),
    #[error("cannot mount the layers: {0}")]
    Mount(#[from] MountError),
}

/// The lazy half, once there is a mesh.
pub(crate) type LazySlot = Arc<OnceLock<LazyParts>>;

/// What the lazy half consists of, for those who ask it.
pub(crate) struct LazyParts {
    pub mesh: Arc<dyn LayerMesh>,
    pub lazy: Arc<Lazy>,
    pub fs: Arc<FileSystem>,
    pub containerd: Arc<ContainerdClient>,
    pub credentials: Arc<dyn Credentials>,
}

/// The running daemon. Dropping it leaves it running until its tasks stop; only [`Handle::stop`] stops in order.
pub struct Handle {
    options: Options,
    tasks: Tasks,
    snapshots: Arc<Snapshots>,
    channel: Channel,
    slot: LazySlot,
    serving: CancellationToken,
    served: TaskTracker,
    session: Option<Session>,
    /// Locked before anything else is opened.
    _root: RootLock,
    outliving: Option<Outliving>,
    numbers: Numbers,
    membership: Membership,
}

/// Opens the records, mounts, shows what was shown before, then serves. Neither containerd nor the mesh need be there. Whether that
/// is to be called ready, who has started it tells the numbers.
pub async fn start(options: Options, deps: Deps) -> Result<Handle, StartError> {
    let overlay = Overlay::probe(&options.root);
    tracing::debug!(?overlay, "what this kernel's overlayfs takes");
    let (mut handle, peer) = Handle::open(options, overlay, deps).await?;
    match peer {
        Some(peer) => handle.attach(peer).await?,
        None => tracing::warn!("in no mesh: every snapshot is plain, nothing is pulled lazily"),
    }
    handle.serve_containerd().await?;
    handle.serve_administration().await?;
    tracing::info!(address = %handle.options.address.display(), root = %handle.options.root.display(), "ready");
    notify::ready(&handle.tasks);
    Ok(handle)
}

fn place(path: &Path) -> impl FnOnce(io::Error) -> StartError {
    let path = path.to_owned();
    move |error| StartError::Place { path, error }
}

fn mountpoints(snapshots: &Snapshots) -> [Mountpoint; 2] {
    Via::ALL.map(|via| Mountpoint { path: snapshots.merged(via), xattrs: via == Via::Full })
}

impl Handle {
    /// What is there before anything is served, and the mesh to attach.
    async fn open(
        options: Options,
        overlay: Overlay,
        deps: Deps,
    ) -> Result<(Handle, Option<Peer>), StartError> {
        let Deps { root, peer, tasks, numbers, membership } = deps;
        let outliving = match options.holder.clone() {
            Some(launch) => Some(Outliving::open(&options.root, launch).await?),
            None => None,
        };
        let handle = Handle {
            snapshots: Arc::new(Snapshots::open(&options.root, overlay)?),
            channel: channel(options.containerd_address.clone()),
            slot: LazySlot::default(),
            serving: tasks.token().child_token(),
            served: TaskTracker::new(),
            session: None,
            _root: root,
            outliving,
            options,
            tasks,
            numbers,
            membership,
        };
        Ok((handle, peer))
    }

    /// Joins a mesh that was not there at the start: from now on images are pulled lazily. Once is enough; a second time
    /// changes nothing. Waits half a minute at most for a holder that is late, while reads are answered.
    pub async fn attach(&mut self, peer: Peer) -> Result<(), StartError> {
        if self.session.is_some() {
            return Ok(());
        }
        let runtime = tokio::runtime::Handle::current();
        let (wait, tree_memory) = (self.options.read_wait, self.options.tree_memory);
        let limits = Limits { map_wait: wait, read_wait: wait, tree_memory, ..Limits::default() };
        let fs = FileSystem::new(self.snapshots.records().clone(), runtime, limits);
        let containerd = Arc::new(ContainerdClient::new(self.channel.clone(), peer.blobs));
        let metrics = Arc::<Metrics>::default();
        self.numbers.add(|registry| metrics::register(&metrics, &fs, registry));
        let deps = lazy::Deps {
            snapshots: self.snapshots.clone(),
            fs: fs.clone(),
            mesh: peer.mesh.clone(),
            registries: peer.registries,
            containerd: containerd.clone(),
            tasks: self.tasks.clone(),
            metrics: metrics.clone(),
        };
        let waits =
            lazy::Options { prepare_wait: self.options.prepare_wait, mount_wait: self.options.mount_wait };
        let lazy = Lazy::start(waits, deps)?;
        let (session, names) = self.serve_mounts(&fs)?;
        self.watch(&session);
        let session = self.session.insert(session);
        if let Some(outliving) = &self.outliving {
            session.set_outlives(outliving.keep(names).await);
        }
        // Nobody else sets it: the session above is there once.
        let _ =
            self.slot.set(LazyParts { mesh: peer.mesh, lazy, fs, containerd, credentials: peer.credentials });
        Ok(())
    }

    /// What was shown before is shown already, so that what the kernel still knows is found. With the names of what is yet to be kept.
    fn serve_mounts(&self, fs: &Arc<FileSystem>) -> Result<(Session, Vec<String>), StartError> {
        let (points, options) = (mountpoints(&self.snapshots), fuse::Options::default());
        let Some(outliving) = &self.outliving else {
            return Ok((Session::mount(fs, &points, &options)?, Vec::new()));
        };
        let (mounts, names) = outliving.mount(&points, self.snapshots.records())?;
        // Whoever had what was taken over has it still: containers keep it also if this process ends before it is kept anew.
        let outlives = mounts.iter().any(Mounted::is_resumed);
        if outlives {
            fs.recover(self.snapshots.chains_in_use()?);
        }
        Ok((Session::serve(fs, mounts, outlives, &options)?, names))
    }

    /// Without the mounts no container could go on.
    fn watch(&self, session: &Session) {
        let (ended, serving, program) = (session.ended(), self.serving.clone(), self.tasks.token());
        self.tasks.spawn("watch the mounts", async move {
            // At a stop they end because we end them.
            if serving.run_until_cancelled(ended).await.is_some() {
                tracing::error!("the layers are no longer mounted; the program stops");
                program.cancel();
            }
        });
    }

    async fn serve_containerd(&self) -> Result<(), StartError> {
        let path = &self.options.address;
        let listener = socket::listen(path).await.map_err(place(path))?;
        let node = Arc::new(Node::new(self.snapshots.clone(), self.slot.clone()));
        let images = ImageService::new(self.channel.clone(), self.slot.clone(), self.options.pull_wait);
        let router = Server::builder()
            .add_service(SnapshotsServer::new(SnapshotsService::new(node)))
            .add_service(images)
            .add_service(Grants::server(self.slot.clone()));
        let stop = self.serving.clone().cancelled_owned();
        self.spawn("serve containerd", async move {
            router.serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop).await
        });
        Ok(())
    }

    async fn serve_administration(&self) -> Result<(), StartError> {
        let path = self.admin_socket();
        let listener = socket::listen(&path).await.map_err(place(&path))?;
        let mounts =
            mountpoints(&self.snapshots).iter().map(|point| point.path.display().to_string()).collect();
        let router =
            admin::router(Admin { slot: self.slot.clone(), mounts, membership: self.membership.clone() });
        let stop = self.serving.clone().cancelled_owned();
        self.spawn("serve administration", async move {
            axum::serve(listener, router).with_graceful_shutdown(stop).await
        });
        Ok(())
    }

    fn admin_socket(&self) -> PathBuf {
        self.options.root.join("admin.sock")
    }

    fn spawn<E: std::fmt::Display>(
        &self,
        name: &'static str,
        work: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        let (served, program) = (self.served.token(), self.tasks.token());
        self.tasks.spawn(name, async move {
            let _served = served;
            if let Err(error) = work.await {
                tracing::error!(%error, name, "can't go on serving; the program stops");
                program.cancel();
            }
        });
    }

    /// Whether containers are left to the next daemon.
    fn leaves(&self) -> bool {
        let in_use = || self.snapshots.chains_in_use().map_or(true, |chains| !chains.is_empty());
        match (&self.session, &self.outliving) {
            (Some(session), _) => session.outlives() && !session.has_ended() && in_use(),
            // Without a mesh nothing was taken over: what an earlier daemon left isn't this one's to end.
            (None, Some(outliving)) => outliving.has_left() || in_use(),
            (None, None) => false,
        }
    }

    /// Stops serving. While containers use lazy images their mounts stay, for the next daemon; else they go, and whoever keeps
    /// them ends. Mounts that were not taken over stay in any case.
    pub async fn stop(self) {
        let leaves = self.leaves();
        if let Some(session) = self.session.as_ref().filter(|_| leaves) {
            session.leave();
        }
        self.serving.cancel();
        self.served.close();
        let _ = tokio::time::timeout(STOP_GRACE, self.served.wait()).await;
        for socket in [&self.options.address, &self.admin_socket()] {
            // It may be gone already; the next start takes care of what stays.
            let _ = std::fs::remove_file(socket);
        }
        if leaves {
            tracing::info!(
                "containers use lazy images: the mounts stay, and what is read waits for the next start"
            );
            return;
        }
        let (session, outliving) = (self.session, self.outliving);
        // Unmounting may wait for requests that our own threads answer.
        let end = move || {
            session.into_iter().for_each(Session::stop);
            outliving.iter().for_each(Outliving::end);
        };
        let _ = tokio::task::spawn_blocking(end).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keep::testing::{hold_below, kept_below};
    use std::os::unix::net::UnixStream;

    /// As after a start in which no mesh could be joined. No other holder can be started.
    async fn without_a_mesh(root: &Path) -> Handle {
        let options = Options {
            root: root.to_owned(),
            address: root.join("s.sock"),
            containerd_address: root.join("c.sock"),
            prepare_wait: Duration::ZERO,
            mount_wait: Duration::ZERO,
            pull_wait: Duration::ZERO,
            read_wait: Duration::ZERO,
            tree_memory: 0,
            holder: Some(Launch { program: root.join("none"), word: "hold" }),
        };
        let deps = Deps {
            root: RootLock::take(root).await.unwrap(),
            peer: None,
            tasks: Tasks::new(),
            numbers: Numbers::default(),
            membership: Membership::default(),
        };
        Handle::open(options, Overlay::NEITHER, deps).await.unwrap().0
    }

    #[tokio::test]
    async fn a_stop_without_a_mesh_leaves_what_an_earlier_daemon_left() {
        let root = tempfile::tempdir().unwrap();
        let (near, _far) = UnixStream::pair().unwrap();
        let holder = hold_below(root.path(), &[("m", near.into())]);
        for _ in 0..2 {
            without_a_mesh(root.path()).await.stop().await;
            assert!(kept_below(root.path()).contains_key("m"));
        }
        assert!(!holder.is_finished());
    }

    #[tokio::test]
    async fn a_stop_without_a_mesh_ends_a_holder_that_keeps_nothing() {
        let root = tempfile::tempdir().unwrap();
        let holder = hold_below(root.path(), &[]);
        without_a_mesh(root.path()).await.stop().await;
        assert!(!root.path().join("holder.sock").exists());
        tokio::task::spawn_blocking(|| holder.join()).await.unwrap().unwrap().unwrap();
    }
}
