//! `Identity`: the first certificate by join token, the next ones by the one before.

use std::sync::Arc;
use std::time::Duration;

use darter_identity::{Authority, JoinToken, Member, require};
use darter_proto::convert::{WireError, check_protocol};
use darter_proto::v1::identity_server::Identity;
use darter_proto::v1::{IssuedCertificate, JoinRequest, RenewRequest};
use darter_types::Role;
use sha2::{Digest, Sha256};
use tonic::{Request, Response, Status};

use super::internal;
use crate::core::names::{self, NameHeld};
use crate::core::tokens::{self, TokenRefusal};
use crate::db::{Audit, Certified, Store};
use crate::metrics::Metrics;
use crate::root::now;

pub(crate) struct IdentityService {
    pub(crate) authority: Arc<Authority>,
    pub(crate) store: Store,
    pub(crate) life: Duration,
    pub(crate) metrics: Arc<Metrics>,
}

fn refused(refusal: TokenRefusal) -> Status {
    Status::permission_denied(refusal.to_string())
}

/// Names a certificate in lists and in the audit log.
fn serial(leaf: &[u8]) -> String {
    hex::encode(&Sha256::digest(leaf)[..8])
}

impl IdentityService {
    /// Checks everything, makes the certificate, and takes a use of the token last: a request that fails costs none.
    async fn admit(&self, request: JoinRequest) -> Result<IssuedCertificate, Status> {
        check_protocol(request.protocol)?;
        let token: JoinToken = request.token.parse().map_err(|error| WireError::invalid("token", error))?;
        if token.cluster != *self.authority.cluster() {
            return Err(refused(TokenRefusal::Unknown));
        }
        let node = request.node.parse().map_err(|error| WireError::invalid("node", error))?;
        let role = self.check(&token).await?;
        let member = Member { cluster: token.cluster.clone(), role, node };
        self.not_revoked(&member).await?;
        self.not_held(&member).await?;
        let issued = self.issue(&request.csr, &member)?;
        let id = token.id_text();
        let taken = self.store.call(move |storage| storage.take_use(&id, now())).await.map_err(internal)?;
        if !taken {
            // It expired or was used up just now: the second look says which.
            self.check(&token).await?;
            return Err(refused(TokenRefusal::UsedUp));
        }
        self.record(&member, &issued, Some(token.id)).await?;
        tracing::info!(%member, "a member joined");
        Ok(issued)
    }

    async fn check(&self, token: &JoinToken) -> Result<Role, Status> {
        let id = token.id_text();
        let record = self.store.call(move |storage| storage.join_token(&id)).await.map_err(internal)?;
        tokens::check(record.as_ref(), token, now()).map_err(refused)
    }

    async fn not_revoked(&self, member: &Member) -> Result<(), Status> {
        let (role, node) = (member.role, member.node.clone());
        let revoked =
            self.store.call(move |storage| storage.is_revoked(role, &node)).await.map_err(internal)?;
        if revoked {
            return Err(Status::permission_denied(format!("{member} was revoked")));
        }
        Ok(())
    }

    /// Only for those who join: whoever renews has shown that the name is its own.
    async fn not_held(&self, member: &Member) -> Result<(), Status> {
        let (role, node) = (member.role, member.node.clone());
        let known = self.store.call(move |storage| storage.member(role, &node)).await.map_err(internal)?;
        match known {
            Some(known) if names::is_held(known.certified_until, known.last_seen, now()) => {
                Err(Status::permission_denied(NameHeld { member: member.clone() }.to_string()))
            }
            _ => Ok(()),
        }
    }

    fn issue(&self, csr: &[u8], member: &Member) -> Result<IssuedCertificate, Status> {
        let chain = self.authority.issue(csr, member, self.life);
        let chain = chain.map_err(|error| WireError::invalid("csr", error))?;
        Ok(IssuedCertificate { chain, ca: self.authority.ca_der().to_vec() })
    }

    async fn record(
        &self,
        member: &Member,
        issued: &IssuedCertificate,
        token: Option<[u8; 8]>,
    ) -> Result<(), Status> {
        self.metrics.certificates.inc();
        let serial = issued.chain.first().map(|leaf| serial(leaf)).unwrap_or_default();
        let until = now() + self.life.as_secs();
        let certified = Certified { member: member.clone(), serial: serial.clone(), until };
        let audit = token.map(|token| Audit {
            at: now(),
            actor: format!("join token {}", hex::encode(token)),
            action: "joined",
            subject: format!("{member}, certificate {serial}"),
        });
        let written = self.store.call(move |storage| {
            storage.record_certificate(&certified)?;
            audit.map_or(Ok(()), |audit| storage.record(&audit))
        });
        written.await.map_err(internal)
    }
}

#[tonic::async_trait]
impl Identity for IdentityService {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<IssuedCertificate>, Status> {
        let from = request.extensions().get::<darter_identity::PeerInfo>().map(|peer| peer.address);
        let admitted = self.admit(request.into_inner()).await;
        if let Err(status) = &admitted {
            tracing::warn!(?from, reason = status.message(), "a join was refused");
        }
        admitted.map(Response::new)
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<IssuedCertificate>, Status> {
        let member = require(&request, &Role::ALL)?;
        let request = request.into_inner();
        check_protocol(request.protocol)?;
        self.not_revoked(&member).await?;
        let issued = self.issue(&request.csr, &member)?;
        self.record(&member, &issued, None).await?;
        Ok(Response::new(issued))
    }
}
