//! Packages: installed, used, upgraded and removed on whole machines with systemd.
//!
//! One machine runs all of Darter by the units that the packages bring, beside Debian's containerd. Debs go into a root that
//! debootstrap made, rpms into one that rpm made.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
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

/// Packages of the build that is tested, and of the same build under a newer version, whose configurations have a line more.
struct Built {
    old: PathBuf,
    new: PathBuf,
}

const PACKAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/package");
const NEWER: &str = "99.0.0";
const NEWER_LINE: &str = "# A newer version says more.\n";
/// All but that of the node daemon, which [`Site::first_steps`] changes.
const UNCHANGED: [&str; 3] = ["manager.toml", "scheduler.toml", "peer.toml"];
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
        let newer = ["--built", "--fast", "--unchecked", "--version", NEWER];
        let configurations = folder.join("etc");
        package(Run::new(PACKAGE).args(["--built", "--fast"]), &built.old)
            .and_then(|()| newer_configurations(&configurations))
            .and_then(|()| {
                package(Run::new(PACKAGE).args(newer).arg("--etc").arg(configurations.display()), &built.new)
            })
            .map_err(|error| format!("{error:#}"))?;
        Ok(built)
    });
    built.as_ref().map_err(|error| anyhow!("{error}"))
}

/// The folder with the debs of the build that is tested.
pub fn debs() -> Result<&'static Path> {
    built().map(|built| built.old.as_path())
}

fn package(run: Run, output: &Path) -> Result<()> {
    run.arg("--output").arg(output.display()).timeout(600).check().map(drop)
}

fn newer_configurations(folder: &Path) -> Result<()> {
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder)?;
    for file in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/etc"))? {
        let file = file?;
        let text = fs::read_to_string(file.path())? + NEWER_LINE;
        fs::write(folder.join(file.file_name()), text)?;
    }
    Ok(())
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
            // Where a configuration was changed by both sides dpkg would ask; docs/install.md has this flag for unattended upgrades.
            Kind::Deb => "dpkg --force-confold -i /root/packages/*.deb",
            Kind::Rpm => "rpm --upgrade /root/packages/*.rpm",
        };
        let installed = site.machine.shell(script).timeout(240).check().map(drop);
        fs::remove_dir_all(to)?;
        installed
    }

    /// All that a package has brought; rpm leaves what was changed.
    fn purge(self, machine: &Machine, packages: &[&str]) -> Run {
        let run = match self {
            Kind::Deb => machine.run("dpkg").arg("--purge"),
            Kind::Rpm => machine.run("rpm").arg("--erase"),
        };
        run.args(packages).timeout(120)
    }

    /// How the name of a newer configuration ends that lies beside one which was changed.
    fn beside(self) -> &'static str {
        match self {
            Kind::Deb => ".dpkg-dist",
            Kind::Rpm => ".rpmnew",
        }
    }

    /// The files of bash, zsh and fish, each with what stands before and behind a subcommand's name in it.
    fn completions(self, program: &str) -> [(String, &'static str, &'static str); 3] {
        let zsh = match self {
            Kind::Deb => "vendor-completions",
            Kind::Rpm => "site-functions",
        };
        [
            (format!("/usr/share/bash-completion/completions/{program}"), ",", ")"),
            (format!("/usr/share/zsh/{zsh}/_{program}"), "\n'", ":"),
            (format!("/usr/share/fish/vendor_completions.d/{program}.fish"), "-a \"", "\""),
        ]
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

    /// The first steps of docs/install.md, all on one machine. Its peer is no seed at first.
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
            token node | install -m 640 -g darter-peer /dev/stdin /etc/darter/peer.token
            systemctl start darter-peer
            [ \"$(systemctl is-active darter-peer)\" = active ]
            token seed | install -m 640 -g darter-peer /dev/stdin /etc/darter/peer.token
            systemctl enable --now darter-seed
            [ \"$(systemctl is-active darter-peer || true)\" = inactive ] # the two are one configuration
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

    /// Waits until each unit is active with another process than `before`.
    fn replaced(&self, before: &[String]) -> Result<()> {
        eventually("all are replaced", 60, || {
            let now = self.pids()?;
            let replaced = now.iter().zip(before).all(|(now, before)| now != before && now != "0");
            Ok(replaced && self.active()? == UNITS)
        })
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

/// Installed, used, killed and upgraded under load, refused to go, gone.
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
    let reading = all_killed(site, reading)?;
    upgraded(site)?;
    refused(site)?;
    finish_reading(site, reading, &data)?;
    gone(site)
}

/// The root of the container that reads, as its machine sees it.
const READING: &str = "/run/containerd/io.containerd.runtime.v2.task/default/reading/rootfs";

/// Reads one file after the other, slowly until it is told to finish, and then says what all of them are together. `/read`
/// has a line for each.
fn start_reading(site: &Site, reference: &str) -> Result<Running> {
    let script = format!(
        "echo reading; for f in /data/*; do cat $f >/dev/null || exit 1; echo $f >>/read; [ -e /finish ] || sleep 0.3; done
         until [ -e /finish ]; do sleep 0.1; done; {}",
        crate::site::SUM
    );
    let mut reading = site.container(reference, "reading", &script).start()?;
    ensure!(reading.first_line().is_some(), "{}", reading.finish()?.said());
    Ok(reading)
}

fn files_read(site: &Site) -> Result<usize> {
    let read = format!("cat {READING}/read 2>/dev/null || true");
    Ok(site.machine.shell(&read).timeout(20).check()?.lines().count())
}

/// Every process of Darter's on the machine at once: the daemons and, where systemd doesn't say that it has a store, the holder.
/// Systemd starts the daemons again and gives the mounts back, and the container goes on reading.
fn all_killed(site: &Site, mut reading: Running) -> Result<Running> {
    let before = site.pids()?;
    // Stopped first, so that none sees another one end and does something about it.
    let kill = "pids=$(grep -ls '^darter' /proc/[0-9]*/comm | cut -d/ -f3)
                for pid in $pids; do echo \"$pid $(cat /proc/$pid/comm)\"; done
                kill -STOP $pids
                kill -KILL $pids";
    let killed = site.machine.shell(kill).check()?;
    ensure!(
        before.iter().all(|pid| killed.contains(&format!("{pid} darter-"))),
        "not all of {before:?}: {killed}"
    );
    let went_on = site.replaced(&before).and_then(|()| reads_on(site, &mut reading));
    if let Err(error) = went_on {
        let said = if reading.is_running() { "nothing".to_owned() } else { reading.finish()?.said() };
        bail!("{error:#}\nthe container said {said}\nkilled at once:\n{killed}");
    }
    Ok(reading)
}

/// Some files that it hasn't begun yet.
fn reads_on(site: &Site, reading: &mut Running) -> Result<()> {
    let before = files_read(site).context("nobody can look into the container's root")?;
    eventually("the container reads on", 30, || {
        ensure!(reading.is_running(), "it has ended");
        Ok(files_read(site)? > before + 3)
    })
}

fn finish_reading(site: &Site, reading: Running, data: &Data) -> Result<()> {
    site.machine.run("touch").arg(format!("{READING}/finish")).check()?;
    let ran = reading.finish()?;
    let sum = ran.stdout.lines().nth(1).unwrap_or_default();
    ensure!(ran.success() && sum.starts_with(&data.sum), "not {}: {}", data.sum, ran.said());
    Ok(())
}

/// The newer packages over the older: what runs is replaced, what was configured stays.
fn upgraded(site: &Site) -> Result<()> {
    let (before, folder) = (site.pids()?, site.machine.path("/etc/darter"));
    let config = folder.join("snapshotter.toml");
    let configured = fs::read_to_string(&config)?;
    ensure!(configured.contains("\nnode_name = \"node\"\n"), "nobody has configured anything:\n{configured}");
    site.kind.install(site, &built()?.new)?;
    let version = site.kind.version(&site.machine)?;
    ensure!(version.starts_with(NEWER), "{version} is installed");
    ensure!(fs::read_to_string(&config)? == configured, "the configuration was not kept");
    let beside = format!("snapshotter.toml{}", site.kind.beside());
    for newer in UNCHANGED.into_iter().chain([beside.as_str()]) {
        let text = fs::read_to_string(folder.join(newer)).with_context(|| newer.to_owned())?;
        ensure!(text.ends_with(NEWER_LINE), "{newer} is not the newer version's");
    }
    let running = site.active()?;
    ensure!(running == UNITS, "after the upgrade only these run: {running:?}");
    let same: Vec<_> = before.iter().zip(site.pids()?).filter(|(old, new)| **old == *new).collect();
    ensure!(same.is_empty(), "these were not replaced: {same:?}");
    Ok(())
}

/// While a container uses a lazy image its daemon can't be removed.
fn refused(site: &Site) -> Result<()> {
    let purge = site.kind.purge(&site.machine, &["darter-snapshotter"]).output()?;
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
    if site.kind == Kind::Deb {
        removed(machine)?;
    }
    site.kind.purge(machine, &PROGRAMS).check()?;
    emptied(site, others)?;
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

/// Without a purge the programs go, and what was configured and what they keep stays.
fn removed(machine: &Machine) -> Result<()> {
    machine.run("dpkg").arg("--remove").args(PROGRAMS).timeout(120).check()?;
    for program in PROGRAMS {
        ensure!(!machine.path(&format!("/usr/bin/{program}")).exists(), "{program} is still there");
    }
    let kept = [
        "/etc/darter/snapshotter.toml",
        "/etc/darter/node.token",
        "/var/lib/darter/identity",
        "/var/lib/darter-manager",
    ];
    for kept in kept {
        ensure!(machine.path(kept).exists(), "the removal took {kept} away");
    }
    Ok(())
}

/// Of the state nothing is left but what somebody else has mounted there; rpm leaves the rest to the administrator.
fn emptied(site: &Site, others: &str) -> Result<()> {
    let unmount = format!("test -e {others}/data && umount {others}");
    site.machine.shell(&unmount).check().context("what somebody else mounted there is there no more")?;
    let left = site.machine.shell("find /var/lib/darter").timeout(60).check()?;
    let wiped = left.lines().eq(["/var/lib/darter", others]);
    ensure!(wiped || site.kind == Kind::Rpm, "the purge left more than {others}:\n{left}");
    site.machine.shell("rm -r /var/lib/darter").check()?;
    // What `listing` doesn't look at: the folder of the sockets, and what systemd and Debian's helper noted about the units.
    let noted = "find /run/darter /var/lib/systemd -name '*darter*' 2>/dev/null || true";
    let noted = site.machine.shell(noted).check()?;
    ensure!(noted.is_empty(), "left behind:\n{noted}");
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

/// Pages and completions are there for each program and for each of its subcommands.
fn documented(site: &Site) -> Result<()> {
    for program in PROGRAMS {
        let subcommands = subcommands(site, program)?;
        let pages = subcommands.iter().map(|subcommand| format!("{program}-{subcommand}"));
        site.machine.run("man").args(["-w", program]).args(pages).check()?;
        for (file, before, after) in site.kind.completions(program) {
            let completion = fs::read_to_string(site.machine.path(&file)).with_context(|| file.clone())?;
            ensure!(completion.contains(program), "{file} knows nothing of {program}");
            let missing: Vec<_> = subcommands
                .iter()
                .filter(|subcommand| !completion.contains(&format!("{before}{subcommand}{after}")))
                .collect();
            ensure!(missing.is_empty(), "{file} has none of {missing:?}");
        }
    }
    Ok(())
}

/// What the program's own help lists.
fn subcommands(site: &Site, program: &str) -> Result<Vec<String>> {
    let help = site.machine.run(program).arg("--help").check()?;
    let listed = help.split_once("\nCommands:\n").map(|(_, rest)| rest.split("\n\n").next().unwrap_or(""));
    let first_word = |line: &str| {
        // What a line goes on with is indented further.
        let line = line.strip_prefix("  ").filter(|line| !line.starts_with(' '))?;
        line.split(' ').next().filter(|word| *word != "help").map(str::to_owned)
    };
    let found: Vec<String> = listed.unwrap_or("").lines().filter_map(first_word).collect();
    let known = match program {
        "darter" => "pull",
        "darter-snapshotter" => "unmount",
        "darter-manager" => "token",
        _ => return Ok(found),
    };
    ensure!(found.iter().any(|one| one == known), "{program} lists {found:?}, and no {known}");
    Ok(found)
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
    site.replaced(&before)
}
