//! The program `darter-manager`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, Subcommand};
use darter_daemon::{config, run, shutdown, telemetry};
use darter_manager::Config;
use darter_types::Role;

const CONFIG: &str = "/etc/darter/manager.toml";

/// The cluster's CA, its members, and orders to preheat images.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// The configuration; the sample file manager.toml shows every key [default: /etc/darter/manager.toml, if it is there]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// How log lines look: text or json.
    #[arg(long, default_value = "text")]
    log_format: telemetry::LogFormat,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Prints a new join token. It works whether the manager runs or not, on the manager's machine.
    Token {
        /// What its users may be: scheduler, seed or node.
        #[arg(long)]
        role: Role,
        /// How long it may be used, for example 30m, 1h or 7d.
        #[arg(long, default_value = "1h", value_parser = darter_manager::parse_life)]
        ttl: Duration,
        /// How many members may join with it.
        #[arg(long, default_value_t = 1)]
        uses: u32,
    },
}

fn main() -> ExitCode {
    let options = Options::parse();
    telemetry::init(options.log_format, "info");
    run::block_on_main(async move {
        let config: Config = match &options.config {
            Some(path) => config::load(path)?,
            None => config::load_or_default(Path::new(CONFIG))?,
        };
        match options.command {
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
    shutdown::wanted(manager.tasks()).await;
    let tasks = manager.tasks().clone();
    manager.stop().await;
    anyhow::ensure!(!tasks.failed(), "a part of the manager failed; the log says which");
    Ok(())
}
