//! The mesh: several nodes, a seed, a scheduler, a manager, each a process of its own.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use darter_integration::cluster::{Cluster, Node, Options};
use darter_integration::command::eventually;
use darter_integration::containerd::DARTER;
use darter_integration::image::{Blobs, Image, Packing};
use darter_integration::registry::{PASSWORD, Registry, USER, layers_served};
use darter_integration::tar::Entry;
use darter_integration::world::World;

use crate::harness::{busybox, noise};

pub const STORIES: crate::Stories = &[
    ("two_nodes_at_once_cost_the_registry_each_byte_once", 180, two_nodes_at_once),
    ("a_preheated_image_costs_the_registry_nothing", 180, a_preheated_image_costs_the_registry_nothing),
    ("a_dead_manager_stops_nobody", 180, a_dead_manager_stops_nobody),
    ("a_restarted_scheduler_knows_the_mesh_again", 180, a_restarted_scheduler_knows_the_mesh_again),
    ("a_third_node_takes_from_both_others", 240, a_third_node_takes_from_both_others),
    ("sixty_second_certificates_fail_no_call", 420, sixty_second_certificates_fail_no_call),
];

/// A cluster whose registry has one image.
pub struct Mesh {
    pub cluster: Cluster,
    pub image: Image,
    pub blobs: Blobs,
    pub registry: Registry,
    pub world: World,
}

pub const NAME: &str = "t/mesh";
pub const LINE: &str = "hello from a layer\n";

impl Mesh {
    /// Busybox, and `megabytes` of noise in two more layers, which its command reads.
    pub fn new(options: Options, megabytes: usize) -> Result<Self> {
        let world = World::new()?;
        let registry = Registry::start(&world, "registry")?;
        let blobs = Blobs::open(world.folder("blobs")?)?;
        let image = noisy(&blobs, megabytes)?;
        registry.push(&blobs, &image, NAME)?;
        let cluster = Cluster::start(&world, &registry, options)?;
        for node in &cluster.nodes {
            node.host.count_from(registry.host().address())?;
        }
        Ok(Self { cluster, image, blobs, registry, world })
    }

    pub fn reference(&self) -> String {
        self.registry.reference(NAME)
    }

    pub fn node(&self, index: usize) -> &Node {
        &self.cluster.nodes[index]
    }

    /// Pulls and runs on one node, lazily. runc keeps containers of all nodes in one place: each has a name of its own.
    pub fn start_on(&self, index: usize) -> Result<()> {
        let containerd = &self.node(index).containerd;
        containerd.ctr_pull(&self.reference(), DARTER).check()?;
        ensure!(containerd.layer_blobs(&self.image)?.is_empty(), "layer blobs are in the content store");
        let ran = containerd.ctr_run(&self.reference(), DARTER, &format!("starts-{index}")).output()?;
        ensure!(ran.stdout == LINE, "node {index}: {}", ran.said());
        Ok(())
    }

    /// Reads every byte of the data in a container.
    pub fn read_all_on(&self, index: usize) -> Result<()> {
        let containerd = &self.node(index).containerd;
        let command = ["sh", "-c", "cat /data/* | wc -c"];
        let ran = containerd
            .ctr_run_command(&self.reference(), DARTER, &format!("reads-{index}"), &command)
            .output()?;
        ensure!(ran.success() && ran.stdout.trim() != "0", "{}", ran.said());
        Ok(())
    }

    /// Fails unless the registry has sent each layer so often.
    pub fn served(&self, times: u64) -> Result<()> {
        layers_served(&self.registry.requests(), &self.image, times)
    }
}

/// Busybox's image with data in `/data`.
pub fn noisy(blobs: &Blobs, megabytes: usize) -> Result<Image> {
    let base = busybox(blobs, &[])?;
    let mut layers = base.layers;
    for half in 0..2 {
        let mut data = noise((megabytes << 19).max(1));
        data.iter_mut().step_by(4096).for_each(|byte| *byte = byte.wrapping_add(half));
        let entries = [Entry::dir("data"), Entry::file(format!("data/{half}"), data)];
        layers.push(blobs.layer(Packing::Gzip, &entries)?);
    }
    blobs.image(&layers, &["cat", "/etc/motd"])
}

fn two_nodes_at_once() -> Result<()> {
    let mesh = Mesh::new(Options::default(), 40)?;
    let (first, second) = thread::scope(|scope| {
        let first = scope.spawn(|| mesh.start_on(0).and_then(|()| mesh.read_all_on(0)));
        thread::sleep(Duration::from_millis(50));
        let second = scope.spawn(|| mesh.start_on(1).and_then(|()| mesh.read_all_on(1)));
        (first.join().expect("no panic"), second.join().expect("no panic"))
    });
    first?;
    second?;
    mesh.served(1)?;
    for node in &mesh.cluster.nodes {
        let direct = node.host.received_from(mesh.registry.host().address())?;
        ensure!(direct < 1 << 20, "a node took {direct} bytes from the registry itself");
    }
    Ok(())
}

fn a_preheated_image_costs_the_registry_nothing() -> Result<()> {
    let mesh = Mesh::new(Options { nodes: 1, ..Options::default() }, 20)?;
    let order = serde_json::json!({"image": mesh.reference(), "username": USER, "password": PASSWORD});
    let made = mesh.cluster.rest("POST", "/api/v1/preheats", &order.to_string())?;
    let id = made["id"].as_str().context("the preheat has no id")?;
    eventually("the preheat is done", 60, || {
        let preheat = mesh.cluster.rest("GET", &format!("/api/v1/preheats/{id}"), "")?;
        match preheat["state"].as_str() {
            Some("pending" | "running") => Ok(false),
            Some("failed" | "canceled") => bail!("{preheat}"),
            _ => Ok(true),
        }
    })?;
    mesh.served(1)?;
    let before = mesh.registry.requests().len();
    mesh.start_on(0)?;
    mesh.read_all_on(0)?;
    let requests = mesh.registry.requests();
    ensure!(
        !requests[before..].iter().any(|r| r.is_layer_of(&mesh.image)),
        "a layer was read from the registry"
    );
    let nodes = mesh.cluster.rest("GET", "/api/v1/nodes", "")?;
    ensure!(nodes.to_string().contains("node-1"), "{nodes}");
    Ok(())
}

fn a_dead_manager_stops_nobody() -> Result<()> {
    let mut mesh = Mesh::new(Options::default(), 10)?;
    mesh.start_on(0)?;
    mesh.cluster.manager.kill();
    mesh.start_on(1)?;
    mesh.read_all_on(1)?;
    mesh.served(1)
}

fn a_restarted_scheduler_knows_the_mesh_again() -> Result<()> {
    let mut mesh = Mesh::new(Options { nodes: 1, ..Options::default() }, 10)?;
    mesh.start_on(0)?;
    mesh.cluster.scheduler.kill();
    mesh.cluster.start_scheduler()?;
    // The promise: five seconds later a new node needs no layer byte from the registry.
    thread::sleep(Duration::from_secs(5));
    let (world, registry) = (&mesh.world, &mesh.registry);
    mesh.cluster.add_node(world, registry)?;
    mesh.start_on(1)?;
    mesh.read_all_on(1)?;
    mesh.served(1)
}

fn a_third_node_takes_from_both_others() -> Result<()> {
    let mesh = Mesh::new(Options { nodes: 3, ..Options::default() }, 60)?;
    for index in [0, 1] {
        mesh.start_on(index)?;
        mesh.read_all_on(index)?;
    }
    mesh.cluster.seed.host().limit(50)?;
    let third = mesh.node(2);
    for index in [0, 1] {
        third.host.count_from(mesh.node(index).host.address())?;
    }
    let before = third.host.traffic()?;
    mesh.start_on(2)?;
    mesh.read_all_on(2)?;
    let all = (third.host.traffic()? - before).received;
    for index in [0, 1] {
        let got = third.host.received_from(mesh.node(index).host.address())?;
        ensure!(got * 4 >= all, "of {all} bytes only {got} came from node {index}");
    }
    Ok(())
}

/// Five minutes of traffic while every certificate is renewed some ten times.
fn sixty_second_certificates_fail_no_call() -> Result<()> {
    let options = Options { nodes: 1, certificate_life_seconds: 60, ..Options::default() };
    let mesh = Mesh::new(options, 10)?;
    let until = Instant::now() + Duration::from_secs(300);
    let mut rounds = 0;
    while Instant::now() < until {
        let image = mesh.blobs.image(
            &[mesh.image.layers[0].clone(), fresh_layer(&mesh.blobs, rounds)?, mesh.image.layers[1].clone()],
            &["cat", "/etc/motd"],
        )?;
        let name = format!("t/round-{rounds}");
        mesh.registry.push(&mesh.blobs, &image, &name)?;
        let (containerd, reference) = (&mesh.node(0).containerd, mesh.registry.reference(&name));
        containerd.ctr_pull(&reference, DARTER).check()?;
        ensure!(containerd.layer_blobs(&image)?.is_empty(), "round {rounds} was not lazy");
        let ran = containerd.ctr_run(&reference, DARTER, &format!("round-{rounds}")).output()?;
        ensure!(ran.stdout == LINE, "round {rounds}: {}", ran.said());
        containerd.remove_image(&reference)?;
        rounds += 1;
        thread::sleep(Duration::from_secs(2));
    }
    ensure!(rounds > 20, "only {rounds} rounds");
    Ok(())
}

fn fresh_layer(blobs: &Blobs, round: u32) -> Result<darter_integration::image::Layer> {
    blobs.layer(Packing::Gzip, &[Entry::file("round", format!("{round}"))])
}
