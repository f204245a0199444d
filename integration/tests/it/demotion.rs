//! Demotion: a layer that Darter said it would serve, and then can't. What overlayfs would run runs, what it would refuse
//! is refused in containerd's words.

use anyhow::{Context, Result, ensure};
use darter_integration::cluster::{self, Cluster};
use darter_integration::command::eventually;
use darter_integration::containerd::{Containerd, DARTER, GENERATIONS, Generation, OVERLAYFS};
use darter_integration::darter::{self, Standalone};
use darter_integration::edge::REFUSED;
use darter_integration::image::{Blobs, Image, Packing};
use darter_integration::registry::Registry;
use darter_integration::stub::{Fault, Stub};
use darter_integration::tar::Entry;
use darter_integration::world::World;

use crate::disk::put_on_a_small_disk;
use crate::harness::{busybox, noise};
use crate::never_worse::{End, both_print, end, last_words, lazy_pull};
use crate::trees::Node;

pub const STORIES: crate::Stories = &[
    ("a_refused_tar_is_refused_in_containerds_words", 600, a_refused_tar_is_refused_in_containerds_words),
    ("a_lying_diff_id_is_refused_in_containerds_words", 180, a_lying_diff_id_is_refused_in_containerds_words),
    ("a_blob_that_vanished_is_refused_in_the_same_words", 180, a_blob_that_vanished_is_refused),
    ("a_spoilt_blob_is_refused_and_runs_once_it_is_whole", 240, a_spoilt_blob_is_refused_and_runs_later),
    ("what_containerd_has_runs_although_its_blob_vanished", 180, what_containerd_has_runs),
    ("a_demoted_layer_runs_below_lazy_ones", 180, a_demoted_layer_runs_below_lazy_ones),
    ("an_image_too_large_to_merge_runs_all_the_same", 240, an_image_too_large_to_merge_runs_all_the_same),
    ("a_seed_with_a_full_disk_stops_nobody", 240, a_seed_with_a_full_disk_stops_nobody),
];

const LINE: &str = "hello from a layer\n";

/// The cause at the end of an error: without what the programs put around it, and without names that differ each time.
fn cause(words: &str) -> String {
    let words = words.rsplit_once("failed to extract layer ").map_or(words, |(_, rest)| rest);
    let words = words.split_once(": ").map_or(words, |(_, rest)| rest);
    let known = [": unknown", ": failed precondition", ": not found"];
    let words = known.iter().fold(words, |words, code| words.strip_suffix(code).unwrap_or(words));
    let local = |word: &str| if word.contains("/") { "PATH".to_owned() } else { word.to_owned() };
    words.split(' ').map(local).collect::<Vec<_>>().join(" ")
}

/// Whether `darter why` says that a layer was lazy, be it that it was demoted since.
fn was_taken(why: &str) -> Result<()> {
    let signs = ["a registry has it", "demoted", "it can't be lazy"];
    ensure!(signs.iter().any(|sign| why.contains(sign)), "it was never lazy:\n{why}");
    Ok(())
}

/// What is said of an image that Darter says it serves, and then must refuse: through Darter, and through overlayfs.
fn refusals(node: &Node, image: &Image, name: &str) -> Result<[String; 2]> {
    node.registry.push(&node.blobs, image, name)?;
    let reference = node.registry.reference(name);
    let containerd = &node.containerd;
    let ours = end(containerd, lazy_pull(containerd, &reference), &reference, DARTER)?;
    was_taken(&node.standalone.command(&["why", &reference]).check()?)?;
    let plain = end(containerd, containerd.ctr_pull(&reference, OVERLAYFS), &reference, OVERLAYFS)?;
    containerd.remove_image(&reference)?;
    Ok([ours.words()?.to_owned(), plain.words()?.to_owned()])
}

fn refused_alike(node: &Node, image: &Image, name: &str) -> Result<()> {
    let [ours, plain] = refusals(node, image, name)?;
    ensure!(cause(&ours) == cause(&plain), "Darter says\n{ours}\noverlayfs\n{plain}");
    Ok(())
}

fn a_refused_tar_is_refused_in_containerds_words() -> Result<()> {
    for generation in GENERATIONS {
        let node = Node::new(generation)?;
        let mut wrong = Vec::new();
        for edge in REFUSED {
            let image = edge.image(&node.blobs)?;
            if let Err(error) = refused_alike(&node, &image, &format!("refused/{}", edge.name)) {
                wrong.push(format!("{}: {error:#}", edge.name));
            }
        }
        ensure!(
            wrong.is_empty(),
            "{generation:?}: {} of {}\n{}",
            wrong.len(),
            REFUSED.len(),
            wrong.join("\n")
        );
    }
    Ok(())
}

fn a_lying_diff_id_is_refused_in_containerds_words() -> Result<()> {
    for generation in GENERATIONS {
        let node = Node::new(generation)?;
        let mut layers = busybox(&node.blobs, &["true"])?.layers;
        layers[1].diff_id = format!("sha256:{}", "5".repeat(64));
        let image = node.blobs.image(&layers, &["cat", "/etc/motd"])?;
        for words in refusals(&node, &image, "t/liar")? {
            // What follows differs between the generations.
            ensure!(words.contains("wrong diff id") && words.contains("calculated on extraction"), "{words}");
        }
        // The true image has the same blobs.
        let image = busybox(&node.blobs, &["cat", "/etc/motd"])?;
        node.registry.push(&node.blobs, &image, "t/honest")?;
        both_print(&node.containerd, &node.registry.reference("t/honest"))?;
    }
    Ok(())
}

/// A node whose registry can misbehave.
struct Shaky {
    containerd: Containerd,
    standalone: Standalone,
    stub: Stub,
    image: Image,
    reference: String,
    _world: World,
}

impl Shaky {
    fn new(generation: Generation) -> Result<Self> {
        let world = World::new()?;
        let blobs = Blobs::open(world.folder("blobs")?)?;
        let stub = Stub::start(&world.host("registry")?, &blobs)?;
        let host = world.host("node")?;
        let socket = darter::snapshotter_socket(&world, &host)?;
        let containerd = Containerd::start(&world, &host, generation, Some(&socket))?;
        containerd.plain_http(&stub.authority())?;
        let standalone = Standalone::start(&world, &containerd)?;
        let image = busybox(&blobs, &["cat", "/etc/motd"])?;
        let reference = stub.add(&image, "t/shaky");
        Ok(Self { containerd, standalone, stub, image, reference, _world: world })
    }

    fn fault(&self, layer: usize, fault: Fault) {
        self.stub.fault(&self.image.layers[layer].blob.digest, fault);
    }

    fn heal(&self, layer: usize) {
        self.stub.heal(&self.image.layers[layer].blob.digest);
    }

    fn ours(&self) -> Result<End> {
        end(&self.containerd, lazy_pull(&self.containerd, &self.reference), &self.reference, DARTER)
    }

    fn plain(&self) -> Result<End> {
        let pull = self.containerd.ctr_pull(&self.reference, OVERLAYFS);
        end(&self.containerd, pull, &self.reference, OVERLAYFS)
    }

    fn was_lazy(&self) -> Result<()> {
        was_taken(&self.standalone.command(&["why", &self.reference]).check()?)
    }
}

fn a_blob_that_vanished_is_refused() -> Result<()> {
    for generation in GENERATIONS {
        let shaky = Shaky::new(generation)?;
        shaky.fault(1, Fault::ReadStatus(404));
        let ours = shaky.ours()?;
        shaky.was_lazy()?;
        let plain = shaky.plain()?;
        for words in [ours.words()?, plain.words()?] {
            ensure!(words.contains("not found"), "{words}");
        }
        // A registry that has it again is asked again.
        shaky.containerd.remove_image(&shaky.reference)?;
        shaky.heal(1);
        ensure!(shaky.ours()? == End::Printed(LINE.into()));
    }
    Ok(())
}

fn a_spoilt_blob_is_refused_and_runs_later() -> Result<()> {
    for generation in GENERATIONS {
        let shaky = Shaky::new(generation)?;
        shaky.fault(0, Fault::Flipped);
        let ours = shaky.ours()?;
        shaky.was_lazy()?;
        let plain = shaky.plain()?;
        for words in [ours.words()?, plain.words()?] {
            ensure!(words.contains("unexpected commit digest"), "{words}");
        }
        shaky.containerd.remove_image(&shaky.reference)?;
        shaky.heal(0);
        let (ours, plain) = (shaky.ours()?, shaky.plain()?);
        ensure!(ours == plain && plain == End::Printed(LINE.into()), "{ours:?}; overlayfs {plain:?}");
    }
    Ok(())
}

/// overlayfs has unpacked the image; its blobs are still in the content store when the registry loses one.
fn what_containerd_has_runs() -> Result<()> {
    for generation in GENERATIONS {
        let shaky = Shaky::new(generation)?;
        ensure!(shaky.plain()? == End::Printed(LINE.into()));
        shaky.fault(0, Fault::ReadStatus(404));
        let ours = shaky.ours()?;
        ensure!(ours == End::Printed(LINE.into()), "{generation:?}: {ours:?}");
        shaky.was_lazy()?;
        // What was demoted stays so.
        let ran = shaky.containerd.ctr_run(&shaky.reference, DARTER, "again").output()?;
        ensure!(ran.stdout == LINE, "{}", last_words(&ran));
    }
    Ok(())
}

/// Two images share a demoted base; the layer above the second one's is only in the registry.
fn a_demoted_layer_runs_below_lazy_ones() -> Result<()> {
    for generation in GENERATIONS {
        let mut shaky = Shaky::new(generation)?;
        ensure!(shaky.plain()? == End::Printed(LINE.into()));
        shaky.fault(0, Fault::ReadStatus(404));
        ensure!(shaky.ours()? == End::Printed(LINE.into()));
        let blobs = shaky.stub.blobs().clone();
        let mut layers = shaky.image.layers.clone();
        layers.push(blobs.layer(Packing::Gzip, &[Entry::file("etc/motd", "hello from above\n")])?);
        let image = blobs.image(&layers, &["cat", "/etc/motd"])?;
        shaky.reference = shaky.stub.add(&image, "t/more");
        let ours = shaky.ours()?;
        ensure!(ours == End::Printed("hello from above\n".into()), "{generation:?}: {ours:?}");
        shaky.standalone.restart()?;
        // containerd takes its time to connect again.
        eventually("it runs after a restart", 30, || {
            let ran = shaky.containerd.ctr_run(&shaky.reference, DARTER, "after").output()?;
            Ok(ran.stdout == "hello from above\n")
        })?;
    }
    Ok(())
}

/// The layers below the one that is too much stay lazy.
fn an_image_too_large_to_merge_runs_all_the_same() -> Result<()> {
    let world = World::new()?;
    let registry = Registry::start(&world, "registry")?;
    let blobs = Blobs::open(world.folder("blobs")?)?;
    let mut layers = busybox(&blobs, &["true"])?.layers;
    let many: Vec<Entry> = (0..5000).map(|number| Entry::file(format!("many/{number}"), "")).collect();
    layers.push(blobs.layer(Packing::Gzip, &many)?);
    let image = blobs.image(&layers, &["cat", "/etc/motd"])?;
    registry.push(&blobs, &image, "t/many")?;
    let node_config = "tree_memory_bytes = 1000000\n".to_owned();
    let cluster =
        Cluster::start(&world, &registry, cluster::Options { nodes: 1, node_config, ..Default::default() })?;
    let reference = registry.reference("t/many");
    both_print(&cluster.nodes[0].containerd, &reference)?;
    let why = cluster.nodes[0].darter("why").arg(&reference).check()?;
    ensure!(why.matches("demoted").count() == 1, "not just one layer was demoted:\n{why}");
    Ok(())
}

fn a_seed_with_a_full_disk_stops_nobody() -> Result<()> {
    let world = World::new()?;
    let registry = Registry::start(&world, "registry")?;
    let blobs = Blobs::open(world.folder("blobs")?)?;
    let mut layers = busybox(&blobs, &["true"])?.layers;
    layers.push(blobs.layer(Packing::Gzip, &[Entry::file("noise", noise(24 << 20))])?);
    let image = blobs.image(&layers, &["cat", "/etc/motd"])?;
    registry.push(&blobs, &image, "t/large")?;
    let options = cluster::Options { nodes: 1, ..Default::default() };
    let mut cluster = Cluster::start(&world, &registry, options)?;
    on_a_small_disk(&mut cluster)?;
    let reference = registry.reference("t/large");
    both_print(&cluster.nodes[0].containerd, &reference)?;
    let log = cluster.seed.daemon()?.log_text();
    let words = "no space is left in";
    ensure!(log.contains(words) && log.contains("MB missing"), "the seed's disk was never full");
    was_taken(&cluster.nodes[0].darter("why").arg(&reference).check()?)
}

/// The seed goes on with the same identity on a disk of a few megabytes.
fn on_a_small_disk(cluster: &mut Cluster) -> Result<()> {
    cluster.seed.stop(30)?;
    put_on_a_small_disk(&cluster.seed, 12)?;
    cluster.start_seed().context("on a small disk")?;
    let nodes = || cluster.rest("GET", "/api/v1/nodes", "");
    eventually("the seed is back", 20, || Ok(nodes()?.to_string().contains("seed")))
}
