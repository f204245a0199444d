//! How a program that joins by token becomes a member, from the settings that all such programs have.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use darter_daemon::backoff::Backoff;
use darter_types::{NodeName, Role};
use tokio::time::{Instant, sleep};

use crate::{Identity, IdentityError, JoinToken};

/// A manager that starts at the same moment is waited for this long.
const PATIENCE: Duration = Duration::from_secs(60);

const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// The settings of joining. An empty text means that it was not set.
#[derive(Debug, Clone)]
pub struct Enrolment {
    /// The certificate is kept in the folder `identity` in here.
    pub root: PathBuf,
    /// `host:port`
    pub manager: String,
    /// Goes before the file.
    pub join_token: String,
    pub join_token_file: PathBuf,
    /// Empty: the host's name.
    pub node_name: String,
}

/// Why a program could not become a member.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    #[error("no join token: set join_token, or put it into {}: {source}", path.display())]
    NoToken { path: PathBuf, source: io::Error },
    #[error("the join token is for a {token}, this program is a {program}: take one for a {program}")]
    Role { token: Role, program: Role },
    #[error("the host's name {name:?} can't name a node ({error}): set node_name")]
    HostName { name: String, error: darter_types::NameError },
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

impl Enrolment {
    /// Joins as `role`. While the manager can't be reached it is asked again for a minute.
    pub async fn join(&self, role: Role) -> Result<Identity, EnrolError> {
        let token = self.token()?;
        if token.role != role {
            return Err(EnrolError::Role { token: token.role, program: role });
        }
        let (node, folder) = (self.node(role)?, self.root.join("identity"));
        let (mut backoff, started) = (Backoff::new(RETRY_MIN, RETRY_MAX), Instant::now());
        loop {
            match Identity::join(&self.manager, &token, &node, &folder).await {
                Err(error) if may_pass(&error) && started.elapsed() < PATIENCE => {
                    tracing::warn!(manager = self.manager, %error, "not joined yet, trying again");
                    sleep(backoff.next()).await;
                }
                joined => return Ok(joined?),
            }
        }
    }

    fn token(&self) -> Result<JoinToken, EnrolError> {
        if !self.join_token.is_empty() {
            return Ok(self.join_token.parse()?);
        }
        let path = &self.join_token_file;
        let text = std::fs::read_to_string(path)
            .map_err(|source| EnrolError::NoToken { path: path.clone(), source })?;
        Ok(text.parse()?)
    }

    fn node(&self, role: Role) -> Result<NodeName, EnrolError> {
        if !self.node_name.is_empty() {
            return Ok(self.node_name.parse().map_err(IdentityError::Name)?);
        }
        let mut name = host_name(Path::new("/proc/sys/kernel/hostname"));
        // A node daemon may run beside it, and two members of one name would be taken for one that moves.
        if role == Role::Seed {
            name.push_str("-seed");
        }
        name.parse().map_err(|error| EnrolError::HostName { name, error })
    }
}

fn may_pass(error: &IdentityError) -> bool {
    use IdentityError::{Connection, Deadline, Unreachable};
    matches!(error, Unreachable { .. } | Deadline(_) | Connection(_))
}

fn host_name(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_ascii_lowercase()
}

/// Where others reach a port that listens on `listen`: what was set, else the address that it listens on, else the one
/// that this host has on its way to the manager.
pub async fn advertised(set: &str, listen: SocketAddr, manager: &str) -> String {
    if !set.is_empty() {
        return set.to_owned();
    }
    let own = if listen.ip().is_unspecified() { address_toward(manager).await } else { Some(listen.ip()) };
    SocketAddr::new(own.unwrap_or(listen.ip()), listen.port()).to_string()
}

/// Connecting a UDP socket sends nothing, but makes the kernel choose a route and with it our address.
async fn address_toward(manager: &str) -> Option<IpAddr> {
    let there = tokio::net::lookup_host(manager).await.ok()?.next()?;
    let any = if there.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(there).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enrolment(token: &str) -> Enrolment {
        Enrolment {
            root: PathBuf::from("/nonexistent"),
            manager: "127.0.0.1:1".to_owned(),
            join_token: token.to_owned(),
            join_token_file: PathBuf::from("/nonexistent/token"),
            node_name: String::new(),
        }
    }

    #[tokio::test]
    async fn missing_token_says_where_it_belongs() {
        let error = enrolment("").join(Role::Seed).await.unwrap_err().to_string();
        assert!(error.contains("/nonexistent/token"), "{error}");
    }

    #[tokio::test]
    async fn token_of_another_role_is_refused_before_anybody_is_asked() {
        let token = JoinToken::generate("c".parse().unwrap(), Role::Node, [1; 32]).unwrap();
        let error = enrolment(&token.to_string()).join(Role::Seed).await.unwrap_err();
        assert!(matches!(error, EnrolError::Role { token: Role::Node, program: Role::Seed }));
    }

    #[tokio::test]
    async fn advertised_address_is_one_that_others_can_reach() {
        let any: SocketAddr = "0.0.0.0:7420".parse().unwrap();
        assert_eq!(advertised("peer-1:99", any, "127.0.0.1:1").await, "peer-1:99");
        assert_eq!(advertised("", any, "127.0.0.1:1").await, "127.0.0.1:7420");
        let one: SocketAddr = "127.0.0.9:7420".parse().unwrap();
        assert_eq!(advertised("", one, "192.0.2.1:1").await, "127.0.0.9:7420");
    }
}
