//! Less: a container needs little of its image to start, and little more is moved meanwhile.

use anyhow::{Context, Result, ensure};
use darter_integration::cluster::{Cluster, Node, Options};
use darter_integration::containerd::{DARTER, cache};
use darter_integration::darter;
use darter_integration::registry::Registry;
use darter_integration::sci;
use darter_integration::world::World;

pub const STORIES: crate::Stories =
    &[("a_start_moves_under_a_fifth_of_the_image", 240, a_start_moves_under_a_fifth)];

const NAME: &str = "t/sci";
const LINK_MBIT: u32 = 200;

/// Pulls and runs; what has come to the node at the moment of the line.
fn received_at_the_line(node: &Node, reference: &str, id: &str) -> Result<u64> {
    let before = node.host.traffic()?;
    darter::pull(&node.containerd, reference).check()?;
    let mut running = node.containerd.ctr_run(reference, DARTER, id).start()?;
    let line = running.first_line();
    let received = (node.host.traffic()? - before).received;
    let ran = running.finish()?;
    line.with_context(|| format!("no line was printed: {}", ran.said()))?;
    ensure!(ran.success(), "{}", ran.said());
    Ok(received)
}

/// Everything that comes over the second node's link, the background's share included.
fn a_start_moves_under_a_fifth() -> Result<()> {
    let (blobs, image) = sci::image(&cache())?;
    let world = World::new()?;
    let registry = Registry::start(&world, "registry")?;
    registry.push(&blobs, &image, NAME)?;
    let cluster = Cluster::start(&world, &registry, Options::default())?;
    for node in &cluster.nodes {
        node.host.limit(LINK_MBIT)?;
    }
    let reference = registry.reference(NAME);
    received_at_the_line(&cluster.nodes[0], &reference, "first")?;
    let received = received_at_the_line(&cluster.nodes[1], &reference, "second")?;
    ensure!(cluster.nodes[1].containerd.layer_blobs(&image)?.is_empty(), "the second node is not lazy");
    let size = image.compressed_size();
    ensure!(received * 5 < size, "{received} bytes came, of an image of {size}");
    Ok(())
}
