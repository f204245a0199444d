//! What a program tells systemd, if systemd started it (`sd_notify(3)`): that it is ready, alive, about to stop.
//!
//! Units say `Type=notify` and `WatchdogSec=`. Without systemd every call here does nothing. A state that can't be told is
//! logged and forgotten: systemd acts on what it doesn't hear.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use crate::tasks::Tasks;

/// Says that the program serves, and from now on, as often as systemd wants it, that it lives. The sign of life comes from
/// a task of the program's own runtime: it stays away when no thread is left to run tasks.
pub fn ready(tasks: &Tasks) {
    tell("READY=1");
    if let Some(limit) = watchdog() {
        tasks.spawn_until_stop("sign of life", repeat("WATCHDOG=1", limit / 2));
    }
}

/// Says that the program has begun to stop.
pub fn stopping() {
    tell("STOPPING=1");
}

async fn repeat(state: &'static str, period: Duration) {
    loop {
        tell(state);
        tokio::time::sleep(period).await;
    }
}

/// Sends `state`, lines of `NAME=value`, to who started the program.
pub fn tell(state: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = send(&name, state) {
        tracing::warn!(%error, state, "systemd was not told");
    }
}

fn send(name: &OsStr, state: &str) -> io::Result<()> {
    let address = address(name)?;
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(drop)
}

/// Where systemd listens. A name that starts with @ is an abstract one: a zero byte stands in its place.
pub fn address(name: &OsStr) -> io::Result<SocketAddr> {
    match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(name),
    }
}

/// After how long without a sign of life systemd kills this process; `None` if it doesn't.
fn watchdog() -> Option<Duration> {
    let text = |name| std::env::var_os(name);
    limit(text("WATCHDOG_USEC"), text("WATCHDOG_PID"), std::process::id())
}

/// The variables are inherited by children, whom they don't concern: `pid` says who is meant.
fn limit(usec: Option<OsString>, pid: Option<OsString>, own: u32) -> Option<Duration> {
    let usec: u64 = usec?.to_str()?.parse().ok()?;
    let meant = pid.is_none_or(|pid| pid.to_str() == Some(own.to_string().as_str()));
    (meant && usec > 0).then(|| Duration::from_micros(usec))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 64];
        let read = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..read].to_vec()).unwrap()
    }

    #[test]
    fn state_arrives_at_a_socket_in_a_folder_and_at_an_abstract_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let abstract_name = format!("@darter-test-{}", std::process::id());
        for name in [path.as_os_str(), OsStr::new(&abstract_name)] {
            let socket = UnixDatagram::bind_addr(&address(name).unwrap()).unwrap();
            send(name, "READY=1").unwrap();
            assert_eq!(received(&socket), "READY=1");
        }
    }

    #[test]
    fn nobody_listening_is_an_error_for_the_log() {
        assert!(send(OsStr::new("/nonexistent/notify"), "READY=1").is_err());
    }

    #[test]
    fn watchdog_of_another_process_is_none_of_ours() {
        let some = |text: &str| Some(OsString::from(text));
        assert_eq!(limit(some("30000000"), some("7"), 7), Some(Duration::from_secs(30)));
        assert_eq!(limit(some("30000000"), None, 7), Some(Duration::from_secs(30)));
        assert_eq!(limit(some("30000000"), some("8"), 7), None);
        assert_eq!(limit(some("soon"), None, 7), None);
        assert_eq!(limit(some("0"), None, 7), None);
        assert_eq!(limit(None, None, 7), None);
    }
}
