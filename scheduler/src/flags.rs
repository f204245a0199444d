//! The command line of `darter-scheduler`.

use std::path::PathBuf;

use clap::Parser;
use darter_daemon::telemetry;

/// Chooses parents and orders layers from seeds.
#[derive(Parser)]
#[command(version)]
pub struct Flags {
    /// The configuration; the sample file scheduler.toml shows every key [default: /etc/darter/scheduler.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// How log lines look: text or json.
    #[arg(long, default_value = "text")]
    pub log_format: telemetry::LogFormat,
    /// What is logged; DARTER_LOG takes precedence.
    #[arg(long, default_value = "info")]
    pub log: String,
}
