//! The whole-system tests: one story after the other, each in a world of its own with a deadline.
//!
//! `cargo test -p darter-integration --test it -- WORD...` runs the stories whose name contains one of the words. What a
//! story leaves behind is swept away and makes it fail. A story that depends on how busy the machine is gets a second try, and
//! says so when it needed it; one about wrong bytes or rights never does.

use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use darter_integration::{sweep, tree, world};

mod api;
mod book;
mod clients;
mod daily;
mod demotion;
mod disk;
mod doctor;
mod harness;
mod ill;
mod kills;
mod less;
mod liar;
mod lies;
mod limits;
mod mesh;
mod never_worse;
mod numbers;
mod once;
mod orders;
mod packages;
mod private;
mod setup;
mod site;
mod standstill;
mod starts;
mod state;
mod takeover;
mod traces;
mod trees;

/// A story: its name states what holds.
pub struct Story {
    name: &'static str,
    /// Long enough for a busy machine; past it the story has failed.
    seconds: u64,
    tries: u32,
    run: fn() -> Result<()>,
}

fn stories() -> Vec<Story> {
    let modules = [
        (harness::STORIES, 1),
        (trees::STORIES, 1),
        (clients::STORIES, 2),
        (daily::STORIES, 2),
        (mesh::STORIES, 2),
        (private::STORIES, 2),
        (never_worse::STORIES, 2),
        (ill::STORIES, 2),
        (demotion::STORIES, 2),
        (setup::STORIES, 2),
        (doctor::STORIES, 2),
        (numbers::STORIES, 2),
        (traces::STORIES, 2),
        (disk::STORIES, 2),
        (limits::STORIES, 2),
        (once::STORIES, 2),
        (orders::STORIES, 2),
        (api::STORIES, 2),
        (less::STORIES, 2),
        (starts::STORIES, 2),
        (lies::STORIES, 1),
        (standstill::STORIES, 2),
        (kills::STORIES, 1),
        (takeover::STORIES, 2),
        (state::STORIES, 1),
        (packages::STORIES, 1),
        (book::STORIES, 1),
    ];
    let told = |(stories, tries): (Stories, u32)| {
        stories.iter().map(move |&(name, seconds, run)| Story { name, seconds, tries, run })
    };
    modules.into_iter().flat_map(told).collect()
}

/// A module's stories, for [`stories`].
pub type Stories = &'static [(&'static str, u64, fn() -> Result<()>)];

fn main() -> ExitCode {
    tree::serve_walk();
    takeover::serve_load();
    world::sweep_on_signal();
    let words: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let chosen =
        |story: &Story| words.is_empty() || words.iter().any(|word| story.name.contains(word.as_str()));
    let stories: Vec<Story> = stories().into_iter().filter(chosen).collect();
    if std::env::args().any(|arg| arg == "--list") {
        stories.iter().for_each(|story| println!("{}: test", story.name));
        return ExitCode::SUCCESS;
    }
    let (all, failed) = (stories.len(), stories.iter().filter(|story| !passes(story)).count());
    println!("{} passed, {failed} failed", all - failed);
    if failed == 0 && all > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn passes(story: &Story) -> bool {
    (1..=story.tries).any(|attempt| {
        let holds = holds(story);
        if holds && attempt > 1 {
            println!("  {} needed {attempt} tries", story.name);
        }
        holds
    })
}

fn holds(story: &Story) -> bool {
    let started = Instant::now();
    let outcome = within_deadline(story);
    let owner = std::process::id();
    let left = sweep::remains(owner);
    sweep::sweep(owner);
    let outcome = match outcome {
        Ok(()) if !left.is_empty() => Err(anyhow!("left behind: {}", left.join(", "))),
        other => other,
    };
    let seconds = started.elapsed().as_secs_f32();
    match &outcome {
        Ok(()) => println!("✓ {} ({seconds:.1} s)", story.name),
        Err(error) => {
            let logs = sweep::saved_logs().with_file_name(format!("failed-{}", story.name));
            let _ = std::fs::remove_dir_all(&logs);
            let _ = std::fs::rename(sweep::saved_logs(), &logs);
            println!("✗ {} ({seconds:.1} s)\n{error:#}\nlogs: {}\n", story.name, logs.display());
        }
    }
    outcome.is_ok()
}

/// The story on a thread of its own. One that hangs in a mount is let go by aborting it and by killing what it started.
fn within_deadline(story: &Story) -> Result<()> {
    let (done, result) = mpsc::channel();
    let run = story.run;
    let thread = thread::spawn(move || {
        let outcome = panic::catch_unwind(AssertUnwindSafe(run));
        let _ = done.send(outcome.unwrap_or_else(|_| Err(anyhow!("it panicked"))));
    });
    match result.recv_timeout(Duration::from_secs(story.seconds)) {
        Ok(outcome) => outcome,
        Err(_) => {
            sweep::sweep(std::process::id());
            let ended = result.recv_timeout(Duration::from_secs(30));
            drop(thread);
            Err(anyhow!("not over within {} s; then: {ended:?}", story.seconds))
        }
    }
}
