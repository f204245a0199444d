//! The `darter` command: one file a subcommand. A library, so that its manual can be made from its definition.

// First: its macros are for all that follow.
#[macro_use]
mod say;

mod admin;
mod containerd;
mod deadline;
mod doctor;
mod drain;
mod hydrate;
mod inventory;
mod limits;
mod manager;
mod member;
mod preheat;
mod progress;
mod pull;
mod reach;
mod setup;
mod snippet;
mod socket;
mod standalone;
mod status;
mod top;
mod trace;
mod unmount;
mod why;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// Starts containers before their image has arrived, without changing the image.
#[derive(Parser)]
#[command(name = "darter", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run all of Darter in one process, without configuration
    Standalone(standalone::Options),
    /// Pull an image the lazy way through a containerd of any version
    Pull(pull::Options),
    /// Show the layers on this node: how complete, from whom
    Status(status::Options),
    /// Show what comes to this node just now: layers, from whom, how fast
    Top(top::Options),
    /// Say for each layer of an image whether it is lazy, and if not, why not
    Why(why::Options),
    /// Show what the start of an image has read: which files, when, how long it waited, who gave them
    Trace(trace::Options),
    /// Have seeds make images' layers, and nodes fetch them, before anybody asks
    Preheat(preheat::Options),
    /// Show and set how many bytes seeds and nodes may move in a second
    Limits(limits::Options),
    /// Take away the mounts that a stopped daemon left to containers, and the process that keeps them
    Unmount(unmount::Options),
    /// Keep the mounts while no daemon is there; `darter standalone` starts it
    #[command(name = darter_snapshotter::HOLD, hide = true)]
    Hold,
    /// Look for what is wrong on this node, and say what mends it
    Doctor(doctor::Options),
    /// Bring an image's layers into containerd's content store, for push, save and commit
    Hydrate(hydrate::Options),
    /// Make this node independent of Darter, and name what still needs it
    Drain(drain::Options),
    /// Change the configuration of others for Darter, and change it back
    Setup(setup::Options),
}

/// The definition of the command line, for its manual and completions.
pub fn command() -> clap::Command {
    Arguments::command()
}

/// Parses the command line and does what it says.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Without a runtime: it stays small.
    if let Command::Hold = arguments.command {
        return darter_snapshotter::keep::hold().map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
    }
    darter_daemon::run::block_on_main(async {
        match arguments.command {
            Command::Standalone(options) => standalone::run(options).await,
            Command::Pull(options) => pull::run(options).await,
            Command::Status(options) => status::run(options).await,
            Command::Top(options) => top::run(options).await,
            Command::Why(options) => why::run(options).await,
            Command::Trace(options) => trace::run(options).await,
            Command::Preheat(options) => preheat::run(options).await,
            Command::Limits(options) => limits::run(options).await,
            Command::Unmount(options) => unmount::run(&options),
            Command::Hold => unreachable!("it was answered above"),
            Command::Doctor(options) => doctor::run(options).await,
            Command::Hydrate(options) => hydrate::run(options).await,
            Command::Drain(options) => drain::run(options).await,
            Command::Setup(options) => setup::run(options).await,
        }
    })
}
