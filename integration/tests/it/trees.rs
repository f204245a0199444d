//! The same tree: what a container sees through Darter is what it would see had containerd unpacked the image.

use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};
use darter_integration::command::Run;
use darter_integration::containerd::{Containerd, DARTER, GENERATIONS, Generation, OVERLAYFS};
use darter_integration::darter::{self, Standalone};
use darter_integration::edge::{EDGES, Edge, REFUSED};
use darter_integration::image::{Blobs, Image};
use darter_integration::registry::Registry;
use darter_integration::tree::{self, Tree};
use darter_integration::world::World;

pub const STORIES: crate::Stories = &[
    ("overlayfs_unpacks_every_edge_image", 300, overlayfs_unpacks_every_edge_image),
    ("edge_images_are_the_same_tree", 600, edge_images_are_the_same_tree),
];

/// A registry and one node, with Darter beside its containerd.
pub struct Node {
    pub containerd: Containerd,
    pub standalone: Standalone,
    pub blobs: Blobs,
    pub registry: Registry,
    /// Last: what the others use is taken away with it.
    pub world: World,
}

impl Node {
    pub fn new(generation: Generation) -> Result<Self> {
        let world = World::new()?;
        let registry = Registry::start(&world, "registry")?;
        let blobs = Blobs::open(world.folder("blobs")?)?;
        let host = world.host("node")?;
        let socket = darter::snapshotter_socket(&world, &host)?;
        let containerd = Containerd::start(&world, &host, generation, Some(&socket))?;
        containerd.plain_http(&registry.authority())?;
        let docker = world.folder("node/darter/docker")?;
        darter::docker_config(&docker, &registry.authority())?;
        let standalone = Standalone::start(&world, &containerd)?;
        Ok(Self { containerd, standalone, blobs, registry, world })
    }

    /// Makes sure that both snapshotters have the image; Darter lazily, with no blob of a layer in the content store.
    pub fn pull_both_ways(&self, image: &Image, name: &str) -> Result<()> {
        self.registry.push(&self.blobs, image, name)?;
        let reference = self.registry.reference(name);
        darter::pull(&self.containerd, &reference).check()?;
        let blobs = self.containerd.layer_blobs(image)?;
        ensure!(blobs.is_empty(), "not lazy: {} layer blobs are in the content store", blobs.len());
        self.containerd.ctr_pull(&reference, OVERLAYFS).check()?;
        Ok(())
    }
}

fn overlayfs_unpacks_every_edge_image() -> Result<()> {
    for generation in GENERATIONS {
        let world = World::new()?;
        let registry = Registry::start(&world, "registry")?;
        let blobs = Blobs::open(world.folder("blobs")?)?;
        let host = world.host("node")?;
        let containerd = Containerd::start(&world, &host, generation, None)?;
        let pull = |edge: &Edge| -> Result<bool> {
            let name = format!("edge/{}", edge.name);
            registry.push(&blobs, &edge.image(&blobs)?, &name)?;
            let pulled = containerd.ctr_pull(&registry.reference(&name), OVERLAYFS).output()?;
            if std::env::var_os("SHOW").is_some() {
                println!("{generation:?} {}: {} {}", edge.name, pulled.success(), pulled.stderr.trim());
            }
            Ok(pulled.success())
        };
        for edge in EDGES {
            ensure!(pull(edge)?, "{generation:?} refuses {}", edge.name);
        }
        for edge in REFUSED {
            ensure!(!pull(edge)?, "{generation:?} takes {}", edge.name);
        }
    }
    Ok(())
}

fn edge_images_are_the_same_tree() -> Result<()> {
    for generation in GENERATIONS {
        let node = Node::new(generation)?;
        let mut wrong = Vec::new();
        for edge in EDGES {
            if let Err(error) = same_tree(&node, edge) {
                wrong.push(format!("{}: {error:#}", edge.name));
            }
        }
        if !wrong.is_empty() {
            bail!("{generation:?}: {} of {} differ\n{}", wrong.len(), EDGES.len(), wrong.join("\n"));
        }
    }
    Ok(())
}

fn same_tree(node: &Node, edge: &Edge) -> Result<()> {
    let since = SystemTime::now();
    let image = edge.image(&node.blobs)?;
    node.pull_both_ways(&image, &format!("edge/{}", edge.name))?;
    for writable in [false, true] {
        let mounted = |snapshotter| {
            let key = format!("{}-{snapshotter}-{writable}", edge.name);
            node.containerd.mount_snapshot(snapshotter, &image.top_chain_id(), &key, writable)
        };
        let (plain, ours) = (mounted(OVERLAYFS)?, mounted(DARTER)?);
        let what = if writable { "a container's root" } else { "a view" };
        let mut wanted = tree::walk(plain.path()).context("walking what overlayfs shows")?;
        let found = tree::walk(ours.path()).with_context(|| format!("walking {what}"))?;
        if !writable {
            excuse_views(&mut wanted, &found);
        }
        tree::compare(&wanted, &found, since).with_context(|| what)?;
        if writable {
            same_answers(plain.path(), ours.path())?;
            same_after_changes(plain.path(), ours.path(), since)?;
        }
    }
    Ok(())
}

/// A view is mounted without an overlay over it. Of its root we say that the number of subdirectories is not known; and a
/// whiteout in a directory that overlayfs does not merge is a device, not a name that is listed and not found.
fn excuse_views(wanted: &mut Tree, found: &Tree) {
    for (path, node) in wanted.iter_mut() {
        let Some(other) = found.get(path) else { continue };
        if path.is_empty() {
            node.nlink = other.nlink;
        }
        if node.kind == '?' && other.kind == 'c' && other.device == 0 {
            *node = other.clone();
        }
    }
}

/// What the usual tools say of a tree, without what depends on the disk below.
fn same_answers(plain: &Path, ours: &Path) -> Result<()> {
    for script in [
        "find . -xdev | LC_ALL=C sort",
        "du -x --inodes -s . | cut -f1",
        "tar c --sort=name --numeric-owner --mtime=@0 --format=posix --pax-option=exthdr.name=%f,delete=atime,delete=ctime . 2>/dev/null | sha256sum",
    ] {
        let answer = |dir: &Path| Run::new("sh").args(["-c", script]).dir(dir).timeout(120).check();
        let (wanted, found) = (answer(plain)?, answer(ours)?);
        ensure!(wanted == found, "`{script}` says\n{found}\nnot\n{wanted}");
    }
    Ok(())
}

/// Changes both trees alike: each command must end alike, and the trees must be alike afterwards.
fn same_after_changes(plain: &Path, ours: &Path, since: SystemTime) -> Result<()> {
    let change = |dir: &Path| Run::new("sh").args(["-c", CHANGES]).dir(dir).timeout(120).check();
    let (wanted, found) = (change(plain)?, change(ours)?);
    ensure!(wanted == found, "the changes went\n{found}\nnot\n{wanted}");
    let (wanted, found) = (tree::walk(plain)?, tree::walk(ours)?);
    tree::compare(&wanted, &found, since).context("after changes")
}

/// Touches up to forty names of the tree: appends, changes modes and owners, links, renames, removes, makes again.
const CHANGES: &str = r#"
export LC_ALL=C
n=0
for name in $(find . -xdev -mindepth 1 | grep -v ' ' | sort | head -n 40); do
    n=$((n + 1))
    case $((n % 6)) in
    0) chmod 700 "$name" 2>&1 ;;
    1) [ -f "$name" ] && [ ! -L "$name" ] && echo appended >> "$name" ;;
    2) mv "$name" "$name-moved" 2>&1 ;;
    3) rm -rf "$name" 2>&1; mkdir "$name" 2>&1 ;;
    4) ln "$name" "$name-linked" 2>&1 ;;
    5) chown -h 4321:1234 "$name" 2>&1 ;;
    esac
    echo "$n $?"
done
"#;
