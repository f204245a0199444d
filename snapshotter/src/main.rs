//! `darter-snapshotter`: the node daemon.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use darter_daemon::tasks::Tasks;
use darter_daemon::{config, run, telemetry};
use darter_snapshotter::Config;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Serves containerd's snapshots, lazily where it can.
#[derive(Parser)]
#[command(version)]
struct Flags {
    /// The configuration file.
    #[arg(long, default_value = "/etc/darter/snapshotter.toml")]
    config: PathBuf,
    /// Where snapshots lie, instead of the configuration's `root`.
    #[arg(long)]
    root: Option<PathBuf>,
    /// The socket for containerd, instead of the configuration's `address`.
    #[arg(long)]
    address: Option<PathBuf>,
    /// containerd's own socket, instead of the configuration's `containerd_address`.
    #[arg(long)]
    containerd_address: Option<PathBuf>,
    /// Joins no mesh: every snapshot is plain.
    #[arg(long)]
    plain: bool,
    /// How log lines look: text or json.
    #[arg(long, default_value = "text")]
    log_format: telemetry::LogFormat,
    /// What is logged; DARTER_LOG goes before it.
    #[arg(long, default_value = "info")]
    log: String,
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    telemetry::init(flags.log_format, &flags.log);
    run::block_on_main(serve(flags))
}

async fn serve(flags: Flags) -> anyhow::Result<()> {
    let mut config: Config = config::load_or_default(&flags.config)?;
    config.set(flags.root, flags.address, flags.containerd_address);
    if flags.plain {
        config.manager = String::new();
    }
    let tasks = Tasks::new();
    darter_snapshotter::run(&config, &tasks).await?;
    anyhow::ensure!(!tasks.failed(), "a part of the program failed");
    Ok(())
}
