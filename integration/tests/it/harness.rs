//! The harness itself: what the other stories rest on.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use darter_integration::containerd::{ALL_GENERATIONS, Containerd, GENERATIONS, Generation, OVERLAYFS};
use darter_integration::image::{Blobs, Image, Packing};
use darter_integration::registry::{Registry, layers_served};
use darter_integration::sweep;
use darter_integration::tar::Entry;
use darter_integration::tree;
use darter_integration::world::World;

pub const STORIES: crate::Stories = &[
    ("overlayfs_pulls_and_runs", 120, overlayfs_pulls_and_runs),
    ("a_failing_story_leaves_nothing", 60, a_failing_story_leaves_nothing),
    ("links_have_the_rate_that_was_set", 60, links_have_the_rate_that_was_set),
    ("every_promise_is_a_story", 10, every_promise_is_a_story),
];

/// Stories about the tests themselves: they promise nothing to users.
const ABOUT_TESTS: [&str; 4] = [
    "overlayfs_pulls_and_runs",
    "links_have_the_rate_that_was_set",
    "overlayfs_unpacks_every_edge_image",
    "every_promise_is_a_story",
];

/// `docs/behaviour.md` and the stories say the same.
fn every_promise_is_a_story() -> Result<()> {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/behaviour.md");
    let page = std::fs::read_to_string(page)?;
    let headings = page.lines().filter_map(|line| line.strip_prefix("### "));
    let promised: BTreeSet<String> =
        headings.map(|words| words.trim().to_lowercase().replace([' ', '-'], "_")).collect();
    let told = crate::stories().into_iter().map(|story| story.name.to_owned());
    let told: BTreeSet<String> = told.filter(|name| !ABOUT_TESTS.contains(&name.as_str())).collect();
    let missing: Vec<_> = promised.symmetric_difference(&told).collect();
    ensure!(missing.is_empty(), "docs/behaviour.md or the stories lack: {missing:?}");
    Ok(())
}

/// The story with each containerd that is supported; a failure says which.
pub fn with_each_containerd(story: impl Fn(Generation) -> Result<()>) -> Result<()> {
    let told = |generation| story(generation).with_context(|| format!("with containerd {generation:?}"));
    ALL_GENERATIONS.into_iter().try_for_each(told)
}

/// An image whose one program is busybox, in two layers.
pub fn busybox(blobs: &Blobs, command: &[&str]) -> Result<Image> {
    let program = std::fs::read("/bin/busybox")?;
    let tools = [
        "sh", "cat", "echo", "ls", "sleep", "true", "dd", "find", "rm", "mv", "chmod", "mkdir", "ln",
        "touch", "sync",
    ];
    let mut base = vec![
        Entry::dir("bin"),
        Entry::file("bin/busybox", program).mode(0o755),
        Entry::dir("tmp").mode(0o1777),
    ];
    base.extend(tools.iter().map(|tool| Entry::symlink(format!("bin/{tool}"), "busybox")));
    let base = blobs.layer(Packing::Gzip, &base)?;
    let top =
        blobs.layer(Packing::Gzip, &[Entry::dir("etc"), Entry::file("etc/motd", "hello from a layer\n")])?;
    blobs.image(&[base, top], command)
}

fn overlayfs_pulls_and_runs() -> Result<()> {
    for generation in GENERATIONS {
        let world = World::new()?;
        let registry = Registry::start(&world, "registry")?;
        let blobs = Blobs::open(world.folder("blobs")?)?;
        let image = busybox(&blobs, &["cat", "/etc/motd"])?;
        registry.push(&blobs, &image, "t/busybox")?;
        let host = world.host("node")?;
        let containerd = Containerd::start(&world, &host, generation, None)?;
        let reference = registry.reference("t/busybox");
        let refused = containerd.ctr_pull_as("reader:wrong", &reference, OVERLAYFS).output()?;
        ensure!(!refused.success(), "a wrong password was taken");
        containerd.ctr_pull(&reference, OVERLAYFS).check()?;
        let ran = containerd.ctr_run(&reference, OVERLAYFS, "c1").output()?;
        ensure!(ran.stdout == "hello from a layer\n", "{generation:?}: {}", ran.said());
        ensure!(ran.first_line_after.is_some_and(|after| after <= ran.took));
        ensure!(containerd.layer_blobs(&image)?.len() == 2, "overlayfs keeps the layers' blobs");
        layers_served(&registry.requests(), &image, 1)?;
        let mounted = containerd.mount_snapshot(OVERLAYFS, &image.top_chain_id(), "view", false)?;
        let tree = tree::walk(mounted.path())?;
        ensure!(tree["etc/motd"].size == 19 && tree["bin/sh"].kind == 'l', "the walk shows the layers");
        ensure!(host.traffic()?.received > image.compressed_size());
    }
    Ok(())
}

fn a_failing_story_leaves_nothing() -> Result<()> {
    let failing = || -> Result<()> {
        let world = World::new()?;
        let host = world.host("node")?;
        let _containerd = Containerd::start(&world, &host, GENERATIONS[0], None)?;
        // What nobody holds a guard of: a daemon's child in another session, and a mount.
        host.run("setsid").args(["--fork", "sleep", "1000"]).check()?;
        let folder = world.folder("mounted")?;
        host.run("mount").args(["-t", "tmpfs", "none"]).arg(folder.display()).check()?;
        anyhow::bail!("on purpose")
    };
    ensure!(failing().is_err());
    let left = sweep::remains(std::process::id());
    ensure!(left.is_empty(), "left: {left:?}");
    ensure!(!sweep::scratch(std::process::id()).exists());
    Ok(())
}

fn links_have_the_rate_that_was_set() -> Result<()> {
    let world = World::new()?;
    let registry = Registry::start(&world, "registry")?;
    let blobs = Blobs::open(world.folder("blobs")?)?;
    let noise = Entry::file("noise", noise(20 << 20));
    let layer = blobs.layer(Packing::Gzip, &[noise])?;
    let image = blobs.image(&[layer], &["true"])?;
    registry.push(&blobs, &image, "t/noise")?;
    let host = world.host("node")?;
    host.limit(100)?;
    let containerd = Containerd::start(&world, &host, GENERATIONS[0], None)?;
    let before = host.traffic()?;
    let pulled = containerd.ctr_pull(&registry.reference("t/noise"), OVERLAYFS).output()?;
    let got = (host.traffic()? - before).received;
    ensure!(pulled.success(), "{}", pulled.said());
    let rate = (got as f64 * 8.0 / 1e6) / pulled.took.as_secs_f64();
    ensure!(got > 20 << 20 && rate < 105.0, "{got} bytes at {rate} Mbit/s");
    Ok(())
}

/// Bytes that don't compress, the same each time.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
