//! `darter-scheduler`: parses its flags, starts, waits, stops.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use darter_daemon::{config, notify, run, shutdown, tasks::Tasks, telemetry};
use darter_scheduler::{Config, Flags};

const CONFIG: &str = "/etc/darter/scheduler.toml";

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
    notify::ready(&tasks);
    shutdown::wanted(&tasks).await;
    handle.stop().await;
    anyhow::ensure!(!tasks.failed(), "a part of the program failed");
    Ok(())
}
