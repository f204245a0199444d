//! `darter-peer`: parses its flags, starts, waits, stops.

use std::process::ExitCode;

use clap::Parser;
use darter_daemon::{config, run, tasks::Tasks, telemetry, traces};
use darter_peer::{Config, Flags};
use darter_types::Role;

const CONFIG: &str = "/etc/darter/peer.toml";

fn main() -> ExitCode {
    let flags = Flags::parse();
    telemetry::init(flags.log_format, &flags.log);
    run::block_on_main(serve(flags))
}

async fn serve(flags: Flags) -> anyhow::Result<()> {
    let config: Config = config::load_given(flags.config.as_deref(), CONFIG)?;
    let role = if flags.seed { Role::Seed } else { Role::Node };
    let tasks = Tasks::new();
    traces::start(&config.traces, env!("CARGO_PKG_NAME"), &config.node_name, &tasks);
    let start = darter_peer::start(&config, role, tasks.clone());
    run::serve(&tasks, start, async |peer: darter_peer::Handle| peer.stop().await).await
}
