//! Descriptors that outlive this process: who keeps them, and how the next process gets them.
//!
//! The open `/dev/fuse` of a mount is what its connection lives by: when the last one is closed, every request fails for every
//! container. So each is also with systemd, in its descriptor store, or with a *holder*, a process of a few hundred
//! kilobytes that does nothing else ([`hold`]); and with both where systemd doesn't say whether it has a store.
//!
//! What is promised: once [`Keeper::keep`] has returned `true`, the next process below the same root finds the descriptor in
//! [`Keeper::open`], however this one ends. A holder that ends is replaced, from what this process has, within a second. One that is
//! there and late keeps this process from starting, where nobody else has the mounts: new ones in their place would be the end of these.
//! What isn't promised: that anybody survives both processes at once.

mod holder;
mod packet;
mod protocol;
mod systemd;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt::ReceiveTimeout};
use nix::sys::time::{TimeVal, TimeValLike};
use parking_lot::Mutex;

pub use holder::hold;
use systemd::ServiceManager;

/// How long a holder may take to answer. It has nothing to wait for.
const ANSWER_WAIT_MS: i64 = 2_000;

/// One that has the mounts of containers may be late for a reason, a busy disk or too little memory: it is asked again for so long.
/// One that refuses, or says what means nothing here, would say the same again: it isn't.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 3 } else { 30 });
/// How long it may then take each time.
const EACH_WAIT_MS: i64 = if cfg!(test) { 100 } else { ANSWER_WAIT_MS };
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// How the names of notes end ([`notes_of`]).
const NOTES: &str = ".notes";

/// Before a holder that could not be started is tried again.
const START_AGAIN: Duration = Duration::from_secs(1);

/// The program that becomes a holder, and the word that makes it one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    pub program: PathBuf,
    pub word: &'static str,
}

impl Launch {
    /// This program itself. Its file may have been replaced meanwhile; what runs is still found.
    pub fn this_program(word: &'static str) -> Launch {
        Launch { program: "/proc/self/exe".into(), word }
    }
}

/// Descriptors by the names under which they were kept.
pub type Kept = BTreeMap<String, OwnedFd>;

/// There is a holder, and what it has can't be had.
#[derive(Debug, thiserror::Error)]
#[error("the holder behind {} doesn't give back the mounts of containers: {error}", socket.display())]
pub struct KeepError {
    socket: PathBuf,
    error: io::Error,
}

/// See the module's head. A cheap handle.
#[derive(Clone)]
pub struct Keeper(Arc<Shared>);

struct Shared {
    socket: PathBuf,
    launch: Launch,
    service_manager: Option<ServiceManager>,
    /// What a new holder has to be given: also what was found, until it is kept anew or forgotten.
    kept: Mutex<Kept>,
    /// Held while a holder is started or spoken to.
    holder: Mutex<()>,
    has_holder: AtomicBool,
    over: AtomicBool,
}

impl Keeper {
    /// Finds those who keep descriptors for the program that works below `root`, or a new holder, and what an earlier process
    /// left with them. Blocks for a moment; where a holder is there that doesn't answer, for half a minute, and then fails, unless
    /// systemd has passed the mounts and no holder is needed.
    pub fn open(root: &Path, launch: Launch) -> Result<(Keeper, Kept), KeepError> {
        let service_manager = ServiceManager::find();
        let needs_holder = service_manager.as_ref().is_none_or(|manager| !manager.is_known);
        let shared = Arc::new(Shared {
            socket: socket_below(root),
            launch,
            service_manager,
            kept: Mutex::default(),
            holder: Mutex::default(),
            has_holder: AtomicBool::new(false),
            over: AtomicBool::new(false),
        });
        let found = shared.found(systemd::passed(), needs_holder)?;
        // Before anybody looks after the holder: whoever never takes over what was found leaves it to the next process all the same.
        for (name, descriptor) in &found {
            shared.remember(name, descriptor.as_fd());
        }
        if needs_holder {
            shared.find_holder();
        }
        Ok((Keeper(shared), found))
    }

    /// Has a copy of `descriptor` ready for [`Keeper::keep`], in the place of one of the same name.
    pub fn remember(&self, name: &str, descriptor: BorrowedFd<'_>) {
        self.0.remember(name, descriptor);
    }

    /// Gives what is remembered under `names` to those who keep; true if somebody has each of them. Blocks: a holder that is late is
    /// asked again for half a minute, for all of them together, as long as `is_wanted`.
    pub fn keep(&self, names: &[String], is_wanted: &dyn Fn() -> bool) -> bool {
        let in_time = patience();
        let again = || in_time() && is_wanted();
        let mut all = true;
        for name in names {
            // One that nobody takes is no reason not to give away the others: each mount has containers of its own.
            all &= self.0.keep(name, &again);
        }
        all
    }

    /// Nobody needs to keep it any longer.
    pub fn forget(&self, name: &str) {
        self.0.kept.lock().remove(name);
        self.0.forget(name);
    }

    /// Forgets everything, and ends the holder.
    pub fn end(&self) {
        let shared = &self.0;
        shared.over.store(true, Ordering::Release);
        let names: Vec<String> = std::mem::take(&mut *shared.kept.lock()).into_keys().collect();
        for name in names {
            shared.forget(&name);
        }
        shared.end_holder();
    }
}

fn warn(error: &io::Error) {
    tracing::warn!(%error, "the holder doesn't answer");
}

/// Ends the holder of the program that works below `root`, if there is one. For when that program doesn't run.
pub fn end_holder_below(root: &Path) {
    let _ = ask(&socket_below(root), protocol::END, "", None, ANSWER_WAIT_MS);
    let _ = std::fs::remove_file(socket_below(root));
}

/// The name for what belongs to the descriptor of that name, and is of no use without it.
pub(crate) fn notes_of(name: &str) -> String {
    format!("{name}{NOTES}")
}

fn socket_below(root: &Path) -> PathBuf {
    root.join("holder.sock")
}

/// Whether the connection behind a descriptor of `/dev/fuse` has ended.
pub(crate) fn ended(descriptor: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::new(descriptor, PollFlags::empty())];
    let over = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
    poll(&mut polled, PollTimeout::ZERO).is_err()
        || polled[0].revents().is_none_or(|found| found.intersects(over))
}

/// Whether what failed tells that no holder is there: no socket, none that anybody listens at, or a path that none can have.
fn is_absent(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, InvalidFilename, NotFound};
    matches!(error.kind(), NotFound | ConnectionRefused | InvalidFilename)
}

/// Whether what failed tells of a holder that is late, or that hung up: it may answer the next time.
fn is_late(error: &io::Error) -> bool {
    use io::ErrorKind::{
        BrokenPipe, ConnectionReset, Interrupted, OutOfMemory, TimedOut, UnexpectedEof, WouldBlock,
    };
    matches!(
        error.kind(),
        WouldBlock | TimedOut | UnexpectedEof | ConnectionReset | BrokenPipe | Interrupted | OutOfMemory
    )
}

/// True for [`PATIENCE`] from now on.
fn patience() -> impl Fn() -> bool {
    let deadline = Instant::now() + PATIENCE;
    move || Instant::now() < deadline
}

/// Asks a holder that is late until it answers, as long as `again` says so. What it is told twice is as good as once.
fn ask_patiently(
    path: &Path,
    verb: u8,
    name: &str,
    descriptor: Option<BorrowedFd<'_>>,
    again: &dyn Fn() -> bool,
) -> io::Result<Kept> {
    let mut told = false;
    loop {
        let error = match ask(path, verb, name, descriptor, EACH_WAIT_MS) {
            Err(error) if is_late(&error) && again() => error,
            answered => return answered,
        };
        if !std::mem::replace(&mut told, true) {
            tracing::warn!(%error, "the holder doesn't answer; it is asked again");
        }
        std::thread::sleep(ASK_AGAIN);
    }
}

/// Says one thing to the holder at `path`, and gathers what it answers.
fn ask(
    path: &Path,
    verb: u8,
    name: &str,
    descriptor: Option<BorrowedFd<'_>>,
    wait_ms: i64,
) -> io::Result<Kept> {
    let socket = packet::connect_to(path)?;
    setsockopt(&socket, ReceiveTimeout, &TimeVal::milliseconds(wait_ms))?;
    packet::send(socket.as_fd(), &protocol::compose(verb, name), descriptor, None)?;
    let mut kept = Kept::new();
    loop {
        let gone = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let packet = packet::receive(socket.as_fd())?.ok_or_else(gone)?;
        match (protocol::parse(&packet.bytes)?, packet.descriptor) {
            ((protocol::HERE, name), Some(descriptor)) => drop(kept.insert(name.to_owned(), descriptor)),
            ((protocol::DONE, _), _) => return Ok(kept),
            _ => return Err(io::Error::other("the holder refuses")),
        }
    }
}

impl Shared {
    fn tell(&self, verb: u8, name: &str, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        ask(&self.socket, verb, name, descriptor, ANSWER_WAIT_MS).map(drop)
    }

    /// What an earlier process left: what systemd has `passed`, and what a holder has.
    fn found(&self, mut passed: Kept, needs_holder: bool) -> Result<Kept, KeepError> {
        // A holder is then what a unit without a store has left: whatever came over it, systemd has.
        let is_spare = !needs_holder && !passed.is_empty();
        let late = patience();
        match self.left(&|| !is_spare && late()) {
            Ok(left) => {
                for (name, descriptor) in left {
                    passed.entry(name).or_insert(descriptor);
                }
            }
            Err(error) if is_spare => {
                tracing::error!(%error, "a holder that is not needed doesn't answer: the mounts are those that systemd has kept");
            }
            Err(error) => return Err(KeepError { socket: self.socket.clone(), error }),
        }
        Ok(passed)
    }

    /// What a holder has that an earlier process started; nothing if none is there, or if it gives nothing. Fails where it is late for
    /// longer than `again` says.
    fn left(&self, again: &dyn Fn() -> bool) -> io::Result<Kept> {
        match ask_patiently(&self.socket, protocol::TAKE, "", None, again) {
            Err(error) if is_absent(&error) => Ok(Kept::new()),
            Err(error) if !is_late(&error) => {
                tracing::warn!(%error, "nothing is taken over from the holder");
                Ok(Kept::new())
            }
            answered => answered,
        }
    }

    /// True if somebody has what is remembered under that name. One that they have under the same name is closed.
    fn keep(&self, name: &str, again: &dyn Fn() -> bool) -> bool {
        // A copy, so that nothing is locked while another process is waited for.
        let copy = self.kept.lock().get(name).map(packet::duplicate).transpose();
        let descriptor = match copy {
            Ok(Some(descriptor)) => descriptor,
            // It was said when it could not be remembered.
            Ok(None) => return false,
            Err(error) => {
                tracing::warn!(%error, name, "a descriptor can't be duplicated");
                return false;
            }
        };
        let stored = self.service_manager.as_ref().is_some_and(|manager| {
            let stored = manager.keep(name, descriptor.as_fd());
            let _ = stored
                .as_ref()
                .inspect_err(|error| tracing::warn!(%error, name, "systemd can't keep a descriptor"));
            stored.is_ok() && manager.is_known
        });
        let held = self.has_holder.load(Ordering::Acquire)
            && ask_patiently(&self.socket, protocol::KEEP, name, Some(descriptor.as_fd()), again)
                .inspect_err(warn)
                .is_ok();
        stored || held
    }

    /// For a new holder, in the place of one of the same name.
    fn remember(&self, name: &str, descriptor: BorrowedFd<'_>) {
        match packet::duplicate(descriptor) {
            Ok(copy) => drop(self.kept.lock().insert(name.to_owned(), copy)),
            Err(error) => tracing::warn!(%error, name, "a descriptor can't be duplicated"),
        }
    }

    fn forget(&self, name: &str) {
        if let Some(manager) = &self.service_manager
            && let Err(error) = manager.forget(name)
        {
            tracing::warn!(%error, name, "systemd doesn't forget a descriptor");
        }
        if self.has_holder.load(Ordering::Acquire) {
            let _ = self.tell(protocol::FORGET, name, None).inspect_err(warn);
        }
    }

    fn end_holder(&self) {
        let _one = self.holder.lock();
        if self.has_holder.swap(false, Ordering::AcqRel) {
            let _ = self.tell(protocol::END, "", None).inspect_err(warn);
            let _ = std::fs::remove_file(&self.socket);
        }
    }

    /// Sees to it that there is a holder, and from now on that there is one again when it ends.
    fn find_holder(self: &Arc<Self>) {
        let (child, line) = match self.holder() {
            Ok(holder) => holder,
            Err(error) => {
                tracing::error!(%error, "there is no holder: containers would lose their files with this process");
                return;
            }
        };
        self.has_holder.store(true, Ordering::Release);
        let shared = self.clone();
        let watched =
            std::thread::Builder::new().name("holder".to_owned()).spawn(move || shared.watch(child, line));
        if let Err(error) = watched {
            tracing::warn!(%error, "nobody looks after the holder");
        }
    }

    /// A connection to the holder, which is started if there is none.
    fn holder(&self) -> io::Result<(Option<Child>, OwnedFd)> {
        match packet::connect_to(&self.socket) {
            Ok(line) => return Ok((None, line)),
            Err(error) if is_absent(&error) => {}
            // Without its socket a holder could not be found any more.
            Err(error) if is_late(&error) => return Err(error),
            Err(error) => tracing::warn!(%error, "the holder can't be reached; another one is started"),
        }
        match std::fs::remove_file(&self.socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = packet::listen_at(&self.socket)?;
        // Before it runs: a holder that nobody is connected to and that keeps nothing ends.
        let line = packet::connect_to(&self.socket)?;
        let mut command = Command::new(&self.launch.program);
        command
            .arg(self.launch.word)
            .stdin(Stdio::from(listener))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Ok((Some(command.spawn()?), line))
    }

    /// Waits until the holder ends, and starts another, which gets what that one had.
    fn watch(&self, mut child: Option<Child>, mut line: OwnedFd) {
        loop {
            // It says nothing on this line, so anything but a pause means that it has ended.
            let _ = packet::receive(line.as_fd());
            let _ = child.as_mut().map(Child::wait);
            let one = self.holder.lock();
            if self.over.load(Ordering::Acquire) {
                return;
            }
            tracing::warn!("the holder has ended; another one is started");
            match self.holder().and_then(|holder| self.equip(holder)) {
                Ok(again) => {
                    tracing::info!("the new holder has the mounts");
                    (child, line) = again;
                }
                Err(error) => {
                    tracing::error!(%error, "no holder can be started");
                    drop(one);
                    std::thread::sleep(START_AGAIN);
                }
            }
        }
    }

    /// Gives a new holder what there is to keep. One that doesn't take it is ended, so that none is left of each attempt.
    fn equip(&self, (mut child, line): (Option<Child>, OwnedFd)) -> io::Result<(Option<Child>, OwnedFd)> {
        match (self.hand_over(), child.as_mut()) {
            (Ok(()), _) => Ok((child, line)),
            (Err(error), Some(started)) => {
                started.kill()?;
                started.wait()?;
                Err(error)
            }
            (Err(error), None) => Err(error),
        }
    }

    fn hand_over(&self) -> io::Result<()> {
        let kept = self.kept.lock();
        kept.iter()
            .try_for_each(|(name, descriptor)| self.tell(protocol::KEEP, name, Some(descriptor.as_fd())))
    }
}

/// A holder for the tests of those who use one: on a thread of this process, instead of a process of its own.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use std::thread::{self, JoinHandle};

    /// Keeps `given`, until it is told to end.
    pub(crate) fn hold_below(root: &Path, given: &[(&str, OwnedFd)]) -> JoinHandle<io::Result<()>> {
        let socket = socket_below(root);
        let listener = packet::listen_at(&socket).unwrap();
        // One that nobody is connected to and that keeps nothing ends.
        let line = packet::connect_to(&socket).unwrap();
        let thread = thread::spawn(move || {
            let _line = line;
            holder::Holder::new(listener).run()
        });
        for (name, descriptor) in given {
            ask(&socket, protocol::KEEP, name, Some(descriptor.as_fd()), ANSWER_WAIT_MS).unwrap();
        }
        thread
    }

    /// What the holder has; nothing if there is none.
    pub(crate) fn kept_below(root: &Path) -> Kept {
        ask(&socket_below(root), protocol::TAKE, "", None, ANSWER_WAIT_MS).unwrap_or_default()
    }
}
