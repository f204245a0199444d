//! Sockets that are for root alone: who may not open one is told so, and not that nobody answers there.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Result, bail};
use tokio::net::UnixStream;

/// Whether this user may not open the socket.
pub async fn is_denied(socket: &Path) -> bool {
    let connected = UnixStream::connect(socket).await;
    connected.is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
}

/// Fails with what to do where this user may not open the socket.
pub async fn allowed(socket: &Path) -> Result<()> {
    if is_denied(socket).await {
        bail!("{} may be opened by root only: run this as root", socket.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_that_is_not_there_is_denied_to_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("x.sock");
        assert!(allowed(&socket).await.is_ok());
        let _listener = tokio::net::UnixListener::bind(&socket).unwrap();
        assert!(!is_denied(&socket).await);
    }
}
