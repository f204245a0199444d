//! "These pieces of that layer", from the store, from other peers, from a seed, from the origin.
//!
//! [`Mesh`] is one peer: it serves maps and pieces to others, keeps a stream to each scheduler, and gives its own program a
//! [`Layer`] for each layer that is in use. A layer first finds its map: in the store, at a peer or a seed ([`Layer::map`]
//! waits for it, the work goes on without waiters), at worst made here from the origin. Then it gives pieces: those that
//! somebody waits for before all others, each from whichever parent is free.
//!
//! Promised: no map is used that a seed of our cluster has not signed, or that was not made here from a blob with both
//! digests right; no byte of a piece leaves this crate unchecked; a peer that sends wrong bytes is passed over; whoever
//! stops waiting leaves no work undone and none behind that nobody wants; credentials go to registries and seeds only.
//!
//! Not here: what a map means (`darter-layer`), how pieces rest (`darter-store`), who is who (`darter-identity`), and
//! anything of containerd or FUSE.

pub mod assemble;
mod background;
mod bits;
mod cache;
mod control;
mod error;
mod frames;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod layer;
mod limits;
mod load;
mod make;
mod mesh;
mod metrics;
mod note;
mod options;
pub mod orders;
mod origin;
mod parents;
mod probe;
mod proof;
mod reach;
mod rendezvous;
mod right;
mod serve;
mod shared;
mod shelf;
mod start;
mod status;
#[cfg(test)]
mod tests;
mod upkeep;
mod work;

pub use error::{LayerError, MeshError};
pub use layer::{Layer, LayerRequest, Priority, Renew};
pub use limits::{RateStatus, SetBy};
pub use mesh::Mesh;
pub use options::{BackgroundOptions, Deps, Options};
pub use origin::{credential_from_wire, credential_to_wire};
pub use probe::Probe;
pub use status::{LayerStatus, Progress, SchedulerStatus, Stage, StoreStatus};
pub use upkeep::InUse;
