//! `darter unmount`: after the daemon of this node was stopped for good, takes away what it left to containers.

use std::path::PathBuf;

use anyhow::Result;

#[derive(Debug, clap::Args)]
pub struct Options {
    /// State directory of the daemon
    #[arg(long, value_name = "DIR", default_value = "/var/lib/darter")]
    root: PathBuf,
    /// Also while containers use lazy images, which then can't read any more
    #[arg(long)]
    force: bool,
}

pub fn run(options: &Options) -> Result<()> {
    for path in darter_snapshotter::unmount(&options.root, options.force)? {
        println!("unmounted {}", path.display());
    }
    Ok(())
}
