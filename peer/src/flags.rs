//! The command line of `darter-peer`.

use std::path::PathBuf;

use clap::Parser;
use darter_daemon::telemetry;

/// A peer without containerd.
#[derive(Parser)]
#[command(version)]
pub struct Flags {
    /// The configuration; the sample file peer.toml shows every key [default: /etc/darter/peer.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Read from registries for the others, and take orders to preheat. It needs a seed's token.
    #[arg(long)]
    pub seed: bool,
    /// How log lines look: text or json.
    #[arg(long, default_value = "text")]
    pub log_format: telemetry::LogFormat,
    /// What is logged; DARTER_LOG takes precedence.
    #[arg(long, default_value = "info")]
    pub log: String,
}
