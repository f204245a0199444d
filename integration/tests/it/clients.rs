//! Real clients: what people pull and run with, on every generation.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use darter_integration::cluster::Options;
use darter_integration::command::{Run, eventually, tail};
use darter_integration::containerd::{ALL_GENERATIONS, DARTER, Generation, SANDBOX};
use darter_integration::image::{Image, Layer};
use darter_integration::registry::{PASSWORD, USER};
use darter_integration::stub::Fault;
use darter_integration::{darter, sweep};
use serde_json::json;

use crate::harness::{busybox, with_each_containerd};
use crate::site::{Data, SUM, Site, start_again};
use crate::trees::Node;

pub const STORIES: crate::Stories = &[
    ("darter_pull_is_lazy_and_runs", 120, darter_pull_is_lazy_and_runs),
    ("ctr_of_2_pulls_lazily", 180, ctr_of_2_pulls_lazily),
    ("nerdctl_pulls_lazily_and_runs", 180, nerdctl_pulls_lazily_and_runs),
    ("crictl_pulls_lazily_and_runs", 180, crictl_pulls_lazily_and_runs),
    ("a_cri_pull_is_held_until_the_maps_are_there", 180, a_cri_pull_is_held_until_the_maps_are_there),
    ("a_pod_runs_from_a_lazy_image", 240, a_pod_runs_from_a_lazy_image),
    ("statistics_match_what_is_written", 480, statistics_match_what_is_written),
    ("credentials_of_a_cri_pull_are_enough", 120, credentials_of_a_cri_pull_are_enough),
    ("a_second_namespace_and_a_second_pull_work", 240, a_second_namespace_and_a_second_pull_work),
    ("status_and_why_tell_what_is_lazy", 120, status_and_why_tell_what_is_lazy),
];

/// The containerd namespace of what comes by CRI.
const CRI: &str = "k8s.io";
const LINE: &str = "hello from a layer\n";

fn stocked(generation: Generation) -> Result<(Node, Image, String)> {
    let node = Node::new(generation)?;
    let image = busybox(&node.blobs, &["cat", "/etc/motd"])?;
    node.registry.push(&node.blobs, &image, "t/busybox")?;
    let reference = node.registry.reference("t/busybox");
    Ok((node, image, reference))
}

fn lazy(node: &Node, image: &Image) -> Result<()> {
    lazy_in(node, node.containerd.namespace(), image)
}

fn lazy_in(node: &Node, namespace: &str, image: &Image) -> Result<()> {
    let stored = node.containerd.ctr_in(namespace).args(["content", "ls", "-q"]).check()?;
    let found = image.layers.iter().filter(|layer| stored.contains(&layer.blob.digest)).count();
    ensure!(found == 0, "{found} layer blobs are in the content store");
    Ok(())
}

fn runs(node: &Node, reference: &str) -> Result<()> {
    let ran = node.containerd.ctr_run(reference, DARTER, "runs").output()?;
    ensure!(ran.stdout == LINE, "{}", ran.said());
    Ok(())
}

fn darter_pull_is_lazy_and_runs() -> Result<()> {
    for generation in ALL_GENERATIONS {
        let (node, image, reference) = stocked(generation)?;
        darter::pull(&node.containerd, &reference).check()?;
        lazy(&node, &image)?;
        runs(&node, &reference)?;
    }
    Ok(())
}

/// That of 1.x pulls, too: it asks for nothing lazily and downloads all layers, which containerd unpacks into Darter.
fn ctr_of_2_pulls_lazily() -> Result<()> {
    with_each_containerd(|generation| {
        let (node, image, reference) = stocked(generation)?;
        node.containerd.ctr_pull(&reference, DARTER).check()?;
        if generation.ctr_pulls_lazily() {
            lazy(&node, &image)?;
        } else {
            let stored = node.containerd.layer_blobs(&image)?.len();
            ensure!(stored == image.layers.len(), "{stored} layer blobs are in the content store");
        }
        runs(&node, &reference)
    })
}

fn nerdctl_pulls_lazily_and_runs() -> Result<()> {
    for generation in ALL_GENERATIONS {
        let (node, image, reference) = stocked(generation)?;
        let authority = node.registry.authority();
        let login = ["login", "--insecure-registry", "-u", USER, "-p", PASSWORD, authority.as_str()];
        node.containerd.nerdctl().args(login).check()?;
        let snapshotter = ["--snapshotter", DARTER, "--insecure-registry"];
        node.containerd.nerdctl().args(snapshotter).args(["pull", "-q", &reference]).check()?;
        lazy(&node, &image)?;
        let run = ["run", "--rm", "--net=none", &reference];
        let ran = node.containerd.nerdctl().args(snapshotter).args(run).output()?;
        ensure!(ran.stdout == LINE, "{}", ran.said());
    }
    Ok(())
}

/// Without CNI: on the host's network. The pause container is the image itself, told to sleep.
fn crictl_pulls_lazily_and_runs() -> Result<()> {
    for generation in ALL_GENERATIONS {
        let (node, image, reference) = stocked(generation)?;
        let creds = format!("{USER}:{PASSWORD}");
        node.containerd.crictl().args(["pull", "--creds", &creds, &reference]).check()?;
        lazy_in(&node, CRI, &image)?;
        runs_as(&node, CRI, &reference)?;
        node.containerd.crictl().args(["rmi", &reference]).check()?;
    }
    Ok(())
}

/// Its layer takes longer than a mount waits, and than a line of the log about what is waited for lets wait for itself.
fn a_cri_pull_is_held_until_the_maps_are_there() -> Result<()> {
    const SIZE: usize = 4_000_000;
    const SECONDS: u64 = 8;
    let node_config = "mount_wait_seconds = 1\n".to_owned();
    let mut site = Site::new(Options { nodes: 1, node_config, ..Options::default() })?;
    let add = |site: &Site, salt: u64, seconds: u64| -> Result<(Data, String)> {
        let data = Data::new(&site.blobs, salt, 4, SIZE / 4)?;
        site.stub.fault(data.top_blob(), Fault::Slow(SIZE as u64 / seconds));
        let reference = site.add(&data, &format!("held/{salt}"));
        Ok((data, reference))
    };
    let pull = |site: &Site, reference: &str| -> Result<Duration> {
        let node = site.node(0);
        let crictl = node.containerd.crictl_with_images_of(node.socket());
        let pulled = crictl.args(["pull", reference]).output()?;
        ensure!(pulled.success(), "{}", pulled.said());
        Ok(pulled.took)
    };
    let (data, reference) = add(&site, 1, SECONDS)?;
    let took = pull(&site, &reference)?;
    ensure!(took > Duration::from_secs(SECONDS - 2), "the pull was done after {took:?}");
    let run = ["run", "--rm", "--net-host", "--snapshotter", DARTER, &reference, "held", "sh", "-c", SUM];
    let ran = site.node(0).containerd.ctr_in(CRI).args(run).output()?;
    ensure!(ran.stdout.starts_with(&data.sum), "not {}: {}", data.sum, ran.said());
    let diff_id = &data.image.layers.last().context("it has layers")?.diff_id;
    let log = site.cluster.nodes[0].snapshotter.daemon()?.log_text();
    let tells = |line: &str| ["pulling", diff_id.as_str(), " MB read"].iter().all(|word| line.contains(word));
    ensure!(log.lines().any(tells), "no word of how far the pull is:\n{}", tail(&log, 20));

    let node = &mut site.cluster.nodes[0];
    node.snapshotter.stop(30)?;
    node.snapshotter.set("pull_wait_seconds", "1")?;
    start_again(node)?;
    let (_, slow) = add(&site, 2, 10 * SECONDS)?;
    let took = pull(&site, &slow)?;
    let bound = Duration::from_secs(1)..Duration::from_secs(SECONDS);
    ensure!(bound.contains(&took), "pull_wait_seconds is 1, and the pull took {took:?}");
    let log = site.cluster.nodes[0].snapshotter.daemon()?.log_text();
    ensure!(log.contains("the image is pulled, but not ready"), "no word of it:\n{}", tail(&log, 20));
    Ok(())
}

/// A pod on the host's network, so without CNI, with one container that runs `command`. Its sandbox is made of a lazy image
/// as well. Gives the ids of pod and container.
fn start_pod(node: &Node, command: &[&str]) -> Result<(String, String)> {
    let crictl = || node.containerd.crictl();
    let pull = |image: &Image, name: &str| -> Result<String> {
        node.registry.push(&node.blobs, image, name)?;
        let (creds, reference) = (format!("{USER}:{PASSWORD}"), node.registry.reference(name));
        crictl().args(["pull", "--creds", &creds, &reference]).check()?;
        lazy_in(node, CRI, image)?;
        Ok(reference)
    };
    let pause = pull(&busybox(&node.blobs, &["sleep", "1000"])?, "t/pause")?;
    let reference = pull(&busybox(&node.blobs, command)?, "t/busybox")?;
    node.containerd.ctr_in(CRI).args(["images", "tag", &pause, SANDBOX]).check()?;
    // CRI learns of it by an event.
    let is_known = || Ok(crictl().args(["inspecti", "-q", SANDBOX]).output()?.success());
    eventually("CRI knows the sandbox's image", 20, is_known)?;
    let (pod_file, container_file) = write_pod(node, &reference)?;
    let pod = crictl().args(["runp", &pod_file]).check()?;
    let container = crictl().args(["create", pod.trim(), &container_file, &pod_file]).check()?;
    crictl().args(["start", container.trim()]).check()?;
    Ok((pod.trim().to_owned(), container.trim().to_owned()))
}

fn a_pod_runs_from_a_lazy_image() -> Result<()> {
    with_each_containerd(a_pod_runs)
}

fn a_pod_runs(generation: Generation) -> Result<()> {
    let node = Node::new(generation)?;
    let crictl = || node.containerd.crictl();
    let (pod, container) = start_pod(&node, &["cat", "/etc/motd"])?;
    let logs = || Ok(crictl().args(["logs", &container]).output()?.stdout == LINE);
    eventually("the container's line is in its log", 20, logs)?;
    crictl().args(["rmp", "-f", &pod]).check()?;
    let left = crictl().args(["pods", "-q"]).check()?;
    ensure!(left.trim().is_empty(), "pods are left: {left}");
    Ok(())
}

/// What kubelet asks before it evicts pods and images. containerd looks every ten seconds.
fn statistics_match_what_is_written() -> Result<()> {
    with_each_containerd(statistics_match)
}

const WRITTEN: u64 = 5 << 20;

fn statistics_match(generation: Generation) -> Result<()> {
    let node = Node::new(generation)?;
    let write = "busybox dd if=/dev/zero of=/written bs=1M count=5; busybox sleep 600";
    let (pod, container) = start_pod(&node, &["busybox", "sh", "-c", write])?;
    let upper = upper_directory(&node, &container)?;
    let (mut told, mut found) = (Taken::default(), Taken::default());
    let same = eventually("the statistics tell what du finds", 60, || {
        (told, found) = (told_of_container(&node, &container)?, Taken::found(&upper)?);
        Ok(found.bytes >= WRITTEN && told == found)
    });
    same.with_context(|| format!("told {told:?}, found {found:?} in {}", upper.display()))?;
    // The images have the same layers, with nothing large in them but busybox; beside them are a sandbox and folders.
    let images = std::fs::metadata("/bin/busybox")?.len();
    let mut all = Taken::default();
    let same = eventually("the statistics tell what images and containers take", 60, || {
        all = told_of_images(&node)?;
        Ok((images + found.bytes..images + found.bytes + (1 << 20)).contains(&all.bytes))
    });
    same.with_context(|| format!("told {all:?}, the images have {images} bytes, the container {found:?}"))?;
    ensure!(all.inodes > found.inodes, "told {all:?}, the container alone has {found:?}");
    println!("  {generation:?}: the container {told:?}, with the images {all:?}");
    node.containerd.crictl().args(["rmp", "-f", &pod]).check().map(drop)
}

/// Room on a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Taken {
    bytes: u64,
    inodes: u64,
}

impl Taken {
    /// As du counts it, the folder itself included.
    fn found(folder: &Path) -> Result<Self> {
        let du = |how: &str| -> Result<u64> {
            let said = Run::new("du").args(["-s", how]).arg(folder.display()).check()?;
            Ok(said.split_whitespace().next().context("du said nothing")?.parse()?)
        };
        Ok(Self { bytes: du("-B1")?, inodes: du("--inodes")? })
    }

    /// As CRI tells it; nothing where it tells nothing yet.
    fn told(usage: &serde_json::Value) -> Result<Self> {
        let number = |field: &str| usage[field]["value"].as_str().unwrap_or("0").parse::<u64>();
        Ok(Self { bytes: number("usedBytes")?, inodes: number("inodesUsed")? })
    }
}

fn told_of_container(node: &Node, container: &str) -> Result<Taken> {
    let said = node.containerd.crictl().args(["stats", "-o", "json", "--id", container]).check()?;
    let stats: serde_json::Value = serde_json::from_str(&said)?;
    Taken::told(&stats["stats"][0]["writableLayer"])
}

/// containerd counts all snapshots here, also those of containers.
fn told_of_images(node: &Node) -> Result<Taken> {
    let said = node.containerd.crictl().args(["imagefsinfo", "-o", "json"]).check()?;
    let info: serde_json::Value = serde_json::from_str(&said)?;
    let systems =
        info["status"]["imageFilesystems"].as_array().with_context(|| format!("no file systems: {said}"))?;
    Taken::told(systems.first().with_context(|| format!("no file system: {said}"))?)
}

/// Where the container's overlayfs writes.
fn upper_directory(node: &Node, container: &str) -> Result<PathBuf> {
    let said = node.containerd.crictl().args(["inspect", container]).check()?;
    let told: serde_json::Value = serde_json::from_str(&said)?;
    let pid = told["info"]["pid"].as_u64().with_context(|| format!("no process of {container}: {said}"))?;
    let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let root = mounts.lines().find(|line| line.split(' ').nth(4) == Some("/"));
    let root = root.with_context(|| format!("{container} has no root:\n{mounts}"))?;
    let upper = root.split([' ', ',']).find_map(|option| option.strip_prefix("upperdir="));
    Ok(upper.with_context(|| format!("{container} has no upper directory: {root}"))?.into())
}

/// Writes what crictl wants to know of pod and container, and returns both paths.
fn write_pod(node: &Node, reference: &str) -> Result<(String, String)> {
    let folder = node.world.folder("pod")?;
    let host_network = json!({"namespace_options": {"network": 2}});
    let pod = json!({
        "metadata": {"name": "pod", "namespace": "default", "uid": "one", "attempt": 1},
        "log_directory": folder.display().to_string(),
        "linux": {
            "cgroup_parent": format!("/{}", sweep::containerd_namespace(std::process::id())),
            "security_context": host_network,
        },
    });
    let container = json!({
        "metadata": {"name": "prints"},
        "image": {"image": reference},
        "log_path": "prints.log",
        "linux": {"security_context": host_network},
    });
    let write = |name: &str, content: serde_json::Value| -> Result<String> {
        let path = folder.join(name);
        std::fs::write(&path, content.to_string())?;
        Ok(path.display().to_string())
    };
    Ok((write("pod.json", pod)?, write("container.json", container)?))
}

/// The kubelet asks Darter's socket about images; nothing else on the node knows the registry's password.
fn credentials_of_a_cri_pull_are_enough() -> Result<()> {
    let node = Node::without_password(Generation::Two)?;
    let image = busybox(&node.blobs, &["cat", "/etc/motd"])?;
    node.registry.push(&node.blobs, &image, "t/busybox")?;
    let reference = node.registry.reference("t/busybox");
    let socket = darter::snapshotter_socket(&node.world, node.containerd.host())?;
    let crictl = || node.containerd.crictl_with_images_of(&socket);
    let pull = |creds: &str| crictl().args(["pull", "--creds", creds, &reference]).output();
    let refused = pull("reader:wrong")?;
    ensure!(!refused.success(), "a wrong password was taken");
    let pulled = pull(&format!("{USER}:{PASSWORD}"))?;
    ensure!(pulled.success(), "{}", pulled.said());
    lazy_in(&node, CRI, &image)?;
    let images = crictl().args(["images", "-q"]).check()?;
    ensure!(images.contains(&image.config.digest), "{images}");
    runs_as(&node, CRI, &reference)
}

fn runs_as(node: &Node, namespace: &str, reference: &str) -> Result<()> {
    let run = ["run", "--rm", "--net-host", "--snapshotter", DARTER, reference, "other"];
    let ran = node.containerd.ctr_in(namespace).args(run).output()?;
    ensure!(ran.stdout == LINE, "{}", ran.said());
    Ok(())
}

fn a_second_namespace_and_a_second_pull_work() -> Result<()> {
    with_each_containerd(two_namespaces)
}

/// Debian's 1.6 doesn't tell the snapshotter in which namespace `ctr`, nerdctl and `darter pull` are.
fn two_namespaces(generation: Generation) -> Result<()> {
    let (node, image, reference) = stocked(generation)?;
    let containerd = &node.containerd;
    let pull = |namespace: &str| -> Result<()> {
        darter::pull_lazily_in(containerd, namespace, &reference).check()?;
        lazy_in(&node, namespace, &image)
    };
    let remove = |namespace: &str| containerd.remove_image_in(namespace, &reference);
    let mine = containerd.namespace().to_owned();
    let other = format!("{mine}-other");
    pull(&mine)?;
    pull(&other)?;
    runs_as(&node, &other, &reference)?;
    remove(&mine)?;
    runs_as(&node, &other, &reference)?;
    pull(&mine)?;
    runs(&node, &reference)?;
    remove(&other)?;
    runs(&node, &reference)?;
    remove(&mine)?;
    nothing_is_left(&node)?;
    pulls_in_both_at_once(&node, &pull, [&mine, &other])?;
    for namespace in [&other, &mine] {
        runs_as(&node, namespace, &reference)?;
        remove(namespace)?;
    }
    nothing_is_left(&node)
}

/// While garbage is collected; twice in each, so that the second finds what the other's first has brought.
fn pulls_in_both_at_once(
    node: &Node,
    pull: &(impl Fn(&str) -> Result<()> + Sync),
    namespaces: [&str; 2],
) -> Result<()> {
    node.containerd.while_collecting(|| {
        thread::scope(|scope| {
            let twice = |namespace| scope.spawn(move || pull(namespace).and_then(|()| pull(namespace)));
            let pulls = namespaces.map(twice);
            pulls.into_iter().try_for_each(|pull| pull.join().expect("a pull does not panic"))
        })
    })
}

/// In no namespace: whoever asks Darter itself sees them all.
fn nothing_is_left(node: &Node) -> Result<()> {
    let socket = darter::snapshotter_socket(&node.world, node.containerd.host())?;
    let left = || Ok(node.containerd.snapshots_at(&socket)?.is_empty());
    eventually("all snapshots are gone", 20, left)
}

fn status_and_why_tell_what_is_lazy() -> Result<()> {
    let (node, image, reference) = stocked(Generation::One)?;
    darter::pull(&node.containerd, &reference).check()?;
    runs(&node, &reference)?;
    let status = node.standalone.command(&["status"]).check()?;
    for layer in &image.layers {
        let line = line_of(&status, layer)?;
        let known = ["ready, arriving as it is needed", "complete"].iter().any(|state| line.contains(state));
        ensure!(known, "{line}");
    }
    let why = node.standalone.command(&["why", &reference]).check()?;
    image.layers.iter().try_for_each(|layer| why_is(&why, layer, "lazy", &["has it", "known against it"]))
}

/// What a command tells of a layer, by the beginning of its diff ID.
fn line_of<'a>(told: &'a str, layer: &Layer) -> Result<&'a str> {
    let id = &layer.diff_id["sha256:".len()..][..12];
    let line = told.lines().find(|line| line.split_whitespace().next() == Some(id));
    line.with_context(|| format!("no word of layer {id}:\n{told}"))
}

/// `darter why` tells that the layer is `kind`, and one of the reasons.
pub fn why_is(why: &str, layer: &Layer, kind: &str, reasons: &[&str]) -> Result<()> {
    let line = line_of(why, layer)?;
    let told = line.split_once(" MB  ").and_then(|(_, told)| told.split_once(' '));
    let is_so = |(told, reason): (&str, &str)| told == kind && reasons.iter().any(|one| reason.contains(one));
    ensure!(told.is_some_and(is_so), "not {kind} because of {reasons:?}: {line}");
    Ok(())
}
