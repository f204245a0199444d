//! A member of a cluster, as its certificate names it.

use std::fmt;
use std::str::FromStr;

use darter_types::{ClusterName, NodeName, Role};
use rustls_pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::IdentityError;

const PREFIX: &str = "spiffe://darter/";

/// Cluster, role and node, written `spiffe://darter/<cluster>/<role>/<node>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Member {
    pub cluster: ClusterName,
    pub role: Role,
    pub node: NodeName,
}

impl Member {
    /// The member that a certificate names. It says nothing of who signed the certificate.
    ///
    /// Fails unless there is exactly one subject alternative name, and that a member's URI.
    pub fn from_certificate(certificate: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let bad = |reason: &str| IdentityError::Certificate(reason.to_owned());
        let (_, parsed) = X509Certificate::from_der(certificate)
            .map_err(|error| IdentityError::Certificate(error.to_string()))?;
        let names = parsed
            .subject_alternative_name()
            .map_err(|error| IdentityError::Certificate(error.to_string()))?;
        let names = &names.ok_or_else(|| bad("it has no subject alternative name"))?.value.general_names;
        match names.as_slice() {
            [GeneralName::URI(uri)] => uri.parse(),
            _ => Err(bad("its subject alternative name must be one URI")),
        }
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}/{}/{}", self.cluster, self.role, self.node)
    }
}

impl FromStr for Member {
    type Err = IdentityError;
    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let refuse = || IdentityError::Member(text.chars().take(200).collect());
        let mut parts = text.strip_prefix(PREFIX).ok_or_else(refuse)?.split('/');
        let (Some(cluster), Some(role), Some(node), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(refuse());
        };
        Ok(Self { cluster: cluster.parse()?, role: role.parse()?, node: node.parse()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uri_round_trips() {
        let text = "spiffe://darter/default/seed/seed-1.example";
        let member: Member = text.parse().unwrap();
        assert_eq!(member.role, Role::Seed);
        assert_eq!(member.to_string(), text);
    }

    #[test]
    fn other_uris_name_nobody() {
        for bad in [
            "spiffe://other/default/seed/a",
            "spiffe://darter/default/seed",
            "spiffe://darter/default/seed/a/b",
            "spiffe://darter/default/king/a",
            "spiffe://darter//seed/a",
        ] {
            assert!(bad.parse::<Member>().is_err(), "{bad:?} was taken");
        }
    }
}
