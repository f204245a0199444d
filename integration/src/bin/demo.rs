//! What Darter does, shown on one machine: an ordinary image starts on two nodes, the plain way and through the mesh.
//!
//! `scripts/demo` builds and calls it. Registry, seed and nodes are network namespaces on a bridge; every program is a process
//! of its own with a configuration file, and everything is gone afterwards, also after Ctrl-C.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use darter_integration::cluster::{Cluster, Node, Options};
use darter_integration::containerd::{Containerd, DARTER, Generation, OVERLAYFS, cache};
use darter_integration::image::{Blobs, Image};
use darter_integration::registry::Registry;
use darter_integration::steps::Steps;
use darter_integration::world::{World, sweep_on_signal};
use darter_integration::{darter, sci};

const IMAGE: &str = "demo/sci";

fn main() -> ExitCode {
    sweep_on_signal();
    let mut steps = Steps::new(std::env::args().nth(1).map(PathBuf::from));
    match demo(&mut steps) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\ndemo: {error:#}");
            if let Some(log) = steps.log() {
                eprintln!("details: {}", log.display());
            }
            ExitCode::FAILURE
        }
    }
}

/// What one way of starting the image took.
struct Row {
    what: &'static str,
    pulled_after: Duration,
    line_after: Duration,
    from_registry: u64,
    from_peers: u64,
    registry_sent: u64,
    stored: u64,
    line: String,
}

fn demo(steps: &mut Steps) -> Result<()> {
    let (blobs, image) = steps.step("the image is made of Debian's packages", || sci::image(&cache()))?;
    let world = World::new()?;
    let registry =
        steps.step("a registry that asks for a password has it", || stock(&world, &blobs, &image))?;
    let options = Options { nodes: 0, generation: Generation::One, ..Options::default() };
    let mut cluster =
        steps.step("manager, scheduler and seed are up", || Cluster::start(&world, &registry, options))?;
    steps.step("two nodes are up, each with its own containerd", || {
        for _ in 0..2 {
            let node = cluster.add_node(&world, &registry)?;
            node.host.count_from(registry.host().address())?;
        }
        Ok(())
    })?;
    let (first, second) = (&cluster.nodes[0], &cluster.nodes[1]);
    let start = |what, node, snapshotter, id| start(what, &registry, &image, node, snapshotter, id);
    let rows = [
        steps.step("started the plain way", || start("plain overlayfs", first, OVERLAYFS, "plain"))?,
        steps.step("plain pull forgotten", || forget(&first.containerd, &registry, &image)).and_then(
            |()| {
                steps.step("started by Darter, first contact", || {
                    start("Darter, first contact", first, DARTER, "first")
                })
            },
        )?,
        steps.step("started by Darter on the second node", || {
            start("Darter, second node", second, DARTER, "second")
        })?,
        steps.step("started once more on that node", || {
            start("Darter, second run", second, DARTER, "again")
        })?,
    ];
    for node in &cluster.nodes {
        let status = node.darter("status").output()?;
        steps.note(&status.said());
    }
    print_table(&image, &rows);
    steps.step("everything is cleaned up", || {
        stop(&mut cluster)?;
        drop((cluster, registry, world));
        Ok(())
    })?;
    ensure!(rows.iter().all(|row| row.line == rows[0].line), "the lines printed differ");
    ensure!(rows[1..].iter().all(|row| row.stored == 0), "layer bytes are in containerd's content store");
    Ok(())
}

fn stock(world: &World, blobs: &Blobs, image: &Image) -> Result<Registry> {
    let registry = Registry::start(world, "registry")?;
    registry.push(blobs, image, IMAGE)?;
    Ok(registry)
}

/// Pulls unless the image is there, runs its command, and counts at the moment of the line.
fn start(
    what: &'static str,
    registry: &Registry,
    image: &Image,
    node: &Node,
    snapshotter: &str,
    id: &str,
) -> Result<Row> {
    let reference = registry.reference(IMAGE);
    let (address, containerd) = (registry.host().address(), &node.containerd);
    let (sent, got) = (registry.host().traffic()?, node.host.traffic()?);
    let direct = node.host.received_from(address)?;
    let again = what.ends_with("second run");
    let pull = match snapshotter {
        _ if again => None,
        DARTER => Some(darter::pull(containerd, &reference)),
        _ => Some(containerd.ctr_pull(&reference, snapshotter)),
    };
    let mut pulled_after = Duration::ZERO;
    if let Some(pull) = pull {
        let pulled = pull.output()?;
        ensure!(pulled.success(), "the pull failed: {}", pulled.said());
        pulled_after = pulled.took;
    }
    let mut running = containerd.ctr_run(&reference, snapshotter, id).start()?;
    let line_after = running.first_line();
    let (sent, got) = (registry.host().traffic()? - sent, node.host.traffic()? - got);
    let direct = node.host.received_from(address)? - direct;
    let ran = running.finish()?;
    let line_after = line_after.with_context(|| format!("no line was printed: {}", ran.said()))?;
    let stored = containerd.layer_blobs(image)?;
    let sizes = image.layers.iter().filter(|layer| stored.contains(&layer.blob.digest));
    Ok(Row {
        what,
        pulled_after,
        line_after: pulled_after + line_after,
        from_registry: direct,
        from_peers: got.received.saturating_sub(direct),
        registry_sent: sent.sent,
        stored: sizes.map(|layer| layer.blob.size).sum(),
        line: ran.stdout,
    })
}

/// So that Darter does not find the layers that the plain pull brought.
fn forget(containerd: &Containerd, registry: &Registry, image: &Image) -> Result<()> {
    containerd.remove_image(&registry.reference(IMAGE))?;
    ensure!(containerd.layer_blobs(image)?.is_empty(), "the plain pull's layers are still there");
    Ok(())
}

fn stop(cluster: &mut Cluster) -> Result<()> {
    for node in &mut cluster.nodes {
        node.containerd.stop()?;
        node.snapshotter.stop(20)?;
    }
    cluster.seed.stop(20)?;
    cluster.scheduler.stop(20)?;
    cluster.manager.stop(20)
}

fn print_table(image: &Image, rows: &[Row]) {
    let mb = |bytes: u64| format!("{:.1}", bytes as f64 / 1e6);
    println!(
        "\n  {} layers, {} MB compressed; MB at the moment of the line:\n",
        image.layers.len(),
        mb(image.compressed_size())
    );
    println!(
        "  {:<22} {:>8} {:>9} {:>14} {:>11} {:>14} {:>9}",
        "", "pulled", "the line", "from registry", "from peers", "registry sent", "in store"
    );
    for row in rows {
        println!(
            "  {:<22} {:>6.2} s {:>7.2} s {:>14} {:>11} {:>14} {:>9}",
            row.what,
            row.pulled_after.as_secs_f64(),
            row.line_after.as_secs_f64(),
            mb(row.from_registry),
            mb(row.from_peers),
            mb(row.registry_sent),
            mb(row.stored)
        );
    }
    let same = rows.iter().all(|row| row.line == rows[0].line);
    println!(
        "\n  {} {}\n",
        if same { "the same line each time:" } else { "the lines differ! the first:" },
        rows[0].line.trim()
    );
}
