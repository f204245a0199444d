//! rustls, told to verify members instead of host names.
//!
//! TLS 1.3 only, no resumption: a resumed session would not look at the certificate again.

use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use darter_types::{ClusterName, Role};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls13_signature};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{
    ClientHello, NoServerSessionStorage, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls::{ClientConfig, DigitallySignedStruct, Error, RootCertStore, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::stored::Credentials;
use crate::{ClientAuth, IdentityError, Member, authority};

/// The name that TLS wants for a server. It is neither sent nor checked.
pub(crate) fn server_name() -> ServerName<'static> {
    ServerName::try_from("darter").expect("a plain word is a DNS name")
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    aws_lc_rs::default_provider().signature_verification_algorithms
}

pub(crate) fn roots(ca: &CertificateDer<'static>) -> Result<Arc<RootCertStore>, IdentityError> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone())?;
    Ok(Arc::new(roots))
}

/// Checks that `leaf` was signed by the CA and was valid at `at`, and says whom it names.
pub(crate) fn verify_chain(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    roots: &RootCertStore,
    at: UnixTime,
) -> Result<Member, Error> {
    let parsed = ParsedCertificate::try_from(leaf)?;
    verify_server_cert_signed_by_trust_anchor(&parsed, roots, intermediates, at, algorithms().all)?;
    Member::from_certificate(leaf).map_err(|error| refused(&error))
}

pub(crate) fn unix_time(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

fn refused(error: &IdentityError) -> Error {
    Error::General(error.to_string())
}

/// The roots that a server must chain to: known, or to be recognised by a join token's pin.
#[derive(Debug)]
pub(crate) enum Trust {
    Roots(Arc<RootCertStore>),
    Pin([u8; 32]),
}

impl Trust {
    fn roots(&self, intermediates: &[CertificateDer<'_>]) -> Result<Arc<RootCertStore>, Error> {
        match self {
            Trust::Roots(roots) => Ok(roots.clone()),
            Trust::Pin(pin) => {
                let ca = intermediates.iter().find(|shown| authority::pin(shown) == *pin);
                let ca = ca.ok_or_else(|| refused(&IdentityError::Pin))?;
                roots(&ca.clone().into_owned()).map_err(|error| refused(&error))
            }
        }
    }
}

/// Takes a server that is a member of our cluster in one of the expected roles, wherever it runs.
#[derive(Debug)]
struct ExpectedServer {
    trust: Trust,
    cluster: ClusterName,
    roles: Vec<Role>,
}

impl ExpectedServer {
    fn check(&self, member: &Member) -> Result<(), IdentityError> {
        if member.cluster != self.cluster {
            return Err(IdentityError::Cluster {
                ours: self.cluster.clone(),
                theirs: member.cluster.clone(),
            });
        }
        if !self.roles.contains(&member.role) {
            return Err(IdentityError::Role { expected: self.roles.clone(), theirs: member.role });
        }
        Ok(())
    }
}

impl ServerCertVerifier for ExpectedServer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let roots = self.trust.roots(intermediates)?;
        let member = verify_chain(leaf, intermediates, &roots, now)?;
        self.check(&member).map_err(|error| refused(&error))?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

/// Shows the certificate of the moment, so that a renewed one is used from the next handshake on.
#[derive(Clone)]
pub(crate) struct Current(pub(crate) Arc<ArcSwap<Credentials>>);

impl std::fmt::Debug for Current {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Current(key not shown)")
    }
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load().certified.clone())
    }
}

impl ResolvesClientCert for Current {
    fn resolve(&self, _roots: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load().certified.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// How to be a client. Without `own` no certificate is shown, which only the manager's `Join` takes.
pub(crate) fn client(
    trust: Trust,
    cluster: &ClusterName,
    roles: &[Role],
    own: Option<Current>,
    alpns: &[&[u8]],
) -> Result<Arc<ClientConfig>, IdentityError> {
    let verifier = ExpectedServer { trust, cluster: cluster.clone(), roles: roles.to_vec() };
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match own {
        Some(own) => builder.with_client_cert_resolver(Arc::new(own)),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpns.iter().map(|alpn| alpn.to_vec()).collect();
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// How to be a server.
pub(crate) fn server(
    roots: Arc<RootCertStore>,
    own: Current,
    alpns: &[&'static [u8]],
    auth: ClientAuth,
) -> Result<Arc<ServerConfig>, IdentityError> {
    let builder = WebPkiClientVerifier::builder_with_provider(roots, provider());
    let builder = match auth {
        ClientAuth::Required => builder,
        ClientAuth::Optional => builder.allow_unauthenticated(),
    };
    let verifier: Arc<dyn ClientCertVerifier> =
        builder.build().map_err(|error| IdentityError::Crypto(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(own));
    config.alpn_protocols = alpns.iter().map(|alpn| alpn.to_vec()).collect();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}
