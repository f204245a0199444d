//! No standstill: what waits for one layer or one piece holds up nothing else, and can be killed.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use darter_integration::cluster::Options;
use darter_integration::command::{Run, eventually};
use darter_integration::containerd::DARTER;
use darter_integration::stub::Fault;

use crate::site::{Data, Site};

pub const STORIES: crate::Stories = &[
    ("a_slow_first_contact_holds_up_no_other_start", 300, a_slow_first_contact_holds_up_no_other_start),
    ("prepare_answers_in_time_for_a_whole_image", 240, prepare_answers_in_time_for_a_whole_image),
    ("a_missing_piece_delays_no_other_container", 300, a_missing_piece_delays_no_other_container),
    ("who_waits_for_a_piece_or_a_map_can_be_killed", 240, who_waits_for_a_piece_or_a_map_can_be_killed),
    ("a_read_that_nobody_can_answer_fails_in_time", 240, a_read_that_nobody_can_answer_fails_in_time),
    ("the_background_delays_no_cold_read", 300, the_background_delays_no_cold_read),
];

/// What the registry says that the slow layer has, and what it sends of it in a second: it takes longer than the story.
const SLOW_LAYER: u64 = 2_000_000_000;
const SLOW_BYTES: u64 = 50_000;
const STARTS: usize = 5;
const READERS: usize = 40;
const COLD_READS: usize = 20;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn start_time(site: &Site, reference: &str, id: &str) -> Result<Duration> {
    let ran = site.node(0).containerd.ctr_run(reference, DARTER, id).output()?;
    ensure!(ran.success(), "{}", ran.said());
    Ok(ran.took)
}

/// While each of the starts runs, two images are removed, with a garbage collection.
fn a_slow_first_contact_holds_up_no_other_start() -> Result<()> {
    let site = Site::with_nodes(1)?;
    let other = Data::new(&site.blobs, 1, 4, 100_000)?;
    let reference = site.add(&other, "still/other");
    site.pull(0, &other, &reference)?;
    let starts = |word: &str| -> Result<Vec<Duration>> {
        (0..STARTS).map(|n| start_time(&site, &reference, &format!("{word}-{n}"))).collect()
    };
    start_time(&site, &reference, "warm")?;
    let without = median(starts("alone")?);

    let mut slow = Data::new(&site.blobs, 2, 40, 500_000)?;
    slow.image.layers.last_mut().context("it has layers")?.blob.size = SLOW_LAYER;
    slow.image = site.blobs.image(&slow.image.layers, &["cat", "/etc/motd"])?;
    let contact = site.add(&slow, "still/slow");
    site.stub.fault(slow.top_blob(), Fault::Huge(SLOW_LAYER, SLOW_BYTES));
    let doomed: Vec<(Data, String)> = (0..STARTS as u64 * 2)
        .map(|n| {
            let data = Data::new(&site.blobs, 10 + n, 3, 50_000)?;
            let name = site.add(&data, &format!("still/doomed-{n}"));
            site.pull(0, &data, &name)?;
            Ok((data, name))
        })
        .collect::<Result<_>>()?;
    site.pull(0, &slow, &contact)?;
    let containerd = &site.node(0).containerd;
    let mut waiting = containerd.ctr_run(&contact, DARTER, "waits").start()?;
    eventually("the slow layer is being read", 30, || Ok(site.stub.reads_of(slow.top_blob()) > 0))?;
    let mut times = Vec::new();
    for (n, pair) in doomed.chunks(2).enumerate() {
        thread::scope(|scope| {
            let removing =
                scope.spawn(|| pair.iter().try_for_each(|(_, name)| containerd.remove_image(name)));
            times.push(start_time(&site, &reference, &format!("beside-{n}"))?);
            removing.join().expect("no panic")
        })?;
    }
    let with = median(times);
    ensure!(waiting.is_running(), "nothing waited: {:?}", waiting.finish());
    let left = containerd.ctr().args(["images", "ls", "-q"]).check()?;
    ensure!(left.contains("still/slow") && !left.contains("still/doomed"), "not removed: {left}");
    let status = site.node(0).darter("status").check()?;
    ensure!(status.contains(" of 2000 MB read"), "nobody reads a layer of 2 GB:\n{status}");
    ensure!(with < without + Duration::from_secs(1), "a start takes {with:?}, {without:?} without");
    Ok(())
}

/// How long Prepare may take for all layers of an image together, as shipped; and what the machine may add to it.
const PREPARE_WAIT: Duration = Duration::from_millis(700);
const MACHINE: Duration = Duration::from_millis(300);
const PULLS: u64 = 3;
const LAYERS: u64 = 12;

/// However many layers it has, of which the registry says nothing: without an answer they are lazy.
fn prepare_answers_in_time_for_a_whole_image() -> Result<()> {
    let site = Site::with_nodes(1)?;
    let pull = |salt: u64, silent: bool| -> Result<(Data, String, Duration)> {
        let mut data = Data::new(&site.blobs, salt, 2, 1_000)?;
        for layer in 1..LAYERS {
            data = Data::over(&data.image.layers, &site.blobs, salt + 100 * layer, 2, 1_000)?;
        }
        for layer in data.image.layers.iter().filter(|_| silent) {
            site.stub.fault(&layer.blob.digest, Fault::Late(Duration::from_secs(5), 503));
        }
        let reference = site.add(&data, &format!("still/layers-{salt}"));
        let pulled = site.node(0).containerd.ctr_pull(&reference, DARTER).output()?;
        ensure!(pulled.success(), "{}", pulled.said());
        let blobs = site.node(0).containerd.layer_blobs(&data.image)?;
        ensure!(blobs.is_empty(), "{} layer blobs are in the content store", blobs.len());
        Ok((data, reference, pulled.took))
    };
    let answered = (1..=PULLS).map(|salt| Ok(pull(salt, false)?.2)).collect::<Result<_>>()?;
    let answered = median(answered);
    let mut silent = Vec::new();
    for salt in PULLS + 1..=2 * PULLS {
        let (data, reference, took) = pull(salt, true)?;
        let why = site.node(0).darter("why").arg(&reference).check()?;
        ensure!(why.contains("not decided in time"), "the registry was not silent:\n{why}");
        data.image.layers.iter().for_each(|layer| site.stub.heal(&layer.blob.digest));
        site.check(0, &data, &reference, &format!("after-{salt}"))?;
        silent.push(took);
    }
    println!("  {LAYERS} layers: {answered:?} where the registry answers, {silent:?} where it does not");
    let longest = silent.into_iter().max().unwrap_or_default();
    ensure!(
        longest < answered + PREPARE_WAIT + MACHINE,
        "{longest:?}, {answered:?} with a registry that answers"
    );
    Ok(())
}

/// A node with the maps of two images; the pieces of the first nobody can give any more, those of the second another node.
struct Missing {
    site: Site,
    lost: Data,
    there: Data,
}

impl Missing {
    fn new() -> Result<Self> {
        let quiet = "background_idle_ms = 3600000\n".to_owned();
        let site = Site::new(Options { nodes: 2, node_config: quiet, ..Options::default() })?;
        let (lost, there) =
            (Data::new(&site.blobs, 1, 4, 900_000)?, Data::new(&site.blobs, 2, 2 * COLD_READS, 600_000)?);
        let (lost_name, there_name) = (site.add(&lost, "still/lost"), site.add(&there, "still/there"));
        // The second node has all of one image, and so has the seed.
        site.pull(1, &there, &there_name)?;
        site.check(1, &there, &there_name, "reads-all")?;
        for (data, name) in [(&lost, &lost_name), (&there, &there_name)] {
            site.pull(0, data, name)?;
            // Its programs come now, its data does not.
            start_time(&site, name, "warm")?;
        }
        Ok(Self { site, lost, there })
    }

    /// The seed and the registry are gone; so are all pieces of the first image's data.
    fn lose(&self) -> Result<()> {
        self.site.stub.fault(self.lost.top_blob(), Fault::StallAfter(0));
        self.site.cluster.seed.host().connected(false)
    }
}

/// A read of four kilobytes in the middle of a file, by a process of its own.
fn reader(file: &std::path::Path) -> Run {
    let input = format!("if={}", file.display());
    Run::new("dd").args([&input, "of=/dev/null", "bs=4096", "count=1", "skip=100"]).timeout(200)
}

fn a_missing_piece_delays_no_other_container() -> Result<()> {
    let missing = Missing::new()?;
    let site = &missing.site;
    let (lost, there) = (site.mount(0, &missing.lost, "lost")?, site.mount(0, &missing.there, "there")?);
    missing.lose()?;
    let cold = |file: usize| -> Result<Duration> {
        let path = there.path().join(format!("data/{file:04}"));
        let read = reader(&path).output()?;
        ensure!(read.success(), "{}", read.said());
        Ok(read.took)
    };
    // The first read of all finds out that the seed is gone.
    cold(0)?;
    let without = median((1..COLD_READS).map(cold).collect::<Result<_>>()?);
    let file = lost.path().join("data/0001");
    let readers = (0..READERS).map(|_| reader(&file).start()).collect::<Result<Vec<_>>>()?;
    eventually("the readers wait", 10, || Ok(readers.iter().all(|reader| sleeps_in_kernel(reader.pid()))))?;
    let with = median((COLD_READS..2 * COLD_READS).map(cold).collect::<Result<_>>()?);
    for mut reader in readers {
        ensure!(reader.is_running(), "a reader of a missing piece has ended");
        reader.kill();
    }
    ensure!(with < without + Duration::from_millis(100), "a cold read takes {with:?}, {without:?} without");
    Ok(())
}

/// Waiting for an answer of FUSE, as `wchan` or the state tells.
fn sleeps_in_kernel(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(')').map_or("", |(_, rest)| rest.trim_start());
    state.starts_with(['S', 'D'])
}

fn who_waits_for_a_piece_or_a_map_can_be_killed() -> Result<()> {
    let missing = Missing::new()?;
    let site = &missing.site;
    let lost = site.mount(0, &missing.lost, "lost")?;
    missing.lose()?;
    dies_when_killed(reader(&lost.path().join("data/0002")), "a piece")?;

    site.cluster.seed.host().connected(true)?;
    let unknown = Data::new(&site.blobs, 3, 4, 900_000)?;
    let reference = site.add(&unknown, "still/unknown");
    site.stub.fault(unknown.top_blob(), Fault::StallAfter(1000));
    site.pull(0, &unknown, &reference)?;
    let merged = site.node(0).snapshotter.folder().join("root");
    let merged = find_mount(&merged).context("the node's mount")?;
    // The names of snapshots are numbers; the newest has no map yet.
    let newest = newest_folder(&merged)?;
    dies_when_killed(Run::new("ls").arg(merged.join(newest.to_string()).display()), "a map")
}

/// Without a network, after the time that the node was given; the next read is none the worse for it.
fn a_read_that_nobody_can_answer_fails_in_time() -> Result<()> {
    const BOUND: Duration = Duration::from_secs(4);
    let node_config = format!("background_idle_ms = 3600000\nread_wait_seconds = {}\n", BOUND.as_secs());
    let mut site = Site::new(Options { nodes: 1, node_config, ..Options::default() })?;
    let data = Data::new(&site.blobs, 1, 4, 900_000)?;
    let reference = site.add(&data, "still/cut-off");
    site.pull(0, &data, &reference)?;
    start_time(&site, &reference, "warm")?;
    let mounted = site.mount(0, &data, "cut-off")?;
    let file = mounted.path().join("data/0001");
    site.node(0).host.connected(false)?;
    let failed = reader(&file).output()?;
    ensure!(failed.stderr.contains("Input/output error"), "it didn't fail: {}", failed.said());
    // The kernel reads ahead first, and asks for the page itself when that has failed.
    ensure!((BOUND..BOUND * 3).contains(&failed.took), "it failed after {:?}", failed.took);
    let log = site.cluster.nodes[0].snapshotter.daemon()?.log_text();
    ensure!(log.contains("a read has waited too long for a piece"), "nothing is said in the log");
    site.node(0).host.connected(true)?;
    drop(mounted);
    site.check(0, &data, &reference, "again")
}

fn dies_when_killed(run: Run, what: &str) -> Result<()> {
    let mut waiting = run.start()?;
    thread::sleep(Duration::from_millis(700));
    ensure!(waiting.is_running(), "it did not wait for {what}: {:?}", waiting.finish());
    let killed = Instant::now();
    waiting.kill();
    ensure!(!waiting.is_running(), "it lives on, waiting for {what}");
    let took = killed.elapsed();
    ensure!(took < Duration::from_secs(2), "who waits for {what} died after {took:?}");
    Ok(())
}

fn find_mount(root: &std::path::Path) -> Option<std::path::PathBuf> {
    let mounts = darter_integration::sweep::mounts_below(root);
    Some(mounts.into_iter().find(|mount| mount.kind.starts_with("fuse"))?.path)
}

fn newest_folder(merged: &std::path::Path) -> Result<u64> {
    let names = Run::new("ls").arg(merged.display()).timeout(20).check()?;
    names.lines().filter_map(|name| name.parse().ok()).max().context("the mount shows no snapshots")
}

/// At 50 Mbit/s, the 95th percentile.
fn the_background_delays_no_cold_read() -> Result<()> {
    const FILES: usize = 160;
    let measure = |idle_ms: u64, salt: u64| -> Result<Duration> {
        let config = format!("background_idle_ms = {idle_ms}\n");
        let site = Site::new(Options { nodes: 1, node_config: config, ..Options::default() })?;
        let data = Data::new(&site.blobs, salt, FILES, 256 * 1024)?;
        let reference = site.add(&data, "still/background");
        let other = Data::new(&site.blobs, 99, 1, 1000)?;
        let warm = site.add(&other, "still/warm");
        site.pull(0, &other, &warm)?;
        site.pull(0, &data, &reference)?;
        start_time(&site, &reference, "knows-the-map")?;
        site.node(0).host.limit(50)?;
        let mounted = site.mount(0, &data, "cold")?;
        let mut times = Vec::new();
        // Far apart, so that reading ahead has nothing to do with it; backwards, away from where the background is.
        for file in (0..FILES).rev().step_by(2).take(60) {
            let read = reader_of_start(&mounted.path().join(format!("data/{file:04}"))).output()?;
            ensure!(read.success(), "{}", read.said());
            times.push(read.took);
        }
        times.sort();
        Ok(times[times.len() * 95 / 100])
    };
    let without = measure(3_600_000, 1)?;
    let with = measure(0, 2)?;
    ensure!(
        with.as_secs_f64() <= 1.3 * without.as_secs_f64(),
        "95 of 100 cold reads take {with:?}, {without:?} without"
    );
    Ok(())
}

fn reader_of_start(file: &std::path::Path) -> Run {
    let input = format!("if={}", file.display());
    Run::new("dd").args([&input, "of=/dev/null", "bs=4096", "count=1"]).timeout(60)
}
