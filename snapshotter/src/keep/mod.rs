//! Descriptors that outlive this process: who keeps them, and how the next process gets them.
//!
//! The open `/dev/fuse` of a mount is what its connection lives by: when the last one is closed, every request fails for every
//! container. So each is also with systemd, in its descriptor store, or with a *holder*, a process of a few hundred
//! kilobytes that does nothing else ([`hold`]); and with both where systemd doesn't say whether it has a store.
//!
//! What is promised: once [`Keeper::keep`] has returned `true`, the next process below the same root finds the descriptor in
//! [`Keeper::open`], however this one ends. A holder that ends is replaced, from what this process has, within a second.
//! What isn't: that anybody survives both processes at once.

mod holder;
mod packet;
mod protocol;
mod systemd;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt::ReceiveTimeout};
use nix::sys::time::{TimeVal, TimeValLike};
use parking_lot::Mutex;

pub use holder::hold;
use systemd::ServiceManager;

/// How long a holder may take to answer. It has nothing to wait for.
const ANSWER_WAIT_S: i64 = 2;

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
    /// left with them. Waits for other processes for a moment.
    pub fn open(root: &Path, launch: Launch) -> (Keeper, Kept) {
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
        let mut found = systemd::passed();
        for (name, descriptor) in shared.left() {
            found.entry(name).or_insert(descriptor);
        }
        // Before anybody looks after the holder: whoever never takes over what was found leaves it to the next process all the same.
        for (name, descriptor) in &found {
            shared.remember(name, descriptor.as_fd());
        }
        if needs_holder {
            shared.find_holder();
        }
        (Keeper(shared), found)
    }

    /// Gives `descriptor` to those who keep; true if somebody has it. One of the same name is forgotten.
    pub fn keep(&self, name: &str, descriptor: BorrowedFd<'_>) -> bool {
        let shared = &self.0;
        shared.remember(name, descriptor);
        let stored = shared.service_manager.as_ref().is_some_and(|manager| {
            let stored = manager.keep(name, descriptor);
            let _ = stored
                .as_ref()
                .inspect_err(|error| tracing::warn!(%error, name, "systemd can't keep a descriptor"));
            stored.is_ok() && manager.is_known
        });
        let held = shared.has_holder.load(Ordering::Acquire)
            && shared.tell(protocol::KEEP, name, Some(descriptor)).inspect_err(warn).is_ok();
        stored || held
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
    let _ = ask(&socket_below(root), protocol::END, "", None);
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

/// Says one thing to the holder at `path`, and gathers what it answers.
fn ask(path: &Path, verb: u8, name: &str, descriptor: Option<BorrowedFd<'_>>) -> io::Result<Kept> {
    let socket = packet::connect_to(path)?;
    setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(ANSWER_WAIT_S))?;
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
        ask(&self.socket, verb, name, descriptor).map(drop)
    }

    /// What a holder has that an earlier process started.
    fn left(&self) -> Kept {
        ask(&self.socket, protocol::TAKE, "", None).unwrap_or_default()
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
        if let Ok(line) = packet::connect_to(&self.socket) {
            return Ok((None, line));
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
            ask(&socket, protocol::KEEP, name, Some(descriptor.as_fd())).unwrap();
        }
        thread
    }

    /// What the holder has; nothing if there is none.
    pub(crate) fn kept_below(root: &Path) -> Kept {
        ask(&socket_below(root), protocol::TAKE, "", None).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_connection_that_ended_is_told_from_one_that_lives() {
        let (one, other) = UnixStream::pair().unwrap();
        assert!(!ended(one.as_fd()));
        drop(other);
        assert!(ended(one.as_fd()));
    }

    #[test]
    fn a_descriptor_comes_with_its_packet() {
        let dir = tempfile::tempdir().unwrap();
        let listener = packet::listen_at(&dir.path().join("s")).unwrap();
        let client = packet::connect_to(&dir.path().join("s")).unwrap();
        let (server, user) = packet::accept(listener.as_fd()).unwrap();
        assert_eq!(user, nix::unistd::geteuid().as_raw());
        let (mut near, far) = UnixStream::pair().unwrap();
        packet::send(client.as_fd(), b"Kname", Some(far.as_fd()), None).unwrap();
        let packet = packet::receive(server.as_fd()).unwrap().unwrap();
        assert_eq!(protocol::parse(&packet.bytes).unwrap(), (protocol::KEEP, "name"));
        UnixStream::from(packet.descriptor.unwrap()).write_all(b"hello").unwrap();
        let mut heard = [0; 5];
        near.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"hello");
        drop(client);
        assert!(packet::receive(server.as_fd()).unwrap().is_none());
    }

    #[test]
    fn a_holder_that_does_not_take_what_it_is_given_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let (near, _far) = UnixStream::pair().unwrap();
        let shared = Shared {
            socket: socket_below(dir.path()),
            // It is told to sleep, so it never answers.
            launch: Launch { program: "sleep".into(), word: "1000" },
            service_manager: None,
            kept: Mutex::new([("name".to_owned(), near.into())].into()),
            holder: Mutex::default(),
            has_holder: AtomicBool::new(false),
            over: AtomicBool::new(false),
        };
        let (child, line) = shared.holder().unwrap();
        let process = PathBuf::from(format!("/proc/{}", child.as_ref().unwrap().id()));
        assert!(process.exists());
        assert!(shared.equip((child, line)).is_err());
        assert!(!process.exists(), "it is there still, or its remains are");
    }

    /// No other holder can be started.
    fn launch_of_nothing(root: &Path) -> Launch {
        Launch { program: root.join("none"), word: "hold" }
    }

    fn eventually(what: &str, holds: impl Fn() -> bool) {
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while !holds() {
            assert!(std::time::Instant::now() < deadline, "never: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn what_was_found_and_not_taken_over_is_given_to_the_next_holder() {
        let dir = tempfile::tempdir().unwrap();
        let (near, _far) = UnixStream::pair().unwrap();
        let first = testing::hold_below(dir.path(), &[("m", near.into())]);
        let (keeper, found) = Keeper::open(dir.path(), launch_of_nothing(dir.path()));
        assert!(found.contains_key("m"));
        // Whoever looks after the holder waits until there is the next one.
        let one = keeper.0.holder.lock();
        end_holder_below(dir.path());
        first.join().unwrap().unwrap();
        let second = testing::hold_below(dir.path(), &[]);
        drop(one);
        eventually("the next holder has it", || testing::kept_below(dir.path()).contains_key("m"));
        keeper.end();
        second.join().unwrap().unwrap();
    }

    #[test]
    fn what_was_found_is_open_nowhere_once_it_is_kept_anew_or_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let [(one, far_of_one), (other, far_of_other)] = [(); 2].map(|()| UnixStream::pair().unwrap());
        let holder = testing::hold_below(dir.path(), &[("one", one.into()), ("other", other.into())]);
        let (keeper, found) = Keeper::open(dir.path(), launch_of_nothing(dir.path()));
        drop(found);
        assert!(!ended(far_of_one.as_fd()) && !ended(far_of_other.as_fd()));
        let (new, _far) = UnixStream::pair().unwrap();
        assert!(keeper.keep("one", new.as_fd()));
        eventually("what was kept anew is closed", || ended(far_of_one.as_fd()));
        keeper.forget("other");
        eventually("what was forgotten is closed", || ended(far_of_other.as_fd()));
        keeper.end();
        holder.join().unwrap().unwrap();
    }

    #[test]
    fn strange_packets_are_refused() {
        assert!(protocol::parse(b"").is_err());
        assert!(protocol::parse(b"K\xff").is_err());
    }
}
