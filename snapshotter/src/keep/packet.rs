//! Small packets over a Unix socket, each with at most one descriptor.
//!
//! A descriptor arrives as a bare number that the kernel has just given to this process. Nothing else can own it, and only
//! unsafe code can say so.
#![allow(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    accept4, bind, connect, getsockopt, listen, recvmsg, sendmsg, socket, sockopt,
};

/// The longest packet. A longer one is cut off and so means nothing.
const PACKET_MAX: usize = 256;

/// What came in one packet.
pub(super) struct Packet {
    pub(super) bytes: Vec<u8>,
    pub(super) descriptor: Option<OwnedFd>,
}

fn new_socket() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?)
}

/// A socket that listens at `path`, where nothing may be.
pub(super) fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let socket = new_socket()?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&socket, Backlog::MAXALLOWABLE)?;
    Ok(socket)
}

pub(super) fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    let socket = new_socket()?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}

/// The next who connects, and the user behind it.
pub(super) fn accept(listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, u32)> {
    let client = own(accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?);
    let user = getsockopt(&client, sockopt::PeerCredentials)?.uid();
    Ok((client, user))
}

pub(super) fn send(
    to: BorrowedFd<'_>,
    bytes: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
    address: Option<&UnixAddr>,
) -> io::Result<()> {
    let numbers: Vec<RawFd> = descriptor.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let messages = if numbers.is_empty() { &[][..] } else { &rights[..] };
    sendmsg(to.as_raw_fd(), &[IoSlice::new(bytes)], messages, MsgFlags::MSG_NOSIGNAL, address)?;
    Ok(())
}

/// The next packet; `None` when the other end is closed.
pub(super) fn receive(from: BorrowedFd<'_>) -> io::Result<Option<Packet>> {
    let mut bytes = vec![0; PACKET_MAX];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let (length, numbers) = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        match recvmsg::<UnixAddr>(from.as_raw_fd(), &mut parts, Some(&mut space), flags) {
            Ok(message) => {
                let rights = message.cmsgs()?.filter_map(|part| match part {
                    ControlMessageOwned::ScmRights(numbers) => Some(numbers),
                    _ => None,
                });
                break (message.bytes, rights.flatten().collect::<Vec<_>>());
            }
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    };
    let mut descriptors = numbers.into_iter().map(own);
    let descriptor = descriptors.next();
    bytes.truncate(length);
    Ok((length > 0).then_some(Packet { bytes, descriptor }))
}

/// The descriptors of these numbers, which whoever started this process has left open in it.
///
/// # Safety
/// Nothing else in this process may use the numbers.
pub(super) unsafe fn inherited(numbers: std::ops::Range<RawFd>) -> Vec<OwnedFd> {
    // SAFETY: the caller's promise.
    numbers.map(|number| unsafe { OwnedFd::from_raw_fd(number) }).collect()
}

fn own(number: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just given it to this process, and it was told to nobody else.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// A second descriptor for the same open file.
pub(super) fn duplicate(descriptor: impl AsFd) -> io::Result<OwnedFd> {
    descriptor.as_fd().try_clone_to_owned()
}
