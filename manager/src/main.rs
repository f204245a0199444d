//! The program `darter-manager`.

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use darter_daemon::{config, notify, run, shutdown, telemetry};
use darter_manager::Config;
use darter_manager::flags::{Command, Flags};

const CONFIG: &str = "/etc/darter/manager.toml";

fn main() -> ExitCode {
    let flags = Flags::parse();
    telemetry::init(flags.log_format, &flags.log);
    run::block_on_main(async move {
        let config: Config = config::load_given(flags.config.as_deref(), CONFIG)?;
        match flags.command {
            Some(Command::Token { role, ttl, uses }) => {
                println!("{}", darter_manager::mint_token(&config, role, ttl, uses)?);
            }
            Some(Command::Release { role, node }) => darter_manager::release(&config, role, &node)?,
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
    run::end(&tasks)
}
