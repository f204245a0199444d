//! Setting containerd up for Darter, and the way back.

use std::fs;

use anyhow::{Result, ensure};
use darter_integration::containerd::{Containerd, DARTER, GENERATIONS, OVERLAYFS};
use darter_integration::darter::{self, Standalone};
use darter_integration::image::{Blobs, Image};
use darter_integration::registry::Registry;
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

fn setup_changes_containerds_configuration_and_back() -> Result<()> {
    for generation in GENERATIONS {
        let world = World::new()?;
        let registry = Registry::start(&world, "registry")?;
        let blobs = Blobs::open(world.folder("blobs")?)?;
        let image = busybox(&blobs, &["cat", "/etc/motd"])?;
        registry.push(&blobs, &image, "t/busybox")?;
        let host = world.host("node")?;
        let mut containerd = Containerd::start(&world, &host, generation, None)?;
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
        darter::pull(&containerd, &reference).check()?;
        ensure!(containerd.layer_blobs(&image)?.is_empty(), "{generation:?}: not lazy");
        prints(&containerd, &reference, DARTER, "lazy")?;
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
    for generation in GENERATIONS {
        let node = Node::new(generation)?;
        let (image, reference) = pulled(&node, "t/exported")?;
        let archive = node.world.folder("export")?.join("image.tar");
        let export =
            || node.containerd.ctr().args(["images", "export"]).arg(archive.display()).arg(&reference);
        ensure!(
            !export().output()?.success(),
            "an image without its layers was exported: what is hydrating for?"
        );
        let socket = node.containerd.socket();
        let hydrate = || {
            let command =
                node.standalone.command(&["hydrate", "--namespace", node.containerd.namespace(), &reference]);
            command.arg("--containerd-address").arg(socket.display()).check()
        };
        let said = hydrate()?;
        ensure!(said.contains("2 brought now"), "{said}");
        ensure!(node.containerd.layer_blobs(&image)?.len() == 2, "layer blobs are missing");
        export().check()?;
        ensure!(fs::metadata(&archive)?.len() > image.compressed_size(), "the archive has no layers");
        let said = hydrate()?;
        ensure!(said.contains("0 brought now"), "what is there was brought again: {said}");
    }
    Ok(())
}

fn a_drained_node_does_without_darter() -> Result<()> {
    for generation in GENERATIONS {
        let mut node = Node::new(generation)?;
        let (_, reference) = pulled(&node, "t/drained")?;
        let name = "sleeper";
        let run = ["run", "-d", "--net-host", "--snapshotter", DARTER, &reference, name, "sleep", "600"];
        node.containerd.ctr().args(run).check()?;
        // As for a commit: containerd compares the container's files with those of its image.
        let diff = ["snapshots", "--snapshotter", DARTER, "diff", "--media-type", LAYER, name];
        node.containerd.ctr().args(diff).check()?;
        let socket = node.containerd.socket();
        let drain =
            || node.standalone.command(&["drain"]).arg("--containerd-address").arg(socket.display()).output();
        let used = drain()?;
        ensure!(
            !used.success() && used.stderr.contains(name),
            "a container in use isn't named: {}",
            used.said()
        );
        let ctr = |words: &[&str]| node.containerd.ctr().args(words).check();
        ctr(&["task", "kill", "-s", "KILL", name])?;
        darter_integration::command::eventually("the sleeper ends", 20, || {
            Ok(ctr(&["task", "rm", name]).is_ok())
        })?;
        ctr(&["containers", "rm", name])?;
        let drained = drain()?;
        ensure!(drained.success(), "{}", drained.said());
        node.standalone.daemon().stop(30)?;
        node.registry.stop();
        prints(&node.containerd, &reference, OVERLAYFS, "after")?;
    }
    Ok(())
}
