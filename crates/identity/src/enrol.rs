//! How a program that joins by token becomes a member, from the settings that all such programs have.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use darter_daemon::backoff::Backoff;
use darter_types::{NodeName, Role};
use tokio::time::{Instant, sleep, timeout};

use crate::identity::Tokens;
use crate::{Identity, IdentityError, JoinToken};

/// A manager that starts at the same moment is waited for this long.
const PATIENCE: Duration = Duration::from_secs(60);

/// For finding the manager's address, only to learn which of ours leads there. What is on a node's disk waits for it.
const LOOKUP_MAX: Duration = Duration::from_secs(2);

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
    #[error(
        "the join token is of another cluster or CA than the certificate that has ended: restart the program to join there"
    )]
    Elsewhere,
    #[error("the host's name {name:?} can't name a node ({error}): set node_name")]
    HostName { name: String, error: darter_types::NameError },
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

impl EnrolError {
    /// There is just no token, which who has joined does not need.
    pub(crate) fn is_missing_token(&self) -> bool {
        matches!(self, Self::NoToken { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

impl Enrolment {
    /// Joins as `role`. While the manager can't be reached it is asked again for a minute.
    ///
    /// Who has a certificate that is still valid needs no token: a secret that is used once is often taken away after that. A
    /// node's is used also when it has expired, since what the node has on its disk needs nobody; [`Identity::keep_fresh`] then gets
    /// another one when it can.
    pub async fn join(&self, role: Role) -> Result<Identity, EnrolError> {
        let (node, folder) = (self.node(role)?, self.root.join("identity"));
        let token = self.token(role);
        let tokens = self.tokens(role, token.as_ref().ok().cloned());
        if let Some(stored) = Identity::stored(role, &node, &folder, tokens.clone())?
            && token.as_ref().map_or(true, |token| stored.is_of(token))
            && may_start_with(&stored, SystemTime::now(), token.as_ref().err())
        {
            return Ok(stored);
        }
        let (token, mut backoff, started) = (token?, Backoff::new(RETRY_MIN, RETRY_MAX), Instant::now());
        loop {
            match Identity::join_with(&self.manager, &token, &node, &folder, tokens.clone()).await {
                Err(error) if may_pass(&error) && started.elapsed() < PATIENCE => {
                    tracing::warn!(manager = self.manager, %error, "not joined yet, trying again");
                    sleep(backoff.next()).await;
                }
                joined => return Ok(joined?),
            }
        }
    }

    /// Looks anew at each call; `known`, which was there before, does where there is none now.
    pub(crate) fn tokens(&self, role: Role, known: Option<JoinToken>) -> Tokens {
        let again = self.clone();
        Arc::new(move || match again.token(role) {
            Ok(token) => Ok(Some(token)),
            Err(error) if known.is_none() && !error.is_missing_token() => Err(error),
            Err(_) => Ok(known.clone()),
        })
    }

    fn token(&self, role: Role) -> Result<JoinToken, EnrolError> {
        let token: JoinToken = match self.join_token.is_empty() {
            false => self.join_token.parse()?,
            true => self.token_of_file()?.parse()?,
        };
        if token.role != role {
            return Err(EnrolError::Role { token: token.role, program: role });
        }
        Ok(token)
    }

    fn token_of_file(&self) -> Result<String, EnrolError> {
        let path = &self.join_token_file;
        std::fs::read_to_string(path).map_err(|source| EnrolError::NoToken { path: path.clone(), source })
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

/// Whether a program can begin with its stored certificate, without asking anybody. `no_token`: why it has none.
fn may_start_with(stored: &Identity, now: SystemTime, no_token: Option<&EnrolError>) -> bool {
    let member = stored.member();
    match (stored.is_valid(now), member.role, no_token) {
        (true, _, None) => true,
        (true, _, Some(error)) if error.is_missing_token() => {
            tracing::info!(%member, "started by the stored certificate, without a join token");
            true
        }
        (true, _, Some(error)) => {
            tracing::warn!(%member, %error, "started by the stored certificate; the join token is of no use: put a good one in its place, or take it away");
            true
        }
        (false, Role::Node, _) => {
            tracing::warn!(%member, "the stored certificate has expired, or this clock is late: until that is mended the node works without its cluster");
            true
        }
        (false, Role::Seed | Role::Scheduler | Role::Manager, _) => false,
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
    let there = timeout(LOOKUP_MAX, tokio::net::lookup_host(manager)).await.ok()?.ok()?.next()?;
    let any = if there.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(there).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::{Authority, Member};

    const LIFE: Duration = Duration::from_secs(3600);

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

    /// A root with the certificate of a member n1, as an earlier start left it.
    fn root_of(authority: &Authority, role: Role) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let member: Member = format!("spiffe://darter/c/{role}/n1").parse().unwrap();
        Identity::issued_by(authority, &member, LIFE).unwrap().save(&root.path().join("identity")).unwrap();
        root
    }

    fn authority() -> Authority {
        Authority::create("c".parse().unwrap()).unwrap()
    }

    fn root_of_a_node() -> tempfile::TempDir {
        root_of(&authority(), Role::Node)
    }

    fn without_a_token(root: &Path, node_name: &str) -> Enrolment {
        Enrolment { root: root.to_owned(), node_name: node_name.to_owned(), ..enrolment("") }
    }

    #[tokio::test]
    async fn stored_certificate_needs_no_token() {
        let root = root_of_a_node();
        let joined = without_a_token(root.path(), "n1").join(Role::Node).await.unwrap();
        assert_eq!(joined.member().to_string(), "spiffe://darter/c/node/n1");
        let cut_off = Enrolment { join_token: "darter.c".to_owned(), ..without_a_token(root.path(), "n1") };
        assert!(cut_off.join(Role::Node).await.is_ok());
    }

    #[test]
    fn only_a_token_that_is_not_there_at_all_needs_no_word() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        let found = || {
            let settings = Enrolment { join_token_file: file.clone(), ..enrolment("") };
            settings.token(Role::Seed).map_err(|error| error.is_missing_token())
        };
        assert_eq!(found(), Err(true));
        let token = |role| JoinToken::generate("c".parse().unwrap(), role, [1; 32]).unwrap();
        for bad in ["", "darter.c", &token(Role::Node).to_string()] {
            std::fs::write(&file, bad).unwrap();
            assert_eq!(found(), Err(false), "{bad:?}");
        }
        let good = token(Role::Seed);
        std::fs::write(&file, good.to_string()).unwrap();
        assert_eq!(found(), Ok(good));
    }

    #[tokio::test]
    async fn stored_certificate_of_another_name_or_role_needs_a_token() {
        let root = root_of_a_node();
        for (name, role) in [("n2", Role::Node), ("n1", Role::Seed)] {
            let error = without_a_token(root.path(), name).join(role).await.unwrap_err();
            assert!(matches!(error, EnrolError::NoToken { .. }), "{error}");
        }
    }

    #[tokio::test]
    async fn only_a_node_begins_with_a_certificate_that_is_not_valid_now() {
        for (role, begins) in [(Role::Node, true), (Role::Seed, false), (Role::Scheduler, false)] {
            let root = root_of(&authority(), role);
            let stored = without_a_token(root.path(), "n1").join(role).await.unwrap();
            let now = SystemTime::now();
            for (at, is_valid) in [(now, true), (now + 2 * LIFE, false), (now - 2 * LIFE, false)] {
                assert_eq!(stored.is_valid(at), is_valid, "{role}");
                assert_eq!(may_start_with(&stored, at, None), is_valid || begins, "{role}");
            }
        }
    }

    #[tokio::test]
    async fn a_token_that_comes_later_is_found_if_it_is_of_the_same_cluster_and_role() {
        let (authority, folder) = (authority(), tempfile::tempdir().unwrap());
        let root = root_of(&authority, Role::Node);
        let join_token_file = folder.path().join("token");
        let enrolment =
            Enrolment { join_token_file: join_token_file.clone(), ..without_a_token(root.path(), "n1") };
        let member = enrolment.join(Role::Node).await.unwrap();
        assert!(matches!(member.token(), Ok(None)));
        let pin = authority.pin();
        let given =
            |cluster: &str, pin| JoinToken::generate(cluster.parse().unwrap(), Role::Node, pin).unwrap();
        for (token, leads_back) in
            [(given("c", [1; 32]), false), (given("d", pin), false), (given("c", pin), true)]
        {
            std::fs::write(&join_token_file, format!("{token}\n")).unwrap();
            assert_eq!(member.token().ok().flatten(), leads_back.then_some(token));
        }
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
