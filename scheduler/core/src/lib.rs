//! Who gets what from whom: the scheduler's rules, without clock, network or chance.
//!
//! [`Core::handle`] takes what happened and when, and says what is to be done. The same events at the same times give
//! the same actions, on every machine: collections are ordered, and what has to be spread is spread by hashes of names.
//! So a log of events ([`record`]) replays to the same actions, and a simulator can run the same core in virtual time.
//!
//! What it promises:
//! - A seed is told to make a layer once, however many nodes ask for it at the same moment.
//! - Nobody is told a parent that left, that holds nothing of the task, or that is the child itself.
//! - Every opened task is answered: at once, or when the grace after a start is over.
//! - Everything that it remembers has a limit ([`limits`]).
//!
//! It does not know which pieces of a span a peer has, who may read a layer, or any credential: peers and seeds settle
//! that among themselves. It depends on `darter-types` alone.

mod choose;
mod core;
mod event;
mod hash;
mod holdings;
pub mod limits;
mod making;
pub mod record;
mod spans;
mod state;
mod telling;

pub use core::{Core, Counts, Options};
pub use event::{Action, Event, Fault, Holding, MakeState, Millis, Parent, PeerId};
pub use spans::Spans;
