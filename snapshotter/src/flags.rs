//! The command line of `darter-snapshotter`.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use darter_daemon::telemetry;

use crate::config::{HOLD, root_folder};

/// Serves containerd's snapshots, lazily where it can.
#[derive(Parser)]
#[command(version)]
pub struct Flags {
    /// The configuration; the sample file snapshotter.toml shows every key [default: /etc/darter/snapshotter.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where snapshots lie, instead of the configuration's `root`.
    #[arg(long, value_parser = root_folder)]
    pub root: Option<PathBuf>,
    /// The socket for containerd, instead of the configuration's `address`.
    #[arg(long)]
    pub address: Option<PathBuf>,
    /// containerd's own socket, instead of the configuration's `containerd_address`.
    #[arg(long)]
    pub containerd_address: Option<PathBuf>,
    /// Joins no mesh: every snapshot is plain.
    #[arg(long)]
    pub plain: bool,
    /// How log lines look: text or json.
    #[arg(long, default_value = "text")]
    pub log_format: telemetry::LogFormat,
    /// What is logged; DARTER_LOG takes precedence.
    #[arg(long, default_value = "info")]
    pub log: String,
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What it does instead of serving.
#[derive(Subcommand)]
pub enum Command {
    /// Takes away the mounts that a daemon left when it ended, and the process that keeps them; then nothing of it is left
    /// but files.
    Unmount {
        /// Also while containers use them, which then can't read any more.
        #[arg(long)]
        force: bool,
    },
    /// Keeps the mounts while no daemon is there. The daemon starts it.
    #[command(name = HOLD, hide = true)]
    Hold,
}
