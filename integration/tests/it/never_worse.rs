//! Never worse: whatever stands in Darter's way, pull and run end as they do with overlayfs, and in the same words.

use std::fs;

use anyhow::{Context, Result, bail, ensure};
use darter_integration::cluster::{self, Cluster};
use darter_integration::command::{Finished, Run, tail};
use darter_integration::containerd::{Containerd, DARTER, GENERATIONS, Generation, OVERLAYFS};
use darter_integration::darter::{self, Standalone};
use darter_integration::image::{Blobs, Image, Packing};
use darter_integration::registry::{PASSWORD, Registry, USER};
use darter_integration::tar::{Data, Entry, Writer};
use darter_integration::tree;
use darter_integration::world::World;

use crate::clients::why_is;
use crate::harness::busybox;
use crate::trees::Node;

pub const STORIES: crate::Stories = &[
    ("a_wrong_password_is_refused_in_the_same_words", 120, a_wrong_password_is_refused_in_the_same_words),
    ("without_credentials_darter_leaves_it_to_containerd", 180, without_credentials_it_is_left_to_containerd),
    ("a_registry_out_of_reach_ends_as_with_overlayfs", 180, a_registry_out_of_reach_ends_as_with_overlayfs),
    ("an_unknown_port_leaves_it_to_containerd", 240, an_unknown_port_leaves_it_to_containerd),
    ("without_seed_and_scheduler_an_image_runs", 180, without_seed_and_scheduler_an_image_runs),
    ("a_seed_without_a_route_stops_nobody", 240, a_seed_without_a_route_stops_nobody),
    ("an_imported_image_runs", 180, an_imported_image_runs),
    ("plain_layers_lie_on_lazy_ones", 180, plain_layers_lie_on_lazy_ones),
    ("lazy_layers_lie_on_plain_ones", 180, lazy_layers_lie_on_plain_ones),
];

/// How a pull and the run after it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    Printed(String),
    /// What was said last by whichever of the two failed.
    Refused(String),
}

impl End {
    /// The words of a refusal; an error if there was none.
    pub fn words(&self) -> Result<&str> {
        match self {
            End::Refused(words) => Ok(words),
            End::Printed(line) => bail!("it was not refused, it printed {line:?}"),
        }
    }
}

/// Pulls, and runs the image's own command.
pub fn end(containerd: &Containerd, pull: Run, reference: &str, snapshotter: &str) -> Result<End> {
    let pulled = pull.output()?;
    if !pulled.success() {
        return Ok(End::Refused(last_words(&pulled)));
    }
    let ran = containerd.ctr_run(reference, snapshotter, &format!("end-{snapshotter}")).output()?;
    Ok(if ran.success() { End::Printed(ran.stdout) } else { End::Refused(last_words(&ran)) })
}

pub fn last_words(finished: &Finished) -> String {
    tail(finished.stderr.trim(), 1)
}

/// The pull by which this generation is lazy.
pub fn lazy_pull(containerd: &Containerd, reference: &str) -> Run {
    match containerd.generation() {
        Generation::One | Generation::OneSeven => darter::pull(containerd, reference),
        Generation::TwoZero | Generation::Two => containerd.ctr_pull(reference, DARTER),
    }
}

/// Pull and run end alike, with the line that the image prints.
pub fn both_print(containerd: &Containerd, reference: &str) -> Result<()> {
    let ours = end(containerd, lazy_pull(containerd, reference), reference, DARTER)?;
    let plain = end(containerd, containerd.ctr_pull(reference, OVERLAYFS), reference, OVERLAYFS)?;
    ensure!(ours == plain, "with Darter: {ours:?}; with overlayfs: {plain:?}");
    ensure!(matches!(plain, End::Printed(_)), "{plain:?}");
    Ok(())
}

const LINE: &str = "hello from a layer\n";

/// What the node's Darter is told of the registry.
#[derive(Clone, Copy)]
struct Told<'a> {
    /// As whom it reads; `None`: as nobody.
    user: Option<&'a str>,
    /// By a hosts.toml: where the registry listens, and that it speaks http.
    place: bool,
}

fn node(generation: Generation, told: Told<'_>) -> Result<Node> {
    let world = World::new()?;
    let registry = Registry::start(&world, "registry")?;
    let blobs = Blobs::open(world.folder("blobs")?)?;
    let host = world.host("node")?;
    let socket = darter::snapshotter_socket(&world, &host)?;
    let containerd = Containerd::start(&world, &host, generation, Some(&socket))?;
    if told.place {
        containerd.plain_http(&registry.authority())?;
    }
    if let Some(user) = told.user {
        darter::docker_config_as(&world.folder("node/darter/docker")?, &registry.authority(), user)?;
    }
    let standalone = Standalone::start(&world, &containerd)?;
    Ok(Node { containerd, standalone, blobs, registry, world })
}

fn stocked(node: &Node) -> Result<(Image, String)> {
    let image = busybox(&node.blobs, &["cat", "/etc/motd"])?;
    node.registry.push(&node.blobs, &image, "t/busybox")?;
    Ok((image, node.registry.reference("t/busybox")))
}

/// Whether containerd itself fetched every layer of the image.
fn all_plain(node: &Node, image: &Image, reference: &str, reason: &str) -> Result<()> {
    let blobs = node.containerd.layer_blobs(image)?.len();
    ensure!(blobs == image.layers.len(), "only {blobs} layers were left to containerd");
    let why = node.standalone.command(&["why", reference]).check()?;
    ensure!(why.contains(reason), "no word of {reason:?}:\n{why}");
    Ok(())
}

fn a_wrong_password_is_refused_in_the_same_words() -> Result<()> {
    for generation in GENERATIONS {
        let node = Node::new(generation)?;
        let (_, reference) = stocked(&node)?;
        let pull = |snapshotter: &str| {
            let pull = node.containerd.ctr_pull_as("reader:wrong", &reference, snapshotter);
            end(&node.containerd, pull, &reference, snapshotter)
        };
        let (ours, plain) = (pull(DARTER)?, pull(OVERLAYFS)?);
        ensure!(ours == plain, "with Darter: {ours:?}; with overlayfs: {plain:?}");
        ensure!(plain.words()?.contains("401 Unauthorized"), "{plain:?}");
        let ours = darter::pull_as(&node.containerd, "reader:wrong", &reference).output()?;
        ensure!(!ours.success() && last_words(&ours).contains("authorization failed"), "{}", ours.said());
    }
    Ok(())
}

/// The client has the password and keeps it, the daemon has none or another one.
fn without_credentials_it_is_left_to_containerd() -> Result<()> {
    for user in [None, Some("reader:wrong")] {
        let node = node(Generation::Two, Told { user, place: true })?;
        let (image, reference) = stocked(&node)?;
        let ours = end(&node.containerd, lazy_pull(&node.containerd, &reference), &reference, DARTER)?;
        ensure!(ours == End::Printed(LINE.into()), "as {user:?}: {ours:?}");
        all_plain(&node, &image, &reference, "authorization failed")?;
        let why = node.standalone.command(&["why", &reference]).check()?;
        let reasons = ["authorization failed", "below it is plain"];
        why_is(&why, &image.layers[0], "plain", &reasons[..1])?;
        image.layers[1..].iter().try_for_each(|layer| why_is(&why, layer, "plain", &reasons))?;
        both_print(&node.containerd, &reference)?;
    }
    Ok(())
}

fn a_registry_out_of_reach_ends_as_with_overlayfs() -> Result<()> {
    for generation in GENERATIONS {
        let node = Node::new(generation)?;
        let (_, reference) = stocked(&node)?;
        node.registry.host().connected(false)?;
        let pull = |snapshotter: &str| {
            end(&node.containerd, node.containerd.ctr_pull(&reference, snapshotter), &reference, snapshotter)
        };
        let (ours, plain) = (pull(DARTER)?, pull(OVERLAYFS)?);
        ensure!(ours == plain, "with Darter: {ours:?}; with overlayfs: {plain:?}");
        ensure!(plain.words()?.contains("dial tcp"), "{plain:?}");
        node.registry.host().connected(true)?;
        both_print(&node.containerd, &reference)?;
    }
    Ok(())
}

/// containerd's label names the registry without its port, and no hosts.toml tells it: Darter asks at the usual port,
/// where nobody answers, not even by a refusal. What is not decided in time is lazy, but only once.
fn an_unknown_port_leaves_it_to_containerd() -> Result<()> {
    for silent in [false, true] {
        let told = Told { user: Some(&format!("{USER}:{PASSWORD}")), place: false };
        let node = node(Generation::Two, told)?;
        let (image, reference) = stocked(&node)?;
        let drop = ["-w", "-A", "OUTPUT", "-p", "tcp", "-m", "multiport", "--dports", "80,443", "-j", "DROP"];
        if silent {
            node.containerd.host().run("iptables").args(drop).check()?;
        }
        let pull = node.containerd.ctr_pull(&reference, DARTER);
        let ours = end(&node.containerd, pull, &reference, DARTER)?;
        ensure!(ours == End::Printed(LINE.into()), "silent: {silent}: {ours:?}");
        all_plain(&node, &image, &reference, "failed to do request")?;
    }
    Ok(())
}

fn without_seed_and_scheduler_an_image_runs() -> Result<()> {
    let world = World::new()?;
    let registry = Registry::start(&world, "registry")?;
    let blobs = Blobs::open(world.folder("blobs")?)?;
    let image = busybox(&blobs, &["cat", "/etc/motd"])?;
    registry.push(&blobs, &image, "t/busybox")?;
    let options = cluster::Options { nodes: 1, generation: Generation::One, ..Default::default() };
    let mut cluster = Cluster::start(&world, &registry, options)?;
    cluster.seed.kill();
    cluster.scheduler.kill();
    both_print(&cluster.nodes[0].containerd, &registry.reference("t/busybox"))?;
    let other = blobs.image(&image.layers[..1], &["echo", "and without a manager"])?;
    registry.push(&blobs, &other, "t/other")?;
    cluster.manager.kill();
    both_print(&cluster.nodes[0].containerd, &registry.reference("t/other"))
}

/// The seed's way to the registry leads nowhere; the node has one.
fn a_seed_without_a_route_stops_nobody() -> Result<()> {
    for how in ["REJECT", "DROP"] {
        let world = World::new()?;
        let registry = Registry::start(&world, "registry")?;
        let blobs = Blobs::open(world.folder("blobs")?)?;
        let image = busybox(&blobs, &["cat", "/etc/motd"])?;
        registry.push(&blobs, &image, "t/busybox")?;
        let options = cluster::Options { nodes: 1, ..Default::default() };
        let cluster = Cluster::start(&world, &registry, options)?;
        let address = registry.host().address().to_string();
        let words = ["-w", "-A", "OUTPUT", "-d", &address, "-j", how];
        cluster.seed.host().run("iptables").args(words).check()?;
        both_print(&cluster.nodes[0].containerd, &registry.reference("t/busybox")).context(how)?;
    }
    Ok(())
}

/// An archive in OCI's layout, as `ctr images import` takes it.
fn archive(world: &World, blobs: &Blobs, image: &Image, name: &str) -> Result<std::path::PathBuf> {
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [{
        "mediaType": image.manifest.media_type, "digest": image.manifest.digest, "size": image.manifest.size,
        "annotations": {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": "latest"},
    }]});
    let path = world.folder("archives")?.join("image.tar");
    let mut writer = Writer::new(fs::File::create(&path)?);
    writer.entry(&Entry::file("oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#))?;
    writer.entry(&Entry::file("index.json", index.to_string()))?;
    let layers = image.layers.iter().map(|layer| &layer.blob);
    for blob in [&image.manifest, &image.config].into_iter().chain(layers) {
        let name = blob.digest.replace(':', "/");
        let data = Data::File(blobs.path(&blob.digest), blob.size);
        writer.entry(&Entry::new(b'0', format!("blobs/{name}")).data(data))?;
    }
    writer.finish()?;
    Ok(path)
}

fn an_imported_image_runs() -> Result<()> {
    for generation in GENERATIONS {
        let node = Node::new(generation)?;
        let image = busybox(&node.blobs, &["cat", "/etc/motd"])?;
        let reference = "nowhere.example/t/busybox:latest";
        let archive = archive(&node.world, &node.blobs, &image, reference)?;
        let import = |snapshotter: &str| {
            let words = ["images", "import", "--snapshotter", snapshotter];
            let import = node.containerd.ctr().args(words).arg(archive.display());
            end(&node.containerd, import, reference, snapshotter)
        };
        let (ours, plain) = (import(DARTER)?, import(OVERLAYFS)?);
        ensure!(ours == plain, "{generation:?}: with Darter: {ours:?}; with overlayfs: {plain:?}");
        ensure!(plain == End::Printed(LINE.into()), "{plain:?}");
    }
    Ok(())
}

/// What a layer committed on top says, level by level.
const CHANGES: [&str; 2] = [
    "echo changed > etc/motd; rm bin/dd; mkdir -p new/deep; echo new > new/deep/file; ln bin/busybox bin/linked; chmod 4755 bin/busybox",
    "rm etc/motd; rm -rf new; mkdir new; echo again > new/file; rm bin/linked; chmod 700 tmp",
];

/// Commits two layers upon the image by hand, as a builder does; returns the name of the topmost.
fn commit_changes(containerd: &Containerd, snapshotter: &str, image: &Image) -> Result<String> {
    let mut parent = image.top_chain_id();
    for (level, script) in CHANGES.iter().enumerate() {
        let (key, name) = (format!("work-{snapshotter}-{level}"), format!("committed-{snapshotter}-{level}"));
        let work = containerd.mount_snapshot(snapshotter, &parent, &key, true)?;
        Run::new("sh").args(["-ec", script]).dir(work.path()).check()?;
        commit(containerd, snapshotter, &key, &name)?;
        parent = name;
    }
    Ok(parent)
}

/// What is mounted stays so until its guard goes, whose removal then finds nothing to remove.
fn commit(containerd: &Containerd, snapshotter: &str, key: &str, name: &str) -> Result<()> {
    Run::new("sync").check()?;
    let words = ["snapshots", "--snapshotter", snapshotter, "commit", name, key];
    containerd.ctr().args(words).check().map(drop)
}

/// The names in what `ctr snapshots diff` gives for a snapshot; a builder makes its layer of that.
fn diff(containerd: &Containerd, snapshotter: &str, key: &str) -> Result<Vec<String>> {
    let words = ["snapshots", "--snapshotter", snapshotter, "diff"];
    let media = ["--media-type", "application/vnd.oci.image.layer.v1.tar", key];
    let tar = containerd.ctr().args(words).args(media).check()?;
    let mut names = Vec::new();
    let mut rest = tar.as_bytes();
    while rest.len() >= 512 && rest[0] != 0 {
        let text = |range: std::ops::Range<usize>| {
            let field = rest[range].split(|byte| *byte == 0).next().unwrap_or_default();
            String::from_utf8_lossy(field).trim().to_owned()
        };
        let size = usize::from_str_radix(&text(124..136), 8).context("the size of an entry")?;
        if rest[156] != b'x' {
            names.push(format!("{} {} {}", rest[156] as char, text(100..108), text(0..100)));
        }
        rest = rest.get(512 + size.next_multiple_of(512)..).unwrap_or_default();
    }
    names.sort();
    ensure!(!names.is_empty(), "an empty difference");
    Ok(names)
}

fn plain_layers_lie_on_lazy_ones() -> Result<()> {
    for generation in GENERATIONS {
        let since = std::time::SystemTime::now();
        let node = Node::new(generation)?;
        let image = busybox(&node.blobs, &["cat", "/etc/motd"])?;
        node.pull_both_ways(&image, "t/busybox")?;
        let containerd = &node.containerd;
        let top = |snapshotter: &str| commit_changes(containerd, snapshotter, &image);
        let (ours, plain) = (top(DARTER)?, top(OVERLAYFS)?);
        for writable in [false, true] {
            let ours = containerd.mount_snapshot(DARTER, &ours, "ours", writable)?;
            let plain = containerd.mount_snapshot(OVERLAYFS, &plain, "plain", writable)?;
            let (found, wanted) = (tree::walk(ours.path())?, tree::walk(plain.path())?);
            ensure!(
                wanted["new/file"].size == 6 && !wanted.contains_key("etc/motd"),
                "the changes were made"
            );
            tree::compare(&wanted, &found, since)?;
        }
        let rootfs = containerd.mount_snapshot(DARTER, &ours, "rootfs", true)?;
        let run = ["run", "--rm", "--net-host", "--rootfs"];
        let ran =
            containerd.ctr().args(run).arg(rootfs.path().display()).args(["above", "/bin/cat", "/new/file"]);
        ensure!(ran.check()? == "again\n");
        let (found, wanted) = (diff(containerd, DARTER, &ours)?, diff(containerd, OVERLAYFS, &plain)?);
        ensure!(found == wanted, "the topmost layer is\n{found:#?}\nnot\n{wanted:#?}");
    }
    Ok(())
}

fn lazy_layers_lie_on_plain_ones() -> Result<()> {
    for generation in GENERATIONS {
        let since = std::time::SystemTime::now();
        let node = Node::new(generation)?;
        let (base, reference) = stocked(&node)?;
        // What the client pulls itself it unpacks without asking whether that is needed.
        let mut pull = node.containerd.ctr_pull(&reference, DARTER);
        if generation == Generation::Two {
            pull = pull.arg("--local");
        }
        pull.check()?;
        let blobs = node.containerd.layer_blobs(&base)?.len();
        ensure!(blobs == base.layers.len(), "{generation:?}: {blobs} layers of the base are plain");
        let more = [
            Entry::dir("etc").mode(0o750),
            Entry::file("etc/motd", "hello from above\n"),
            Entry::whiteout("bin/dd"),
            Entry::hard_link("etc/linked", "etc/motd"),
        ];
        let mut layers = base.layers.clone();
        layers.push(node.blobs.layer(Packing::Gzip, &more)?);
        let image = node.blobs.image(&layers, &["cat", "/etc/linked"])?;
        node.registry.push(&node.blobs, &image, "t/more")?;
        let reference = node.registry.reference("t/more");
        let ours = end(&node.containerd, lazy_pull(&node.containerd, &reference), &reference, DARTER)?;
        ensure!(node.containerd.layer_blobs(&image)?.len() == blobs, "{generation:?}: nothing was lazy");
        let plain =
            end(&node.containerd, node.containerd.ctr_pull(&reference, OVERLAYFS), &reference, OVERLAYFS)?;
        ensure!(ours == plain, "{generation:?}: with Darter: {ours:?}; with overlayfs: {plain:?}");
        ensure!(plain == End::Printed("hello from above\n".into()), "{plain:?}");
        let ours = node.containerd.mount_snapshot(DARTER, &image.top_chain_id(), "ours", true)?;
        let plain = node.containerd.mount_snapshot(OVERLAYFS, &image.top_chain_id(), "plain", true)?;
        tree::compare(&tree::walk(plain.path())?, &tree::walk(ours.path())?, since)?;
    }
    Ok(())
}
