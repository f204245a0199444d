//! Getting certificates from the manager: the first by token, the following ones by the one before.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use darter_daemon::backoff::Backoff;
use darter_proto::v1::identity_client::IdentityClient;
use darter_proto::v1::{IssuedCertificate, JoinRequest, RenewRequest};
use darter_types::{PROTOCOL_VERSION, Role};
use rustls_pki_types::CertificateDer;
use tokio::time::{sleep, timeout};
use tonic::Status;

use crate::enrol::EnrolError;
use crate::stored::{Credentials, Request};
use crate::tls::{self, Trust};
use crate::{Authority, Identity, IdentityError, JoinToken, Member, authority, connect};

/// For one answer of the manager, connecting included.
const CALL_DEADLINE: Duration = Duration::from_secs(15);

const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(60);

/// The clock may be set, and a machine may sleep: no wait for a renewal is longer than this without another look.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

type Issued = (Credentials, CertificateDer<'static>);

/// Asks the manager for `member`'s first certificate; its CA must be the one that the token pins.
pub(crate) async fn join(manager: &str, token: &JoinToken, member: &Member) -> Result<Issued, IdentityError> {
    let request = Request::new()?;
    let message = JoinRequest {
        protocol: PROTOCOL_VERSION,
        token: token.to_string(),
        node: member.node.to_string(),
        csr: request.csr.clone(),
    };
    let (pin, cluster) = (token.pin, token.cluster.clone());
    let channel = connect::lazy(manager.to_owned(), move || {
        tls::client(Trust::Pin(pin), &cluster, &[Role::Manager], None, &[b"h2"])
    });
    let answer = answered(manager, IdentityClient::new(channel).join(message)).await?;
    take(request, answer, member, token.pin)
}

async fn renew(identity: &Identity, manager: &str) -> Result<Issued, IdentityError> {
    let request = Request::new()?;
    let message = RenewRequest { protocol: PROTOCOL_VERSION, csr: request.csr.clone() };
    // A channel of its own for each renewal: it shows the newest certificate.
    let channel = identity.channel(manager, &[Role::Manager]);
    let answer = answered(manager, IdentityClient::new(channel).renew(message)).await?;
    take(request, answer, identity.member(), authority::pin(&identity.inner.ca))
}

async fn answered(
    manager: &str,
    call: impl Future<Output = Result<tonic::Response<IssuedCertificate>, Status>>,
) -> Result<IssuedCertificate, IdentityError> {
    let answer =
        timeout(CALL_DEADLINE, call).await.map_err(|_| IdentityError::Deadline(manager.to_owned()))?;
    answer.map(tonic::Response::into_inner).map_err(|status| explained(manager, &status))
}

/// The status in words; where it stems from the connection, the cause that the status hides is what helps.
fn explained(manager: &str, status: &Status) -> IdentityError {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<IdentityError>() {
            return failed_connection(error);
        }
        cause = error.source();
    }
    IdentityError::Refused { address: manager.to_owned(), reason: status.message().to_owned() }
}

/// rustls reports what it does not accept as invalid data; all else of a connection may pass.
fn failed_connection(error: &IdentityError) -> IdentityError {
    match error {
        IdentityError::Tls { source, .. } if source.kind() == io::ErrorKind::InvalidData => {
            IdentityError::Untrusted(error.to_string())
        }
        _ => IdentityError::Connection(error.to_string()),
    }
}

/// Takes what was issued only if it is for this member, by this CA, and for the key that was sent.
fn take(
    request: Request,
    answer: IssuedCertificate,
    member: &Member,
    pin: [u8; 32],
) -> Result<Issued, IdentityError> {
    let ca = CertificateDer::from(answer.ca);
    if authority::pin(&ca) != pin {
        return Err(IdentityError::Pin);
    }
    let chain: Vec<_> = answer.chain.into_iter().map(CertificateDer::from).collect();
    let (leaf, intermediates) =
        chain.split_first().ok_or_else(|| IdentityError::Certificate("the manager sent none".to_owned()))?;
    let roots = tls::roots(&ca)?;
    let issued = tls::verify_chain(leaf, intermediates, &roots, tls::unix_time(SystemTime::now()))?;
    if issued != *member {
        return Err(IdentityError::Issued { expected: member.to_string(), issued: issued.to_string() });
    }
    Ok((request.complete(chain, &ca, false)?, ca))
}

/// Never returns.
pub(crate) async fn keep_fresh(identity: Identity, manager: String) {
    loop {
        until_due(&identity).await;
        refresh(&identity, &manager).await;
    }
}

/// Never returns.
pub(crate) async fn keep_reissued(identity: Identity, authority: Arc<Authority>, life: Duration) {
    loop {
        until_due(&identity).await;
        if let Err(error) = identity.reissue(&authority, life) {
            tracing::error!(%error, "can't issue the next certificate of our own");
            sleep(RETRY_MIN).await;
        }
    }
}

async fn until_due(identity: &Identity) {
    loop {
        let due = identity.inner.current.load().renew_at();
        let Ok(left) = due.duration_since(SystemTime::now()) else { return };
        sleep(left.min(LOOK_AGAIN)).await;
    }
}

/// Asks until there is a new certificate.
async fn refresh(identity: &Identity, manager: &str) {
    let mut backoff = Backoff::new(RETRY_MIN, RETRY_MAX);
    loop {
        match renew_or_join(identity, manager).await {
            Ok((credentials, _)) => return store(identity, credentials),
            Err(error) => {
                let expired = identity.expires() < SystemTime::now();
                tracing::warn!(%error, expired, "can't renew the certificate, trying again");
                sleep(backoff.next()).await;
            }
        }
    }
}

async fn renew_or_join(identity: &Identity, manager: &str) -> Result<Issued, EnrolError> {
    let has_ended = identity.expires() <= SystemTime::now();
    let token = if has_ended { token_now(identity)? } else { None };
    Ok(match token {
        Some(token) => join(manager, &token, identity.member()).await?,
        None => renew(identity, manager).await?,
    })
}

/// The token that somebody has put there for a member whose certificate has ended, else the one by which it joined. Only one for
/// its own CA is taken: the running program trusts no other.
fn token_now(identity: &Identity) -> Result<Option<JoinToken>, EnrolError> {
    let (member, pin) = (identity.member(), authority::pin(&identity.inner.ca));
    let own = identity.inner.token.clone();
    match identity.inner.look.get().map(|look| look()) {
        Some(Ok(token)) if token.cluster == member.cluster && token.pin == pin => Ok(Some(token)),
        Some(Ok(_)) => Err(EnrolError::Elsewhere),
        Some(Err(error)) if own.is_none() && !error.is_missing_token() => Err(error),
        Some(Err(_)) | None => Ok(own),
    }
}

/// Uses the new certificate even if it can't be stored: the old one on disk costs a join after a restart, no more.
fn store(identity: &Identity, credentials: Credentials) {
    if let Some(folder) = &identity.inner.folder
        && let Err(error) = credentials.save(folder, &identity.inner.ca)
    {
        tracing::warn!(%error, "can't store the new certificate");
    }
    identity.inner.current.store(Arc::new(credentials));
    tracing::info!(member = %identity.member(), "the certificate was renewed");
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use darter_daemon::tasks::Tasks;
    use darter_proto::v1::identity_server;
    use tokio::net::TcpListener;
    use tonic::Response;
    use tonic::transport::Server;

    use super::*;
    use crate::ClientAuth;
    use crate::enrol::Enrolment;

    const LIFE: Duration = Duration::from_secs(3600);

    /// A manager that knows one token.
    struct Manager {
        authority: Arc<Authority>,
        token: String,
    }

    #[tonic::async_trait]
    impl identity_server::Identity for Manager {
        async fn join(
            &self,
            request: tonic::Request<JoinRequest>,
        ) -> Result<Response<IssuedCertificate>, Status> {
            let JoinRequest { token, node, csr, .. } = request.into_inner();
            if token != self.token {
                return Err(Status::permission_denied("the token is not known"));
            }
            let chain = self.authority.issue(&csr, &member(&node), LIFE).unwrap();
            Ok(Response::new(IssuedCertificate { chain, ca: self.authority.ca_der().to_vec() }))
        }

        async fn renew(
            &self,
            _: tonic::Request<RenewRequest>,
        ) -> Result<Response<IssuedCertificate>, Status> {
            Err(Status::unauthenticated("the certificate has ended"))
        }
    }

    fn member(node: &str) -> Member {
        format!("spiffe://darter/c/node/{node}").parse().unwrap()
    }

    async fn serve(manager: Manager, tasks: &Tasks) -> String {
        let own = "spiffe://darter/c/manager/m".parse().unwrap();
        let identity = Identity::issued_by(&manager.authority, &own, LIFE).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut listener = identity.listener(tcp, &[b"h2"], ClientAuth::Optional, tasks).unwrap();
        let address = listener.address().to_string();
        let server = Server::builder().add_service(identity_server::IdentityServer::new(manager));
        let incoming = listener.grpc();
        tasks.spawn("manager", async move { server.serve_with_incoming(incoming).await.unwrap() });
        address
    }

    /// One whose certificate has ended, and that looks for tokens there.
    async fn ended(authority: &Authority, manager: &str, file: &Path) -> Identity {
        let identity = Identity::issued_by(authority, &member("n1"), Duration::ZERO).unwrap();
        let settings = Enrolment {
            root: file.to_owned(),
            manager: manager.to_owned(),
            join_token: String::new(),
            join_token_file: file.to_owned(),
            node_name: "n1".to_owned(),
        };
        identity.look_for_tokens(settings.look(Role::Node));
        // It ends with the second.
        while let Ok(left) = identity.expires().duration_since(SystemTime::now()) {
            sleep(left + Duration::from_millis(1)).await;
        }
        identity
    }

    #[tokio::test]
    async fn certificate_that_ended_without_a_token_is_replaced_when_one_is_put_there() {
        let (folder, tasks) = (tempfile::tempdir().unwrap(), Tasks::new());
        let authority = Arc::new(Authority::create("c".parse().unwrap()).unwrap());
        let generate = |pin| JoinToken::generate("c".parse().unwrap(), Role::Node, pin).unwrap();
        let token = generate(authority.pin()).to_string();
        let manager = Manager { authority: authority.clone(), token: token.clone() };
        let (address, file) = (serve(manager, &tasks).await, folder.path().join("token"));
        let identity = ended(&authority, &address, &file).await;
        assert!(matches!(renew_or_join(&identity, &address).await, Err(EnrolError::Identity(_))));
        std::fs::write(&file, generate([1; 32]).to_string()).unwrap();
        assert!(matches!(renew_or_join(&identity, &address).await, Err(EnrolError::Elsewhere)));
        std::fs::write(&file, token).unwrap();
        timeout(Duration::from_secs(20), refresh(&identity, &address)).await.unwrap();
        assert!(identity.expires() > SystemTime::now());
        assert_eq!(Member::from_certificate(&identity.inner.current.load().chain[0]).unwrap(), member("n1"));
    }
}
