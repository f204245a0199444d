//! The holder: a small process that keeps descriptors while no daemon is there.
//!
//! It takes its listening socket as standard input, knows no paths, and reads nothing from what it keeps. It ends when it is
//! told to, and by itself when no daemon is there and every connection that it keeps has ended.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::packet::{self, Packet};
use super::{NOTES, ended, protocol};

/// Who may be connected at the same time; one more is turned away.
const CLIENTS_MAX: usize = 8;
/// What may be kept; one more is refused.
const KEPT_MAX: usize = 16;
/// How often it looks whether what it keeps is still of use, when no daemon is there.
const LOOK_EVERY_MS: u16 = 1_000;

/// Keeps, until there is nothing left to keep. For a process that does nothing else: it leaves its session and directory.
pub fn hold() -> io::Result<()> {
    // Whoever ends the daemon with all of its process group or session doesn't mean the holder. It fails only for who leads
    // a group of its own, which is as good.
    let _ = nix::unistd::setsid();
    let _ = nix::sys::prctl::set_name(c"darter-holder");
    // Without it every container on the node loses its files; it takes next to no memory itself.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
    std::env::set_current_dir("/")?;
    let listener = packet::duplicate(io::stdin())?;
    Holder::new(listener).run()
}

pub(super) struct Holder {
    listener: OwnedFd,
    clients: Vec<OwnedFd>,
    kept: BTreeMap<String, OwnedFd>,
    over: bool,
}

impl Holder {
    pub(super) fn new(listener: OwnedFd) -> Self {
        Self { listener, clients: Vec::new(), kept: BTreeMap::new(), over: false }
    }

    pub(super) fn run(&mut self) -> io::Result<()> {
        loop {
            let woken = self.wait()?;
            if woken.first() == Some(&true) {
                self.welcome();
            }
            // From the last to the first, so that positions stay right while some go.
            for (client, _) in woken.iter().skip(1).enumerate().rev().filter(|(_, woken)| **woken) {
                self.serve(client);
            }
            if self.clients.is_empty() {
                self.kept.retain(|_, descriptor| !ended(descriptor.as_fd()));
            }
            let is_useful = self.kept.keys().any(|name| !name.ends_with(NOTES));
            if self.over || (self.clients.is_empty() && !is_useful) {
                return Ok(());
            }
        }
    }

    /// Whether there is something from the listener, and from each client. What is kept isn't waited for: each request of a
    /// container would wake this process.
    fn wait(&self) -> io::Result<Vec<bool>> {
        let all = std::iter::once(&self.listener).chain(&self.clients);
        let mut waited: Vec<_> = all.map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
        let timeout =
            if self.clients.is_empty() { PollTimeout::from(LOOK_EVERY_MS) } else { PollTimeout::NONE };
        match poll(&mut waited, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(waited.iter().map(|socket| socket.any().unwrap_or(false)).collect())
    }

    /// Only root is served: a descriptor of a mount is every container's files.
    fn welcome(&mut self) {
        let own = nix::unistd::geteuid().as_raw();
        if let Ok((client, user)) = packet::accept(self.listener.as_fd())
            && (user == 0 || user == own)
            && self.clients.len() < CLIENTS_MAX
        {
            self.clients.push(client);
        }
    }

    fn serve(&mut self, client: usize) {
        let answered = match packet::receive(self.clients[client].as_fd()) {
            Ok(Some(packet)) => self.obey(client, packet).is_ok(),
            Ok(None) | Err(_) => false,
        };
        if !answered {
            self.clients.remove(client);
        }
    }

    fn obey(&mut self, client: usize, packet: Packet) -> io::Result<()> {
        let (verb, name) = protocol::parse(&packet.bytes)?;
        let answer = |bytes: &[u8], descriptor: Option<BorrowedFd<'_>>| {
            packet::send(self.clients[client].as_fd(), bytes, descriptor, None)
        };
        match (verb, packet.descriptor) {
            (protocol::KEEP, Some(descriptor)) if self.kept.len() < KEPT_MAX => {
                self.kept.insert(name.to_owned(), descriptor);
            }
            (protocol::TAKE, None) => {
                for (name, descriptor) in &self.kept {
                    answer(&protocol::compose(protocol::HERE, name), Some(descriptor.as_fd()))?;
                }
            }
            (protocol::FORGET, None) => {
                self.kept.remove(name);
            }
            (protocol::END, None) => self.over = true,
            _ => return answer(&protocol::compose(protocol::REFUSED, ""), None),
        }
        packet::send(self.clients[client].as_fd(), &protocol::compose(protocol::DONE, ""), None, None)
    }
}
