//! Systemd's descriptor store (`sd_pid_notify_with_fds(3)`, `FDSTORE=1`): what is in it comes back at the next start.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, socket};

use super::packet;

/// The number of the first descriptor that systemd passes on.
const FIRST: RawFd = 3;
/// More of them would not be ours.
const PASSED_MAX: RawFd = 64;
/// Set these names apart from sockets that a unit may pass as well.
const PREFIX: &str = "darter-";

/// Where systemd listens for what its services say.
pub(super) struct ServiceManager {
    address: OsString,
    /// It has said that it has a store for this service. Before version 254 it doesn't say.
    pub(super) is_known: bool,
}

impl ServiceManager {
    /// `None` if this process wasn't started as a service that may speak.
    pub(super) fn find() -> Option<Self> {
        let address = env::var_os("NOTIFY_SOCKET")?;
        let room = env::var("FDSTORE").ok().and_then(|room| room.parse::<u32>().ok());
        Some(Self { address, is_known: room.is_some_and(|room| room > 0) })
    }

    /// Puts a descriptor into the store. It isn't watched there (`FDPOLL=0`): each request of a container would wake systemd.
    pub(super) fn keep(&self, name: &str, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        self.say(&format!("FDSTORE=1\nFDNAME={PREFIX}{name}\nFDPOLL=0"), Some(descriptor))
    }

    pub(super) fn forget(&self, name: &str) -> io::Result<()> {
        self.say(&format!("FDSTOREREMOVE=1\nFDNAME={PREFIX}{name}"), None)
    }

    fn say(&self, state: &str, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        // A name that starts with @ is an abstract one.
        let address = match self.address.as_bytes().strip_prefix(b"@") {
            Some(name) => UnixAddr::new_abstract(name)?,
            None => UnixAddr::new(self.address.as_os_str())?,
        };
        let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        packet::send(socket.as_fd(), state.as_bytes(), descriptor, Some(&address))
    }
}

/// What systemd has passed to this process, by name. Call it once, before anything else could use the numbers.
#[allow(unsafe_code, reason = "descriptors are passed as numbers")]
pub(super) fn passed() -> BTreeMap<String, OwnedFd> {
    let text = |name| env::var(name).unwrap_or_default();
    let Some((count, names)) =
        announced(&text("LISTEN_PID"), &text("LISTEN_FDS"), &text("LISTEN_FDNAMES"), std::process::id())
    else {
        return BTreeMap::new();
    };
    // SAFETY: systemd says that these are open and meant for this process, which takes them here and nowhere else.
    let descriptors = unsafe { packet::inherited(FIRST..FIRST + count) };
    let named = names.into_iter().zip(descriptors);
    let ours = |(name, descriptor): (String, OwnedFd)| {
        let name = name.strip_prefix(PREFIX)?.to_owned();
        // So that no program that is started from here gets it as well.
        Some((name, packet::duplicate(descriptor).ok()?))
    };
    named.filter_map(ours).collect()
}

/// How many descriptors were passed to the process `own`, and their names. The variables are inherited by children, whom
/// they don't concern.
fn announced(pid: &str, count: &str, names: &str, own: u32) -> Option<(RawFd, Vec<String>)> {
    let meant = pid.parse() == Ok(own);
    let count = count.parse().ok().filter(|count| meant && (1..=PASSED_MAX).contains(count))?;
    Some((count, names.split(':').map(str::to_owned).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_for_another_process_are_left_alone() {
        let names = vec!["darter-m".to_owned(), "other".to_owned()];
        assert_eq!(announced("7", "2", "darter-m:other", 7), Some((2, names)));
        assert_eq!(announced("8", "2", "darter-m:other", 7), None);
        for count in ["", "0", "-1", "many", "1000"] {
            assert_eq!(announced("7", count, "", 7), None, "{count:?}");
        }
    }
}
