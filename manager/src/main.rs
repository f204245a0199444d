//! The program `darter-manager`.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use darter_daemon::{config, notify, run, shutdown, telemetry};
use darter_manager::Config;
use darter_manager::flags::{Command, Flags};

const CONFIG: &str = "/etc/darter/manager.toml";

fn main() -> ExitCode {
    let flags = Flags::parse();
    telemetry::init(flags.log_format, "info");
    run::block_on_main(async move {
        let config: Config = match &flags.config {
            Some(path) => config::load(path)?,
            None => config::load_or_default(Path::new(CONFIG))?,
        };
        match flags.command {
            Some(Command::Token { role, ttl, uses }) => {
                println!("{}", darter_manager::mint_token(&config, role, ttl, uses)?);
            }
            None => serve(config).await?,
        }
        Ok(())
    })
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let manager = darter_manager::start(config).await.context("the manager can't start")?;
    notify::ready(manager.tasks());
    shutdown::wanted(manager.tasks()).await;
    let tasks = manager.tasks().clone();
    manager.stop().await;
    anyhow::ensure!(!tasks.failed(), "a part of the manager failed; the log says which");
    Ok(())
}
