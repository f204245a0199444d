//! What every program of Darter does alike: configuration, logs, numbers, traces, tasks, back-off, start and stop.
//!
//! Nothing here knows what a program is for. A `main` parses its flags, loads its configuration with [`config`], calls
//! [`telemetry::init`], and hands the rest to [`run::block_on_main`].

pub mod address;
pub mod backoff;
pub mod config;
pub mod database;
pub mod http;
mod memory;
pub mod notify;
pub mod numbers;
pub mod priority;
mod process;
pub mod run;
pub mod shutdown;
pub mod tasks;
pub mod telemetry;
pub mod traces;
