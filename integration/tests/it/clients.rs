//! Real clients: what people pull and run with, on both generations.

use anyhow::{Result, ensure};
use darter_integration::command::eventually;
use darter_integration::containerd::{ALL_GENERATIONS, DARTER, Generation, SANDBOX};
use darter_integration::image::Image;
use darter_integration::registry::{PASSWORD, USER};
use darter_integration::{darter, sweep};
use serde_json::json;

use crate::harness::busybox;
use crate::trees::Node;

pub const STORIES: crate::Stories = &[
    ("darter_pull_is_lazy_and_runs", 120, darter_pull_is_lazy_and_runs),
    ("ctr_of_2_pulls_lazily", 120, ctr_of_2_pulls_lazily),
    ("nerdctl_pulls_lazily_and_runs", 180, nerdctl_pulls_lazily_and_runs),
    ("crictl_pulls_lazily_and_runs", 180, crictl_pulls_lazily_and_runs),
    ("a_pod_runs_from_a_lazy_image", 180, a_pod_runs_from_a_lazy_image),
    ("statistics_match_what_is_written", 180, statistics_match_what_is_written),
    ("credentials_of_a_cri_pull_are_enough", 120, credentials_of_a_cri_pull_are_enough),
    ("a_second_namespace_and_a_second_pull_work", 180, a_second_namespace_and_a_second_pull_work),
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

fn ctr_of_2_pulls_lazily() -> Result<()> {
    for generation in [Generation::TwoZero, Generation::Two] {
        let (node, image, reference) = stocked(generation)?;
        node.containerd.ctr_pull(&reference, DARTER).check()?;
        lazy(&node, &image)?;
        runs(&node, &reference)?;
    }
    Ok(())
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
    let (pod_file, container_file) = write_pod(node, &reference)?;
    let pod = crictl().args(["runp", &pod_file]).check()?;
    let container = crictl().args(["create", pod.trim(), &container_file, &pod_file]).check()?;
    crictl().args(["start", container.trim()]).check()?;
    Ok((pod.trim().to_owned(), container.trim().to_owned()))
}

fn a_pod_runs_from_a_lazy_image() -> Result<()> {
    let node = Node::new(Generation::Two)?;
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
    const WRITTEN: u64 = 5 << 20;
    let node = Node::new(Generation::Two)?;
    let write = "busybox dd if=/dev/zero of=/written bs=1M count=5; busybox sleep 600";
    let (pod, container) = start_pod(&node, &["busybox", "sh", "-c", write])?;
    let used = || -> Result<u64> {
        let said = node.containerd.crictl().args(["stats", "-o", "json", "--id", &container]).check()?;
        let stats: serde_json::Value = serde_json::from_str(&said)?;
        let used = stats["stats"][0]["writableLayer"]["usedBytes"]["value"].as_str().unwrap_or("0");
        Ok(used.parse()?)
    };
    eventually("the statistics tell what was written", 60, || Ok(used()? >= WRITTEN))?;
    // Beside it are folders that containerd makes.
    ensure!(used()? < WRITTEN + (128 << 10), "{} bytes for {WRITTEN} that were written", used()?);
    let said = node.containerd.crictl().args(["imagefsinfo", "-o", "json"]).check()?;
    ensure!(said.contains("usedBytes"), "{said}");
    node.containerd.crictl().args(["rmp", "-f", &pod]).check().map(drop)
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
    let (node, image, reference) = stocked(Generation::Two)?;
    let pull = |namespace: &str| {
        let credentials = format!("{USER}:{PASSWORD}");
        let words =
            ["images", "pull", "--plain-http", "--user", &credentials, "--snapshotter", DARTER, &reference];
        node.containerd.ctr_in(namespace).args(words).check()
    };
    let mine = node.containerd.namespace().to_owned();
    let other = format!("{mine}-other");
    pull(&mine)?;
    pull(&other)?;
    runs_as(&node, &other, &reference)?;
    node.containerd.remove_image(&reference)?;
    runs_as(&node, &other, &reference)?;
    pull(&mine)?;
    lazy(&node, &image)?;
    runs(&node, &reference)?;
    node.containerd.ctr_in(&other).args(["images", "rm", "--sync", &reference]).check()?;
    node.containerd.remove_image(&reference)?;
    let left = node.containerd.ctr().args(["snapshots", "--snapshotter", DARTER, "ls"]).check()?;
    ensure!(left.lines().count() <= 1, "snapshots are left:\n{left}");
    pull(&mine)?;
    runs(&node, &reference)
}

fn status_and_why_tell_what_is_lazy() -> Result<()> {
    let (node, image, reference) = stocked(Generation::One)?;
    darter::pull(&node.containerd, &reference).check()?;
    runs(&node, &reference)?;
    let status = node.standalone.command(&["status"]).check()?;
    for layer in &image.layers {
        let id = &layer.diff_id["sha256:".len()..][..12];
        ensure!(status.contains(id), "no word of layer {id}:\n{status}");
    }
    let why = node.standalone.command(&["why", &reference]).check()?;
    ensure!(why.to_lowercase().contains("lazy"), "{why}");
    Ok(())
}
