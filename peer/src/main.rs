//! `darter-peer`: parses its flags, starts, waits, stops.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use darter_daemon::{config, run, shutdown, tasks::Tasks, telemetry};
use darter_peer::Config;
use darter_types::Role;

/// A peer without containerd.
#[derive(Parser)]
#[command(version)]
struct Flags {
    /// The configuration; packaging/etc/peer.toml shows every key.
    #[arg(long, default_value = "/etc/darter/peer.toml")]
    config: PathBuf,
    /// Read from registries for the others, and take orders to preheat. It needs a seed's token.
    #[arg(long)]
    seed: bool,
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
    let config: Config = config::load(&flags.config)?;
    let role = if flags.seed { Role::Seed } else { Role::Node };
    let tasks = Tasks::new();
    let started = tokio::select! {
        started = darter_peer::start(&config, role, tasks.clone()) => started,
        () = shutdown::signal() => return Ok(()),
    };
    let handle = started.context("can't start")?;
    shutdown::wanted(&tasks).await;
    handle.stop().await;
    anyhow::ensure!(!tasks.failed(), "a part of the program failed");
    Ok(())
}
