//! One live connection to the kernel: requests come in, answers go out in any order from any thread.
//!
//! It needs nothing but the descriptor, so it can also be started on one that another process has mounted. All threads
//! share the descriptor: one cloned for each (`FUSE_DEV_IOC_CLONE`) would lose the requests in flight when a process
//! dies and another takes over.

use std::io::{self, IoSlice};
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;
use nix::errno::Errno;
use nix::sys::uio::writev;
use tokio::runtime::Handle;

use super::Unanswered;
use super::ending::Ending;
use super::notes::Notes;
use super::pending::{Pending, Ticket};
use super::wire::{self, Header, Names, Request};
use super::workers::Workers;
use crate::fs::{Answer, FileSystem, FsError, Lookup, Operation};

/// The errno for each failure.
fn errno(error: FsError) -> Errno {
    match error {
        FsError::Stale => Errno::ESTALE,
        FsError::NotDirectory => Errno::ENOTDIR,
        FsError::IsDirectory => Errno::EISDIR,
        FsError::WrongKind => Errno::EINVAL,
        FsError::NoAttribute => Errno::ENODATA,
        FsError::Io => Errno::EIO,
    }
}

/// What stands in an answer.
pub(super) enum Body {
    Whole(Vec<u8>),
    Parts(Vec<Bytes>),
}

type Outcome = Result<Body, Errno>;

pub(super) struct Connection {
    pub(super) device: OwnedFd,
    pub(super) buffer_size: usize,
    /// The next process finds what this one doesn't answer: the kernel sends it again, or it is noted.
    pub(super) can_wait: bool,
    /// Whether extended attributes are shown through it.
    pub(super) xattrs: bool,
    pub(super) fs: Arc<FileSystem>,
    pub(super) workers: Arc<Workers>,
    pub(super) runtime: Handle,
    pub(super) ending: Ending,
    pub(super) pending: Arc<Pending>,
}

impl Connection {
    /// Serves requests until the connection ends. Several threads may do so.
    pub(super) fn serve(self: &Arc<Self>) {
        let mut own = Vec::new();
        let noted = self.pending.notes().and_then(Notes::buffer);
        let buffer = match noted.filter(|buffer| buffer.len() >= self.buffer_size) {
            Some(buffer) => buffer,
            None => {
                own.resize(self.buffer_size, 0);
                &mut own[..]
            }
        };
        // Every page is touched: the kernel could not get a new one for a process that is being killed, and would fail the
        // request that it was about to put there. A unique number of 0 says that there is none.
        buffer.fill(0);
        std::hint::black_box(&mut *buffer);
        loop {
            match nix::unistd::read(&self.device, buffer) {
                Ok(length) => {
                    if self.take(&buffer[..length]).is_break() {
                        break;
                    }
                }
                // ENOENT: the request was called off while it was being read.
                Err(Errno::EINTR | Errno::EAGAIN | Errno::ENOENT) => {}
                Err(Errno::ENODEV | Errno::ECONNABORTED) => break,
                Err(error) => {
                    tracing::error!(%error, "requests can't be read any more");
                    break;
                }
            }
        }
        self.ending.end();
    }

    /// Sees to it that nobody waits for the process that is gone.
    pub(super) fn go_on_with(self: &Arc<Self>, unanswered: Unanswered) -> io::Result<()> {
        match unanswered {
            Unanswered::Nothing => {}
            Unanswered::WithKernel => self.notify(&wire::resend())?,
            Unanswered::Noted { slots, requests } => {
                tracing::info!(requests = slots.len(), "answering what was noted");
                for request in &requests {
                    // What would be the last request was answered, or the connection would have ended.
                    let _ = self.take(request);
                }
                slots.into_iter().for_each(|slot| self.pending.release(Some(slot)));
            }
        }
        Ok(())
    }

    /// Answers a request, or sees to it that it will be. The break is the last one.
    pub(super) fn take(self: &Arc<Self>, message: &[u8]) -> ControlFlow<()> {
        match wire::decode(message) {
            Ok((header, Request::Destroy)) => {
                self.send(header.unique, Ok(Body::Whole(Vec::new())));
                return ControlFlow::Break(());
            }
            Ok((header, request)) if self.is_early(&header, &request) => {
                self.put_off(header, message.to_vec())
            }
            Ok((header, request)) => self.dispatch(header, &request, message),
            Err(error) => tracing::error!(%error, length = message.len(), "a request was passed over"),
        }
        ControlFlow::Continue(())
    }

    /// Whether it is about something that is still being found again after a restart.
    fn is_early(&self, header: &Header, request: &Request<'_>) -> bool {
        match request {
            _ if !self.fs.is_recovering() => false,
            Request::Forget | Request::Interrupt { .. } | Request::StatFs => false,
            Request::Lookup { name } => !self.fs.is_found(header.node, Some(name)),
            _ => !self.fs.is_found(header.node, None),
        }
    }

    /// Answers it when what it is about has been found, or can't be any more.
    fn put_off(self: &Arc<Self>, header: Header, message: Vec<u8>) {
        let ticket = self.pending.enter(header.unique, header.thread, &message);
        let connection = self.clone();
        self.runtime.spawn(async move {
            let (unique, again) = (header.unique, || wire::decode(&message).expect("it was decoded before"));
            let name = match again().1 {
                Request::Lookup { name } => Some(name),
                _ => None,
            };
            tokio::select! {
                biased;
                () = ticket.called_off() => return connection.send(unique, Err(Errno::EINTR)),
                () = connection.fs.found(header.node, name) => {}
            }
            let (was_interrupted, slot) = ticket.hand_on();
            if was_interrupted {
                connection.pending.interrupt(unique);
            }
            connection.dispatch(header, &again().1, &message);
            connection.pending.release(slot);
        });
    }

    fn dispatch(self: &Arc<Self>, header: Header, request: &Request<'_>, message: &[u8]) {
        let Header { unique, node, .. } = header;
        let fs = &self.fs;
        fs.stats().count(operation(request));
        match *request {
            Request::Lookup { name } => self.answer(&header, message, fs.lookup(node, name), looked_up),
            Request::Attributes => {
                self.now(unique, fs.attributes(node).map(|entry| wire::attributes(&entry)))
            }
            Request::Readlink => self.now(unique, fs.readlink(node)),
            Request::Read { offset, size } => {
                self.answer(&header, message, fs.read(node, offset, size), |data| {
                    Body::Parts(data.into_parts())
                });
            }
            Request::ReadDir { offset, size } => self.list(&header, message, offset, Names::new(size, false)),
            Request::ReadDirPlus { offset, size } => {
                self.list(&header, message, offset, Names::new(size, true))
            }
            // It says: there are none at all, never ask again. Names are listed all the same, and are none: refusing that
            // would be an error to programs which copy files.
            Request::GetXattr { .. } if !self.xattrs => self.send(unique, Err(Errno::ENOSYS)),
            Request::ListXattr { size } if !self.xattrs => self.send(unique, sized(Vec::new(), size)),
            Request::GetXattr { name, size } => {
                self.send(unique, fs.xattr(node, name).map_err(errno).and_then(|value| sized(value, size)));
            }
            Request::ListXattr { size } => {
                let names = fs.xattr_names(node).map(|names| names.into_iter().flat_map(with_nul).collect());
                self.send(unique, names.map_err(errno).and_then(|names| sized(names, size)));
            }
            Request::StatFs => self.now(unique, Ok(wire::stat_fs(fs.usage()))),
            // No answer: it would have the kernel ask again, and again.
            Request::Interrupt { unique: waiting } => self.pending.interrupt(waiting),
            Request::Write => self.send(unique, Err(Errno::EROFS)),
            // No state is kept for a file, so there is nothing to forget.
            Request::Forget => {}
            // For OPEN and OPENDIR this says: never ask again, and keep what was read.
            Request::Open | Request::OpenDir | Request::Seek | Request::Init(_) | Request::Other => {
                self.send(unique, Err(Errno::ENOSYS));
            }
            // It ends the loop and doesn't get here.
            Request::Destroy => {}
        }
    }

    fn list(self: &Arc<Self>, header: &Header, message: &[u8], offset: u64, mut names: Names) {
        self.answer(header, message, self.fs.list(header.node), move |listing| {
            listing.visit(offset, |listed| names.push(&listed));
            Body::Whole(names.finish())
        });
    }

    fn now(&self, unique: u64, result: Result<Vec<u8>, FsError>) {
        self.send(unique, result.map(Body::Whole).map_err(errno));
    }

    fn answer<T: Send + 'static>(
        self: &Arc<Self>,
        header: &Header,
        message: &[u8],
        answer: Answer<Result<T, FsError>>,
        encode: impl FnOnce(T) -> Body + Send + 'static,
    ) {
        match answer {
            Answer::Ready(result) => self.send(header.unique, result.map(encode).map_err(errno)),
            later => {
                let ticket = self.pending.enter(header.unique, header.thread, message);
                let promise = Promise { connection: self.clone(), ticket, kept: false };
                promise.keep(later.map(|result| result.map(encode).map_err(errno)));
            }
        }
    }

    fn send(&self, unique: u64, outcome: Outcome) {
        // The end of this process is no reason for a container's read to fail.
        let can_wait = self.can_wait && self.pending.is_left();
        if can_wait && matches!(outcome, Err(Errno::EIO | Errno::ESTALE)) {
            return;
        }
        let (error, parts) = match &outcome {
            Ok(Body::Whole(bytes)) => (0, vec![IoSlice::new(bytes)]),
            Ok(Body::Parts(parts)) => (0, parts.iter().map(|part| IoSlice::new(part)).collect()),
            Err(errno) => (*errno as i32, Vec::new()),
        };
        let header = wire::out_header(unique, error, parts.iter().map(|part| part.len()).sum());
        let message: Vec<_> = [IoSlice::new(&header)].into_iter().chain(parts).collect();
        match writev(&self.device, &message) {
            // Nobody waits any more: killed, unmounted or aborted.
            Ok(_) | Err(Errno::ENOENT | Errno::ENODEV | Errno::ECONNABORTED) => {}
            Err(error) => tracing::error!(%error, unique, "the kernel refuses an answer"),
        }
    }

    /// Sends a notification. May wait for as long as the kernel is busy with what it is about.
    pub(super) fn notify(&self, notification: &[u8]) -> io::Result<()> {
        match nix::unistd::write(&self.device, notification) {
            // ENOENT: the kernel doesn't know it anyway.
            Ok(_) | Err(Errno::ENOENT | Errno::ENODEV) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// A request that will be answered later: by its result, by EINTR if the one who asks dies, and by EIO if it is dropped.
struct Promise {
    connection: Arc<Connection>,
    ticket: Ticket,
    kept: bool,
}

impl Promise {
    fn keep(self, answer: Answer<Outcome>) {
        match answer {
            Answer::Ready(outcome) => self.send(outcome),
            Answer::Work(job) => {
                let connection = self.connection.clone();
                connection.workers.submit(Box::new(move || self.keep(job())));
            }
            Answer::Wait(result) => {
                let runtime = self.connection.runtime.clone();
                runtime.spawn(async move {
                    let outcome = tokio::select! {
                        outcome = result => outcome,
                        () = self.ticket.called_off() => Err(Errno::EINTR),
                    };
                    self.send(outcome);
                });
            }
        }
    }

    fn send(mut self, outcome: Outcome) {
        self.kept = true;
        self.connection.send(self.ticket.unique(), outcome);
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        if !self.kept {
            self.connection.send(self.ticket.unique(), Err(Errno::EIO));
        }
    }
}

fn looked_up(lookup: Lookup) -> Body {
    Body::Whole(match lookup {
        Lookup::Found(entry) => wire::entry(&entry),
        Lookup::Absent(lifetime) => wire::absent(lifetime),
    })
}

fn with_nul(mut name: Vec<u8>) -> Vec<u8> {
    name.push(0);
    name
}

/// The value of an attribute, or with room for nothing its size.
fn sized(value: Vec<u8>, room: u32) -> Outcome {
    match room {
        0 => Ok(Body::Whole(wire::xattr_size(value.len() as u32))),
        _ if value.len() > room as usize => Err(Errno::ERANGE),
        _ => Ok(Body::Whole(value)),
    }
}

fn operation(request: &Request<'_>) -> Operation {
    match request {
        Request::Lookup { .. } => Operation::Lookup,
        Request::Forget => Operation::Forget,
        Request::Attributes => Operation::Attributes,
        Request::Readlink => Operation::Readlink,
        Request::Open => Operation::Open,
        Request::Read { .. } => Operation::Read,
        Request::StatFs => Operation::StatFs,
        Request::GetXattr { .. } => Operation::GetXattr,
        Request::ListXattr { .. } => Operation::ListXattr,
        Request::OpenDir => Operation::OpenDir,
        Request::ReadDir { .. } => Operation::ReadDir,
        Request::ReadDirPlus { .. } => Operation::ReadDirPlus,
        Request::Seek => Operation::Seek,
        Request::Interrupt { .. } => Operation::Interrupt,
        Request::Init(_) | Request::Destroy | Request::Write | Request::Other => Operation::Other,
    }
}
