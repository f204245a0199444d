//! The program `darter-manager`.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use darter_daemon::{config, notify, run, shutdown, telemetry};
use darter_manager::flags::{ApiTokenAction, Command, Flags};
use darter_manager::{ApiTokenWish, Config};

const CONFIG: &str = "/etc/darter/manager.toml";

fn main() -> ExitCode {
    let flags = Flags::parse();
    telemetry::init(flags.log_format, &flags.log);
    run::block_on_main(async move {
        let given = flags.config.as_deref();
        match flags.command {
            Some(command) => obey(&darter_manager::of_command(given, Path::new(CONFIG))?, command),
            None => serve(config::load_given(given, CONFIG)?).await,
        }
    })
}

fn obey(config: &Config, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Token { role, ttl, uses } => {
            println!("{}", darter_manager::mint_token(config, role, ttl, uses)?);
        }
        Command::Release { role, node, force } => {
            darter_manager::release(config, role, &node, force)?;
            println!(
                "{role} {node} is released: the next machine that joins by this name with a token gets it"
            );
        }
        Command::ApiToken { action } => api_token(config, action)?,
    }
    Ok(())
}

fn api_token(config: &Config, action: ApiTokenAction) -> anyhow::Result<()> {
    match action {
        ApiTokenAction::Add { name, role, scope, ttl } => {
            let wish = ApiTokenWish { name, role, scopes: scope.into_iter().collect(), life: ttl };
            println!("{}", darter_manager::mint_api_token(config, wish)?);
        }
        ApiTokenAction::List => {
            darter_manager::list_api_tokens(config)?.iter().for_each(|line| println!("{line}"));
        }
        ApiTokenAction::Remove { id } => darter_manager::remove_api_token(config, &id)?,
    }
    Ok(())
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let manager = darter_manager::start(config).await.context("the manager can't start")?;
    notify::ready(manager.tasks());
    shutdown::wanted(manager.tasks()).await;
    let tasks = manager.tasks().clone();
    manager.stop().await;
    run::end(&tasks)
}
