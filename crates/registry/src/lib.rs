//! The client of registries: the pull side of the OCI distribution specification, and enough of the push side for tests.
//!
//! It finds a registry as containerd does (`certs.d/*/hosts.toml`: mirrors first, then the server; Docker's
//! `config.json` for credentials), speaks token and basic authentication, follows redirects by hand, and reads blobs
//! with resume. It promises that
//!
//! * no credential, token or pre-signed query is part of an error, a `Debug` text or a log line,
//! * `Authorization` goes to no other host than the one that asked for it and the token server that it named; a
//!   mirror that asks is shown only what a client gave with a pull ([`Client::lend`]), as containerd does,
//! * every wait is bounded ([`Patience`]), and no answer is held in memory beyond a named limit,
//! * manifests and [`Client::fetch`]ed blobs were checked against their digest. A streamed [`Blob`] was not: whoever
//!   reads it to the end hashes it anyway.
//!
//! It keeps nothing on disk, and decides nothing about layers.

mod auth;
mod blob;
mod client;
mod credential;
mod directory;
mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod helper;
mod hosts;
mod known;
mod lent;
pub mod manifest;
mod near;
pub mod platform;
mod push;
mod reference;
mod retry;
mod size;
mod transport;

pub use blob::{Blob, BlobStream};
pub use client::{Client, Image, Options, Resolved};
pub use credential::{Credential, default_docker_config};
pub use error::RegistryError;
pub use manifest::{Descriptor, Document, ImageConfig, ImageManifest, Index, Manifest};
pub use platform::Platform;
pub use reference::{ImageRef, Reference, ReferenceError};
pub use retry::Patience;
