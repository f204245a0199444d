//! How the demo and the benchmark show what they do: a mark and a time per step, details in a log.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;

/// The list of steps on the terminal, and its log.
pub struct Steps {
    log: Option<(PathBuf, File)>,
    terminal: bool,
}

impl Steps {
    /// Without a log file nothing is lost but the details.
    pub fn new(log: Option<PathBuf>) -> Self {
        let log = log.and_then(|path| {
            Some((path.clone(), File::options().create(true).append(true).open(path).ok()?))
        });
        Self { log, terminal: std::io::stdout().is_terminal() }
    }

    /// Runs one step. A failure is shown with where to read on.
    pub fn step<T>(&mut self, words: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.note(&format!("=== {words}"));
        if self.terminal {
            print!("  … {words}");
            let _ = std::io::stdout().flush();
        }
        let started = Instant::now();
        let outcome = work();
        let mark = if outcome.is_ok() { '✓' } else { '✗' };
        let clear = if self.terminal { "\r\x1b[K" } else { "" };
        println!("{clear}  {mark} {words:<58} {:>5.1}s", started.elapsed().as_secs_f64());
        if let Err(error) = &outcome {
            self.note(&format!("{error:?}"));
        }
        outcome
    }

    /// A line for the log alone.
    pub fn note(&mut self, text: &str) {
        if let Some((_, log)) = &mut self.log {
            let _ = writeln!(log, "{text}");
        }
    }

    pub fn log(&self) -> Option<&PathBuf> {
        self.log.as_ref().map(|(path, _)| path)
    }
}
