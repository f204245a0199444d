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

async fn renew_or_join(identity: &Identity, manager: &str) -> Result<Issued, IdentityError> {
    let has_expired = identity.expires() <= SystemTime::now();
    match has_expired.then(|| identity.token()).flatten() {
        Some(token) => join(manager, &token, identity.member()).await,
        None => renew(identity, manager).await,
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
