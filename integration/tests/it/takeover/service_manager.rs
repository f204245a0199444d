//! Systemd's side of its descriptor store: receives what a service hands over, and passes it to the next process.
//!
//! Descriptors travel as numbers; only unsafe code can say that nobody else has them.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// Longer than any start takes.
const PATIENCE: Duration = Duration::from_secs(30);

pub struct ServiceManager {
    socket: UnixDatagram,
    path: PathBuf,
}

impl ServiceManager {
    pub fn listen(path: &Path) -> Result<Self> {
        let socket = UnixDatagram::bind(path)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { socket, path: path.to_owned() })
    }

    /// What a service finds in its environment.
    pub fn environment(&self) -> Vec<(String, String)> {
        vec![
            ("NOTIFY_SOCKET".to_owned(), self.path.display().to_string()),
            ("FDSTORE".to_owned(), "16".to_owned()),
        ]
    }

    /// What was stored before the service said `last`.
    pub fn kept_after(&self, last: &str) -> Result<BTreeMap<String, OwnedFd>> {
        let mut kept = BTreeMap::new();
        loop {
            let (text, descriptor) = self.next().with_context(|| format!("the service didn't say {last}"))?;
            if text.lines().any(|line| line == last) {
                return Ok(kept);
            }
            let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or_default();
            if text.lines().any(|line| line == "FDSTORE=1") {
                kept.insert(name.to_owned(), descriptor.context("FDSTORE without a descriptor")?);
            } else if text.lines().any(|line| line == "FDSTOREREMOVE=1") {
                kept.remove(name);
            }
        }
    }

    fn next(&self) -> Result<(String, Option<OwnedFd>)> {
        let mut bytes = [0; 4096];
        let mut space = nix::cmsg_space!([RawFd; 4]);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let message =
            recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        let mut descriptors = Vec::new();
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(numbers) = part {
                // SAFETY: the kernel has just given them to this process, and they were told to nobody else.
                descriptors.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
            }
        }
        let length = message.bytes;
        Ok((String::from_utf8_lossy(&bytes[..length]).into_owned(), descriptors.pop()))
    }
}
