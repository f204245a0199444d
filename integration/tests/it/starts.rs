//! What one start read first, the next node fetches before anything asks.

use anyhow::{Context, Result, ensure};
use darter_integration::cluster::{Node, Options};
use darter_integration::command::eventually;
use darter_integration::containerd::DARTER;
use darter_integration::darter::{Read, trace};

use crate::site::{Data, Site, files, start_again};

pub const STORIES: crate::Stories = &[
    ("the_second_node_fetches_what_the_first_read", 180, the_second_node_fetches_what_the_first_read),
    ("a_changed_command_is_no_slower", 240, a_changed_command_is_no_slower),
    ("an_order_of_everything_moves_a_bounded_share", 180, an_order_of_everything_moves_a_bounded_share),
    ("starts_are_remembered_over_restarts", 240, starts_are_remembered_over_restarts),
    ("trace_tells_what_a_start_read", 120, trace_tells_what_a_start_read),
];

const FILES: usize = 60;
const FILE_LEN: usize = 300_000;
/// So that what comes was asked for by a container, or by an order.
const NO_BACKGROUND: &str = "background_idle_ms = 3600000\n";

fn site(nodes: usize) -> Result<Site> {
    Site::new(Options { nodes, node_config: NO_BACKGROUND.to_owned(), ..Options::default() })
}

/// A command that reads these files.
fn cat(numbers: impl Iterator<Item = usize>) -> String {
    let names: Vec<_> = numbers.map(|number| format!("/data/{number:04}")).collect();
    format!("cat {} | busybox sha256sum", names.join(" "))
}

/// Pulls and runs; what the container has printed, and what has come to the node.
fn start(site: &Site, index: usize, data: &Data, reference: &str, command: &str) -> Result<(String, u64)> {
    let node = site.node(index);
    let before = node.host.traffic()?;
    site.pull(index, data, reference)?;
    let words = ["sh", "-c", command];
    let id = format!("start-{index}");
    let ran = node.containerd.ctr_run_command(reference, DARTER, &id, &words).output()?;
    ensure!(ran.success() && !ran.stdout.is_empty(), "{}", ran.said());
    Ok((ran.stdout, (node.host.traffic()? - before).received))
}

/// How many pieces a container had to wait for, because they were not on the node.
fn waits(node: &Node, reference: &str) -> Result<usize> {
    Ok(trace(node, reference)?.iter().filter(|read| !read.local).count())
}

/// Waits until the seed knows what a start has read of the data.
fn seed_knows(site: &Site, data: &Data) -> Result<()> {
    let maps = site.cluster.seed.folder().join("root/store/maps");
    let layer = &data.image.layers.last().context("an image has layers")?.diff_id;
    let name = layer.trim_start_matches("sha256:").to_owned();
    eventually("the seed knows what the start read", 30, || {
        Ok(files(&maps, &[".start"])?.iter().any(|file| file.to_string_lossy().contains(&name)))
    })
}

/// The node's daemon started again, without fetching in the order of earlier starts.
fn without_prefetch(node: &mut Node) -> Result<()> {
    node.snapshotter.stop(30)?;
    node.snapshotter.set("prefetch", "false")?;
    start_again(node)
}

fn the_second_node_fetches_what_the_first_read() -> Result<()> {
    let mut site = site(3)?;
    without_prefetch(&mut site.cluster.nodes[2])?;
    let data = Data::new(&site.blobs, 61, FILES, FILE_LEN)?;
    let reference = site.add(&data, "starts/second");
    let command = cat((0..FILES).step_by(3));
    let (first, _) = start(&site, 0, &data, &reference, &command)?;
    seed_knows(&site, &data)?;
    let (second, moved) = start(&site, 1, &data, &reference, &command)?;
    let (third, _) = start(&site, 2, &data, &reference, &command)?;
    ensure!(first == second && first == third, "{first} {second} {third}");
    let [first, second, third] = [0, 1, 2].map(|index| waits(site.node(index), &reference));
    let (first, second, third) = (first?, second?, third?);
    ensure!(second * 4 <= first, "{second} waits after {first}");
    ensure!(third * 2 >= first, "without prefetch there are only {third} waits, after {first}");
    let (read, all) = (FILES.div_ceil(3) * FILE_LEN, FILES * FILE_LEN);
    ensure!(moved < (read + all / 6) as u64, "{moved} bytes came, {read} were read");
    Ok(())
}

/// The record is of other files: those that are read wait hardly longer, and what comes in vain is what the record says.
fn a_changed_command_is_no_slower() -> Result<()> {
    let mut site = site(3)?;
    without_prefetch(&mut site.cluster.nodes[2])?;
    let data = Data::new(&site.blobs, 62, FILES, FILE_LEN)?;
    let reference = site.add(&data, "starts/changed");
    let (before, after) = (cat(0..FILES / 2), cat(FILES / 2..FILES));
    start(&site, 0, &data, &reference, &before)?;
    seed_knows(&site, &data)?;
    for index in [1, 2] {
        site.node(index).host.limit(100)?;
    }
    let (_, moved) = start(&site, 1, &data, &reference, &after)?;
    let (_, moved_without) = start(&site, 2, &data, &reference, &after)?;
    let waited = |index| -> Result<f64> {
        Ok(trace(site.node(index), &reference)?.iter().map(|read: &Read| read.waited_ms).sum())
    };
    let (with, without) = (waited(1)?, waited(2)?);
    ensure!(with < 1.5 * without + 200.0, "{with:.0} ms were waited, {without:.0} ms without prefetch");
    let recorded = (FILES / 2 * FILE_LEN) as u64;
    ensure!(moved < moved_without + recorded * 5 / 4, "{moved} bytes, {moved_without} without prefetch");
    Ok(())
}

/// A node that reads more of a large layer than this start is taken for a scanner, and says nothing.
fn an_order_of_everything_moves_a_bounded_share() -> Result<()> {
    const BOUND: u64 = 64 << 20;
    let nearly_all = || cat((15..100).rev());
    let site = site(2)?;
    let data = Data::new(&site.blobs, 63, 100, 1_000_000)?;
    let reference = site.add(&data, "starts/everything");
    let (read, _) = start(&site, 0, &data, &reference, &nearly_all())?;
    seed_knows(&site, &data)?;
    let node = site.node(1);
    let before = node.host.traffic()?;
    let came = || -> Result<u64> { Ok((node.host.traffic()? - before).received) };
    site.pull(1, &data, &reference)?;
    eventually("what is allowed has come", 60, || Ok(came()? >= BOUND))?;
    let mut last = 0;
    eventually("nothing more comes", 30, || {
        let now = came()?;
        let is_quiet = now - last < 100_000;
        last = now;
        Ok(is_quiet)
    })?;
    ensure!(came()? < BOUND + BOUND / 16, "{} bytes came", came()?);
    let (told, _) = start(&site, 1, &data, &reference, &nearly_all())?;
    ensure!(told == read, "other bytes");
    Ok(())
}

fn starts_are_remembered_over_restarts() -> Result<()> {
    let mut site = site(2)?;
    let data = Data::new(&site.blobs, 64, FILES, FILE_LEN)?;
    let reference = site.add(&data, "starts/restarts");
    let command = cat((0..FILES).step_by(3));
    start(&site, 0, &data, &reference, &command)?;
    seed_knows(&site, &data)?;
    let first = waits(site.node(0), &reference)?;
    site.cluster.seed.stop(30)?;
    site.cluster.nodes[0].snapshotter.stop(30)?;
    site.cluster.start_seed()?;
    start_again(&mut site.cluster.nodes[0])?;
    start(&site, 1, &data, &reference, &command)?;
    let second = waits(site.node(1), &reference)?;
    ensure!(second * 4 <= first, "{second} waits after {first}");
    Ok(())
}

fn trace_tells_what_a_start_read() -> Result<()> {
    let site = site(1)?;
    let data = Data::new(&site.blobs, 65, FILES, FILE_LEN)?;
    let reference = site.add(&data, "starts/trace");
    start(&site, 0, &data, &reference, &cat([7, 3, 5].into_iter()))?;
    let reads = trace(site.node(0), &reference)?;
    let of_data: Vec<_> = reads.iter().filter(|read| read.path.starts_with("/data/")).collect();
    let mut paths: Vec<_> = of_data.iter().map(|read| read.path.as_str()).collect();
    paths.dedup();
    ensure!(paths == ["/data/0007", "/data/0003", "/data/0005"], "{paths:?}");
    ensure!(of_data.iter().all(|read| read.from == "seed"), "not all is from the seed");
    ensure!(of_data.iter().any(|read| !read.local && read.waited_ms > 0.0), "nothing was waited for");
    let told = site.node(0).darter("trace").arg(&reference).check()?;
    ensure!(told.contains("/data/0003") && told.contains("waited for"), "{told}");
    Ok(())
}
