//! FUSE: the binding between the kernel and [`crate::fs`]. It mounts, takes requests, and translates; it decides nothing.
//!
//! Nothing else knows FUSE's messages, and no crate stands between: mounting and the handshake are a few dozen lines here,
//! while the crate that was looked at runs a loop that can't be interrupted, can't be started on a live descriptor, and
//! unmounts in ways that we then have to undo (`docs/decisions/0004-no-fuse-crate.md`).
//!
//! What holds: an answer may come from any thread and in any order; a request that waits holds no thread; when the process
//! behind it is killed, it is answered with EINTR, and goes on when that gets any other signal, as on a disk; a request is never left without an answer.

mod connection;
mod device;
mod dying;
mod ending;
mod pending;
mod wire;
mod workers;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;
use std::time::Duration;

use connection::Connection;
pub use device::MountError;
use ending::Ending;
use workers::Workers;

use crate::fs::{FileSystem, Notice};

/// Notices that may wait for the kernel. One too many is dropped: the kernel then keeps an entry that leads nowhere, until
/// it needs the memory.
const NOTICES_MAX: usize = 1024;
/// How long a stop waits for those who still use the mount, before it ends the connection under them.
const STOP_GRACE: Duration = Duration::from_secs(1);

/// How many threads serve a mount.
#[derive(Debug, Clone)]
pub struct Options {
    /// They take requests and answer what is known.
    pub threads: usize,
    /// They read pieces from the disk and decode them.
    pub workers: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { threads: 2, workers: 4 }
    }
}

/// The threads that serve one live connection, wherever it came from.
pub struct Loop {
    connection: Arc<Connection>,
    threads: Vec<JoinHandle<()>>,
    /// Disconnected when the last thread that takes requests has ended.
    over: Receiver<()>,
}

impl Loop {
    /// Serves the connection behind `device`, on which the handshake has been done.
    pub fn start(device: OwnedFd, fs: Arc<FileSystem>, options: &Options) -> io::Result<Loop> {
        let ending = Ending::default();
        let workers = Workers::start(options.workers, &ending)?;
        let runtime = fs.runtime().clone();
        let pending = Arc::default();
        let connection = Arc::new(Connection { device, fs, workers, runtime, ending, pending });
        let (alive, over) = mpsc::channel();
        let mut running = Loop { connection, threads: Vec::new(), over };
        for index in 0..options.threads {
            let (connection, alive) = (running.connection.clone(), alive.clone());
            running.thread(format!("fuse-{index}"), move || {
                let _alive = alive;
                connection.serve();
            })?;
        }
        running.start_notices()?;
        Ok(running)
    }

    fn thread(&mut self, name: String, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let guard = self.connection.ending.on_panic();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let _guard = guard;
            body();
        })?;
        self.threads.push(thread);
        Ok(())
    }

    /// Notices go from a thread of their own: the kernel may make it wait for a request that we still have to answer.
    fn start_notices(&mut self) -> io::Result<()> {
        let (sender, receiver) = mpsc::sync_channel(NOTICES_MAX);
        self.connection.fs.set_notices(Box::new(move |notice| drop(sender.try_send(notice))));
        let connection = self.connection.clone();
        let name = "fuse-notices".to_owned();
        // Not joined in the end: it may be waiting in the kernel for good.
        std::thread::Builder::new().name(name).spawn(move || send_notices(&connection, &receiver)).map(drop)
    }

    /// Resolves when the connection has ended: it was unmounted by somebody, or a thread panicked.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        let ending = self.connection.ending.clone();
        async move { ending.wait().await }
    }

    /// True if all threads that take requests have ended within `grace`.
    fn over_within(&self, grace: Duration) -> bool {
        matches!(self.over.recv_timeout(grace), Err(mpsc::RecvTimeoutError::Disconnected))
    }

    /// Ends what is left when no more requests come.
    fn finish(&mut self) {
        self.connection.fs.set_notices(Box::new(drop));
        for thread in self.threads.drain(..) {
            let _panicked = thread.join();
        }
        self.connection.workers.stop();
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

/// A mount of a [`FileSystem`], served until it is stopped or dropped.
pub struct Session {
    place: PathBuf,
    number: Option<u32>,
    running: Option<Loop>,
}

impl Session {
    /// Mounts `fs` at `place` and starts to serve it. What an earlier process left mounted there is taken away first. Waits
    /// for the kernel for a moment.
    pub fn mount(fs: Arc<FileSystem>, place: &Path, options: &Options) -> Result<Session, MountError> {
        let device = device::mount_at(place)?;
        let number = device::connection_of(place);
        let running = Loop::start(device, fs, options).map_err(|error| {
            device::unmount(place);
            MountError::Threads(error)
        })?;
        tracing::info!(place = %place.display(), "mounted");
        Ok(Session { place: place.to_owned(), number, running: Some(running) })
    }

    /// Where it is mounted.
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// The number of the connection, as `/sys/fs/fuse/connections` has it.
    pub fn number(&self) -> Option<u32> {
        self.number
    }

    /// Resolves when the mount is no longer served: it was stopped, somebody unmounted it, or a thread panicked.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        self.running.as_ref().expect("only the end takes the loop away").ended()
    }

    /// Unmounts and ends the threads; for who still uses the mount, every request fails from then on. Waits up to a few
    /// seconds, so call it where waiting is allowed.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let Some(mut running) = self.running.take() else { return };
        device::unmount(&self.place);
        if !running.over_within(STOP_GRACE)
            && let Some(number) = self.number
        {
            device::abort(number);
        }
        if running.over_within(STOP_GRACE) {
            running.finish();
        } else {
            tracing::warn!("the mount is still in use and can't be aborted; it ends with this process");
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.end();
    }
}
