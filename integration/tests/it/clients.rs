//! Real clients: what people pull and run with, on both generations.

use anyhow::{Result, ensure};
use darter_integration::containerd::{DARTER, GENERATIONS, Generation};
use darter_integration::darter;
use darter_integration::image::Image;
use darter_integration::registry::{PASSWORD, USER};

use crate::harness::busybox;
use crate::trees::Node;

pub const STORIES: crate::Stories = &[
    ("darter_pull_is_lazy_and_runs", 120, darter_pull_is_lazy_and_runs),
    ("ctr_of_2_pulls_lazily", 120, ctr_of_2_pulls_lazily),
    ("nerdctl_pulls_lazily_and_runs", 180, nerdctl_pulls_lazily_and_runs),
    ("crictl_pulls_lazily_and_runs", 180, crictl_pulls_lazily_and_runs),
    ("a_second_namespace_and_a_second_pull_work", 180, a_second_namespace_and_a_second_pull_work),
    ("status_and_why_tell_what_is_lazy", 120, status_and_why_tell_what_is_lazy),
];

const LINE: &str = "hello from a layer\n";

fn stocked(generation: Generation) -> Result<(Node, Image, String)> {
    let node = Node::new(generation)?;
    let image = busybox(&node.blobs, &["cat", "/etc/motd"])?;
    node.registry.push(&node.blobs, &image, "t/busybox")?;
    let reference = node.registry.reference("t/busybox");
    Ok((node, image, reference))
}

fn lazy(node: &Node, image: &Image) -> Result<()> {
    let blobs = node.containerd.layer_blobs(image)?;
    ensure!(blobs.is_empty(), "{} layer blobs are in the content store", blobs.len());
    Ok(())
}

fn runs(node: &Node, reference: &str) -> Result<()> {
    let ran = node.containerd.ctr_run(reference, DARTER, "runs").output()?;
    ensure!(ran.stdout == LINE, "{}", ran.said());
    Ok(())
}

fn darter_pull_is_lazy_and_runs() -> Result<()> {
    for generation in GENERATIONS {
        let (node, image, reference) = stocked(generation)?;
        darter::pull(&node.containerd, &reference).check()?;
        lazy(&node, &image)?;
        runs(&node, &reference)?;
    }
    Ok(())
}

fn ctr_of_2_pulls_lazily() -> Result<()> {
    let (node, image, reference) = stocked(Generation::Two)?;
    node.containerd.ctr_pull(&reference, DARTER).check()?;
    lazy(&node, &image)?;
    runs(&node, &reference)
}

fn nerdctl_pulls_lazily_and_runs() -> Result<()> {
    for generation in GENERATIONS {
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
    for generation in GENERATIONS {
        let (node, image, reference) = stocked(generation)?;
        let creds = format!("{USER}:{PASSWORD}");
        node.containerd.crictl().args(["pull", "--creds", &creds, &reference]).check()?;
        lazy(&node, &image)?;
        runs_as(&node, "k8s.io", &reference)?;
        node.containerd.crictl().args(["rmi", &reference]).check()?;
    }
    Ok(())
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
