//! The same tree: what a container sees through Darter is what it would see had containerd unpacked the image.

use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};
use darter_integration::builders::{self, Built};
use darter_integration::command::Run;
use darter_integration::containerd::{
    Containerd, DARTER, GENERATIONS, Generation, MountedSnapshot, OVERLAYFS, cache,
};
use darter_integration::darter::{self, Standalone, fuse_requests};
use darter_integration::edge::{CAPABILITY, EDGES, Edge, HUGE, REFUSED};
use darter_integration::image::{Blobs, Image, Packing};
use darter_integration::procfs;
use darter_integration::registry::Registry;
use darter_integration::tar::Entry;
use darter_integration::tree::{self, Tree};
use darter_integration::world::World;

use crate::harness::busybox;

pub const STORIES: crate::Stories = &[
    ("overlayfs_unpacks_every_edge_image", 300, overlayfs_unpacks_every_edge_image),
    ("edge_images_are_the_same_tree", 600, edge_images_are_the_same_tree),
    ("a_file_over_4_gib_is_the_same", 300, a_file_over_4_gib_is_the_same),
    ("images_of_real_builders_are_the_same_tree", 600, images_of_real_builders_are_the_same_tree),
    ("an_image_without_extended_attributes_is_asked_for_none", 120, without_attributes_none_is_asked_for),
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
        let node = Self::without_password(generation)?;
        let docker = node.world.folder("node/darter/docker")?;
        darter::docker_config(&docker, &node.registry.authority())?;
        Ok(node)
    }

    /// Nothing on the node knows the registry's password.
    pub fn without_password(generation: Generation) -> Result<Self> {
        let world = World::new()?;
        let registry = Registry::start(&world, "registry")?;
        let blobs = Blobs::open(world.folder("blobs")?)?;
        let host = world.host("node")?;
        let socket = darter::snapshotter_socket(&world, &host)?;
        let containerd = Containerd::start(&world, &host, generation, Some(&socket))?;
        containerd.plain_http(&registry.authority())?;
        let standalone = Standalone::start(&world, &containerd)?;
        Ok(Self { containerd, standalone, blobs, registry, world })
    }

    /// Makes sure that both snapshotters have the image; Darter lazily, with no blob of a layer in the content store.
    pub fn pull_both_ways(&self, image: &Image, name: &str) -> Result<()> {
        self.registry.push(&self.blobs, image, name)?;
        self.pull_pushed_both_ways(image, name)
    }

    /// The same, of an image that the registry has.
    pub fn pull_pushed_both_ways(&self, image: &Image, name: &str) -> Result<()> {
        let reference = self.registry.reference(name);
        // An image before it may share a layer, which overlayfs needed.
        let before = self.containerd.layer_blobs(image)?;
        darter::pull(&self.containerd, &reference).check()?;
        let blobs = self.containerd.layer_blobs(image)?;
        ensure!(blobs == before, "not lazy: {} layer blobs are in the content store", blobs.len());
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
            if let Err(error) = same_edge(&node, edge) {
                wrong.push(format!("{}: {error:#}", edge.name));
            }
        }
        if !wrong.is_empty() {
            bail!("{generation:?}: {} of {} differ\n{}", wrong.len(), EDGES.len(), wrong.join("\n"));
        }
    }
    Ok(())
}

fn same_edge(node: &Node, edge: &Edge) -> Result<()> {
    let since = SystemTime::now();
    let image = edge.image(&node.blobs)?;
    node.pull_both_ways(&image, &format!("edge/{}", edge.name))?;
    same_tree(node, edge.name, &image, since)
}

/// As a view and as a container's root, that one also after changes.
fn same_tree(node: &Node, name: &str, image: &Image, since: SystemTime) -> Result<()> {
    for writable in [false, true] {
        let (plain, ours) = mount_both(node, name, image, writable)?;
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

/// Through overlayfs, and through Darter.
fn mount_both(
    node: &Node,
    name: &str,
    image: &Image,
    writable: bool,
) -> Result<(MountedSnapshot, MountedSnapshot)> {
    let mounted = |snapshotter| {
        let key = format!("{name}-{snapshotter}-{writable}");
        node.containerd.mount_snapshot(snapshotter, &image.top_chain_id(), &key, writable)
    };
    Ok((mounted(OVERLAYFS)?, mounted(DARTER)?))
}

/// Of such a file the ends and samples are compared, and it is not copied up.
fn a_file_over_4_gib_is_the_same() -> Result<()> {
    let (kept, image) = HUGE.kept(&cache())?;
    for generation in GENERATIONS {
        let (since, mut node) = (SystemTime::now(), Node::new(generation)?);
        node.registry.push(&kept, &image, "edge/huge")?;
        node.pull_pushed_both_ways(&image, "edge/huge")?;
        let (plain, ours) = mount_both(&node, HUGE.name, &image, true)?;
        let (wanted, found) = (tree::walk(plain.path())?, tree::walk(ours.path())?);
        tree::compare(&wanted, &found, since)?;
        ensure!(found["zeros"].size == (4 << 30) + 3, "{:?}", found["zeros"]);
        drop((plain, ours));
        node.standalone.daemon().must_run()?;
        let resident = procfs::resident_anonymous(node.standalone.pid());
        ensure!(resident < RESIDENT_MAX, "{generation:?}: {resident} bytes are resident");
    }
    Ok(())
}

/// Of maker and node daemon in one process, whatever the size of the image.
const RESIDENT_MAX: u64 = 300 << 20;

fn images_of_real_builders_are_the_same_tree() -> Result<()> {
    let images = builders::images(&cache())?;
    images.iter().try_for_each(enough_to_compare)?;
    for generation in GENERATIONS {
        let node = Node::new(generation)?;
        for built in &images {
            let since = SystemTime::now();
            let same = || {
                node.registry.push_layout(&built.layout, built.name)?;
                node.pull_pushed_both_ways(&built.image, built.name)?;
                same_tree(&node, built.name, &built.image, since)
            };
            same().with_context(|| format!("{generation:?}: the image by {}", built.name))?;
        }
    }
    Ok(())
}

/// What a container costs that looks at each file, once another has done so: the kernel knows all but extended attributes.
fn without_attributes_none_is_asked_for() -> Result<()> {
    let node = Node::new(Generation::Two)?;
    let plain = busybox(&node.blobs, &["ls", "-lR", "/bin", "/etc"])?;
    let entry = Entry::file("bin/capable", "x").mode(0o755).xattr("security.capability", CAPABILITY);
    let capable = over(&node.blobs, &plain, entry)?;
    let mut asked = Vec::new();
    for (image, name) in [(&plain, "t/plain"), (&capable, "t/capable")] {
        node.registry.push(&node.blobs, image, name)?;
        let reference = node.registry.reference(name);
        darter::pull(&node.containerd, &reference).check()?;
        let run = |id: &str| node.containerd.ctr_run(&reference, DARTER, id).check();
        let first = run("first")?;
        let before = fuse_requests(&node.standalone.root())?;
        ensure!(run("second")? == first, "the second container sees something else");
        let after = fuse_requests(&node.standalone.root())?;
        asked.push(after["getxattr"] - before["getxattr"]);
    }
    ensure!(asked[0] == 0, "asked {} times for what no file has", asked[0]);
    ensure!(asked[1] > 20, "asked {} times only: what does this story count?", asked[1]);
    let mounted = node.containerd.mount_snapshot(DARTER, &capable.top_chain_id(), "capable", true)?;
    let found = xattr::get(mounted.path().join("bin/capable"), "security.capability")?;
    ensure!(found.as_deref() == Some(&CAPABILITY[..]), "the file's capability is {found:?}");
    Ok(())
}

/// The image with a layer more, of one entry.
fn over(blobs: &Blobs, image: &Image, entry: Entry) -> Result<Image> {
    let layer = blobs.layer(Packing::Gzip, &[Entry::dir("bin"), entry])?;
    let layers: Vec<_> = image.layers.iter().cloned().chain([layer]).collect();
    blobs.image(&layers, &["ls", "-lR", "/bin", "/etc"])
}

/// Six layers, five thousand entries, whiteouts, and a directory that hides what is below it.
fn enough_to_compare(built: &Built) -> Result<()> {
    let mut names = Vec::new();
    for layer in &built.image.layers {
        let blob = built.layout.join("blobs").join(layer.blob.digest.replace(':', "/"));
        // What umoci inserts has no end of the archive, of which tar complains after it has listed all.
        let list = Run::new("tar").arg("tzf").arg(blob.display()).output()?;
        names.extend(list.stdout.lines().map(str::to_owned));
    }
    let with = |mark: &str| names.iter().filter(|name| name.contains(mark)).count();
    let (layers, opaque) = (built.image.layers.len(), with("/.wh..wh..opq"));
    let whiteouts = with("/.wh.") - opaque;
    ensure!(
        layers >= 6 && names.len() >= 5000 && whiteouts > 0 && opaque > 0,
        "{}: {layers} layers, {} entries, {whiteouts} whiteouts, {opaque} opaque",
        built.name,
        names.len()
    );
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
