//! Orders for nodes: an image is on them before anybody asks, and needs nobody any more.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use darter_integration::command::eventually;
use darter_integration::darter::program;
use darter_integration::registry::{PASSWORD, USER};
use darter_integration::stub::Fault;
use serde_json::Value;

use crate::disk::status;
use crate::once::order;
use crate::site::{Data, Site, found_again};

pub const STORIES: crate::Stories = &[
    ("a_preheated_node_needs_nobody_to_run_an_image", 240, needs_nobody),
    ("a_cancelled_preheat_of_nodes_ends_at_once", 180, cancelled),
    ("a_node_that_dies_during_a_preheat_is_named", 300, a_node_that_dies),
    ("top_shows_what_comes_to_a_node", 120, top_shows),
];

const FILES: usize = 12;
const FILE_LEN: usize = 300_000;
/// Of a node's link where an order is to take some time: the image has 3.6 MB that don't compress.
const SLOW_MBIT: u32 = 1;

/// With seed, scheduler, manager and every other node gone, and a registry that gives no layer.
fn needs_nobody() -> Result<()> {
    let mut site = Site::with_nodes(2)?;
    let data = Data::new(&site.blobs, 1, FILES, FILE_LEN)?;
    let reference = site.add(&data, "orders/whole");
    let said = order(&site, &[&reference, "--nodes", "node-1", "--wait"]).check()?;
    for at in ["seed", "node-1"] {
        ensure!(said.contains(&format!("{reference} at {at}: 3 layers ready")), "{said}");
    }
    let reads =
        || data.image.layers.iter().map(|layer| site.stub.reads_of(&layer.blob.digest)).sum::<usize>();
    ensure!(reads() == data.image.layers.len(), "the layers were read {} times", reads());
    site.cluster.seed.kill();
    site.cluster.scheduler.kill();
    site.cluster.manager.kill();
    site.cluster.nodes[1].snapshotter.stop(30)?;
    for layer in &data.image.layers {
        site.stub.fault(&layer.blob.digest, Fault::ReadStatus(503));
    }
    site.pull(0, &data, &reference)?;
    site.check(0, &data, &reference, "alone")?;
    let layers = status(site.node(0))?["layers"].as_array().context("a list of layers")?.clone();
    ensure!(layers.len() == data.image.layers.len(), "{layers:?}");
    for layer in layers {
        let none = layer["from"].as_object().is_some_and(serde_json::Map::is_empty);
        ensure!(none && layer["have"] == layer["pieces"], "{layer}");
    }
    ensure!(site.stub.reads_of(data.top_blob()) == 1, "the registry was asked for a layer");
    Ok(())
}

fn rest(site: &Site, id: &str) -> Result<Value> {
    site.cluster.rest("GET", &format!("/api/v1/preheats/{id}"), "")
}

/// What is told of a node's part.
fn target(preheat: &Value, node: &str) -> Result<Value> {
    let targets = preheat["targets"].as_array().context("targets")?;
    let target = targets.iter().find(|target| target["node"] == node);
    target.cloned().with_context(|| format!("no {node} in {preheat}"))
}

fn words(target: &Value) -> String {
    target["error"].as_str().unwrap_or_default().to_owned()
}

/// Orders the image for these nodes; returns when this one has some of it and not all.
fn under_way(site: &Site, reference: &str, nodes: &str, node: &str) -> Result<String> {
    let id = order(site, &[reference, "--nodes", nodes]).check()?.trim().to_owned();
    eventually("pieces come to the node", 60, || {
        let target = target(&rest(site, &id)?, node)?;
        let read: u64 = target["layers"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|layer| layer["read"].as_u64())
            .sum();
        ensure!(target["state"] != "failed" && target["state"] != "succeeded", "{target}");
        Ok(target["state"] == "running" && read > 0)
    })?;
    Ok(id)
}

fn cancelled() -> Result<()> {
    let site = Site::with_nodes(2)?;
    let data = Data::new(&site.blobs, 2, FILES, FILE_LEN)?;
    let reference = site.add(&data, "orders/cancelled");
    let host = site.node(0).host.clone();
    host.limit(SLOW_MBIT)?;
    let id = under_way(&site, &reference, "all", "node-1")?;
    let said = order(&site, &["--cancel", &id]).check()?;
    let cancelled = target(&rest(&site, &id)?, "node-1")?;
    ensure!(said.contains("cancelled") && cancelled["state"] == "cancelled", "{said}: {cancelled}");
    // The node is told, and lets go of the layers; what is in the link's queue still comes.
    eventually("the node lets go of the layers", 10, || {
        Ok(status(site.node(0))?["layers"].as_array().is_some_and(Vec::is_empty))
    })?;
    let received = || Ok::<_, anyhow::Error>(host.traffic()?.received);
    eventually("nothing comes any more", 20, || {
        let before = received()?;
        thread::sleep(Duration::from_secs(2));
        Ok(received()? - before < 20_000)
    })?;
    // A share, with a time-out that is too short.
    let late = order(&site, &[&reference, "--nodes", "100%", "--wait", "--timeout", "1s"]).output()?;
    ensure!(!late.success() && late.said().contains("not done within 1 s"), "{}", late.said());
    host.unlimit()?;
    let said = order(&site, &[&reference, "--nodes", "2", "--wait"]).check()?;
    ensure!(said.matches(": 3 layers ready").count() == 3, "{said}");
    Ok(())
}

fn a_node_that_dies() -> Result<()> {
    let mut site = Site::with_nodes(2)?;
    let first = Data::new(&site.blobs, 3, FILES, FILE_LEN)?;
    let second = Data::new(&site.blobs, 4, FILES, FILE_LEN)?;
    let names = [site.add(&first, "orders/first"), site.add(&second, "orders/second")];
    site.node(1).host.limit(SLOW_MBIT)?;

    // One that comes back goes on where it was.
    let id = under_way(&site, &names[0], "node-1,node-2", "node-2")?;
    site.cluster.nodes[1].snapshotter.kill();
    let is_missed =
        || Ok(words(&target(&rest(&site, &id)?, "node-2")?).contains("left while it had the order"));
    eventually("the order says that the node left", 30, is_missed)?;
    site.node(1).host.unlimit()?;
    site.cluster.nodes[1].start_snapshotter()?;
    found_again(site.node(1))?;
    eventually("the order is done", 60, || Ok(rest(&site, &id)?["state"] == "succeeded"))?;
    ensure!(target(&rest(&site, &id)?, "node-2")?["error"].is_null(), "{}", rest(&site, &id)?);

    // One that doesn't fails its part, and no other.
    site.node(1).host.limit(SLOW_MBIT)?;
    let id = under_way(&site, &names[1], "node-1,node-2", "node-2")?;
    site.cluster.nodes[1].snapshotter.kill();
    eventually("the order is over", 120, || Ok(rest(&site, &id)?["state"] == "failed"))?;
    let over = rest(&site, &id)?;
    let (well, gone) = (target(&over, "node-1")?, target(&over, "node-2")?);
    ensure!(well["state"] == "succeeded" && gone["state"] == "failed", "{over}");
    ensure!(words(&gone).contains("did not come back within 60 s"), "{over}");
    let said = order(&site, &[&names[1], "--nodes", "all", "--wait"]).output()?;
    ensure!(said.success() && said.stderr.contains("away, and not preheated: node-2"), "{}", said.said());
    site.node(1).host.unlimit()?;
    site.cluster.nodes[1].start_snapshotter()
}

fn top_shows() -> Result<()> {
    let site = Site::with_nodes(1)?;
    let data = Data::new(&site.blobs, 5, FILES, FILE_LEN)?;
    let reference = site.registry.reference("orders/top");
    site.registry.push(&site.blobs, &data.image, "orders/top")?;
    let node = site.node(0);
    let once = || node.darter("top").arg("--once").check();
    ensure!(once()?.contains("0 layers, 0 complete; nothing is arriving"), "{}", once()?);
    // What an order brings is shown while it comes.
    node.host.limit(SLOW_MBIT)?;
    let user = format!("{USER}:{PASSWORD}");
    let id = order(&site, &[&reference, "--user", &user, "--nodes", "all"]).check()?.trim().to_owned();
    eventually("a rate is shown", 60, || {
        let shown = once()?;
        let parent = shown.lines().find(|line| line.starts_with("seed"));
        Ok(parent.is_some_and(|line| line.contains("MB/s")) && shown.contains("PIECES"))
    })?;
    // On a terminal, until q is pressed: another page, and the first one again.
    let root = node.snapshotter.folder().join("root");
    let command = format!("{} top --root {}", program("darter").display(), root.display());
    let typed =
        node.host.run("bash").args(["-c", "(sleep 3; printf q) | timeout 60 script -qefc \"$0\" /dev/null"]);
    let shown = typed.arg(&command).check()?;
    ensure!(shown.starts_with("\u{1b}[?1049h") && shown.contains("PARENT"), "{shown:?}");
    ensure!(shown.trim_end().ends_with("\u{1b}[?1049l"), "the terminal is not as before: {shown:?}");
    order(&site, &["--cancel", &id]).check().map(drop)
}
