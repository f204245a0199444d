//! FUSE: the binding between the kernel and [`crate::fs`]. It mounts, takes requests, and translates; it decides nothing.
//!
//! Nothing else knows FUSE's messages, and no crate stands between: mounting and the handshake are a few dozen lines here,
//! while the crate that was looked at runs a loop that can't be interrupted, can't be started on a live descriptor, and
//! unmounts in ways that we then have to undo (`docs/decisions/0004-no-fuse-crate.md`).
//!
//! What holds: an answer may come from any thread and in any order; a request that waits holds no thread; when the process
//! behind it is killed, it is answered with EINTR, and goes on when that gets any other signal, as on a disk; a request is never left without an answer.
//!
//! One file system may be mounted at several places, each a connection of its own: with extended attributes, or without
//! any, where the kernel stops asking for them (`docs/decisions/0006-a-mount-without-xattrs.md`).

mod connection;
mod device;
mod dying;
mod ending;
mod notes;
mod pending;
mod wire;
mod workers;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;
use std::time::Duration;

use connection::Connection;
use darter_daemon::priority;
pub use device::{Live, MountError, OwnMount, mounts_below};
use ending::Ending;
use notes::{Notes, Slot};
use pending::Pending;
use workers::Workers;

use crate::fs::{FileSystem, Notice, NoticeSink};

/// Notices that may wait for the kernel. One too many is dropped: the kernel then keeps an entry that leads nowhere, until
/// it needs the memory.
const NOTICES_MAX: usize = 1024;
/// How long a stop waits for those who still use the mount, before it ends the connection under them.
const STOP_GRACE: Duration = Duration::from_secs(1);

/// How many threads serve the mounts.
#[derive(Debug, Clone)]
pub struct Options {
    /// Of each mount: they take requests and answer what is known.
    pub threads: usize,
    /// Of all together: they read pieces from the disk and decode them.
    pub workers: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { threads: 2, workers: 4 }
    }
}

/// Where a file system is mounted, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mountpoint {
    pub path: PathBuf,
    /// Whether files have their extended attributes there. Where they have none the kernel asks for one once, and never
    /// again, whatever the file: an overlay above would ask several times for each file of each new container.
    pub xattrs: bool,
}

/// A live connection to the kernel, on which the handshake has been done: by this process, or by an earlier one.
pub struct Mounted {
    point: Mountpoint,
    descriptor: OwnedFd,
    live: Live,
    /// Where the kernel sends nothing again.
    notes: Option<Notes>,
    is_resumed: bool,
}

impl Mounted {
    /// Mounts at `point`. What an earlier process left mounted there is taken away first. Waits for the kernel for a moment.
    pub fn fresh(point: &Mountpoint) -> Result<Mounted, MountError> {
        let (descriptor, live) = device::mount_at(&point.path)?;
        tracing::info!(place = %point.path.display(), xattrs = point.xattrs, "mounted");
        let notes = if live.resends() { None } else { new_notes() };
        Ok(Mounted { point: point.clone(), descriptor, live, notes, is_resumed: false })
    }

    /// Goes on with a mount of an earlier process, and with its notes; `None` if that is no longer at `point`, or has ended.
    pub fn resumed(
        point: &Mountpoint,
        descriptor: OwnedFd,
        live: Live,
        notes: Option<OwnedFd>,
    ) -> Option<Mounted> {
        let there = device::is_there(&point.path, live.connection, descriptor.as_fd());
        let notes = || match notes.map(Notes::open) {
            _ if live.resends() => None,
            Some(Ok(notes)) => Some(notes),
            lost => {
                let error = lost.and_then(Result::err);
                tracing::warn!(?error, "no notes: requests that were being answered are lost");
                new_notes()
            }
        };
        there.then(|| Mounted { point: point.clone(), descriptor, live, notes: notes(), is_resumed: true })
    }

    /// What the next process needs to know.
    pub fn live(&self) -> Live {
        self.live
    }

    /// What the next process needs to have.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    /// What the next process needs as well, if there is something.
    pub fn notes(&self) -> Option<BorrowedFd<'_>> {
        self.notes.as_ref().map(Notes::descriptor)
    }

    pub fn is_resumed(&self) -> bool {
        self.is_resumed
    }

    fn unanswered(&self) -> io::Result<Unanswered> {
        Ok(match &self.notes {
            _ if !self.is_resumed => Unanswered::Nothing,
            None if self.live.resends() => Unanswered::WithKernel,
            None => Unanswered::Nothing,
            Some(notes) => {
                let (slots, requests) = notes.left()?;
                Unanswered::Noted { slots, requests }
            }
        })
    }
}

fn new_notes() -> Option<Notes> {
    let lost = "requests can't be noted: they will be lost if this process is killed";
    Notes::new().inspect_err(|error| tracing::error!(%error, lost)).ok()
}

/// What the last process had read and not answered.
enum Unanswered {
    Nothing,
    /// The kernel sends it again.
    WithKernel,
    Noted {
        slots: Vec<Slot>,
        requests: Vec<Vec<u8>>,
    },
}

/// The threads that serve live connections, wherever they came from.
pub struct Loop {
    connections: Vec<Arc<Connection>>,
    workers: Arc<Workers>,
    ending: Ending,
    /// As long as they are held, notices go to the connections.
    sinks: Vec<NoticeSink>,
    threads: Vec<JoinHandle<()>>,
    /// Disconnected when the last thread that takes requests has ended.
    over: Receiver<()>,
}

impl Loop {
    /// Serves `fs` on all of `mounts`; when one of them ends, so does the whole.
    pub fn start(mounts: Vec<Mounted>, fs: &Arc<FileSystem>, options: &Options) -> io::Result<Loop> {
        let ending = Ending::default();
        let workers = Arc::new(Workers::start(options.workers, &ending)?);
        let connect = |mounted: Mounted| {
            Arc::new(Connection {
                buffer_size: mounted.live.buffer_size(),
                device: mounted.descriptor,
                xattrs: mounted.point.xattrs,
                can_wait: mounted.live.resends() || mounted.notes.is_some(),
                fs: fs.clone(),
                workers: workers.clone(),
                runtime: fs.runtime().clone(),
                ending: ending.clone(),
                pending: Arc::new(Pending::new(mounted.notes)),
            })
        };
        let unanswered = mounts.iter().map(Mounted::unanswered).collect::<io::Result<Vec<_>>>()?;
        let connections: Vec<_> = mounts.into_iter().map(connect).collect();
        // Before anything is read here, so that only what the last process has read comes again.
        for (connection, unanswered) in connections.iter().zip(unanswered) {
            connection.go_on_with(unanswered)?;
        }
        let (alive, over) = mpsc::channel();
        let (sinks, threads) = (Vec::new(), Vec::new());
        let mut running = Loop { connections, workers, ending, sinks, threads, over };
        for connection in running.connections.clone() {
            for index in 0..options.threads {
                let (connection, alive) = (connection.clone(), alive.clone());
                running.thread(format!("fuse-{index}"), move || {
                    let _alive = alive;
                    priority::answer_soon();
                    connection.serve();
                })?;
            }
            running.start_notices(connection)?;
        }
        Ok(running)
    }

    fn thread(&mut self, name: String, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let guard = self.ending.on_panic();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let _guard = guard;
            body();
        })?;
        self.threads.push(thread);
        Ok(())
    }

    /// Notices go from a thread of their own: the kernel may make it wait for a request that we still have to answer.
    fn start_notices(&mut self, connection: Arc<Connection>) -> io::Result<()> {
        let (sender, receiver) = mpsc::sync_channel(NOTICES_MAX);
        let sink: NoticeSink = Arc::new(move |notice| drop(sender.try_send(notice)));
        connection.fs.send_notices_to(&sink);
        self.sinks.push(sink);
        let name = "fuse-notices".to_owned();
        // Not joined in the end: it may be waiting in the kernel for good.
        std::thread::Builder::new().name(name).spawn(move || send_notices(&connection, &receiver)).map(drop)
    }

    /// Resolves when a connection has ended: it was unmounted by somebody, or a thread panicked.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        let ending = self.ending.clone();
        async move { ending.wait().await }
    }

    /// True if all threads that take requests have ended within `grace`.
    fn over_within(&self, grace: Duration) -> bool {
        matches!(self.over.recv_timeout(grace), Err(mpsc::RecvTimeoutError::Disconnected))
    }

    /// Ends what is left when no more requests come.
    fn finish(&mut self) {
        self.sinks.clear();
        for thread in self.threads.drain(..) {
            let _panicked = thread.join();
        }
        self.workers.stop();
    }
}

fn send_notices(connection: &Connection, notices: &Receiver<Notice>) {
    for notice in notices {
        let message = match &notice {
            Notice::Entry { parent, name } => wire::forget_entry(*parent, name),
            Notice::Inode { ino } => wire::forget_inode(*ino),
        };
        if let Err(error) = connection.notify(&message) {
            tracing::debug!(%error, ?notice, "the kernel doesn't take a notice");
        }
    }
}

/// The mounts of a [`FileSystem`], served until they are stopped or dropped.
#[derive(Default)]
pub struct Session {
    places: Vec<PathBuf>,
    numbers: Vec<u32>,
    outlives: bool,
    running: Option<Loop>,
}

impl Session {
    /// Mounts `fs` at each of `points` and starts to serve it. What an earlier process left mounted there is taken away
    /// first. All of them or, after an error, none. Waits for the kernel for a moment.
    pub fn mount(
        fs: &Arc<FileSystem>,
        points: &[Mountpoint],
        options: &Options,
    ) -> Result<Session, MountError> {
        let mut session = Session::default();
        let mut mounts = Vec::new();
        for point in points {
            let mounted = Mounted::fresh(point)?;
            // From here on, dropping the session takes it away.
            session.has(&mounted);
            mounts.push(mounted);
        }
        session.running = Some(Loop::start(mounts, fs, options).map_err(MountError::Threads)?);
        Ok(session)
    }

    /// Serves `fs` on `mounts`. With `outlives` somebody else has their descriptors as well, so that they can be
    /// [left](Session::leave); dropping the session does so, too.
    pub fn serve(
        fs: &Arc<FileSystem>,
        mounts: Vec<Mounted>,
        outlives: bool,
        options: &Options,
    ) -> Result<Session, MountError> {
        let mut session = Session::default();
        session.outlives = outlives;
        mounts.iter().for_each(|mounted| session.has(mounted));
        session.running = Some(Loop::start(mounts, fs, options).map_err(MountError::Threads)?);
        Ok(session)
    }

    fn has(&mut self, mounted: &Mounted) {
        self.places.push(mounted.point.path.clone());
        self.numbers.push(mounted.live.connection);
    }

    /// Says whether somebody else has the descriptors, once that is known.
    pub fn set_outlives(&mut self, outlives: bool) {
        self.outlives = outlives;
    }

    /// Whether it may be left to another process.
    pub fn outlives(&self) -> bool {
        self.outlives
    }

    /// Whether a mount has ended: somebody unmounted it.
    pub fn has_ended(&self) -> bool {
        let connections = self.running.iter().flat_map(|running| &running.connections);
        connections.into_iter().any(|connection| crate::keep::ended(connection.device.as_fd()))
    }

    /// From now on the next process is expected: what can be answered still is, but nothing fails any more. Whoever waits
    /// goes on waiting, for that process. The threads end with this one.
    pub fn leave(&self) {
        for connection in self.running.iter().flat_map(|running| &running.connections) {
            connection.pending.leave();
        }
    }

    /// The numbers of the connections, as `/sys/fs/fuse/connections` has them.
    pub fn numbers(&self) -> &[u32] {
        &self.numbers
    }

    /// Resolves when a mount is no longer served: it was stopped, somebody unmounted it, or a thread panicked.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        self.running.as_ref().expect("only the end takes the loop away").ended()
    }

    /// Unmounts and ends the threads; for who still uses a mount, every request fails from then on. Waits up to a few
    /// seconds, so call it where waiting is allowed.
    pub fn stop(mut self) {
        self.outlives = false;
        self.end();
    }

    fn end(&mut self) {
        for place in self.places.drain(..) {
            device::unmount(&place);
        }
        let Some(mut running) = self.running.take() else { return };
        if !running.over_within(STOP_GRACE) {
            for number in &self.numbers {
                device::abort(*number);
            }
        }
        if running.over_within(STOP_GRACE) {
            running.finish();
        } else {
            tracing::warn!("a mount is still in use and can't be aborted; it ends with this process");
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        match self.outlives {
            true => self.leave(),
            false => self.end(),
        }
    }
}
