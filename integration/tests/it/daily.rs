//! Daily use: platforms, commits, removals, and what goes wrong in the middle.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use darter_integration::command::eventually;
use darter_integration::containerd::{DARTER, Generation};
use darter_integration::darter;
use darter_integration::image::Image;
use darter_integration::registry::{PASSWORD, USER};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::busybox;
use crate::site::{Data, Site, mount};
use crate::trees::Node;

pub const STORIES: crate::Stories = &[
    ("an_image_for_two_platforms_is_pulled_for_one_or_all", 120, an_image_for_two_platforms),
    ("a_container_can_be_committed_and_all_pruned", 180, a_container_can_be_committed),
    ("a_credential_helper_is_asked", 120, a_credential_helper_is_asked),
    ("a_header_in_hosts_toml_is_enough", 120, a_header_in_hosts_toml_is_enough),
    ("pulls_at_the_same_time_share_layers", 180, pulls_at_the_same_time),
    ("a_cancelled_pull_leaves_nothing_and_can_be_repeated", 180, a_cancelled_pull),
];

fn an_image_for_two_platforms() -> Result<()> {
    let site = Site::with_nodes(1)?;
    let ours = Data::new(&site.blobs, 1, 4, 50_000)?;
    let theirs = Data::new(&site.blobs, 2, 4, 50_000)?;
    let other = site.blobs.image_for("arm64", &theirs.image.layers, &["cat", "/etc/motd"])?;
    for image in [&ours.image, &other] {
        site.stub.add(image, "daily/both");
    }
    let reference = site.stub.add_index(&[("arm64", &other), ("amd64", &ours.image)], "daily/both")?;
    let containerd = &site.node(0).containerd;
    darter::pull(containerd, &reference).check()?;
    site.check(0, &ours, &reference, "ours")?;
    darter::pull(containerd, &reference).args(["--platform", "linux/arm64"]).check()?;
    ensure!(containerd.layer_blobs(&other)?.is_empty(), "the other platform's image is not lazy");
    let mounted = mount(site.node(0), &other, "theirs")?;
    let wrong = mounted.path().join("data/0000");
    ensure!(fs::read(&wrong)?.len() == 50_000, "{} is not what the image has", wrong.display());
    drop(mounted);
    let missing = darter::pull(containerd, &reference).args(["--platform", "linux/riscv64"]).output()?;
    ensure!(!missing.success() && missing.stderr.contains("riscv64"), "{}", missing.said());
    let namespace = format!("{}-all", containerd.namespace());
    let all = ["images", "pull", "--plain-http", "--all-platforms", "--snapshotter", DARTER, &reference];
    containerd.ctr_in(&namespace).args(all).check()?;
    let run = ["run", "--rm", "--net-host", "--snapshotter", DARTER, &reference, "all", "cat", "/etc/motd"];
    containerd.ctr_in(&namespace).args(run).check().map(drop)
}

/// As people do it with nerdctl; a commit needs the layers, so they are brought before.
fn a_container_can_be_committed() -> Result<()> {
    let node = Node::new(Generation::Two)?;
    let image = busybox(&node.blobs, &["cat", "/etc/motd"])?;
    node.registry.push(&node.blobs, &image, "daily/app")?;
    let reference = node.registry.reference("daily/app");
    let authority = node.registry.authority();
    let login = ["login", "--insecure-registry", "-u", USER, "-p", PASSWORD, authority.as_str()];
    node.containerd.nerdctl().args(login).check()?;
    let nerdctl = |words: &[&str]| {
        node.containerd.nerdctl().args(["--snapshotter", DARTER, "--insecure-registry"]).args(words).check()
    };
    let change = "echo changed > /etc/motd; rm /bin/no-such; echo done";
    nerdctl(&["run", "--name", "changed", "--net=none", &reference, "busybox", "sh", "-c", change])?;
    let socket = node.containerd.socket();
    let hydrate = ["hydrate", "--namespace", node.containerd.namespace(), &reference];
    node.standalone.command(&hydrate).arg("--containerd-address").arg(socket.display()).check()?;
    nerdctl(&["commit", "changed", "daily/committed:1"])?;
    let said = nerdctl(&["run", "--rm", "--net=none", "daily/committed:1", "cat", "/etc/motd"])?;
    ensure!(said == "changed\n", "the commit has {said:?}");
    let archive = node.world.folder("saved")?.join("image.tar");
    nerdctl(&["save", "-o", &archive.display().to_string(), "daily/committed:1"])?;
    nerdctl(&["rm", "changed"])?;
    nerdctl(&["rmi", "-f", "daily/committed:1"])?;
    nerdctl(&["load", "-i", &archive.display().to_string()])?;
    let said = nerdctl(&["run", "--rm", "--net=none", "daily/committed:1", "cat", "/etc/motd"])?;
    ensure!(said == "changed\n", "the image that was saved has {said:?}");
    nerdctl(&["system", "prune", "--all", "--force"])?;
    let left = || node.containerd.ctr().args(["snapshots", "--snapshotter", DARTER, "ls"]).check();
    eventually("all snapshots are gone", 20, || Ok(left()?.lines().count() <= 1))
}

/// An image at the registry with a password, on a node that knows none.
fn private() -> Result<(Node, Image, String)> {
    let node = Node::without_password(Generation::Two)?;
    let image = busybox(&node.blobs, &["cat", "/etc/motd"])?;
    node.registry.push(&node.blobs, &image, "daily/private")?;
    let reference = node.registry.reference("daily/private");
    Ok((node, image, reference))
}

fn a_credential_helper_is_asked() -> Result<()> {
    let (node, image, reference) = private()?;
    let folder = node.world.folder("node/darter")?;
    let (bin, docker) = (folder.join("bin"), folder.join("docker"));
    fs::create_dir_all(&bin)?;
    fs::create_dir_all(&docker)?;
    let helper = bin.join("docker-credential-story");
    fs::write(
        &helper,
        format!(
            "#!/bin/sh\ncat > {}\necho '{{\"Username\":\"{USER}\",\"Secret\":\"{PASSWORD}\"}}'\n",
            folder.join("asked").display()
        ),
    )?;
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755))?;
    let authority = node.registry.authority();
    fs::write(docker.join("config.json"), format!("{{\"credHelpers\":{{\"{authority}\":\"story\"}}}}"))?;
    node.containerd.ctr_pull(&reference, DARTER).check()?;
    ensure!(node.containerd.layer_blobs(&image)?.is_empty(), "the pull was not lazy");
    node.containerd.ctr_run(&reference, DARTER, "helped").check()?;
    let asked = fs::read_to_string(folder.join("asked"))?;
    ensure!(asked == authority, "the helper was asked for {asked:?}");
    Ok(())
}

/// The way of a kubelet whose nodes are let in by configuration: the pull itself brings nothing.
fn a_header_in_hosts_toml_is_enough() -> Result<()> {
    let (node, image, reference) = private()?;
    let authority = node.registry.authority();
    let file = node.containerd.hosts_dir().join(&authority).join("hosts.toml");
    let login = STANDARD.encode(format!("{USER}:{PASSWORD}"));
    let header = format!("\n[host.\"http://{authority}\".header]\n  Authorization = \"Basic {login}\"\n");
    fs::write(&file, fs::read_to_string(&file)? + &header)?;
    node.containerd.crictl().args(["pull", &reference]).check()?;
    let stored = node.containerd.ctr_in("k8s.io").args(["content", "ls", "-q"]).check()?;
    let blobs = image.layers.iter().filter(|layer| stored.contains(&layer.blob.digest)).count();
    ensure!(blobs == 0, "{blobs} layer blobs are in the content store");
    let run = ["run", "--rm", "--net-host", "--snapshotter", DARTER, &reference, "let-in"];
    node.containerd.ctr_in("k8s.io").args(run).check().map(drop)
}

/// With images removed, and garbage collected, meanwhile.
fn pulls_at_the_same_time() -> Result<()> {
    let site = Site::with_nodes(1)?;
    let images: Vec<(Data, String)> = (0..6)
        .map(|n| {
            let data = Data::new(&site.blobs, 1 + n, 6, 60_000)?;
            let reference = site.add(&data, &format!("daily/shared-{n}"));
            Ok((data, reference))
        })
        .collect::<Result<_>>()?;
    let (doomed, kept) = images.split_at(2);
    for (data, reference) in doomed {
        site.pull(0, data, reference)?;
    }
    thread::scope(|scope| {
        let pulls: Vec<_> =
            kept.iter().map(|(data, reference)| scope.spawn(|| site.pull(0, data, reference))).collect();
        for (_, reference) in doomed {
            site.node(0).containerd.remove_image(reference)?;
        }
        pulls.into_iter().try_for_each(|pull| pull.join().expect("a pull does not panic"))
    })?;
    for (number, (data, reference)) in kept.iter().enumerate() {
        site.check(0, data, reference, &format!("shared-{number}"))?;
    }
    let base = &kept[0].0.image.layers[0].blob.digest;
    ensure!(site.stub.reads_of(base) == 1, "the shared layer was read {} times", site.stub.reads_of(base));
    Ok(())
}

fn a_cancelled_pull() -> Result<()> {
    let site = Site::with_nodes(1)?;
    let data = Data::new(&site.blobs, 1, 30, 200_000)?;
    let reference = site.add(&data, "daily/cancelled");
    let containerd = &site.node(0).containerd;
    let mut cancelled = 0;
    for milliseconds in [3, 6, 10, 15, 20, 30, 40, 60, 80, 120] {
        let mut pull = darter::pull(containerd, &reference).start()?;
        thread::sleep(Duration::from_millis(milliseconds));
        if pull.is_running() {
            kill(Pid::from_raw(pull.pid() as i32), Signal::SIGINT).context("it has ended just now")?;
        }
        cancelled += usize::from(!pull.finish()?.success());
        containerd.remove_image(&reference)?;
        let left = || containerd.ctr().args(["snapshots", "--snapshotter", DARTER, "ls"]).check();
        eventually("nothing is left of the pull", 20, || Ok(left()?.lines().count() <= 1))?;
    }
    ensure!(cancelled > 0, "no pull was cancelled in its middle");
    site.pull(0, &data, &reference)?;
    site.check(0, &data, &reference, "whole")
}
