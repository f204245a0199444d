//! A machine with systemd: Debian's own files, and its systemd as the first process of namespaces of its own.
//!
//! It is for what only a whole system shows: packages, units, upgrades. It has a network address in the world; its mounts,
//! processes and cgroups end with it. The kernel's settings it can see but not change.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::command::{Daemon, Run, eventually};
use crate::containerd::cache;
use crate::sweep;
use crate::world::{Host, World};

const SUITE: &str = "bookworm";
/// Beyond Debian's smallest set: what the packages depend on or work with, and rpm for roots of rpms.
const PACKAGES: &str = "systemd,dbus,containerd,runc,ca-certificates,rpm,man-db";
/// Makes the namespaces' mounts, and becomes systemd.
const BOOT: &str = include_str!("machine/boot.sh");
/// Makes one rpm of a whole root.
const BASE: &str = include_str!("machine/base.spec");
/// Units that would reach beyond the machine's namespaces, or wait for hardware.
const MASKED: [&str; 4] = [
    "systemd-sysctl.service",
    "systemd-modules-load.service",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
];

/// A machine that has booted.
pub struct Machine {
    host: Host,
    root: PathBuf,
    init: u32,
    _unshare: Daemon,
}

impl Machine {
    /// Boots from the files in `root`, which are then its own.
    pub fn boot(world: &World, role: &str, root: &Path) -> Result<Self> {
        let host = world.host(role)?;
        for unit in MASKED {
            let link = root.join("etc/systemd/system").join(unit);
            let _ = fs::remove_file(&link);
            std::os::unix::fs::symlink("/dev/null", link)?;
        }
        fs::write(root.join("etc/hostname"), format!("{role}\n"))?;
        let cgroup = cgroup(role)?;
        let run = host.run("sh").args(["-euc", BOOT, "boot"]).arg(cgroup.display()).arg(root.display());
        let mut unshare = Daemon::start("machine", run, &world.folder(role)?.join("log"))?;
        let mut init = None;
        eventually("the machine has a first process", 20, || {
            unshare.must_run()?;
            init = first_child(unshare.pid());
            Ok(init.is_some_and(|pid| name_of(pid).as_deref() == Some("systemd")))
        })?;
        let machine =
            Self { host, root: root.to_owned(), init: init.context("it was found")?, _unshare: unshare };
        eventually("the machine has booted", 60, || {
            let state = machine.run("systemctl").arg("is-system-running").output()?;
            Ok(matches!(state.stdout.trim(), "running" | "degraded"))
        })?;
        Ok(machine)
    }

    pub fn host(&self) -> &Host {
        &self.host
    }

    /// A file of it, seen from outside. Not for what is mounted inside.
    pub fn path(&self, inside: &str) -> PathBuf {
        self.root.join(inside.trim_start_matches('/'))
    }

    /// A command on this machine.
    pub fn run(&self, program: &str) -> Run {
        Run::new("nsenter")
            .arg(format!("--target={}", self.init))
            .args(["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd", "--"])
            .args([
                "env",
                "-i",
                "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
                "DEBIAN_FRONTEND=noninteractive",
                program,
            ])
    }

    /// Lines for a shell that stops at the first error.
    pub fn shell(&self, script: &str) -> Run {
        self.run("sh").args(["-euc", script])
    }

    /// What systemd says about a unit.
    pub fn property(&self, unit: &str, name: &str) -> Result<String> {
        let text = self.run("systemctl").args(["show", "--value", "-p", name, unit]).check()?;
        Ok(text.trim().to_owned())
    }

    /// What the units whose names begin with `darter` have logged last, for errors.
    pub fn journal(&self) -> String {
        let journal =
            self.run("journalctl").args(["--no-pager", "-q", "-o", "cat", "-n", "60", "-u", "darter*"]);
        journal.output().map_or_else(|error| format!("{error:#}"), |finished| finished.said())
    }
}

/// Below this run's folder of cgroups in the hierarchy that systemd uses, so that the sweep takes it away.
fn cgroup(role: &str) -> Result<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let mount = table.lines().find(|line| line.contains(" - cgroup2 ")).context("no cgroup2 is mounted")?;
    let place = mount.split(' ').nth(4).context("a line of mountinfo has more fields")?;
    let cgroup = Path::new(place).join(sweep::containerd_namespace(std::process::id())).join(role);
    fs::create_dir_all(&cgroup)?;
    Ok(cgroup)
}

fn first_child(pid: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

fn name_of(pid: u32) -> Option<String> {
    Some(fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim().to_owned())
}

/// Debian's files for a machine at `root`.
pub fn debian(root: &Path) -> Result<()> {
    copy(&kept_debian()?, root)
}

/// From the cache or, the first time, from the mirror.
fn kept_debian() -> Result<PathBuf> {
    let kept = kept("root");
    if !kept.exists() {
        let fresh = kept.with_extension(std::process::id().to_string());
        let made = debootstrap(&fresh).and_then(|()| Ok(fs::rename(&fresh, &kept)?));
        let _ = fs::remove_dir_all(&fresh);
        made?;
    }
    Ok(kept)
}

fn kept(what: &str) -> PathBuf {
    cache().join(format!("images/machine-{SUITE}-{}.{what}", PACKAGES.replace(',', "-")))
}

/// Copies a folder with everything in it.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    Run::new("cp")
        .args(["-a", "--reflink=auto"])
        .arg(from.display())
        .arg(to.display())
        .timeout(300)
        .check()
        .map(drop)
}

/// In a mount namespace of its own, so that what it mounts in the new root goes away with it.
fn debootstrap(root: &Path) -> Result<()> {
    let mirror = std::env::var("DARTER_MIRROR").unwrap_or_else(|_| "http://deb.debian.org/debian".into());
    let made = Run::new("unshare")
        .args(["--mount", "--propagation", "private", "--", "debootstrap", "--variant=minbase"])
        .args([&format!("--include={PACKAGES}"), SUITE])
        .arg(root.display())
        .arg(mirror)
        .timeout(1200)
        .output()?;
    if !made.success() {
        bail!("debootstrap failed:\n{}", crate::command::tail(&made.said(), 15));
    }
    for folder in ["var/cache/apt/archives", "var/lib/apt/lists"] {
        let _ = fs::remove_dir_all(root.join(folder));
        fs::create_dir_all(root.join(folder).join("partial"))?;
    }
    Ok(())
}

/// An rpm that has all files of [`debian`] and provides their libraries, for roots that rpm makes: Debian's rpm comes with no
/// distribution to install.
pub fn base_rpm(world: &World) -> Result<PathBuf> {
    let kept = kept("rpm");
    if kept.exists() {
        return Ok(kept);
    }
    let folder = world.folder("base-rpm")?;
    let spec = folder.join("base.spec");
    fs::write(&spec, BASE)?;
    let define = |name: &str, path: &Path| format!("{name} {}", path.display());
    Run::new("rpmbuild")
        .args(["-bb", "--define", &define("_topdir", &folder), "--define", &define("_rpmdir", &folder)])
        .args(["--define", "_rpmfilename base.rpm", "--define", &define("from", &kept_debian()?)])
        .arg(spec.display())
        .timeout(600)
        .check()?;
    let fresh = kept.with_extension(std::process::id().to_string());
    fs::copy(folder.join("base.rpm"), &fresh)?;
    fs::rename(fresh, &kept)?;
    Ok(kept)
}
