//! A key with its certificate chain, ready for TLS and for signing; and the file in which it survives a restart.
//!
//! The file `identity.pem` holds the key, the chain (leaf first) and, last, the CA. It is replaced as a whole.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::authority::BACKDATED;
use crate::{IdentityError, Member, pem};

pub(crate) fn path(folder: &Path) -> PathBuf {
    folder.join("identity.pem")
}

/// What an identity has at one moment; renewal replaces it as a whole.
pub(crate) struct Credentials {
    pub(crate) certified: Arc<CertifiedKey>,
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pkcs8: Vec<u8>,
    signing: EcdsaKeyPair,
    pub(crate) issued: SystemTime,
    pub(crate) expires: SystemTime,
}

/// A new key, and the request for a certificate for it.
pub(crate) struct Request {
    key: KeyPair,
    pub(crate) csr: Vec<u8>,
}

impl Request {
    pub(crate) fn new() -> Result<Self, IdentityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let csr = CertificateParams::default().serialize_request(&key)?.der().to_vec();
        Ok(Self { key, csr })
    }

    /// The key together with the chain that was issued for it. With `with_ca` TLS shows the CA as well, so that members who
    /// only know its pin can check it.
    pub(crate) fn complete(
        self,
        chain: Vec<CertificateDer<'static>>,
        ca: &CertificateDer<'static>,
        with_ca: bool,
    ) -> Result<Credentials, IdentityError> {
        Credentials::new(self.key.serialized_der().to_vec(), chain, with_ca.then(|| ca.clone()))
    }
}

impl Credentials {
    fn new(
        pkcs8: Vec<u8>,
        chain: Vec<CertificateDer<'static>>,
        shown_ca: Option<CertificateDer<'static>>,
    ) -> Result<Self, IdentityError> {
        let leaf =
            chain.first().ok_or_else(|| IdentityError::Certificate("the chain is empty".to_owned()))?;
        let (issued, expires) = validity(leaf)?;
        let signing = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &pkcs8)
            .map_err(|error| IdentityError::Crypto(error.to_string()))?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(pkcs8.clone()));
        let shown = chain.iter().cloned().chain(shown_ca).collect();
        let certified = CertifiedKey::from_der(shown, key, &rustls::crypto::aws_lc_rs::default_provider())?;
        Ok(Self { certified: Arc::new(certified), chain, pkcs8, signing, issued, expires })
    }

    pub(crate) fn sign(&self, message: &[u8]) -> Vec<u8> {
        let signature = self.signing.sign(&SystemRandom::new(), message);
        signature.expect("signing with a P-256 key that was loaded does not fail").as_ref().to_vec()
    }

    /// Half of the certificate's life: when to ask for the next one.
    pub(crate) fn renew_at(&self) -> SystemTime {
        self.issued + self.expires.duration_since(self.issued).unwrap_or_default() / 2
    }

    pub(crate) fn save(&self, folder: &Path, ca: &CertificateDer<'static>) -> Result<(), IdentityError> {
        let certificates: Vec<_> = self.chain.iter().chain([ca]).cloned().collect();
        pem::write(&path(folder), &self.pkcs8, &certificates)
    }

    /// What a folder holds, with its CA; `None` if it holds nothing. Whether it may still be used is the caller's question.
    pub(crate) fn load(folder: &Path) -> Result<Option<(Self, CertificateDer<'static>)>, IdentityError> {
        let Some((pkcs8, mut chain)) = pem::read(&path(folder))? else { return Ok(None) };
        let ca = chain.pop().ok_or_else(|| IdentityError::Damaged {
            path: path(folder),
            reason: "it holds no certificate".to_owned(),
        })?;
        Ok(Some((Self::new(pkcs8, chain, None)?, ca)))
    }
}

/// The certificate that a folder keeps, for people who ask about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredCertificate {
    pub member: Member,
    pub issued: SystemTime,
    pub expires: SystemTime,
}

impl StoredCertificate {
    /// `None` if the folder has none.
    pub fn of(folder: &Path) -> Result<Option<Self>, IdentityError> {
        let Some((credentials, _)) = Credentials::load(folder)? else { return Ok(None) };
        let member = Member::from_certificate(&credentials.chain[0])?;
        Ok(Some(Self { member, issued: credentials.issued, expires: credentials.expires }))
    }
}

/// When a certificate was issued, and until when it holds.
fn validity(certificate: &CertificateDer<'_>) -> Result<(SystemTime, SystemTime), IdentityError> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate)
        .map_err(|error| IdentityError::Certificate(error.to_string()))?;
    let time = |seconds: i64| UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    let validity = parsed.validity();
    Ok((time(validity.not_before.timestamp()) + BACKDATED, time(validity.not_after.timestamp())))
}
