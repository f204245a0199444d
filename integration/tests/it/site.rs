//! A cluster beside a registry that misbehaves on demand, and images small enough for many rounds.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use darter_integration::cluster::{Cluster, Node, Options};
use darter_integration::command::eventually;
use darter_integration::containerd::{DARTER, Generation, MountedSnapshot};
use darter_integration::darter;
use darter_integration::image::{Blobs, Image, Layer, Packing};
use darter_integration::registry::Registry;
use darter_integration::stub::Stub;
use darter_integration::tar::Entry;
use darter_integration::world::World;
use sha2::{Digest, Sha256};

use crate::harness::busybox;

/// What [`Site::check`] prints about the data of an image.
pub const SUM: &str = "cat /data/* | busybox sha256sum";

/// The fields are dropped in this order: the world last.
pub struct Site {
    pub cluster: Cluster,
    pub stub: Stub,
    pub blobs: Blobs,
    pub registry: Registry,
    pub world: World,
}

impl Site {
    pub fn new(options: Options) -> Result<Self> {
        let world = World::new()?;
        let registry = Registry::start(&world, "registry")?;
        let blobs = Blobs::open(world.folder("blobs")?)?;
        let stub = Stub::start(&world.host("stub")?, &blobs)?;
        let authority = stub.authority();
        let cluster = Cluster::start(&world, &registry, options)?;
        let folder = world.folder("seed/certs.d")?.join(&authority);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("hosts.toml"), format!("server = \"http://{authority}\"\n"))?;
        for node in &cluster.nodes {
            node.containerd.plain_http(&authority)?;
        }
        Ok(Self { cluster, stub, blobs, registry, world })
    }

    pub fn with_nodes(nodes: usize) -> Result<Self> {
        Self::new(Options { nodes, ..Options::default() })
    }

    /// One node, with a containerd of this generation.
    pub fn with_containerd(generation: Generation) -> Result<Self> {
        Self::new(Options { nodes: 1, generation, ..Options::default() })
    }

    pub fn node(&self, index: usize) -> &Node {
        &self.cluster.nodes[index]
    }

    pub fn add(&self, data: &Data, name: &str) -> String {
        self.stub.add(&data.image, name)
    }

    /// Pulls, lazily.
    pub fn pull(&self, index: usize, data: &Data, reference: &str) -> Result<()> {
        let containerd = &self.node(index).containerd;
        darter::pull_lazily_in(containerd, containerd.namespace(), reference).check()?;
        let blobs = containerd.layer_blobs(&data.image)?;
        ensure!(blobs.is_empty(), "{} layer blobs are in the content store", blobs.len());
        Ok(())
    }

    /// Reads all data in a container: it must be what the image has.
    pub fn check(&self, index: usize, data: &Data, reference: &str, id: &str) -> Result<()> {
        self.check_in(self.node(index).containerd.namespace(), index, data, reference, id)
    }

    /// The same in another namespace of containerd.
    pub fn check_in(
        &self,
        namespace: &str,
        index: usize,
        data: &Data,
        reference: &str,
        id: &str,
    ) -> Result<()> {
        let run = ["run", "--rm", "--net-host", "--snapshotter", DARTER, reference, id, "sh", "-c", SUM];
        let ran = self.node(index).containerd.ctr_in(namespace).args(run).output()?;
        ensure!(ran.stdout.starts_with(&data.sum), "not {}: {}", data.sum, ran.said());
        Ok(())
    }

    pub fn mount(&self, index: usize, data: &Data, key: &str) -> Result<MountedSnapshot> {
        mount(self.node(index), &data.image, key)
    }
}

/// A snapshot for a container's root, mounted.
pub fn mount(node: &Node, image: &Image, key: &str) -> Result<MountedSnapshot> {
    node.containerd.mount_snapshot(DARTER, &image.top_chain_id(), key, true)
}

/// The node daemon started again, and found by its containerd.
pub fn start_again(node: &mut Node) -> Result<()> {
    node.start_snapshotter()?;
    found_again(node)
}

/// Waits until containerd has found its snapshotter, for which it looks less and less often.
pub fn found_again(node: &Node) -> Result<()> {
    let snapshots = |words: &[&str]| {
        let run = node.containerd.ctr().args(["snapshots", "--snapshotter", DARTER]).args(words);
        Ok(run.timeout(20).output()?.success())
    };
    // Where there are no snapshots, a list of them would not reach it.
    eventually("containerd finds its snapshotter", 60, || snapshots(&["prepare", "found"]))?;
    eventually("the snapshot is removed", 20, || snapshots(&["rm", "found"]))
}

/// An image whose `/data` is known.
pub struct Data {
    pub image: Image,
    /// What [`SUM`] prints.
    pub sum: String,
}

impl Data {
    /// Busybox below a layer of `files` files of `length` bytes each, in `/data`, which no other `salt` has.
    pub fn new(blobs: &Blobs, salt: u64, files: usize, length: usize) -> Result<Self> {
        Self::over(&busybox(blobs, &[])?.layers, blobs, salt, files, length)
    }

    pub fn over(below: &[Layer], blobs: &Blobs, salt: u64, files: usize, length: usize) -> Result<Self> {
        let (mut entries, mut sum) = (vec![Entry::dir("data")], Sha256::new());
        for file in 0..files {
            let bytes = random_bytes(salt << 32 | file as u64, length);
            sum.update(&bytes);
            entries.push(Entry::file(format!("data/{file:04}"), bytes));
        }
        let top = blobs.layer(Packing::Gzip, &entries)?;
        let layers: Vec<Layer> = below.iter().cloned().chain([top]).collect();
        let image = blobs.image(&layers, &["cat", "/etc/motd"])?;
        Ok(Self { image, sum: hex::encode(sum.finalize()) })
    }

    /// The digest of the layer that has the data.
    pub fn top_blob(&self) -> &str {
        &self.image.layers.last().expect("an image has layers").blob.digest
    }
}

/// The next of a series of numbers that looks random and is the same each time.
pub fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Bytes that don't compress, others for each seed.
pub fn random_bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        bytes.extend(next_random(&mut state).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Files below `folder` whose names end so.
pub fn files(folder: &Path, ends: &[&str]) -> Result<Vec<PathBuf>> {
    let (mut todo, mut found) = (vec![folder.to_owned()], Vec::new());
    while let Some(folder) = todo.pop() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type()?.is_dir() {
                todo.push(entry.path());
            } else if ends.iter().any(|end| name.ends_with(end)) {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    Ok(found)
}
