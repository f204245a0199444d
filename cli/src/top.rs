//! `darter top`: what comes to this node just now: layers, from whom, how fast. It asks the daemon as `darter status` does.

mod picture;
mod screen;

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Deserialize;

use crate::status::Status;
use picture::{Sample, picture};
use screen::Screen;

#[derive(Debug, clap::Args)]
pub struct Options {
    /// The node daemon's state directory
    #[arg(long, value_name = "DIR", default_value = "/var/lib/darter")]
    root: PathBuf,
    /// Print the picture of one second and end; so it is where the output is no terminal
    #[arg(long)]
    once: bool,
}

/// How often the daemon is asked, and what rates are of.
const EVERY: Duration = Duration::from_secs(1);

/// How often it is looked whether a key was pressed.
const LOOK_AT_KEYS_EVERY: Duration = Duration::from_millis(50);

/// Lines and columns where there is no terminal: all there is.
const UNBOUNDED: (usize, usize) = (usize::MAX, usize::MAX);

pub async fn run(options: Options) -> Result<()> {
    let is_live = std::io::stdout().is_terminal() && std::io::stdin().is_terminal();
    if options.once || !is_live {
        let before = sample(&options.root).await?;
        tokio::time::sleep(EVERY).await;
        let now = sample(&options.root).await?;
        picture(&now, Some(&before), UNBOUNDED).iter().for_each(|line| println!("{line}"));
        return Ok(());
    }
    live(&options.root).await
}

/// Until q, Ctrl-C or SIGTERM; the terminal is then as before.
async fn live(root: &Path) -> Result<()> {
    // An error of the first look is told as any command's.
    let mut before = sample(root).await?;
    let screen = Screen::open()?;
    let mut ended = std::pin::pin!(darter_daemon::shutdown::signal());
    screen.show(&picture(&before, None, screen.size()))?;
    loop {
        let asked = Instant::now();
        while asked.elapsed() < EVERY {
            tokio::select! {
                () = tokio::time::sleep(LOOK_AT_KEYS_EVERY) => {}
                () = &mut ended => return Ok(()),
            }
            if screen.is_quit()? {
                return Ok(());
            }
        }
        match sample(root).await {
            Ok(now) => {
                screen.show(&picture(&now, Some(&before), screen.size()))?;
                before = now;
            }
            // It may be restarted just now.
            Err(error) => screen.show(&[format!("{error:#}"), String::new(), "q ends".to_owned()])?,
        }
    }
}

async fn sample(root: &Path) -> Result<Sample> {
    #[derive(Deserialize)]
    struct Stats {
        fuse: BTreeMap<String, u64>,
    }
    let status: Status = crate::admin::get(root, "/status").await?;
    let stats: Stats = crate::admin::get(root, "/stats").await?;
    Ok(Sample { at: Instant::now(), status, fuse: stats.fuse })
}
