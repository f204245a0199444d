//! The cluster's certificate authority: one P-256 key, kept by the manager in a file of its own.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use darter_types::ClusterName;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
    SerialNumber,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivatePkcs8KeyDer};
use sha2::{Digest, Sha256};

use crate::{IdentityError, Member, pem};

/// How long before its issue a certificate is already valid, for members whose clocks are behind.
pub const BACKDATED: Duration = Duration::from_secs(300);

/// A CA outlives what it signs by far; a new one means that every member joins again.
const CA_LIFE: Duration = Duration::from_secs(20 * 365 * 24 * 3600);

/// The CA of one cluster. Whoever has it can be any member.
pub struct Authority {
    cluster: ClusterName,
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

impl Authority {
    pub fn create(cluster: ClusterName) -> Result<Self, IdentityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "Darter");
        params.distinguished_name.push(DnType::CommonName, format!("CA of {cluster}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.serial_number = Some(serial()?);
        let now = SystemTime::now();
        params.not_before = (now - BACKDATED).into();
        params.not_after = (now + CA_LIFE).into();
        let certificate = params.self_signed(&key)?.der().clone();
        Ok(Self { cluster, issuer: Issuer::new(params, key), certificate })
    }

    /// `None` if there is no such file. The file must be of `cluster`'s CA.
    pub fn load(path: &Path, cluster: ClusterName) -> Result<Option<Self>, IdentityError> {
        let damaged =
            |reason: &str| IdentityError::Damaged { path: path.to_owned(), reason: reason.to_owned() };
        let Some((key, certificates)) = pem::read(path)? else { return Ok(None) };
        let [certificate] = certificates.as_slice() else {
            return Err(damaged("it must hold one certificate"));
        };
        let key =
            KeyPair::from_pkcs8_der_and_sign_algo(&PrivatePkcs8KeyDer::from(key), &PKCS_ECDSA_P256_SHA256)?;
        if common_name(certificate).as_deref() != Some(&format!("CA of {cluster}")) {
            return Err(damaged(
                "it is the CA of another cluster: give the program that cluster's name, or another root",
            ));
        }
        let issuer = Issuer::from_ca_cert_der(certificate, key)?;
        Ok(Some(Self { cluster, issuer, certificate: certificate.clone() }))
    }

    /// Key and certificate in one file that only its owner can read.
    pub fn save(&self, path: &Path) -> Result<(), IdentityError> {
        pem::write(path, self.issuer.key().serialized_der(), std::slice::from_ref(&self.certificate))
    }

    /// Loads the CA from `path`, or makes one and saves it there.
    pub fn open(path: &Path, cluster: ClusterName) -> Result<Self, IdentityError> {
        if let Some(authority) = Self::load(path, cluster.clone())? {
            return Ok(authority);
        }
        let authority = Self::create(cluster)?;
        authority.save(path)?;
        Ok(authority)
    }

    /// A certificate for `member` with the public key of `csr` (PKCS #10, DER), of which nothing else counts, valid from
    /// [`BACKDATED`] ago for `life` from now. The chain has the leaf first and does not hold the CA.
    pub fn issue(&self, csr: &[u8], member: &Member, life: Duration) -> Result<Vec<Vec<u8>>, IdentityError> {
        let csr = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr))?;
        if member.cluster != self.cluster {
            return Err(IdentityError::Cluster {
                ours: self.cluster.clone(),
                theirs: member.cluster.clone(),
            });
        }
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "Darter");
        let uri = member.to_string().try_into().map_err(|_| IdentityError::Member(member.to_string()))?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial()?);
        let now = SystemTime::now();
        params.not_before = (now - BACKDATED).into();
        params.not_after = next_second(now + life).into();
        Ok(vec![params.signed_by(&csr.public_key, &self.issuer)?.der().to_vec()])
    }

    pub fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    pub fn ca_der(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// SHA-256 of the CA's certificate in DER: what a join token carries.
    pub fn pin(&self) -> [u8; 32] {
        pin(&self.certificate)
    }
}

pub(crate) fn pin(certificate: &CertificateDer<'_>) -> [u8; 32] {
    Sha256::digest(certificate).into()
}

/// Certificates count in whole seconds: rounding up keeps a life of a second or two from being cut in half.
fn next_second(time: SystemTime) -> SystemTime {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    UNIX_EPOCH + Duration::from_secs(since.as_secs() + u64::from(since.subsec_nanos() > 0))
}

/// 128 random bits, positive as RFC 5280 asks (section 4.1.2.2).
fn serial() -> Result<SerialNumber, IdentityError> {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| IdentityError::Crypto("no random bytes".to_owned()))?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let name = parsed.subject().iter_common_name().next()?;
    name.as_str().ok().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn cluster() -> ClusterName {
        "default".parse().unwrap()
    }

    #[test]
    fn saved_authority_is_the_same_one_and_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.pem");
        let made = Authority::open(&path, cluster()).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Authority::open(&path, cluster()).unwrap().pin(), made.pin());
    }

    #[test]
    fn authority_of_another_cluster_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.pem");
        Authority::open(&path, cluster()).unwrap();
        assert!(Authority::load(&path, "other".parse().unwrap()).is_err());
    }

    #[test]
    fn request_that_is_not_signed_by_its_key_is_refused() {
        let authority = Authority::create(cluster()).unwrap();
        let member = "spiffe://darter/default/node/a".parse().unwrap();
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let mut csr = CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
        assert!(authority.issue(&csr, &member, BACKDATED).is_ok());
        *csr.last_mut().unwrap() ^= 1;
        assert!(authority.issue(&csr, &member, BACKDATED).is_err());
    }
}
