//! [`Identity`]: what a program is in its cluster, how it comes to it, and what it can prove with it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use darter_daemon::tasks::Tasks;
use darter_types::{NodeName, Role};
use rustls::RootCertStore;
use rustls_pki_types::CertificateDer;
use tokio::net::TcpListener;
use tonic::transport::Channel;

use crate::enrol::EnrolError;
use crate::listener::{ClientAuth, Listener};
use crate::stored::{Credentials, Request};
use crate::tls::{self, Current, Trust};
use crate::{Authority, IdentityError, JoinToken, Member, TlsStream, authority, connect, listener, renewal};

/// Looks for a join token.
pub(crate) type Look = Box<dyn Fn() -> Result<JoinToken, EnrolError> + Send + Sync>;

/// A member's key, certificate and CA. Clones share them: a renewed certificate is used by all from the next handshake on,
/// while connections that stand keep the one they were made with.
#[derive(Clone)]
pub struct Identity {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) member: Member,
    pub(crate) ca: CertificateDer<'static>,
    pub(crate) roots: Arc<RootCertStore>,
    pub(crate) current: Arc<ArcSwap<Credentials>>,
    /// Where renewed certificates go; `None` if they live in memory only.
    pub(crate) folder: Option<PathBuf>,
    /// To join again, should the certificate ever expire.
    pub(crate) token: Option<JoinToken>,
    /// Finds a newer one then.
    pub(crate) look: OnceLock<Look>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({})", self.inner.member)
    }
}

impl Identity {
    /// Becomes `node` of the token's cluster in the token's role.
    ///
    /// A certificate in `folder` that is still valid, of that very member and of the pinned CA, is used without asking the
    /// manager at `manager` (`host:port`), which may be down. Otherwise the manager must answer, must be of the pinned CA,
    /// and its certificate is stored in `folder`.
    pub async fn join(
        manager: &str,
        token: &JoinToken,
        node: &NodeName,
        folder: &Path,
    ) -> Result<Identity, IdentityError> {
        let member = Member { cluster: token.cluster.clone(), role: token.role, node: node.clone() };
        let is_meant = |stored: &Stored| {
            authority::pin(&stored.1) == token.pin
                && holds_for(stored, SystemTime::now()).as_ref() == Some(&member)
        };
        let (credentials, ca) = match load(folder).filter(is_meant) {
            Some(found) => found,
            None => {
                let issued = renewal::join(manager, token, &member).await?;
                issued.0.save(folder, &issued.1)?;
                issued
            }
        };
        Self::new(member, credentials, ca, Some(folder.to_owned()), Some(token.clone()))
    }

    /// `node` in this role by the certificate in `folder` alone, whose cluster and CA are in the same file; `None` if there is none,
    /// or it is of another member or no longer valid.
    pub fn stored(role: Role, node: &NodeName, folder: &Path) -> Result<Option<Identity>, IdentityError> {
        let Some(stored) = load(folder) else { return Ok(None) };
        match holds_for(&stored, SystemTime::now()) {
            Some(member) if member.role == role && member.node == *node => {
                Self::new(member, stored.0, stored.1, Some(folder.to_owned()), None).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// An identity straight from the CA: for the manager itself, for `standalone` and for tests. It lives in memory only, and
    /// [`Identity::keep_fresh`] can't renew it; [`Identity::reissue`] does.
    pub fn issued_by(
        authority: &Authority,
        member: &Member,
        life: Duration,
    ) -> Result<Identity, IdentityError> {
        let credentials = issue(authority, member, life)?;
        Self::new(member.clone(), credentials, authority.ca_der().clone(), None, None)
    }

    /// The next certificate of an identity that [`Identity::issued_by`] made.
    pub fn reissue(&self, authority: &Authority, life: Duration) -> Result<(), IdentityError> {
        self.inner.current.store(Arc::new(issue(authority, &self.inner.member, life)?));
        Ok(())
    }

    fn new(
        member: Member,
        credentials: Credentials,
        ca: CertificateDer<'static>,
        folder: Option<PathBuf>,
        token: Option<JoinToken>,
    ) -> Result<Self, IdentityError> {
        let roots = tls::roots(&ca)?;
        let current = Arc::new(ArcSwap::from_pointee(credentials));
        let look = OnceLock::new();
        Ok(Self { inner: Arc::new(Inner { member, ca, roots, current, folder, token, look }) })
    }

    /// Where a token is looked for, should the certificate ever expire.
    pub(crate) fn look_for_tokens(&self, look: Look) {
        let _ = self.inner.look.set(look);
    }

    pub fn member(&self) -> &Member {
        &self.inner.member
    }

    /// When the certificate of the moment ends.
    pub fn expires(&self) -> SystemTime {
        self.inner.current.load().expires
    }

    /// Renews the certificate at half its life, for as long as the tasks run. While the manager does not answer it is asked
    /// again, with growing pauses; a certificate that expired in the meantime is replaced by joining again, as soon as there is a token.
    pub fn keep_fresh(&self, manager: String, tasks: &Tasks) {
        tasks.spawn_until_stop("certificate renewal", renewal::keep_fresh(self.clone(), manager));
    }

    /// Like [`Identity::keep_fresh`], for whoever holds the CA.
    pub fn keep_reissued(&self, authority: Arc<Authority>, life: Duration, tasks: &Tasks) {
        tasks.spawn_until_stop("certificate reissue", renewal::keep_reissued(self.clone(), authority, life));
    }

    /// An ECDSA P-256 signature over the SHA-256 of `message`, in ASN.1 form.
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.inner.current.load().sign(message)
    }

    /// The certificates to send along with a signature: DER, leaf first, without the CA. Take it and the signature from
    /// [`Identity::sign_with_chain`] where a renewal between the two would matter.
    pub fn chain(&self) -> Vec<Vec<u8>> {
        self.inner.current.load().chain.iter().map(|certificate| certificate.to_vec()).collect()
    }

    /// A signature and the chain of the key that made it.
    pub fn sign_with_chain(&self, message: &[u8]) -> (Vec<u8>, Vec<Vec<u8>>) {
        let current = self.inner.current.load();
        (current.sign(message), current.chain.iter().map(|certificate| certificate.to_vec()).collect())
    }

    /// Who signed `message`: a member of our cluster whose certificate was valid at `at`, which may be long ago. Whether
    /// that member's role entitles it to sign this is for the caller to decide.
    pub fn verify_signed(
        &self,
        message: &[u8],
        signature: &[u8],
        chain: &[Vec<u8>],
        at: SystemTime,
    ) -> Result<Member, IdentityError> {
        let bad = |reason: String| IdentityError::Signature(reason);
        let chain: Vec<_> = chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
        let (leaf, intermediates) =
            chain.split_first().ok_or_else(|| bad("it comes without certificate".to_owned()))?;
        let member = tls::verify_chain(leaf, intermediates, &self.inner.roots, tls::unix_time(at))
            .map_err(|error| bad(error.to_string()))?;
        self.same_cluster(&member)?;
        let (_, parsed) =
            x509_parser::parse_x509_certificate(leaf).map_err(|error| bad(error.to_string()))?;
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &parsed.public_key().subject_public_key.data)
            .verify(message, signature)
            .map_err(|_| bad("it is not of these bytes and this certificate".to_owned()))?;
        Ok(member)
    }

    pub(crate) fn same_cluster(&self, member: &Member) -> Result<(), IdentityError> {
        let (ours, theirs) = (&self.inner.member.cluster, &member.cluster);
        if ours == theirs {
            return Ok(());
        }
        Err(IdentityError::Cluster { ours: ours.clone(), theirs: theirs.clone() })
    }

    pub(crate) fn client_config(
        &self,
        expected: &[Role],
        alpns: &[&[u8]],
    ) -> Result<Arc<rustls::ClientConfig>, IdentityError> {
        let trust = Trust::Roots(self.inner.roots.clone());
        tls::client(
            trust,
            &self.inner.member.cluster,
            expected,
            Some(Current(self.inner.current.clone())),
            alpns,
        )
    }

    /// A gRPC channel to `address` (`host:port`) that connects when first used and again whenever the connection is lost. The
    /// server must be of our cluster, in one of the `expected` roles.
    pub fn channel(&self, address: &str, expected: &[Role]) -> Channel {
        connect::channel(self, address, expected)
    }

    /// A raw TLS stream under the rules of [`Identity::channel`], for the protocol that `alpn` names, and who answered.
    pub async fn connect(
        &self,
        address: &str,
        expected: &[Role],
        alpn: &'static [u8],
    ) -> Result<(TlsStream, Member), IdentityError> {
        self.connect_any(address, expected, &[alpn]).await
    }

    /// The same for the one of several protocols that the server likes best; the stream says which that is.
    pub async fn connect_any(
        &self,
        address: &str,
        expected: &[Role],
        alpns: &[&[u8]],
    ) -> Result<(TlsStream, Member), IdentityError> {
        let config = self.client_config(expected, alpns)?;
        connect::connect(address, config).await
    }

    /// Accepts TLS on `tcp` for the protocols in `alpns`, of which `h2` is gRPC, until the tasks stop.
    pub fn listener(
        &self,
        tcp: TcpListener,
        alpns: &[&'static [u8]],
        auth: ClientAuth,
        tasks: &Tasks,
    ) -> Result<Listener, IdentityError> {
        let own = Current(self.inner.current.clone());
        let config = tls::server(self.inner.roots.clone(), own, alpns, auth)?;
        listener::start(self.clone(), tcp, config, alpns, tasks)
    }
}

fn issue(authority: &Authority, member: &Member, life: Duration) -> Result<Credentials, IdentityError> {
    let request = Request::new()?;
    let chain = authority.issue(&request.csr, member, life)?;
    let chain = chain.into_iter().map(CertificateDer::from).collect();
    request.complete(chain, authority.ca_der(), member.role == Role::Manager)
}

/// Credentials and their CA.
type Stored = (Credentials, CertificateDer<'static>);

fn load(folder: &Path) -> Option<Stored> {
    Credentials::load(folder).unwrap_or_else(|error| {
        tracing::warn!(%error, "the stored certificate can't be used, joining again");
        None
    })
}

/// Whose certificate it is, if its own CA has made it and it holds at this time.
fn holds_for((credentials, ca): &Stored, at: SystemTime) -> Option<Member> {
    let (leaf, intermediates) = credentials.chain.split_first()?;
    let roots = tls::roots(ca).ok()?;
    tls::verify_chain(leaf, intermediates, &roots, tls::unix_time(at)).ok()
}

#[cfg(test)]
impl Identity {
    /// As a join leaves it in `folder`.
    pub(crate) fn save(&self, folder: &Path) -> Result<(), IdentityError> {
        self.inner.current.load().save(folder, &self.inner.ca)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_certificate_holds_for_its_member_until_it_expires() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::create("c".parse().unwrap()).unwrap();
        let member: Member = "spiffe://darter/c/node/n1".parse().unwrap();
        let identity = Identity::issued_by(&authority, &member, Duration::from_secs(60)).unwrap();
        identity.save(folder.path()).unwrap();
        let (stored, now) = (load(folder.path()).unwrap(), SystemTime::now());
        assert_eq!(holds_for(&stored, now), Some(member));
        assert_eq!(holds_for(&stored, now + Duration::from_secs(120)), None);
    }
}
