//! The wire format between Darter's programs, and nothing else.
//!
//! [`v1`] is generated from `darter/darter.proto`. [`convert`] turns its messages into the checked types of
//! `darter-types` and back: a bad message is refused there, and nowhere else.

pub mod convert;

/// Messages, clients and servers of the protocol's first version.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("darter.v1");
}
