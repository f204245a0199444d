//! Containers outlive the daemon: whatever ends it, who uses a lazy image notices a short wait and nothing else.

mod load;
mod service_manager;

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use darter_integration::cluster::{Node, Options};
use darter_integration::command::{Run, Running, eventually};
use darter_integration::containerd::{DARTER, MountedSnapshot};
use darter_integration::darter::program;
use darter_integration::image::Image;
use darter_integration::stub::Fault;
use darter_integration::sweep;

use crate::disk::status;
use crate::site::{Site, found_again, mount, next_random, start_again};
pub use load::serve_load;
use load::{Load, Seen};
use service_manager::ServiceManager;

pub const STORIES: crate::Stories = &[
    ("fifty_kills_under_load_fail_no_read", 400, fifty_kills_under_load_fail_no_read),
    ("kills_fail_no_read_on_older_kernels", 300, kills_fail_no_read_on_older_kernels),
    ("a_stop_fails_no_read", 240, a_stop_fails_no_read),
    ("a_stop_before_the_mesh_is_joined_loses_no_mount", 240, a_stop_before_the_mesh_is_joined_loses_no_mount),
    ("an_upgrade_fails_no_read", 240, an_upgrade_fails_no_read),
    ("all_of_darter_killed_at_once_fails_no_read", 240, all_of_darter_killed_at_once_fails_no_read),
    ("a_killed_holder_is_replaced", 240, a_killed_holder_is_replaced),
    ("systemd_keeps_the_mounts", 240, systemd_keeps_the_mounts),
    ("a_used_snapshot_that_is_removed_hangs_nobody", 400, a_used_snapshot_that_is_removed_hangs_nobody),
    ("nothing_is_left_when_no_container_is", 240, nothing_is_left_when_no_container_is),
];

const KILLS: usize = 50;
const KILLS_NOTED: usize = 20;
/// What the longest wait may be, beyond the time that no daemon was there.
const STALL_MAX: Duration = Duration::from_secs(1);
/// How long a node leaves a peer alone that it could not reach for a second or two (`UNREACHED_MIN` in crates/mesh/src/layer/standing.rs).
const PEER_LEFT_ALONE: Duration = Duration::from_secs(1);
/// What the slow link may take by itself: it carries ten pieces in a second.
const SLOW_LINK: Duration = Duration::from_secs(1);
/// How long a call of containerd may take that waits for no map.
const CALL_MAX: Duration = Duration::from_secs(10);
/// The exit status of timeout(1).
const TIMED_OUT: i32 = 124;
/// How long somebody may go on waiting for a file whose snapshot was removed.
const READER_MAX: Duration = Duration::from_secs(30);
const LINK_MBIT: u32 = 200;
/// So slow that somebody always waits for a piece, and that most of the image isn't on the node when its container runs.
const SLOW_LINK_MBIT: u32 = 20;
const SEED: u64 = 20_261_123;

/// A node with a lazy image that a load and a container use.
struct Used {
    load: Load,
    container: Running,
    mounted: MountedSnapshot,
    image: Image,
    reference: String,
    site: Site,
}

/// Goes on until it is killed, and says so when something fails.
const LOOP: &str = "echo at work; while :; do ls /data >/dev/null && cat /data/00*/* >/dev/null && \
                    busybox true || echo failed; done";

impl Used {
    /// All pieces come as they are needed, over a slow link, so that there is always somebody who waits for one.
    fn new() -> Result<Self> {
        Self::with(Vec::new(), LINK_MBIT)
    }

    fn with(environment: Vec<(String, String)>, link_mbit: u32) -> Result<Self> {
        let config = "background_idle_ms = 3600000\n".to_owned();
        let mut site = Site::new(Options { nodes: 1, node_config: config, ..Options::default() })?;
        if !environment.is_empty() {
            let node = &mut site.cluster.nodes[0];
            node.snapshotter.stop(20)?;
            node.snapshotter.set_environment(environment);
            start_again(node)?;
        }
        let image = load::image(&site.blobs)?;
        let reference = site.stub.add(&image, "takeover/load");
        let containerd = &site.node(0).containerd;
        containerd.ctr_pull(&reference, DARTER).check()?;
        let mounted = mount(site.node(0), &image, "load")?;
        site.node(0).host.limit(link_mbit)?;
        let load = Load::start(mounted.path())?;
        let command = ["sh", "-c", LOOP];
        let mut container =
            containerd.ctr_run_command(&reference, DARTER, "used", &command).timeout(390).start()?;
        ensure!(container.first_line().is_some(), "the container didn't start: {:?}", container.finish());
        Ok(Self { load, container, mounted, image, reference, site })
    }

    fn node(&mut self) -> &mut Node {
        &mut self.site.cluster.nodes[0]
    }

    /// A new container runs, too, with the right bytes.
    fn works(&self, id: &str) -> Result<()> {
        let command = ["sh", "-c", "ls /data | wc -l"];
        let containerd = &self.site.node(0).containerd;
        let ran = containerd.ctr_run_command(&self.reference, DARTER, id, &command).output()?;
        ensure!(ran.stdout.trim() == "1500", "a new container saw {}", ran.said());
        Ok(())
    }

    /// Nobody has met an error, while no daemon is there.
    fn is_still_kept_by(&mut self, holder: u32) -> Result<()> {
        let name = fs::read_to_string(format!("/proc/{holder}/comm")).unwrap_or_default();
        ensure!(name.trim() == "darter-holder", "the holder has ended");
        // Whoever waits goes on waiting; a request that fails would be the load's end.
        thread::sleep(Duration::from_millis(500));
        ensure!(self.load.is_running(), "the load ended");
        ensure!(self.container.is_running(), "the container ended");
        Ok(())
    }

    /// Nobody has waited for longer than the bound and the time that no daemon was there, as far as that isn't its own doing.
    fn finish_within(self, away: Duration) -> Result<()> {
        let longest = Duration::from_millis(self.finish()?.longest_ms);
        ensure!(
            longest < STALL_MAX + away,
            "somebody waited for {longest:?}, no daemon was there for {away:?}"
        );
        Ok(())
    }

    /// Nobody has met an error; what the load has seen.
    fn finish(mut self) -> Result<Seen> {
        let seen = self.load.finish(self.mounted.path())?;
        let containerd = &self.site.node(0).containerd;
        containerd.ctr().args(["tasks", "kill", "-s", "SIGKILL", "used"]).check()?;
        ensure!(self.container.first_line().is_some());
        let container = self.container.finish()?;
        ensure!(!container.said().contains("failed"), "the container has met {}", container.said());
        println!("  {seen:?}");
        ensure!(seen.reads > 5 && seen.maps > 5 && seen.look_ups > 20 && seen.lists > 20, "idle: {seen:?}");
        Ok(seen)
    }
}

/// How long no daemon was there, as far as that isn't the daemon's doing: until the new process was started.
fn kill_and_start(node: &mut Node) -> Result<Duration> {
    let killed = Instant::now();
    node.snapshotter.kill();
    let away = killed.elapsed();
    node.start_snapshotter()?;
    Ok(away)
}

fn fifty_kills_under_load_fail_no_read() -> Result<()> {
    let mut used = Used::new()?;
    let (mut random, mut away) = (SEED, Duration::ZERO);
    for kill in 0..KILLS {
        thread::sleep(Duration::from_millis(50 + next_random(&mut random) % 350));
        away = away.max(kill_and_start(used.node()).with_context(|| format!("kill {kill}"))?);
        ensure!(used.load.is_running(), "the load ended at kill {kill}: {:?}", used.finish());
    }
    found_again(used.site.node(0))?;
    used.works("afterwards")?;
    used.finish_within(away)
}

/// As on a kernel before 6.9.
fn kills_fail_no_read_on_older_kernels() -> Result<()> {
    let mut used = Used::with(vec![("DARTER_NO_RESEND".to_owned(), "1".to_owned())], LINK_MBIT)?;
    used.node().host.limit(SLOW_LINK_MBIT)?;
    let (mut random, mut away) = (SEED, Duration::ZERO);
    for kill in 0..KILLS_NOTED {
        thread::sleep(Duration::from_millis(100 + next_random(&mut random) % 350));
        away = away.max(kill_and_start(used.node()).with_context(|| format!("kill {kill}"))?);
        ensure!(used.load.is_running(), "the load ended at kill {kill}: {:?}", used.finish());
    }
    used.node().snapshotter.stop(20)?;
    used.node().start_snapshotter()?;
    let log = used.node().snapshotter.daemon()?.log_text();
    let noted = log.lines().filter(|line| line.contains("answering what was noted"));
    let with_some = noted.filter(|line| !line.contains("requests=0")).count();
    ensure!(with_some >= KILLS_NOTED / 2, "only after {with_some} kills there was something to answer");
    used.node().host.limit(LINK_MBIT)?;
    found_again(used.site.node(0))?;
    used.works("afterwards")?;
    used.finish_within(away + SLOW_LINK)
}

/// Also where the next start comes late; nobody waits for longer than that and the bound.
fn a_stop_fails_no_read() -> Result<()> {
    for pauses_ms in [&[0, 0, 0][..], &[500, 2_000]] {
        let mut used = Used::new()?;
        for pause_ms in pauses_ms {
            thread::sleep(Duration::from_millis(500));
            used.node().snapshotter.stop(20)?;
            thread::sleep(Duration::from_millis(*pause_ms));
            used.node().start_snapshotter()?;
        }
        found_again(used.site.node(0))?;
        used.works("afterwards")?;
        let away = Duration::from_millis(pauses_ms.iter().copied().max().unwrap_or_default());
        used.finish_within(away)?;
    }
    Ok(())
}

/// Daemons that never took the mounts over: told of no manager, without a certificate, and with a port that somebody else has.
fn a_stop_before_the_mesh_is_joined_loses_no_mount() -> Result<()> {
    let mut used = Used::new()?;
    let holder = *holders(used.node())?.first().context("there is no holder")?;
    let file = used.node().snapshotter.config();
    let config = fs::read_to_string(&file)?;
    used.node().snapshotter.stop(20)?;
    used.node().snapshotter.set("manager", "\"\"")?;
    start_without_a_mesh(used.node())?;
    fs::write(&file, &config)?;
    used.node().snapshotter.stop(20)?;
    used.is_still_kept_by(holder).context("no manager")?;

    let certificate = Aside::put(used.node())?;
    start_without_a_mesh(used.node())?;
    used.node().snapshotter.stop(20)?;
    used.is_still_kept_by(holder).context("no certificate")?;

    start_without_a_mesh(used.node())?;
    let listen = config.lines().find_map(|line| line.strip_prefix("listen = ")).context("no address")?;
    let bind = || Ok(TcpListener::bind(listen.trim_matches('"'))?);
    let taken = used.node().host.inside(bind)?;
    certificate.back()?;
    eventually("the daemon ends", 40, || Ok(used.node().snapshotter.daemon()?.must_run().is_err()))?;
    let log = used.node().snapshotter.daemon()?.log_text();
    ensure!(log.contains("can't join the mesh"), "it didn't end for want of its port: {log}");
    used.node().snapshotter.kill();
    used.is_still_kept_by(holder).context("a taken port")?;

    drop(taken);
    start_again(used.node())?;
    used.works("afterwards")?;
    used.finish().map(drop)
}

fn start_without_a_mesh(node: &mut Node) -> Result<()> {
    node.start_snapshotter()?;
    ensure!(status(node)?["lazy"] == false, "it has joined a mesh");
    Ok(())
}

/// A node's certificate, where its daemon doesn't find it. Nor does it find a token.
struct Aside {
    place: PathBuf,
    aside: PathBuf,
}

impl Aside {
    fn put(node: &Node) -> Result<Self> {
        let folder = node.snapshotter.folder();
        let (place, aside) = (folder.join("root/identity"), folder.join("identity-aside"));
        fs::remove_file(folder.join("token"))?;
        fs::rename(&place, &aside)?;
        Ok(Self { place, aside })
    }

    fn back(self) -> Result<()> {
        Ok(fs::rename(self.aside, self.place)?)
    }
}

fn an_upgrade_fails_no_read() -> Result<()> {
    let mut used = Used::new()?;
    let newer = used.site.world.folder("newer")?.join("darter-snapshotter");
    fs::copy(program("darter-snapshotter"), &newer)?;
    used.node().snapshotter.stop(20)?;
    used.node().snapshotter.set_file(&newer);
    used.node().start_snapshotter()?;
    let running = fs::read_link(format!("/proc/{}/exe", used.node().snapshotter.pid()))?;
    ensure!(running == newer, "it runs {}", running.display());
    found_again(used.site.node(0))?;
    used.works("afterwards")?;
    used.finish_within(Duration::ZERO)
}

/// The node's only peer is gone as well, and comes back last.
fn all_of_darter_killed_at_once_fails_no_read() -> Result<()> {
    let mut used = Used::new()?;
    thread::sleep(Duration::from_millis(500));
    let cluster = &mut used.site.cluster;
    let killed = Instant::now();
    cluster.nodes[0].snapshotter.kill();
    cluster.seed.kill();
    cluster.scheduler.kill();
    cluster.manager.kill();
    thread::sleep(Duration::from_secs(1));
    cluster.nodes[0].start_snapshotter()?;
    cluster.start_manager()?;
    cluster.start_scheduler()?;
    cluster.start_seed()?;
    let away = killed.elapsed();
    thread::sleep(Duration::from_secs(2));
    found_again(used.site.node(0))?;
    used.works("afterwards")?;
    used.finish_within(away + PEER_LEFT_ALONE)
}

/// The processes that keep mounts on this node.
pub fn holders(node: &Node) -> Result<Vec<u32>> {
    let own = fs::read_link(format!("/proc/{}/ns/net", node.snapshotter.pid()))?;
    let is_holder = |pid: &u32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.trim() == "darter-holder"
            && fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|namespace| namespace == own)
    };
    let names = fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.filter_map(|name| name.parse().ok()).filter(is_holder).collect())
}

fn a_killed_holder_is_replaced() -> Result<()> {
    let mut used = Used::new()?;
    let (mut last, mut away) = (0, Duration::ZERO);
    for round in 1..=3 {
        // Who waited for the last round's daemon has been answered: each wait is one round's.
        thread::sleep(Duration::from_millis(500));
        let holder = *holders(used.node())?.first().context("there is no holder")?;
        ensure!(holder != last, "the holder was not killed");
        let resident = darter_integration::procfs::resident(holder);
        ensure!(resident < 8 << 20, "the holder takes {resident} bytes");
        Run::new("kill").args(["-9", &holder.to_string()]).check()?;
        eventually("there is another holder", 10, || {
            Ok(holders(used.node())?.first().is_some_and(|found| *found != holder))
        })?;
        // It has what the daemon had when it answers.
        eventually("the log tells of it", 10, || {
            let log = used.node().snapshotter.daemon()?.log_text();
            Ok(log.matches("the new holder has the mounts").count() >= round)
        })?;
        away = away.max(kill_and_start(used.node())?);
        last = holder;
    }
    found_again(used.site.node(0))?;
    used.works("afterwards")?;
    used.finish_within(away)
}

fn systemd_keeps_the_mounts() -> Result<()> {
    let mut used = Used::new()?;
    let manager = ServiceManager::listen(&used.site.world.folder("systemd")?.join("notify"))?;
    // From the holder's hands into systemd's.
    used.node().snapshotter.stop(20)?;
    used.node().snapshotter.set_environment(manager.environment());
    used.node().start_snapshotter()?;
    let kept = manager.kept_after("READY=1")?;
    ensure!(kept.len() == 2, "systemd was given {:?}", kept.keys());
    for pid in holders(used.node())? {
        Run::new("kill").args(["-9", &pid.to_string()]).check()?;
    }
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(300));
        used.node().snapshotter.kill();
        used.node().snapshotter.pass(&kept)?;
        used.node().start_snapshotter()?;
        ensure!(holders(used.node())?.is_empty(), "a holder beside systemd's store");
    }
    found_again(used.site.node(0))?;
    used.works("afterwards")?;
    used.finish_within(Duration::ZERO)
}

/// By a client that doesn't ask, and by an unmount: the reader may get errors, but nobody waits for ever. Also while readers
/// wait for pieces that nobody gives.
fn a_used_snapshot_that_is_removed_hangs_nobody() -> Result<()> {
    for pieces_come in [true, false] {
        removed_while_used(pieces_come).with_context(|| format!("pieces come: {pieces_come}"))?;
    }
    Ok(())
}

fn removed_while_used(pieces_come: bool) -> Result<()> {
    let mut used = Used::with(Vec::new(), if pieces_come { LINK_MBIT } else { SLOW_LINK_MBIT })?;
    let reference = used.reference.clone();
    if !pieces_come {
        used.site.cluster.seed.host().connected(false)?;
        used.site.registry.host().connected(false)?;
        let top = &used.image.layers.last().context("it has layers")?.blob.digest;
        used.site.stub.fault(top, Fault::StallAfter(0));
        waits_in_vain(used.mounted.path())?;
    }
    let bounded = |used: &Used, words: &[&str]| -> Result<()> {
        let started = Instant::now();
        let done = used.site.node(0).containerd.ctr().args(words).output()?;
        let took = started.elapsed();
        ensure!(took < CALL_MAX, "{words:?} took {took:?}: {}", done.said());
        Ok(())
    };
    bounded(&used, &["snapshots", "--snapshotter", DARTER, "rm", "used"])?;
    bounded(&used, &["snapshots", "--snapshotter", DARTER, "rm", "load"])?;
    // It is in use: that fails, or isn't seen to.
    let unmounted = Instant::now();
    let _ = Run::new("umount").arg(used.mounted.path().display()).timeout(10).output()?;
    ensure!(unmounted.elapsed() < CALL_MAX, "an unmount took {:?}", unmounted.elapsed());
    bounded(&used, &["images", "rm", "--sync", &reference])?;
    bounded(&used, &["snapshots", "--snapshotter", DARTER, "ls"])?;
    bounded(&used, &["tasks", "kill", "--signal", "SIGKILL", "used"])?;
    // Also while no daemon is there, and by the one that comes.
    kill_and_start(used.node())?;
    found_again(used.site.node(0))?;
    bounded(&used, &["content", "prune", "references"])?;
    Run::new("umount").arg("-l").arg(used.mounted.path().display()).timeout(10).check()?;
    let Used { load, container, mounted, site, image, .. } = used;
    let told = Instant::now();
    let ended = load.finish(mounted.path());
    ensure!(told.elapsed() < READER_MAX, "readers went on waiting for {:?}: {ended:?}", told.elapsed());
    drop(container);
    if !pieces_come {
        site.node(0).host.limit(LINK_MBIT)?;
        site.cluster.seed.host().connected(true)?;
        site.registry.host().connected(true)?;
        site.stub.heal(&image.layers.last().context("it has layers")?.blob.digest);
    }
    bounded_pull(&site, &image, &reference)
}

/// Whoever reads a file that isn't on the node waits: the load finds such a one soon.
fn waits_in_vain(mounted: &Path) -> Result<()> {
    for folder in (0..load::FOLDERS).rev().step_by(10) {
        let file = mounted.join(format!("data/{folder:04}/0"));
        let read = Run::new("timeout").args(["2", "cat"]).arg(file.display()).timeout(20).output()?;
        if read.status.code() == Some(TIMED_OUT) {
            return Ok(());
        }
        ensure!(read.success(), "a read failed instead of waiting: {}", read.stderr);
    }
    bail!("all of the image was on the node: nobody waits for a piece")
}

/// All goes on: the image can be pulled anew and runs.
fn bounded_pull(site: &Site, image: &Image, reference: &str) -> Result<()> {
    let containerd = &site.node(0).containerd;
    containerd.ctr_pull(reference, DARTER).check()?;
    let mounted = mount(site.node(0), image, "anew")?;
    let names = Run::new("ls").arg(mounted.path().join("data").display()).timeout(60).check()?;
    ensure!(names.lines().count() == 1500, "{} names", names.lines().count());
    Ok(())
}

fn mounts_of(node: &Node) -> Vec<PathBuf> {
    let mounts = sweep::mounts_below(&node.snapshotter.folder().join("root"));
    mounts.into_iter().filter(|mount| mount.kind.starts_with("fuse")).map(|mount| mount.path).collect()
}

fn nothing_is_left_when_no_container_is() -> Result<()> {
    let mut used = Used::new()?;
    let root = used.node().snapshotter.folder().join("root");
    let unmount = |force: bool| {
        let words = if force { &["unmount", "--force"][..] } else { &["unmount"][..] };
        Run::new(program("darter-snapshotter")).arg("--root").arg(root.display()).args(words).timeout(20)
    };
    ensure!(unmount(false).output()?.said().contains("stop it first"), "it runs");
    used.node().snapshotter.stop(20)?;
    ensure!(!mounts_of(used.node()).is_empty(), "containers lost their mount with a stop");
    let refused = unmount(false).output()?;
    ensure!(refused.said().contains("containers use lazy images"), "{}", refused.said());
    used.node().start_snapshotter()?;
    found_again(used.site.node(0))?;
    let Used { load, container, mounted, mut site, image, reference } = used;
    load.finish(mounted.path())?;
    site.node(0).containerd.ctr().args(["tasks", "kill", "-s", "SIGKILL", "used"]).check()?;
    container.finish()?;
    drop(mounted);
    let node = &mut site.cluster.nodes[0];
    // A garbage collection tells the snapshotter which snapshots are gone.
    node.containerd.ctr().args(["images", "tag", &reference, "other"]).check()?;
    node.containerd.remove_image("other")?;
    node.snapshotter.stop(20)?;
    nothing(node, &root).context("after a stop")?;
    // Killed while nobody uses it: the mount stays, and goes when somebody says so.
    start_again(node)?;
    let mounted = mount(node, &image, "again")?;
    node.snapshotter.kill();
    ensure!(!mounts_of(node).is_empty());
    unmount(true).check()?;
    nothing(node, &root).context("after a kill")?;
    start_again(node)?;
    drop(mounted);
    node.containerd.remove_image(&reference)
}

fn nothing(node: &Node, root: &Path) -> Result<()> {
    let mounts = mounts_of(node);
    ensure!(mounts.is_empty(), "left: {mounts:?}");
    ensure!(!root.join("holder.sock").exists(), "the holder's socket is left");
    Ok(())
}
