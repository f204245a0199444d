//! The peer without containerd: seeds, and hosts that run other engines.
//!
//! What makes it a peer is `darter-mesh`. This crate starts one from a configuration and, on a seed, carries out the
//! manager's orders to preheat images ([`preheat`]).
//!
//! Dependencies go to `mesh`, `registry`, `identity`, `daemon` and `types`.

mod config;
mod flags;
pub mod preheat;
mod start;

pub use config::Config;
pub use flags::Flags;
pub use start::{Handle, start};
