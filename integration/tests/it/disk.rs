//! Too little room on a disk: what nobody uses goes, and nobody who runs notices.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use darter_integration::cluster::{Node, Options, Program};
use darter_integration::command::{Run, Running, eventually};
use darter_integration::containerd::DARTER;
use nix::sys::statvfs::statvfs;
use serde_json::Value;

use crate::site::{Data, SUM, Site, files, found_again, next_random};

pub const STORIES: crate::Stories = &[
    ("layers_that_nobody_uses_make_room", 400, layers_that_nobody_uses_make_room),
    ("a_quota_is_kept", 300, a_quota_is_kept),
    ("a_full_disk_stops_no_container", 300, a_full_disk_stops_no_container),
    ("a_disk_that_fills_at_any_moment_leaves_no_wrong_byte", 300, a_disk_that_fills_at_any_moment),
];

const FILES: usize = 8;
const FILE_LEN: usize = 2_000_000;
const IMAGES: u64 = 6;
/// Room for three and a half of these images below the high mark.
const DISK_MB: u64 = 72;
const QUOTA: u64 = 40_000_000;
/// The marks as shipped.
const HIGH: u64 = 80;
const MARKS: &str = "store_high_percent = 80\nstore_low_percent = 75\nstore_keep_seconds = 10\n";

fn site() -> Result<Site> {
    let (node_config, seed_config) = (MARKS.to_owned(), MARKS.to_owned());
    Site::new(Options { nodes: 1, node_config, seed_config, ..Options::default() })
}

/// The program goes on with what it has, on a disk of a few megabytes. It doesn't run, and starts no more by this.
pub fn put_on_a_small_disk(program: &Program, megabytes: u64) -> Result<()> {
    let root = program.folder().join("root");
    let aside = root.with_extension("aside");
    fs::rename(&root, &aside)?;
    fs::create_dir(&root)?;
    let size = format!("size={megabytes}m");
    let mount = program.host().run("mount").args(["-t", "tmpfs", "-o", &size, "small"]);
    mount.arg(root.display()).check()?;
    program.host().run("cp").arg("-a").arg(aside.join(".").display()).arg(root.display()).check().map(drop)
}

fn seed_on_a_small_disk(site: &mut Site) -> Result<()> {
    site.cluster.seed.stop(30)?;
    put_on_a_small_disk(&site.cluster.seed, DISK_MB)?;
    site.cluster.start_seed()
}

fn node_on_a_small_disk(site: &mut Site) -> Result<()> {
    let node = &mut site.cluster.nodes[0];
    node.snapshotter.stop(30)?;
    node.unmount()?;
    put_on_a_small_disk(&node.snapshotter, DISK_MB)?;
    node.start_snapshotter()?;
    found_again(node)
}

fn roots(site: &Site) -> [PathBuf; 2] {
    [&site.node(0).snapshotter, &site.cluster.seed].map(|program| program.folder().join("root"))
}

/// As kubelet counts it.
fn percent_full(root: &Path) -> Result<u64> {
    let found = statvfs(root)?;
    Ok(100 - found.blocks_available() * 100 / found.blocks())
}

/// Bytes of pieces that are really on the disk.
fn on_disk(root: &Path) -> Result<u64> {
    let packs = files(&root.join("store/packs"), &[".pack"])?;
    packs.iter().map(|pack| Ok(fs::metadata(pack)?.blocks() * 512)).sum()
}

pub fn status(node: &Node) -> Result<Value> {
    Ok(serde_json::from_str(&node.darter("status").arg("--json").check()?)?)
}

/// How many pieces of the image's topmost layer are on the node, and how many there are.
pub fn top_layer(node: &Node, data: &Data) -> Result<(u64, u64)> {
    let diff_id = &data.image.layers.last().context("it has layers")?.diff_id;
    let status = status(node)?;
    let layers = status["layers"].as_array().context("a list of layers")?;
    let layer = layers.iter().find(|layer| layer["diff_id"] == diff_id.as_str());
    let count = |key: &str| layer.and_then(|layer| layer[key].as_u64()).unwrap_or_default();
    Ok((count("have"), count("pieces")))
}

/// A container that reads all, and then stays.
fn stay(node: &Node, reference: &str, id: &str) -> Result<Running> {
    let command = ["sh", "-c", "cat /data/* >/dev/null && echo at work && sleep 1000"];
    let run = node.containerd.ctr_run_command(reference, DARTER, id, &command);
    let mut running = run.timeout(390).start()?;
    ensure!(running.first_line().is_some(), "the container didn't start: {:?}", running.finish());
    Ok(running)
}

fn layers_that_nobody_uses_make_room() -> Result<()> {
    let mut site = site()?;
    seed_on_a_small_disk(&mut site)?;
    node_on_a_small_disk(&mut site)?;
    let images: Vec<(Data, String)> = (0..IMAGES)
        .map(|salt| {
            let data = Data::new(&site.blobs, salt, FILES, FILE_LEN)?;
            let name = site.add(&data, &format!("room/{salt}"));
            Ok((data, name))
        })
        .collect::<Result<_>>()?;
    let (kept, name) = &images[0];
    site.pull(0, kept, name)?;
    let _container = stay(site.node(0), name, "kept")?;
    for (salt, (data, name)) in images.iter().enumerate().skip(1) {
        site.pull(0, data, name)?;
        site.check(0, data, name, &format!("read-{salt}"))?;
        has_room_again(&site)?;
    }
    let evicted = status(site.node(0))?["store"]["evicted"].as_u64();
    ensure!(evicted.is_some_and(|bytes| bytes > 16_000_000), "{evicted:?} bytes went");
    let words = site.node(0).darter("status").check()?;
    ensure!(words.contains("of pieces") && words.contains("evicted"), "{words}");
    let (have, pieces) = top_layer(site.node(0), kept)?;
    ensure!(have == pieces && pieces > 0, "of what is in use {have} of {pieces} pieces are left");
    let (oldest, pieces) = top_layer(site.node(0), &images[1].0)?;
    ensure!(oldest < pieces, "all of what was used longest ago is still here");
    let (newest, pieces) = top_layer(site.node(0), &images.last().context("there are images")?.0)?;
    ensure!(newest > oldest, "of what was used last {newest} of {pieces} are left, {oldest} of the oldest");
    // What went comes again, from a seed that has to make it again.
    for (salt, (data, name)) in images.iter().enumerate() {
        site.check(0, data, name, &format!("again-{salt}"))?;
        has_room_again(&site)?;
    }
    Ok(())
}

/// What was used within `store_keep_seconds` stays: several images at once would fill so small a disk.
fn has_room_again(site: &Site) -> Result<()> {
    for root in roots(site) {
        let is_low = || Ok(percent_full(&root)? <= HIGH);
        eventually("there is room again", 60, is_low).with_context(|| root.display().to_string())?;
    }
    Ok(())
}

fn a_quota_is_kept() -> Result<()> {
    let quota = format!("store_quota_bytes = {QUOTA}\nstore_high_percent = 100\nstore_low_percent = 100\n");
    let options = Options { nodes: 1, node_config: quota.clone(), seed_config: quota, ..Options::default() };
    let site = Site::new(options)?;
    let mut first = None;
    for salt in 0..IMAGES {
        let data = Data::new(&site.blobs, salt, FILES, FILE_LEN)?;
        let name = site.add(&data, &format!("quota/{salt}"));
        site.pull(0, &data, &name)?;
        site.check(0, &data, &name, &format!("read-{salt}"))?;
        for root in roots(&site) {
            let bytes = on_disk(&root)?;
            ensure!(bytes < QUOTA + QUOTA / 20, "{bytes} bytes in {}", root.display());
        }
        first.get_or_insert((data, name));
    }
    ensure!(site.node(0).darter("status").check()?.contains(" of 40.0 MB of pieces"), "no word of the quota");
    let (first, name) = first.context("there are images")?;
    site.check(0, &first, &name, "first-again")
}

/// Something else takes the room until only `free` bytes are left.
fn fill_up(root: &Path, free: u64) -> Result<()> {
    let found = statvfs(root)?;
    let available = found.blocks_available() * found.fragment_size();
    let length = available.saturating_sub(free).to_string();
    Run::new("fallocate")
        .args(["-l", &length])
        .arg(root.join(format!("ballast-{free}")).display())
        .check()?;
    Ok(())
}

fn give_room(root: &Path) -> Result<()> {
    for entry in fs::read_dir(root)? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("ballast-")) {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// All data as a process sees it that is started in the container.
fn read_inside(node: &Node, data: &Data, id: &str, exec: &str) -> Result<()> {
    let words = ["tasks", "exec", "--exec-id", exec, id, "sh", "-c", SUM];
    let ran = node.containerd.ctr().args(words).output()?;
    ensure!(ran.stdout.starts_with(&data.sum), "{exec}: not {}: {}", data.sum, ran.said());
    Ok(())
}

/// Although nothing has been refused yet.
fn above_the_mark_is_told(node: &Node) -> Result<()> {
    let words = node.darter("status").check()?;
    ensure!(words.contains("above store_high_percent (80%)"), "{words}");
    Ok(())
}

/// Behind these words stands a number, above nothing, with its unit.
fn tells_what_is_missing(said: &str, words: &str) -> bool {
    said.split(words).skip(1).any(|rest| {
        let rest = rest.lines().next().unwrap_or_default();
        let told = rest.split(", ").find_map(|part| part.split_once(" missing")?.0.split_once(' '));
        told.is_some_and(|(number, unit)| {
            let is_above_nothing = number.parse::<f64>().is_ok_and(|number| number > 0.0);
            is_above_nothing && ["bytes", "kB", "MB", "GB"].contains(&unit)
        })
    })
}

/// From before the first piece of its data is there until after the disk has room again.
fn a_full_disk_stops_no_container() -> Result<()> {
    let mut site = site()?;
    node_on_a_small_disk(&mut site)?;
    let root = site.node(0).snapshotter.folder().join("root");
    let (data, other) =
        (Data::new(&site.blobs, 1, FILES, FILE_LEN)?, Data::new(&site.blobs, 2, FILES, FILE_LEN)?);
    let (name, other_name) = (site.add(&data, "full/one"), site.add(&other, "full/other"));
    // Nothing comes in the background, but a container can be started.
    fill_up(&root, DISK_MB * (100 - HIGH - 4) * 10_000)?;
    above_the_mark_is_told(site.node(0))?;
    site.pull(0, &data, &name)?;
    let command = ["sh", "-c", "echo at work && sleep 1000"];
    let run = site.node(0).containerd.ctr_run_command(&name, DARTER, "stays", &command);
    let mut running = run.timeout(290).start()?;
    ensure!(running.first_line().is_some(), "the container didn't start: {:?}", running.finish());
    fill_up(&root, 0)?;
    read_inside(site.node(0), &data, "stays", "full")?;
    let (have, pieces) = top_layer(site.node(0), &data)?;
    ensure!(have < pieces, "{have} of {pieces} pieces on a full disk");

    let node = &mut site.cluster.nodes[0];
    node.snapshotter.kill();
    node.start_snapshotter().context("with a full disk")?;
    found_again(node)?;
    read_inside(site.node(0), &data, "stays", "started-again")?;

    let refused = site.node(0).containerd.ctr_pull(&other_name, DARTER).output()?;
    let words = format!("no space is left in {}", root.display());
    ensure!(!refused.success() && refused.said().contains(&words), "{}", refused.said());
    ensure!(tells_what_is_missing(&refused.said(), &words), "{}", refused.said());

    give_room(&root)?;
    eventually("what is missing arrives by itself", 120, || {
        top_layer(site.node(0), &data).map(|(have, pieces)| have == pieces)
    })?;
    read_inside(site.node(0), &data, "stays", "with-room")?;
    site.pull(0, &other, &other_name)?;
    site.check(0, &other, &other_name, "other")?;
    ensure!(running.is_running(), "the container ended: {:?}", running.finish());
    Ok(())
}

const FILLS: u64 = 10;
/// Slow enough that a pull with all reads takes longer than most waits before the disk fills.
const LINK_MBIT: u32 = 40;
const FILL_MS_MAX: u64 = 1_500;
/// How long the disk stays full: a pull and a start meet it.
const FULL_FOR: Duration = Duration::from_millis(1_500);
const FILL_SEED: u64 = 20_261_123;
const SMALL_LEN: usize = 500_000;

/// The disk of the node, or of the seed, for a while: in the middle of a pull, of a layer that is made, of what is written for it.
/// What fails meanwhile says so; no byte is wrong then or later, and all comes once there is room.
fn a_disk_that_fills_at_any_moment() -> Result<()> {
    let mut site = site()?;
    seed_on_a_small_disk(&mut site)?;
    node_on_a_small_disk(&mut site)?;
    site.node(0).host.limit(LINK_MBIT)?;
    let mut random = FILL_SEED;
    for fill in 0..FILLS {
        let data = Data::new(&site.blobs, 100 + fill, FILES, SMALL_LEN)?;
        let name = site.add(&data, &format!("fills/{fill}"));
        let wait = Duration::from_millis(next_random(&mut random) % FILL_MS_MAX);
        let root = &roots(&site)[(fill % 2) as usize];
        let goes_on = || {
            fill_while_reading(&site, &data, &name, root, wait)?;
            reads_with_room(site.node(0), &data, &name, fill)
        };
        goes_on().with_context(|| format!("{} was full after {wait:?}", root.display()))?;
        site.node(0).containerd.remove_image(&name)?;
        site.cluster.nodes[0].snapshotter.daemon()?.must_run()?;
        site.cluster.seed.daemon()?.must_run()?;
    }
    Ok(())
}

fn fill_while_reading(site: &Site, data: &Data, name: &str, root: &Path, wait: Duration) -> Result<()> {
    let node = site.node(0);
    thread::scope(|scope| {
        // Pull and start may fail, as long as they end.
        let reading = scope.spawn(|| -> Result<()> {
            let pulled = node.containerd.ctr_pull(name, DARTER).output()?;
            let id = format!("meanwhile-{}", wait.as_millis());
            if pulled.success() { reads(node, data, name, &id).map(drop) } else { Ok(()) }
        });
        thread::sleep(wait);
        // It ends when nothing more goes in, whoever else writes.
        let ballast = format!("of={}", root.join("ballast-all").display());
        Run::new("dd").args(["if=/dev/zero", &ballast, "bs=64k"]).output()?;
        thread::sleep(FULL_FOR);
        give_room(root)?;
        reading.join().expect("no panic")
    })
}

fn reads_with_room(node: &Node, data: &Data, name: &str, fill: u64) -> Result<()> {
    let mut tries = 0;
    eventually("all comes when there is room", 60, || {
        tries += 1;
        let pulled = node.containerd.ctr_pull(name, DARTER).output()?;
        Ok(pulled.success() && reads(node, data, name, &format!("with-room-{fill}-{tries}"))?)
    })
}

/// Whether a container reads all data. It may be told that it can't; other bytes it is never given.
fn reads(node: &Node, data: &Data, name: &str, id: &str) -> Result<bool> {
    let ran = node.containerd.ctr_run_command(name, DARTER, id, &["sh", "-c", SUM]).output()?;
    let is_right = ran.stdout.starts_with(&data.sum);
    // The shell's status is that of the sum.
    let is_told = !ran.success() || !ran.stderr.is_empty();
    ensure!(is_right || is_told, "wrong bytes: {}", ran.said());
    Ok(is_right)
}
