//! Limits of what hosts may move, and a background that stands back.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use darter_integration::cluster::Options;
use darter_integration::command::{Run, eventually};
use darter_integration::containerd::DARTER;
use darter_integration::darter::program;
use darter_integration::world::Host;

use crate::numbers::{ask, samples, value};
use crate::site::{Data, Site};

pub const STORIES: crate::Stories = &[
    ("limits_set_on_the_manager_change_a_transfer_under_way", 180, change_a_transfer_under_way),
    ("each_limit_is_kept", 240, each_limit_is_kept),
    ("a_read_goes_before_what_nobody_asked_for", 180, a_read_goes_before),
    ("the_background_yields_to_a_busy_link", 240, yields_to_a_busy_link),
    ("the_background_yields_to_a_busy_disk", 240, yields_to_a_busy_disk),
];

const MB: f64 = 1e6;
const PIECE: usize = 256 * 1024;
const NODE: &str = "node-1";

/// The background begins at once.
const HASTY: &str = "background_idle_ms = 0\n";

fn site(config: &str) -> Result<Site> {
    Site::new(Options { nodes: 1, node_config: format!("{HASTY}{config}"), ..Options::default() })
}

/// `darter limits`, as an operator types it.
fn limits(site: &Site, words: &[&str]) -> Result<String> {
    let manager = &site.cluster.manager;
    let rest = format!("http://{}:7480", manager.host().address());
    let token = manager.folder().join("root/api-token");
    let run = manager.host().run(program("darter")).arg("limits").args(words);
    run.args(["--manager", &rest, "--token-file"]).arg(token.display()).check()
}

/// A number that the node tells.
fn number(site: &Site, name: &str, label: &str) -> Result<f64> {
    value(&samples(&ask(&site.node(0).snapshotter, 7484, "/metrics")?), name, label)
}

/// Waits until the node or seed has heard of a limit.
fn in_force(site: &Site, seed: bool, kind: &str, set_by: &str, rate: f64) -> Result<()> {
    let (program, port) = if seed { (&site.cluster.seed, 7483) } else { (&site.node(0).snapshotter, 7484) };
    eventually(&format!("a limit of {kind} is in force"), 20, || {
        let told = samples(&ask(program, port, "/metrics")?);
        let label = format!("kind=\"{kind}\",set_by=\"{set_by}\"");
        Ok(value(&told, "darter_mesh_limit_bytes", &label).is_ok_and(|now| now == rate))
    })
}

/// An image of so many pieces that don't compress; the node knows its maps, and a container of it has run.
fn known(site: &Site, salt: u64, pieces: usize) -> Result<(Data, String)> {
    let image = pushed(site, salt, pieces)?;
    start(site, &image)?;
    Ok(image)
}

fn pushed(site: &Site, salt: u64, pieces: usize) -> Result<(Data, String)> {
    let data = Data::new(&site.blobs, salt, pieces, PIECE)?;
    let reference = site.add(&data, &format!("limits/app-{salt}"));
    Ok((data, reference))
}

/// Pulls it and runs a container, which reads none of its data.
fn start(site: &Site, (data, reference): &(Data, String)) -> Result<()> {
    site.pull(0, data, reference)?;
    let id = format!("first-{}", &data.sum[..12]);
    let ran = site.node(0).containerd.ctr_run(reference, DARTER, &id).output()?;
    ensure!(ran.success(), "{}", ran.said());
    Ok(())
}

fn bytes(pieces: usize) -> f64 {
    (pieces * PIECE) as f64
}

/// What comes over the host's link, in bytes per second, while this waits.
fn received(host: &Host, time: Duration) -> Result<f64> {
    let (before, since) = (host.traffic()?, Instant::now());
    thread::sleep(time);
    Ok((host.traffic()? - before).received as f64 / since.elapsed().as_secs_f64())
}

fn complete(site: &Site, seconds: u64) -> Result<()> {
    eventually(
        "the background is done",
        seconds,
        || Ok(number(site, "darter_mesh_layers", "partial")? == 0.0),
    )
}

fn change_a_transfer_under_way() -> Result<()> {
    let site = site("")?;
    limits(&site, &["set", "--upload", "2MB"])?;
    in_force(&site, true, "upload", "cluster", 2.0 * MB)?;
    known(&site, 1, 240)?;
    let host = &site.node(0).host;
    let slow = received(host, Duration::from_secs(4))?;
    ensure!((0.6 * MB..3.0 * MB).contains(&slow), "{slow} bytes/s at a limit of 2 MB/s");
    let said = limits(&site, &["set", "--seed", "seed", "--upload", "8MB"])?;
    ensure!(said.contains("seed seed") && said.contains("8 MB/s"), "{said}");
    in_force(&site, true, "upload", "member", 8.0 * MB)?;
    let quick = received(host, Duration::from_secs(2))?;
    ensure!(quick > 1.5 * slow && quick < 12.0 * MB, "{quick} bytes/s at 8 MB/s, {slow} at 2 MB/s");
    ensure!(number(&site, "darter_mesh_layers", "partial")? > 0.0, "it was over too soon to show anything");
    let shown = limits(&site, &["show"])?;
    ensure!(shown.contains("every seed and node") && shown.contains("2 MB/s"), "{shown}");
    ensure!(shown.contains("seed seed") && shown.contains("8 MB/s"), "{shown}");
    limits(&site, &["reset", "--seed", "seed"])?;
    limits(&site, &["reset", "upload"])?;
    in_force(&site, true, "upload", "host", 0.0)?;
    complete(&site, 30)
}

/// Reads the whole image in a container; how long that takes.
fn read_all(site: &Site, (data, reference): &(Data, String), id: &str) -> Result<Duration> {
    let since = Instant::now();
    site.check(0, data, reference, id)?;
    Ok(since.elapsed())
}

fn kept(what: &str, took: Duration, bytes: f64, rate: f64) -> Result<()> {
    let least = 0.8 * bytes / rate;
    ensure!(took.as_secs_f64() >= least, "{what}: {bytes} bytes took {took:?} at {rate} bytes/s");
    Ok(())
}

fn each_limit_is_kept() -> Result<()> {
    const PIECES: usize = 40;
    // The first is of the node's own configuration, the others are set on the manager.
    let config = "background_idle_ms = 3600000\ndownload_rate_bytes = 2000000\n".to_owned();
    let site = Site::new(Options { nodes: 1, node_config: config, ..Options::default() })?;
    let all = bytes(PIECES);
    in_force(&site, false, "download", "host", 2.0 * MB)?;
    let image = known(&site, 1, PIECES)?;
    kept("download", read_all(&site, &image, "download")?, all, 2.0 * MB)?;
    limits(&site, &["set", "--node", NODE, "--download", "none"])?;
    in_force(&site, false, "download", "member", 0.0)?;
    let status = site.node(0).darter("status").check()?;
    ensure!(!status.contains("limits:"), "{status}");

    limits(&site, &["set", "--seed", "seed", "--upload", "2MB"])?;
    in_force(&site, true, "upload", "member", 2.0 * MB)?;
    let image = known(&site, 2, PIECES)?;
    kept("upload", read_all(&site, &image, "upload")?, all, 2.0 * MB)?;
    limits(&site, &["reset", "--seed", "seed"])?;

    limits(&site, &["set", "--registry", "2MB", "--background", "1MB"])?;
    in_force(&site, true, "registry", "cluster", 2.0 * MB)?;
    in_force(&site, false, "background", "cluster", 1.0 * MB)?;
    let status = site.node(0).darter("status").check()?;
    ensure!(status.contains("background 1 MB/s (set on the manager for all)"), "{status}");
    let image = pushed(&site, 3, PIECES)?;
    let since = Instant::now();
    start(&site, &image)?;
    kept("registry", since.elapsed(), all, 2.0 * MB)?;
    // What a container asks for is no background.
    let took = read_all(&site, &image, "demand")?;
    ensure!(
        took.as_secs_f64() < 0.7 * all / MB,
        "a container's reads took {took:?}, as if they were limited"
    );
    // There is one world at a time.
    drop(site);
    background_is_limited()
}

/// As the manager says, while it is under way.
fn background_is_limited() -> Result<()> {
    let site = site("")?;
    let limit = |words: &str, rate: f64| {
        limits(&site, &["set", "--node", NODE, "--background", words])?;
        in_force(&site, false, "background", "member", rate)
    };
    limit("1MB", MB)?;
    known(&site, 4, 96)?;
    let came = || number(&site, "darter_mesh_background_bytes_total", "");
    let rate = |seconds| {
        let (before, since) = (came()?, Instant::now());
        thread::sleep(Duration::from_secs(seconds));
        Ok::<_, anyhow::Error>((came()? - before) / since.elapsed().as_secs_f64())
    };
    eventually("the background has begun", 30, || Ok(came()? > 0.0))?;
    let slow = rate(5)?;
    ensure!((0.4 * MB..1.4 * MB).contains(&slow), "{slow} bytes/s came in the background at 1 MB/s");
    limit("4MB", 4.0 * MB)?;
    let quick = rate(3)?;
    ensure!((1.6 * MB..5.6 * MB).contains(&quick), "{quick} bytes/s came in the background at 4 MB/s");
    ensure!(number(&site, "darter_mesh_layers", "partial")? > 0.0, "it was over too soon to show anything");
    Ok(())
}

/// How long it takes to read the beginning of each of these files, the last one first, as a container would.
fn cold_reads(site: &Site, data: &Data, files: Range<usize>) -> Result<Vec<Duration>> {
    let mounted = site.mount(0, data, "cold")?;
    let read = |file: usize| {
        let input = format!("if={}", mounted.path().join(format!("data/{file:04}")).display());
        let read =
            Run::new("dd").args([&input, "of=/dev/null", "bs=4096", "count=1"]).timeout(60).output()?;
        ensure!(read.success(), "{}", read.said());
        Ok(read.took)
    };
    files.rev().map(read).collect()
}

/// All that the node may receive is wanted by the background; a read waits for a piece that is under way, not for its turn.
fn a_read_goes_before() -> Result<()> {
    let site = site("download_rate_bytes = 1000000\n")?;
    let (data, _) = known(&site, 1, 160)?;
    let came = || number(&site, "darter_mesh_background_bytes_total", "");
    eventually("the background is under way", 30, || Ok(came()? > MB))?;
    let mut times = cold_reads(&site, &data, 150..160)?;
    times.sort();
    let median = times[times.len() / 2];
    ensure!(median < Duration::from_millis(1200), "a read of one piece takes {median:?}: {times:?}");
    ensure!(number(&site, "darter_mesh_layers", "partial")? > 0.0, "the background was over before");
    Ok(())
}

/// The background trickles while `busy` lasts, says why, and goes on after it. What a container reads meanwhile does not.
fn yields_while(site: &Site, data: &Data, to: &str, busy: impl FnOnce() -> Result<()>) -> Result<()> {
    let label = format!("to=\"{to}\"");
    let yields = || Ok(number(site, "darter_mesh_background_yields", &label)? == 1.0);
    eventually("the background stands back", 30, yields)?;
    let status = site.node(0).darter("status").check()?;
    ensure!(status.contains("others keep busy: ") && status.contains(to), "{status}");
    let came = || number(site, "darter_mesh_background_bytes_total", "");
    let before = came()?;
    thread::sleep(Duration::from_secs(6));
    let trickled = came()? - before;
    // One piece in two seconds, and what was under way.
    ensure!(trickled <= bytes(5), "{trickled} bytes came in six seconds while the {to} was busy");
    ensure!(yields()?, "it stopped standing back while the {to} was busy");
    reads_do_not_yield(site, data).with_context(|| format!("while the {to} was busy"))?;
    busy()?;
    complete(site, 90)?;
    let stood = number(site, "darter_mesh_background_yielded_seconds_total", &label)?;
    ensure!(stood >= 4.0, "it says that it stood back for {stood} s");
    Ok(())
}

/// Six pieces at the background's pace would take ten seconds.
fn reads_do_not_yield(site: &Site, data: &Data) -> Result<()> {
    let waits = || number(site, "darter_mesh_read_wait_seconds", "_count");
    let before = waits()?;
    let times = cold_reads(site, data, 154..160)?;
    ensure!(waits()? >= before + 6.0, "what was read was here before, so this shows nothing");
    let took: Duration = times.iter().sum();
    ensure!(took < Duration::from_secs(8), "six reads of a piece took {took:?}: {times:?}");
    Ok(())
}

fn yields_to_a_busy_link() -> Result<()> {
    const LINK_MBIT: u32 = 50;
    let site =
        site("background_yields = true\nlink_rate_bytes = 6250000\nbackground_rate_bytes = 2000000\n")?;
    let host = site.node(0).host.clone();
    host.limit(LINK_MBIT)?;
    let (data, _) = known(&site, 1, 160)?;
    let url = format!("http://{}/v2/limits/app-1/blobs/{}", site.stub.authority(), data.top_blob());
    let mut other = host.run("curl").args(["-sS", "--limit-rate", "4800k"]);
    for _ in 0..8 {
        other = other.args(["-o", "/dev/null", &url]);
    }
    let mut other = other.timeout(150).start()?;
    yields_while(&site, &data, "network", || {
        ensure!(other.is_running(), "the other process was done too soon");
        other.kill();
        Ok(())
    })
}

/// Writers past the page cache, each of which waits for the disk most of the time, until this is dropped.
struct BusyDisk {
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<std::io::Result<()>>>,
}

impl BusyDisk {
    const WRITERS: usize = 12;
    const CHUNK: usize = 128 << 10;
    const FILE_CHUNKS: u64 = 256;
    /// What a disk wants of addresses in memory.
    const ALIGNMENT: usize = 4096;

    fn start(folder: &Path) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let writer = |number| {
            let (stop, path) = (stop.clone(), folder.join(format!("file-{number}")));
            thread::spawn(move || Self::write(&path, &stop))
        };
        let writers = (0..Self::WRITERS).map(writer).collect();
        Self { stop, writers }
    }

    fn write(path: &Path, stop: &AtomicBool) -> std::io::Result<()> {
        let direct = nix::fcntl::OFlag::O_DIRECT.bits();
        let file = File::options().write(true).create(true).truncate(true).custom_flags(direct).open(path)?;
        let memory = vec![7; Self::CHUNK + Self::ALIGNMENT];
        let skip = memory.as_ptr().align_offset(Self::ALIGNMENT);
        let chunk = &memory[skip..skip + Self::CHUNK];
        for round in 0.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            file.write_all_at(chunk, round % Self::FILE_CHUNKS * Self::CHUNK as u64)?;
        }
        Ok(())
    }

    fn end(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        for writer in std::mem::take(&mut self.writers) {
            writer.join().expect("no panic while writing")?;
        }
        Ok(())
    }
}

impl Drop for BusyDisk {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn yields_to_a_busy_disk() -> Result<()> {
    let site = site("background_yields = true\nbackground_rate_bytes = 2000000\n")?;
    let folder = site.world.folder("busy")?;
    let (data, _) = known(&site, 1, 160)?;
    let disk = BusyDisk::start(&folder);
    yields_while(&site, &data, "disk", || disk.end())
}
