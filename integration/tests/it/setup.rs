//! Setting containerd up for Darter, and the way back.

use std::fs;
use std::path::Path;

use anyhow::{Error, Result, ensure};
use darter_integration::command::{Run, eventually};
use darter_integration::containerd::{ALL_GENERATIONS, Containerd, DARTER, Generation, OVERLAYFS};
use darter_integration::darter::{self, Standalone};
use darter_integration::image::{Blobs, Image};
use darter_integration::registry::{PASSWORD, Registry, USER};
use darter_integration::world::World;

use crate::harness::busybox;
use crate::trees::Node;

pub const STORIES: crate::Stories = &[
    (
        "setup_changes_containerds_configuration_and_back",
        180,
        setup_changes_containerds_configuration_and_back,
    ),
    ("a_hydrated_image_can_be_exported", 180, a_hydrated_image_can_be_exported),
    ("a_drained_node_does_without_darter", 180, a_drained_node_does_without_darter),
];

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const LINE: &str = "hello from a layer\n";
/// The containerd namespace of what comes by CRI.
const CRI: &str = "k8s.io";

fn setup_changes_containerds_configuration_and_back() -> Result<()> {
    for generation in ALL_GENERATIONS {
        let world = World::new()?;
        let registry = Registry::start(&world, "registry")?;
        let blobs = Blobs::open(world.folder("blobs")?)?;
        let image = busybox(&blobs, &["cat", "/etc/motd"])?;
        registry.push(&blobs, &image, "t/busybox")?;
        let host = world.host("node")?;
        let mut containerd = Containerd::start(&world, &host, generation, None)?;
        containerd.plain_http(&registry.authority())?;
        darter::docker_config(&world.folder("node/darter/docker")?, &registry.authority())?;
        let standalone = Standalone::start(&world, &containerd)?;
        let config = containerd.config();
        let before = fs::read_to_string(&config)?;
        let setup = |flag: &[&str]| {
            let socket = darter::snapshotter_socket(&world, &host).expect("the node has one");
            standalone
                .command(&["setup", "containerd"])
                .args(flag)
                .arg("--config")
                .arg(config.display())
                .arg("--containerd-address")
                .arg(containerd.socket().display())
                .arg("--address")
                .arg(socket.display())
                .check()
        };
        let shown = setup(&[])?;
        ensure!(shown.contains("+[proxy_plugins.darter]"), "no change is shown:\n{shown}");
        ensure!(fs::read_to_string(&config)? == before, "showing the change made it");
        setup(&["--apply"])?;
        let again = setup(&["--apply"])?;
        ensure!(again.contains("has all that Darter needs"), "{again}");
        containerd.restart()?;
        let reference = registry.reference("t/busybox");
        pulls_lazily(&containerd, &image, &reference)?;
        if generation != Generation::One {
            // What kubelet takes for the disk of its images. 1.6 hears of no exports.
            let told = containerd.ctr().args(["plugins", "ls", "-d", &format!("id=={DARTER}")]).check()?;
            let root = standalone.root().display().to_string();
            ensure!(told.contains(&root), "{generation:?} doesn't know Darter's root:\n{told}");
        }
        prints(&containerd, &reference, DARTER, "lazy")?;
        containerd.crictl().args(["rmi", &reference]).check()?;
        containerd.remove_image(&reference)?;
        let undone = standalone.command(&["setup", "containerd", "--undo"]);
        undone
            .arg("--config")
            .arg(config.display())
            .arg("--containerd-address")
            .arg(containerd.socket().display())
            .check()?;
        ensure!(fs::read_to_string(&config)? == before, "--undo left something");
        containerd.restart()?;
        containerd.ctr_pull(&reference, OVERLAYFS).check()?;
        prints(&containerd, &reference, OVERLAYFS, "plain")?;
    }
    Ok(())
}

/// By each client that the configuration has switched: kubelet's way in, and from 2.0 on ctr's.
fn pulls_lazily(containerd: &Containerd, image: &Image, reference: &str) -> Result<()> {
    let generation = containerd.generation();
    // After a start it is the last to answer.
    let images = || Ok(containerd.crictl().args(["images", "-q"]).output()?.success());
    eventually("CRI answers", 20, images)?;
    containerd.crictl().args(["pull", "--creds", &format!("{USER}:{PASSWORD}"), reference]).check()?;
    let blobs = containerd.layer_blobs_in(CRI, image)?;
    ensure!(blobs.is_empty(), "{generation:?}: crictl's pull was not lazy");
    match generation {
        // Its ctr unpacks by itself, without asking for what is there.
        Generation::One | Generation::OneSeven => darter::pull(containerd, reference).check()?,
        Generation::TwoZero | Generation::Two => containerd.ctr_pull(reference, DARTER).check()?,
    };
    ensure!(containerd.layer_blobs(image)?.is_empty(), "{generation:?}: the pull was not lazy");
    Ok(())
}

fn prints(containerd: &Containerd, reference: &str, snapshotter: &str, id: &str) -> Result<()> {
    let ran = containerd.ctr_run(reference, snapshotter, id).output()?;
    ensure!(ran.stdout == LINE, "{}", ran.said());
    Ok(())
}

fn pulled(node: &Node, name: &str) -> Result<(Image, String)> {
    let image = busybox(&node.blobs, &["cat", "/etc/motd"])?;
    node.registry.push(&node.blobs, &image, name)?;
    let reference = node.registry.reference(name);
    darter::pull(&node.containerd, &reference).check()?;
    ensure!(node.containerd.layer_blobs(&image)?.is_empty(), "not lazy");
    Ok((image, reference))
}

fn a_hydrated_image_can_be_exported() -> Result<()> {
    for generation in ALL_GENERATIONS {
        let mut node = Node::new(generation)?;
        let (image, reference) = pulled(&node, "t/exported")?;
        let folder = node.world.folder("export")?;
        ensure!(
            !export(&node, &reference, &folder.join("none.tar")).output()?.success(),
            "an image without its layers was exported: what is hydrating for?"
        );
        let said = hydrate(&node, &reference)?;
        ensure!(said.contains("2 brought now"), "{said}");
        ensure!(node.containerd.layer_blobs(&image)?.len() == 2, "layer blobs are missing");
        let said = hydrate(&node, &reference)?;
        ensure!(said.contains("0 brought now"), "what is there was brought again: {said}");
        let elsewhere = Registry::start(&node.world, "elsewhere")?;
        node.containerd.ctr_push(&elsewhere.reference("t/pushed"), &reference).check()?;
        elsewhere.must_have(&image, "t/pushed")?;
        // Once it has run, this node has all of it.
        node.containerd.ctr_run(&reference, DARTER, "once").check()?;
        // From here on nothing can be fetched: some clients would do so by themselves.
        node.registry.stop();
        let archive = folder.join("exported.tar");
        export(&node, &reference, &archive).check()?;
        ensure!(fs::metadata(&archive)?.len() > image.compressed_size(), "the archive has no layers");
        // nerdctl saves by the transfer service of 2.x.
        if generation == Generation::Two {
            saved_and_committed(&node, &image, &reference)?;
        }
    }
    Ok(())
}

fn export(node: &Node, reference: &str, archive: &Path) -> Run {
    node.containerd.ctr().args(["images", "export"]).arg(archive.display()).arg(reference)
}

fn hydrate(node: &Node, reference: &str) -> Result<String> {
    let words = ["hydrate", "--namespace", node.containerd.namespace(), reference];
    let socket = node.containerd.socket();
    node.standalone.command(&words).arg("--containerd-address").arg(socket.display()).check()
}

fn saved_and_committed(node: &Node, image: &Image, reference: &str) -> Result<()> {
    let nerdctl = |words: &[&str]| {
        node.containerd.nerdctl().args(["--snapshotter", DARTER, "--insecure-registry"]).args(words).check()
    };
    let change = "echo changed > /etc/motd";
    nerdctl(&["run", "--name", "changed", "--net=none", reference, "busybox", "sh", "-c", change])?;
    nerdctl(&["commit", "changed", "t/committed:1"])?;
    for (name, of) in [("saved.tar", reference), ("committed.tar", "t/committed:1")] {
        let archive = node.world.folder("export")?.join(name);
        nerdctl(&["save", "-o", &archive.display().to_string(), of])?;
        ensure!(fs::metadata(&archive)?.len() > image.compressed_size(), "{name} has no layers");
    }
    nerdctl(&["rm", "changed"]).map(drop)
}

fn a_drained_node_does_without_darter() -> Result<()> {
    for generation in ALL_GENERATIONS {
        let mut node = Node::new(generation)?;
        let (image, reference) = pulled(&node, "t/drained")?;
        let other = format!("{}-other", node.containerd.namespace());
        let in_other = pulled_into(&node, &other, "t/other", &["cat", "/etc/motd"])?;
        ensure!(node.containerd.layer_blobs_in(&other, &image)?.is_empty(), "not lazy");
        let planned = drain(&node, &["--dry-run"]).check()?;
        for reference in [&reference, &in_other] {
            ensure!(planned.contains(&format!("{reference} would be hydrated")), "{planned}");
        }
        let early = [node.containerd.layer_blobs(&image)?, node.containerd.layer_blobs_in(&other, &image)?];
        ensure!(early.iter().all(Vec::is_empty), "--dry-run has hydrated");
        let name = "sleeper";
        let run = ["run", "-d", "--net-host", "--snapshotter", DARTER, &reference, name, "sleep", "600"];
        node.containerd.ctr().args(run).check()?;
        // As for a commit: containerd compares the container's files with those of its image.
        let diff = ["snapshots", "--snapshotter", DARTER, "diff", "--media-type", LAYER, name];
        node.containerd.ctr().args(diff).check()?;
        a_container_in_use_is_named(&node, name)?;
        drain(&node, &[]).check()?;
        removed(&node, &other)?;
        node.standalone.daemon().stop(30)?;
        node.registry.stop();
        prints(&node.containerd, &reference, OVERLAYFS, "after")?;
        let run = ["run", "--rm", "--net-host", "--snapshotter", OVERLAYFS, &in_other, "after-other"];
        let ran = node.containerd.ctr_in(&other).args(run).output()?;
        ensure!(ran.stdout == LINE, "{}", ran.said());
    }
    Ok(())
}

fn pulled_into(node: &Node, namespace: &str, name: &str, command: &[&str]) -> Result<String> {
    let image = busybox(&node.blobs, command)?;
    node.registry.push(&node.blobs, &image, name)?;
    let (login, reference) = (format!("{USER}:{PASSWORD}"), node.registry.reference(name));
    darter::pull_into(&node.containerd, namespace, &login, &reference).check()?;
    Ok(reference)
}

fn drain(node: &Node, flags: &[&str]) -> Run {
    let socket = node.containerd.socket();
    node.standalone.command(&["drain"]).args(flags).arg("--containerd-address").arg(socket.display())
}

/// By a drain that fails; then it goes.
fn a_container_in_use_is_named(node: &Node, name: &str) -> Result<()> {
    let used = drain(node, &[]).output()?;
    ensure!(!used.success() && used.stderr.contains(name), "a container in use isn't named: {}", used.said());
    let ctr = |words: &[&str]| node.containerd.ctr().args(words).check();
    ctr(&["task", "kill", "-s", "KILL", name])?;
    eventually("the sleeper ends", 20, || Ok(ctr(&["task", "rm", name]).is_ok()))?;
    ctr(&["containers", "rm", name]).map(drop)
}

/// `--remove` takes the images that hold Darter, and those alone.
fn removed(node: &Node, namespace: &str) -> Result<()> {
    let reference = pulled_into(node, namespace, "t/removed", &["sleep", "1"])?;
    let ctr = |words: &[&str]| node.containerd.ctr_in(namespace).args(words).check();
    let snapshots = || {
        Ok::<_, Error>(ctr(&["snapshots", "--snapshotter", DARTER, "ls"])?.lines().count().saturating_sub(1))
    };
    ensure!(snapshots()? > 0, "the image has no snapshots of Darter's");
    let planned = drain(node, &["--remove", "--dry-run"]).check()?;
    ensure!(planned.contains(&format!("{reference} would be removed")), "{planned}");
    let before = ctr(&["images", "ls", "-q"])?;
    ensure!(before.contains(&reference) && snapshots()? > 0, "--dry-run has removed: {before}");
    drain(node, &["--remove"]).check()?;
    let after = ctr(&["images", "ls", "-q"])?;
    ensure!(!after.contains(&reference) && after.lines().count() + 1 == before.lines().count(), "{after}");
    ensure!(snapshots()? == 0, "snapshots are left");
    Ok(())
}
