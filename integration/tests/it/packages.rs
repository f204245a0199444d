//! Packages: installed, used, upgraded and removed on whole machines with systemd.
//!
//! One machine runs all of Darter by the units that the packages bring, beside Debian's containerd. Debs go into a root that
//! debootstrap made, rpms into one that rpm made.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use darter_integration::command::{Run, Running, eventually, tail};
use darter_integration::containerd::cache;
use darter_integration::image::Blobs;
use darter_integration::machine::{self, Machine};
use darter_integration::registry::{PASSWORD, Registry, USER};
use darter_integration::world::World;

use crate::site::Data;

pub const STORIES: crate::Stories = &[
    ("lintian_and_rpmlint_find_no_error", 600, lintian_and_rpmlint_find_no_error),
    ("debs_install_run_upgrade_and_leave_nothing", 900, debs_install_run_upgrade_and_leave_nothing),
    ("rpms_install_run_upgrade_and_leave_nothing", 900, rpms_install_run_upgrade_and_leave_nothing),
    ("a_daemon_that_hangs_is_replaced", 300, a_daemon_that_hangs_is_replaced),
];

/// Packages of the build that is tested, and of the same build under a newer version.
struct Built {
    old: PathBuf,
    new: PathBuf,
}

const NEWER: &str = "99.0.0";
const PROGRAMS: [&str; 5] =
    ["darter", "darter-snapshotter", "darter-peer", "darter-scheduler", "darter-manager"];
const UNITS: [&str; 4] = ["darter-manager", "darter-scheduler", "darter-seed", "darter-snapshotter"];
/// Folders that distributions of rpms have from the start.
const SHARED_BY_RPMS: [&str; 3] =
    ["usr/share/fish/vendor_completions.d", "usr/share/licenses", "usr/share/zsh/site-functions"];
/// What a container that reads for a while reads.
const FILES: usize = 120;
const FILE_LEN: usize = 100_000;

/// Built once for all stories.
fn built() -> Result<&'static Built> {
    static BUILT: OnceLock<Result<Built, String>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let folder = cache().join("packages-test");
        let built = Built { old: folder.join("old"), new: folder.join("new") };
        package(&built.old, &["--built", "--fast"])
            .and_then(|()| package(&built.new, &["--built", "--fast", "--unchecked", "--version", NEWER]))
            .map_err(|error| format!("{error:#}"))?;
        Ok(built)
    });
    built.as_ref().map_err(|error| anyhow!("{error}"))
}

/// The folder with the debs of the build that is tested.
pub fn debs() -> Result<&'static Path> {
    built().map(|built| built.old.as_path())
}

fn package(output: &Path, flags: &[&str]) -> Result<()> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/package");
    Run::new(script).args(flags).arg("--output").arg(output.display()).timeout(600).check().map(drop)
}

/// `scripts/package` fails where they find one.
fn lintian_and_rpmlint_find_no_error() -> Result<()> {
    built().map(drop)
}

/// A kind of package, and the commands for it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Deb,
    Rpm,
}

impl Kind {
    /// The files of a machine that never had Darter.
    fn root(self, world: &World, root: &Path) -> Result<()> {
        match self {
            Kind::Deb => machine::debian(root),
            Kind::Rpm => {
                let base = machine::base_rpm(world)?;
                let rpm = |args: &[&str]| {
                    Run::new("rpm").arg("--root").arg(root.display()).args(args).timeout(300).check()
                };
                fs::create_dir_all(root)?;
                rpm(&["--initdb"])?;
                rpm(&["--install", "--noscripts", &base.display().to_string()])?;
                SHARED_BY_RPMS.iter().try_for_each(|folder| Ok(fs::create_dir_all(root.join(folder))?))
            }
        }
    }

    fn install(self, site: &Site, from: &Path) -> Result<()> {
        let to = site.machine.path("/root/packages");
        let _ = fs::remove_dir_all(&to);
        machine::copy(from, &to)?;
        let script = match self {
            // Where a configuration was changed by both sides, the question is answered as an unattended upgrade does.
            Kind::Deb => "dpkg --force-confold -i /root/packages/*.deb",
            Kind::Rpm => "rpm --upgrade /root/packages/*.rpm",
        };
        let installed = site.machine.shell(script).timeout(240).check().map(drop);
        fs::remove_dir_all(to)?;
        installed
    }

    fn remove(self, machine: &Machine, packages: &[&str]) -> Run {
        let run = match self {
            Kind::Deb => machine.run("dpkg").arg("--purge"),
            Kind::Rpm => machine.run("rpm").arg("--erase"),
        };
        run.args(packages).timeout(120)
    }

    fn version(self, machine: &Machine) -> Result<String> {
        let query = match self {
            Kind::Deb => "dpkg-query -W -f '${Version}' darter-snapshotter",
            Kind::Rpm => "rpm -q --qf '%{VERSION}' darter-snapshotter",
        };
        machine.shell(query).check()
    }
}

/// A machine with the packages on it, and a registry. Dropped in this order.
struct Site {
    machine: Machine,
    registry: Registry,
    world: World,
    kind: Kind,
    before: BTreeSet<PathBuf>,
}

impl Site {
    fn new(kind: Kind) -> Result<Self> {
        let built = built()?;
        let world = World::new()?;
        let registry = Registry::start(&world, "registry")?;
        let root = world.folder("machine")?.join("root");
        kind.root(&world, &root)?;
        let machine = Machine::boot(&world, "machine", &root)?;
        prepare_containerd(&machine, &registry)?;
        let before = listing(&machine)?;
        let site = Self { machine, registry, world, kind, before };
        kind.install(&site, &built.old)?;
        Ok(site)
    }

    /// The first steps of docs/install.md, all on one machine.
    fn first_steps(&self) -> Result<()> {
        let inactive = self.active()?;
        ensure!(inactive.is_empty(), "the installation started {inactive:?}");
        let script = "
            cd /etc/darter
            sed -i -e 's/^listen = .*/listen = \"0.0.0.0:7421\"/' -e 's/^node_name = .*/node_name = \"node\"/' snapshotter.toml
            systemctl enable --now darter-manager
            token() { runuser -u darter-manager -- darter-manager token --role \"$1\"; }
            token scheduler | install -m 640 -g darter-scheduler /dev/stdin /etc/darter/scheduler.token
            systemctl enable --now darter-scheduler
            token seed | install -m 640 -g darter-peer /dev/stdin /etc/darter/peer.token
            systemctl enable --now darter-seed
            token node | install -m 600 /dev/stdin /etc/darter/node.token
            systemctl enable --now darter-snapshotter
            systemctl restart containerd";
        self.machine.shell(script).timeout(120).check()?;
        let active = self.active()?;
        ensure!(active == UNITS, "of {UNITS:?} these run: {active:?}");
        Ok(())
    }

    fn active(&self) -> Result<Vec<&'static str>> {
        let state = |unit: &&str| Ok(self.machine.property(unit, "ActiveState")? == "active");
        UNITS.into_iter().filter_map(|unit| state(&unit).map(|yes| yes.then_some(unit)).transpose()).collect()
    }

    fn pids(&self) -> Result<Vec<String>> {
        UNITS.iter().map(|unit| self.machine.property(unit, "MainPID")).collect()
    }

    fn pull(&self, reference: &str) -> Result<String> {
        let user = format!("{USER}:{PASSWORD}");
        let pull = ["pull", "--user", &user, "--plain-http", reference];
        self.machine.run("darter").args(pull).timeout(120).check()
    }

    /// No processor shares: there are no controllers in the machine's cgroups.
    fn container(&self, reference: &str, id: &str, script: &str) -> Run {
        let run = ["run", "--rm", "--cpu-shares", "0", "--snapshotter", "darter"];
        self.machine.run("ctr").args(run).args([reference, id, "sh", "-c", script]).timeout(300)
    }

    /// What the journal says belongs to every error.
    fn explained<T>(&self, outcome: Result<T>) -> Result<T> {
        outcome.map_err(|error| {
            let journal = tail(&self.machine.journal(), 40);
            anyhow!("{error:#}\nthe journal:\n{journal}")
        })
    }
}

/// Everything on the machine's disk, save what changes by itself.
fn listing(machine: &Machine) -> Result<BTreeSet<PathBuf>> {
    let find = "find / -xdev -path /proc -prune -o -path /var/log -prune -o -path /var/lib/containerd -prune \
                -o -path /opt/containerd -prune -o -path /var/lib/rpm -prune -o -path /var/cache -prune -o -path /tmp -prune -o -path /var/tmp -prune \
                -o -path /var/lib/systemd -prune -o -name '*-old' -prune -o -path '/etc/*-' -prune -o -name .pwd.lock -prune -o -print";
    Ok(machine.shell(find).timeout(60).check()?.lines().map(PathBuf::from).collect())
}

/// Debian's containerd, told of Darter and of a registry without TLS.
fn prepare_containerd(machine: &Machine, registry: &Registry) -> Result<()> {
    let authority = registry.authority();
    let hosts = machine.path(&format!("/etc/containerd/certs.d/{authority}"));
    fs::create_dir_all(&hosts)?;
    fs::write(hosts.join("hosts.toml"), format!("server = \"http://{authority}\"\n"))?;
    let config = "version = 2\n[proxy_plugins.darter]\n  type = \"snapshot\"\n  address = \"/run/darter/darter.sock\"\n";
    Ok(fs::write(machine.path("/etc/containerd/config.toml"), config)?)
}

fn debs_install_run_upgrade_and_leave_nothing() -> Result<()> {
    life(Kind::Deb)
}

fn rpms_install_run_upgrade_and_leave_nothing() -> Result<()> {
    life(Kind::Rpm)
}

fn life(kind: Kind) -> Result<()> {
    let site = Site::new(kind)?;
    let outcome = lived(&site);
    site.explained(outcome)
}

/// Installed, used, upgraded under load, refused to go, gone.
fn lived(site: &Site) -> Result<()> {
    site.first_steps()?;
    confined(site)?;
    documented(site)?;
    let blobs = Blobs::open(site.world.folder("blobs")?)?;
    let data = Data::new(&blobs, 1, FILES, FILE_LEN)?;
    site.registry.push(&blobs, &data.image, "t/data")?;
    let reference = site.registry.reference("t/data");
    let pulled = site.pull(&reference)?;
    let layers = data.image.layers.len();
    ensure!(pulled.contains(&format!("{layers} of {layers} layers lazy")), "{pulled}");
    let reading = start_reading(site, &reference)?;
    upgraded(site)?;
    refused(site)?;
    finish_reading(site, reading, &data)?;
    gone(site)
}

/// Reads one file after the other, slowly until it is told to finish, and then says what all of them are together.
fn start_reading(site: &Site, reference: &str) -> Result<Running> {
    let script = format!(
        "echo reading; for f in /data/*; do cat $f >/dev/null || exit 1; [ -e /finish ] || sleep 0.3; done
         until [ -e /finish ]; do sleep 0.1; done; {}",
        crate::site::SUM
    );
    let mut reading = site.container(reference, "reading", &script).start()?;
    ensure!(reading.first_line().is_some(), "{}", reading.finish()?.said());
    Ok(reading)
}

fn finish_reading(site: &Site, reading: Running, data: &Data) -> Result<()> {
    let root = "/run/containerd/io.containerd.runtime.v2.task/default/reading/rootfs";
    site.machine.run("touch").arg(format!("{root}/finish")).check()?;
    let ran = reading.finish()?;
    let sum = ran.stdout.lines().nth(1).unwrap_or_default();
    ensure!(ran.success() && sum.starts_with(&data.sum), "not {}: {}", data.sum, ran.said());
    Ok(())
}

/// The newer packages over the older: what runs is replaced, what was configured stays.
fn upgraded(site: &Site) -> Result<()> {
    let (before, config) = (site.pids()?, site.machine.path("/etc/darter/snapshotter.toml"));
    let configured = fs::read_to_string(&config)?;
    site.kind.install(site, &built()?.new)?;
    let version = site.kind.version(&site.machine)?;
    ensure!(version.starts_with(NEWER), "{version} is installed");
    ensure!(fs::read_to_string(&config)? == configured, "the configuration was not kept");
    let running = site.active()?;
    ensure!(running == UNITS, "after the upgrade only these run: {running:?}");
    let same: Vec<_> = before.iter().zip(site.pids()?).filter(|(old, new)| **old == *new).collect();
    ensure!(same.is_empty(), "these were not replaced: {same:?}");
    Ok(())
}

/// While a container uses a lazy image its daemon can't be removed.
fn refused(site: &Site) -> Result<()> {
    let purge = site.kind.remove(&site.machine, &["darter-snapshotter"]).output()?;
    ensure!(!purge.success() && purge.said().contains("darter drain"), "{}", purge.said());
    ensure!(purge.said().contains("/run/containerd/"), "no container is named: {}", purge.said());
    site.kind.version(&site.machine).context("it is still installed")?;
    ensure!(site.active()? == UNITS, "a refused removal stopped a daemon");
    Ok(())
}

fn gone(site: &Site) -> Result<()> {
    let machine = &site.machine;
    eventually("the container's root is unmounted", 20, || {
        Ok(!machine.shell("cat /proc/self/mountinfo").check()?.contains("/run/containerd/io.containerd"))
    })?;
    let others = "/var/lib/darter/others";
    let mount = format!("mkdir {others} && mount -t tmpfs tmpfs {others} && touch {others}/data");
    machine.shell(&mount).check()?;
    site.kind.remove(machine, &PROGRAMS).check()?;
    let kept = format!("test -e {others}/data && umount {others} && rm -r /var/lib/darter");
    machine.shell(&kept).check().context("what somebody else mounted there is there no more")?;
    let processes = machine.shell("cat /proc/[0-9]*/comm").check()?;
    ensure!(!processes.contains("darter"), "still runs:\n{processes}");
    let mounts = machine.shell("cat /proc/self/mountinfo").check()?;
    ensure!(!mounts.contains("darter.sock") && !mounts.contains("fuse.darter"), "still mounted:\n{mounts}");
    if site.kind == Kind::Rpm {
        // What rpm has no scripts for is the administrator's, as docs/install.md says.
        let rest = "rm -rf /var/lib/darter* /etc/darter; for user in peer scheduler manager; do userdel darter-$user; done";
        machine.shell(rest).check()?;
    }
    let left: Vec<_> = listing(machine)?.difference(&site.before).cloned().collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    let users = fs::read_to_string(machine.path("/etc/passwd"))?;
    ensure!(!users.contains("darter"), "users are left:\n{users}");
    Ok(())
}

/// The node daemon mounts where everybody sees it; the others are nobody in particular.
fn confined(site: &Site) -> Result<()> {
    let namespace = |pid: &str| site.machine.shell(&format!("readlink /proc/{pid}/ns/mnt")).check();
    for unit in UNITS {
        let pid = site.machine.property(unit, "MainPID")?;
        let status = site.machine.shell(&format!("cat /proc/{pid}/status")).check()?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("").trim();
        let root = unit == "darter-snapshotter";
        ensure!((namespace(&pid)? == namespace("1")?) == root, "{unit} sees other mounts than it should");
        ensure!(field("Uid:").starts_with("0\t") == root, "{unit} runs as {}", field("Uid:"));
        ensure!(field("NoNewPrivs:") == "1" && field("Seccomp:") == "2", "{unit} is not confined:\n{status}");
        ensure!((field("CapBnd:") == "0000000000000000") != root, "{unit} may have {}", field("CapBnd:"));
    }
    Ok(())
}

/// Pages and completions are there for the command and for each of its subcommands.
fn documented(site: &Site) -> Result<()> {
    let pages = site
        .machine
        .shell("man -w darter darter-pull darter-status darter-why darter-preheat darter-standalone");
    pages.check()?;
    for program in PROGRAMS {
        site.machine.run("man").args(["-w", program]).check()?;
        let completion = site.machine.path(&format!("/usr/share/bash-completion/completions/{program}"));
        ensure!(completion.exists(), "{} is not there", completion.display());
    }
    Ok(())
}

/// A daemon that is there and does nothing gives no sign of life: systemd kills it and starts another.
fn a_daemon_that_hangs_is_replaced() -> Result<()> {
    let site = Site::new(Kind::Deb)?;
    let outcome = hung(&site);
    site.explained(outcome)
}

fn hung(site: &Site) -> Result<()> {
    let shorter = "for unit in manager scheduler seed snapshotter; do
                       mkdir -p /run/systemd/system/darter-$unit.service.d
                       printf '[Service]\\nWatchdogSec=3s\\n' >/run/systemd/system/darter-$unit.service.d/shorter.conf
                   done; systemctl daemon-reload";
    site.machine.shell(shorter).check()?;
    site.first_steps()?;
    // Longer than any of them may be silent.
    std::thread::sleep(Duration::from_secs(4));
    let before = site.pids()?;
    for unit in UNITS {
        ensure!(site.machine.property(unit, "NRestarts")? == "0", "{unit} was killed although it lived");
    }
    site.machine.shell(&format!("kill -STOP {}", before.join(" "))).check()?;
    eventually("all are replaced", 60, || {
        let now = site.pids()?;
        let replaced = now.iter().zip(&before).all(|(now, before)| now != before && now != "0");
        Ok(replaced && site.active()? == UNITS)
    })
}
