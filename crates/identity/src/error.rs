//! What can go wrong with an identity.

use std::io;
use std::path::PathBuf;

use darter_types::{ClusterName, NameError, Role};

/// Texts say what to do where the reader can do something. No text ever holds a secret.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("the join token is not valid: {0}")]
    Token(&'static str),
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("{0:?} names no member: it must read spiffe://darter/<cluster>/<role>/<node>")]
    Member(String),
    #[error("the certificate names no member of a cluster: {0}")]
    Certificate(String),
    #[error(
        "the manager's CA is not the one that the join token pins: take a new token from the manager you mean to join"
    )]
    Pin,
    #[error("the other side is of cluster {theirs}, this one of {ours}")]
    Cluster { ours: ClusterName, theirs: ClusterName },
    #[error("the other side is a {theirs}, not a {}", list(.expected))]
    Role { expected: Vec<Role>, theirs: Role },
    #[error("the manager issued a certificate for {issued}, not for {expected}")]
    Issued { expected: String, issued: String },
    #[error("the signature does not verify: {0}")]
    Signature(String),
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{}: {reason}", path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error("can't reach {address}: {source}")]
    Unreachable { address: String, source: io::Error },
    #[error("no TLS with {address}: {source}")]
    Tls { address: String, source: io::Error },
    #[error("no answer from {0} within the deadline")]
    Deadline(String),
    #[error("{address} refused: {reason}")]
    Refused { address: String, reason: String },
    /// The manager can't be reached now.
    #[error("{0}")]
    Connection(String),
    /// Who answers is not whom the caller trusts; asking again does not help.
    #[error("{0}")]
    Untrusted(String),
    #[error("cryptography failed: {0}")]
    Crypto(String),
}

fn list(roles: &[Role]) -> String {
    roles.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(" or ")
}

impl From<rcgen::Error> for IdentityError {
    fn from(error: rcgen::Error) -> Self {
        IdentityError::Crypto(error.to_string())
    }
}

impl From<rustls::Error> for IdentityError {
    fn from(error: rustls::Error) -> Self {
        IdentityError::Crypto(error.to_string())
    }
}
