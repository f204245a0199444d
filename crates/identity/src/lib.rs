//! Who is who in a cluster, and proof of it: the cluster's CA, joining it, certificates that renew themselves, mutual TLS.
//!
//! Every program of Darter holds one [`Identity`]: a key, a certificate chain to the cluster's CA, and the CA itself. The
//! certificate names cluster, role and node as a URI ([`Member`]); TLS between programs is verified by that name and never
//! by host names. There is no way into the mesh without a certificate, tests and `darter standalone` included: they make a
//! throw-away [`Authority`] and use the same code.
//!
//! [`attend`] is here as well: the stream on which every program tells the manager that it lives, and is told who else does.
//!
//! Dependencies go to `types`, `proto` and `daemon`. This crate knows nothing of layers, pieces or scheduling.

pub mod attend;
mod authority;
mod connect;
mod door;
pub mod enrol;
mod error;
mod identity;
mod listener;
mod member;
mod pem;
mod renewal;
mod request;
mod stored;
mod tls;
mod token;

pub use authority::{Authority, BACKDATED};
pub use connect::TlsStream;
pub use error::IdentityError;
pub use identity::Identity;
pub use listener::{Accepted, ClientAuth, Incoming, Listener, PeerInfo};
pub use member::Member;
pub use pem::write_private;
pub use request::{followed, member, require, trail};
pub use stored::StoredCertificate;
pub use token::{JoinToken, SECRET_LEN};
