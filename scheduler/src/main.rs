//! `darter-scheduler`: parses its flags, starts, waits, stops.

use std::process::ExitCode;

use clap::Parser;
use darter_daemon::{config, run, tasks::Tasks, telemetry};
use darter_scheduler::{Config, Flags};

const CONFIG: &str = "/etc/darter/scheduler.toml";

fn main() -> ExitCode {
    let flags = Flags::parse();
    telemetry::init(flags.log_format, &flags.log);
    run::block_on_main(schedule(flags))
}

async fn schedule(flags: Flags) -> anyhow::Result<()> {
    let config: Config = config::load_given(flags.config.as_deref(), CONFIG)?;
    let tasks = Tasks::new();
    let start = darter_scheduler::start(config, tasks.clone());
    run::serve(&tasks, start, async |scheduler: darter_scheduler::Handle| scheduler.stop().await).await
}
