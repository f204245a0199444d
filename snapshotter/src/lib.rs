//! The node daemon: containerd's snapshots, served from the mesh where that is possible, from plain directories where
//! there is a reason against it.
//!
//! ```text
//! containerd ── containerd/ ── node ── snapshot/   the tree of snapshots and its records; plain directories
//!          └─── cri/             └──── lazy/ ── fs/ ── fuse/ ── kernel
//!                                        └───── the mesh, the registries, containerd's content store
//! ```
//! [`start`] puts it together. It needs neither containerd nor the mesh to be there, and serves what its records say.

mod admin;
mod config;
pub mod containerd;
pub mod cri;
mod flags;
pub mod fs;
pub mod fuse;
pub mod keep;
pub mod lazy;
mod local;
mod membership;
mod metrics;
mod node;
mod outlive;
mod peer;
mod run;
pub mod snapshot;
mod socket;
mod start;

pub use config::{Config, HOLD, root_folder};
pub use flags::{Command, Flags};
pub use membership::Membership;
pub use outlive::{RootError, RootLock, UnmountError, unmount};
pub use run::{RunError, run};
pub use start::{Deps, Handle, Options, Peer, StartError, start};
