//! Writes the manual pages and the shells' completions that the packages ship, from the programs' own definitions.
//!
//! `darter-manual FOLDER` makes `FOLDER/PROGRAM/` for each program, with `*.1` and `*.8` pages and `bash`, `zsh`, `fish`.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Command, CommandFactory};
use clap_complete::{Shell, generate};
use clap_mangen::Man;

/// A program, and what its page says beyond its flags.
struct Program {
    command: Command,
    section: &'static str,
    files: &'static [(&'static str, &'static str)],
    see_also: &'static str,
}

/// Where these shells look for completions of a program: below this, in a file of this name.
const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Zsh, Shell::Fish];

fn programs() -> [Program; 5] {
    [
        Program {
            command: darter_cli::command(),
            section: "1",
            files: &[
                (
                    "/var/lib/darter",
                    "State of the node daemon and of darter standalone; admin.sock in it answers status and why.",
                ),
                ("/run/darter/darter.sock", "The socket that containerd's configuration names."),
            ],
            see_also: "darter-snapshotter(8), darter-peer(8), darter-scheduler(8), darter-manager(8), containerd(8)",
        },
        Program {
            command: darter_snapshotter::Flags::command(),
            section: "8",
            files: &[
                ("/etc/darter/snapshotter.toml", "Its configuration; every key is there with its default."),
                ("/etc/darter/node.token", "The token with which the node joins its cluster."),
                ("/var/lib/darter", "Snapshots, pieces, maps and the certificate."),
                ("/run/darter/darter.sock", "The socket for containerd and for kubelet."),
            ],
            see_also: "darter(1), darter-manager(8), containerd(8)",
        },
        Program {
            command: darter_peer::Flags::command(),
            section: "8",
            files: &[
                ("/etc/darter/peer.toml", "Its configuration; every key is there with its default."),
                ("/etc/darter/peer.token", "The token with which it joins its cluster."),
                ("/var/lib/darter-peer", "Pieces, maps and the certificate."),
            ],
            see_also: "darter(1), darter-manager(8), darter-scheduler(8)",
        },
        Program {
            command: darter_scheduler::Flags::command(),
            section: "8",
            files: &[
                ("/etc/darter/scheduler.toml", "Its configuration; every key is there with its default."),
                ("/etc/darter/scheduler.token", "The token with which it joins its cluster."),
                ("/var/lib/darter-scheduler", "Its certificate."),
            ],
            see_also: "darter(1), darter-manager(8), darter-peer(8)",
        },
        Program {
            command: darter_manager::flags::Flags::command(),
            section: "8",
            files: &[
                ("/etc/darter/manager.toml", "Its configuration; every key is there with its default."),
                (
                    "/var/lib/darter-manager",
                    "The database, the CA's key (ca.pem) and the first API token (api-token).",
                ),
            ],
            see_also: "darter(1), darter-scheduler(8), darter-peer(8), darter-snapshotter(8)",
        },
    ]
}

fn main() -> Result<()> {
    let folder = std::env::args_os().nth(1).map(PathBuf::from).context("usage: darter-manual FOLDER")?;
    programs().into_iter().try_for_each(|program| write(program, &folder))
}

fn write(program: Program, folder: &Path) -> Result<()> {
    let name = program.command.get_name().to_owned();
    let folder = folder.join(&name);
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    for shell in SHELLS {
        let mut file = File::create(folder.join(shell.to_string()))?;
        generate(shell, &mut program.command.clone(), &name, &mut file);
    }
    // Built: a subcommand then knows its whole name, and the flags that it has from the program.
    let mut command = program.command.clone().disable_help_subcommand(true);
    command.build();
    page(&command, &name, &program, &folder)?;
    for subcommand in command.get_subcommands().filter(|one| !one.is_hide_set()) {
        page(subcommand, &format!("{name}-{}", subcommand.get_name()), &program, &folder)?;
    }
    Ok(())
}

/// One page: what clap knows, then what it doesn't.
fn page(command: &Command, title: &str, program: &Program, folder: &Path) -> Result<()> {
    let section = program.section;
    let source = format!("darter {}", env!("CARGO_PKG_VERSION"));
    let mut out = Vec::new();
    let man =
        Man::new(command.clone()).title(title.to_owned()).section(section).source(source).manual("Darter");
    man.render(&mut out)?;
    writeln!(
        out,
        ".SH \"EXIT STATUS\"\n0 when it did what was asked, 2 when the command line is wrong, 1 for all else."
    )?;
    writeln!(out, ".SH FILES")?;
    for (path, words) in program.files {
        writeln!(out, ".TP\n.I {path}\n{words}")?;
    }
    writeln!(out, ".SH \"SEE ALSO\"\n{}", program.see_also)?;
    let path = folder.join(format!("{title}.{section}"));
    fs::write(&path, out).with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_subcommand_has_a_page_and_every_program_three_shells() {
        let dir = tempfile::tempdir().unwrap();
        programs().into_iter().for_each(|program| write(program, dir.path()).unwrap());
        for program in programs() {
            let name = program.command.get_name().to_owned();
            let has = |file: &str| fs::read_to_string(dir.path().join(&name).join(file)).unwrap();
            for subcommand in program.command.get_subcommands().filter(|one| !one.is_hide_set()) {
                let text = has(&format!("{name}-{}.{}", subcommand.get_name(), program.section));
                assert!(text.contains(".SH SYNOPSIS") && text.contains(".SH FILES"), "{text}");
            }
            for shell in SHELLS {
                assert!(has(&shell.to_string()).contains(&name));
            }
        }
    }
}
