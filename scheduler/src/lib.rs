//! The scheduler: chooses parents, orders layers from seeds.
//!
//! What it decides, and on what grounds, is `darter-scheduler-core`. This crate gives the core what it lacks: `grpc`
//! translates the streams of nodes and seeds into events, `driver` owns the core, has the clock and carries out its actions,
//! `recorder` writes events down for a replay. It holds nothing on disk but its certificate: when it is started again,
//! peers announce what they hold.
//!
//! Dependencies go to `scheduler-core`, `identity`, `daemon`, `proto` and `types`.

mod config;
mod driver;
mod flags;
mod grpc;
mod metrics;
mod recorder;
mod start;
mod translate;

pub use config::Config;
pub use flags::Flags;
pub use start::{Handle, SchedulerError, start, start_with_identity};
