//! `darter-snapshotter`: the node daemon.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use darter_daemon::tasks::Tasks;
use darter_daemon::{config, run, shutdown, telemetry};
use darter_snapshotter::{Config, Deps, Handle, start};

/// How long the program's tasks may take to end.
const STOP_GRACE: Duration = Duration::from_secs(5);

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
    let tasks = Tasks::new();
    let started = tokio::select! {
        started = start_with(&config, flags.plain, &tasks) => started,
        () = shutdown::signal() => return Ok(()),
    };
    let handle = started.context("can't start")?;
    shutdown::wanted(&tasks).await;
    handle.stop().await;
    tasks.clone().stop(STOP_GRACE).await;
    anyhow::ensure!(!tasks.failed(), "a part of the program failed");
    Ok(())
}

async fn start_with(config: &Config, plain: bool, tasks: &Tasks) -> anyhow::Result<Handle> {
    let peer = if plain { None } else { config.peer(tasks).await? };
    Ok(start(config.options(), Deps { peer, tasks: tasks.clone() }).await?)
}
