//! `darter-scheduler`: parses its flags, starts, waits, stops.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use darter_daemon::{config, run, shutdown, tasks::Tasks, telemetry};
use darter_scheduler::Config;

const CONFIG: &str = "/etc/darter/scheduler.toml";

/// Chooses parents and orders layers from seeds.
#[derive(Parser)]
#[command(version)]
struct Flags {
    /// The configuration; the sample file scheduler.toml shows every key [default: /etc/darter/scheduler.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
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
    run::block_on_main(schedule(flags))
}

async fn schedule(flags: Flags) -> anyhow::Result<()> {
    let config: Config = match &flags.config {
        Some(path) => config::load(path)?,
        None => config::load_or_default(Path::new(CONFIG))?,
    };
    let tasks = Tasks::new();
    let started = tokio::select! {
        started = darter_scheduler::start(config, tasks.clone()) => started,
        () = shutdown::signal() => return Ok(()),
    };
    let handle = started.context("can't start")?;
    shutdown::wanted(&tasks).await;
    handle.stop().await;
    anyhow::ensure!(!tasks.failed(), "a part of the program failed");
    Ok(())
}
