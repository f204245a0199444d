//! `darter-snapshotter`: the node daemon.

use std::process::ExitCode;

use clap::Parser;
use darter_daemon::tasks::Tasks;
use darter_daemon::{config, run, telemetry, traces};
use darter_snapshotter::{Command, Config, Flags, keep, unmount};

const CONFIG: &str = "/etc/darter/snapshotter.toml";

fn main() -> ExitCode {
    let flags = Flags::parse();
    // Without a runtime: it stays small.
    if let Some(Command::Hold) = flags.command {
        return keep::hold().map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
    }
    telemetry::init(flags.log_format, &flags.log);
    run::block_on_main(serve(flags))
}

async fn serve(flags: Flags) -> anyhow::Result<()> {
    let mut config: Config = config::load_given(flags.config.as_deref(), CONFIG)?;
    config.set(flags.root, flags.address, flags.containerd_address);
    if let Some(Command::Unmount { force }) = flags.command {
        for path in unmount(&config.root, force)? {
            println!("unmounted {}", path.display());
        }
        return Ok(());
    }
    if flags.plain {
        config.manager = String::new();
    }
    let tasks = Tasks::new();
    traces::start(&config.traces, env!("CARGO_PKG_NAME"), &config.node_name, &tasks);
    darter_snapshotter::run(&config, &tasks).await?;
    run::end(&tasks)
}
