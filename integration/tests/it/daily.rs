//! Daily use: platforms, commits, removals, and what goes wrong in the middle.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use darter_integration::command::{Run, Running, eventually};
use darter_integration::containerd::{COLLECTING, Containerd, DARTER, Generation};
use darter_integration::darter;
use darter_integration::image::Image;
use darter_integration::registry::{PASSWORD, USER};
use darter_integration::stub::Fault;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{busybox, with_each_containerd};
use crate::site::{Data, Site, mount};
use crate::trees::Node;

pub const STORIES: crate::Stories = &[
    ("an_image_for_two_platforms_is_pulled_for_one_or_all", 240, an_image_for_two_platforms),
    ("a_container_can_be_committed_and_all_pruned", 300, a_container_can_be_committed),
    ("a_credential_helper_is_asked", 120, a_credential_helper_is_asked),
    ("a_header_in_hosts_toml_is_enough", 120, a_header_in_hosts_toml_is_enough),
    ("pulls_at_the_same_time_share_layers", 300, pulls_at_the_same_time),
    ("a_cancelled_pull_leaves_nothing_and_can_be_repeated", 400, a_cancelled_pull),
];

fn an_image_for_two_platforms() -> Result<()> {
    with_each_containerd(two_platforms)
}

fn two_platforms(generation: Generation) -> Result<()> {
    let site = Site::with_containerd(generation)?;
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
    all_platforms(containerd, &reference, [&ours.image, &other])
}

/// No ctr asks for layers lazily then: 1.x never does, and from 2.0 on it has nothing unpacked at such a pull. So all of them come.
fn all_platforms(containerd: &Containerd, reference: &str, images: [&Image; 2]) -> Result<()> {
    let namespace = format!("{}-all", containerd.namespace());
    let all = ["images", "pull", "--plain-http", "--all-platforms", "--snapshotter", DARTER, reference];
    containerd.ctr_in(&namespace).args(all).check()?;
    for image in images {
        let (stored, layers) = (containerd.layer_blobs_in(&namespace, image)?.len(), image.layers.len());
        ensure!(stored == layers, "{stored} of {layers} layers of {} came", image.manifest.digest);
    }
    let run = ["run", "--rm", "--net-host", "--snapshotter", DARTER, reference, "all", "cat", "/etc/motd"];
    containerd.ctr_in(&namespace).args(run).check().map(drop)
}

/// As people do it with nerdctl; a commit needs the layers, so they are brought before.
fn a_container_can_be_committed() -> Result<()> {
    with_each_containerd(committed_and_pruned)
}

fn committed_and_pruned(generation: Generation) -> Result<()> {
    let node = Node::new(generation)?;
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
    let archive = archive.display().to_string();
    if saves_by_nerdctl(generation) {
        nerdctl(&["save", "-o", &archive, "daily/committed:1"])?;
    } else {
        let export = ["images", "export", &archive, "docker.io/daily/committed:1"];
        node.containerd.ctr().args(export).check()?;
    }
    nerdctl(&["rm", "changed"])?;
    nerdctl(&["rmi", "-f", "daily/committed:1"])?;
    if saves_by_nerdctl(generation) {
        nerdctl(&["load", "-i", &archive])?;
    } else {
        node.containerd.ctr().args(["images", "import", "--snapshotter", DARTER, &archive]).check()?;
    }
    let said = nerdctl(&["run", "--rm", "--net=none", "daily/committed:1", "cat", "/etc/motd"])?;
    ensure!(said == "changed\n", "the image that was saved has {said:?}");
    nerdctl(&["system", "prune", "--all", "--force"])?;
    let left = || node.containerd.ctr().args(["snapshots", "--snapshotter", DARTER, "ls"]).check();
    eventually("all snapshots are gone", 20, || Ok(left()?.lines().count() <= 1))
}

/// nerdctl saves and loads by containerd's transfer service only. 1.6 has none, and that of 1.7 unpacks for no snapshotter that its
/// configuration doesn't name. There it is ctr's turn.
fn saves_by_nerdctl(generation: Generation) -> bool {
    matches!(generation, Generation::TwoZero | Generation::Two)
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

fn pulls_at_the_same_time() -> Result<()> {
    with_each_containerd(shared_pulls)
}

/// With images removed, and garbage collected all the time, meanwhile.
fn shared_pulls(generation: Generation) -> Result<()> {
    let site = Site::with_containerd(generation)?;
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
    let containerd = &site.node(0).containerd;
    containerd.while_collecting(|| {
        thread::scope(|scope| {
            let pulls: Vec<_> =
                kept.iter().map(|(data, reference)| scope.spawn(|| site.pull(0, data, reference))).collect();
            for (_, reference) in doomed {
                containerd.remove_image(reference)?;
            }
            pulls.into_iter().try_for_each(|pull| pull.join().expect("a pull does not panic"))
        })
    })?;
    for (number, (data, reference)) in kept.iter().enumerate() {
        site.check(0, data, reference, &format!("shared-{number}"))?;
    }
    let base = &kept[0].0.image.layers[0].blob.digest;
    ensure!(site.stub.reads_of(base) == 1, "the shared layer was read {} times", site.stub.reads_of(base));
    Ok(())
}

fn a_cancelled_pull() -> Result<()> {
    with_each_containerd(cancelled_pulls)
}

fn cancelled_pulls(generation: Generation) -> Result<()> {
    let site = Site::with_containerd(generation)?;
    let node = site.node(0);
    node.containerd.while_collecting(|| {
        cancelled_at_any_time(&site)?;
        let clients = Client::that_pull_lazily(generation);
        clients.iter().try_for_each(|client| cancelled_in_its_middle(&site, *client))
    })?;
    let left = || Ok(node.containerd.snapshots_at(node.socket())?.is_empty());
    eventually("nothing is left in any namespace", 20, left)
}

fn cancelled_at_any_time(site: &Site) -> Result<()> {
    let data = Data::new(&site.blobs, 1, 30, 200_000)?;
    let reference = site.add(&data, "daily/cancelled");
    let containerd = &site.node(0).containerd;
    let mut cancelled = 0;
    for milliseconds in [3, 6, 10, 15, 20, 30, 40, 60, 80, 120] {
        let mut pull = darter::pull(containerd, &reference).start()?;
        thread::sleep(Duration::from_millis(milliseconds));
        if pull.is_running() {
            interrupt(&pull)?;
        }
        cancelled += usize::from(!pull.finish()?.success());
        containerd.remove_image(&reference)?;
        eventually("nothing is left of the pull", 20, || {
            has_no_snapshots(containerd, containerd.namespace())
        })?;
    }
    ensure!(cancelled > 0, "no pull was cancelled in its middle");
    site.pull(0, &data, &reference)?;
    site.check(0, &data, &reference, "whole")?;
    containerd.remove_image(&reference)
}

fn interrupt(pull: &Running) -> Result<()> {
    kill(Pid::from_raw(pull.pid() as i32), Signal::SIGINT).context("it has ended just now")
}

fn has_no_snapshots(containerd: &Containerd, namespace: &str) -> Result<bool> {
    let listed = containerd.ctr_in(namespace).args(["snapshots", "--snapshotter", DARTER, "ls"]).check()?;
    Ok(listed.lines().count() <= 1)
}

/// What asks Darter for the layers of a pull.
#[derive(Clone, Copy, Debug)]
enum Client {
    Darter,
    Ctr,
    Crictl,
}

impl Client {
    /// ctr of 1.x isn't among them: it downloads everything, always.
    fn that_pull_lazily(generation: Generation) -> &'static [Self] {
        if generation.ctr_pulls_lazily() {
            &[Client::Darter, Client::Ctr, Client::Crictl]
        } else {
            &[Client::Darter, Client::Crictl]
        }
    }

    fn namespace(self, containerd: &Containerd) -> &str {
        match self {
            Client::Darter | Client::Ctr => containerd.namespace(),
            Client::Crictl => "k8s.io",
        }
    }

    fn pull(self, containerd: &Containerd, reference: &str) -> Run {
        match self {
            Client::Darter => darter::pull(containerd, reference),
            Client::Ctr => containerd.ctr_pull(reference, DARTER),
            Client::Crictl => containerd.crictl().args(["pull", reference]),
        }
    }

    fn remove(self, containerd: &Containerd, reference: &str) -> Result<()> {
        match self {
            Client::Darter | Client::Ctr => containerd.remove_image(reference),
            Client::Crictl => containerd.crictl().args(["rmi", reference]).check().map(drop),
        }
    }
}

/// Pulls of which each must be interrupted within the time that Prepare waits. One is enough.
const INTERRUPTED_TRIES: u64 = 3;

/// Interrupted while Prepare waits for what the registry has to say on the last layer; then pulled again.
fn cancelled_in_its_middle(site: &Site, client: Client) -> Result<()> {
    for attempt in 0..INTERRUPTED_TRIES {
        let data = Data::new(&site.blobs, 100 * (1 + client as u64) + attempt, 2, 100_000)?;
        let reference = site.add(&data, &format!("daily/{client:?}-{attempt}").to_lowercase());
        let cancelled = interrupted_in_prepare(site, client, &data, &reference)?;
        pulled_after_all(site, client, &data, &reference)
            .with_context(|| format!("again with {client:?}"))?;
        if cancelled {
            return Ok(());
        }
        println!("  {client:?} was done before it was interrupted");
    }
    bail!("{client:?} was never interrupted in its middle")
}

/// Whether the pull was still under way.
fn interrupted_in_prepare(site: &Site, client: Client, data: &Data, reference: &str) -> Result<bool> {
    let (containerd, top) = (&site.node(0).containerd, data.top_blob());
    site.stub.fault(top, Fault::Late(Duration::from_secs(20), 503));
    let mut pull = client.pull(containerd, reference).start()?;
    eventually("Darter asks for the last layer", 20, || Ok(site.stub.was_asked_for(top)))?;
    if pull.is_running() {
        interrupt(&pull)?;
    }
    let ended = pull.finish()?;
    site.stub.heal(top);
    if !ended.success() {
        nothing_is_left_in(containerd, client)
            .with_context(|| format!("after {client:?}: {}", ended.said()))?;
    }
    Ok(!ended.success())
}

/// What the pull had brought goes with its lease. One that containerd doesn't end with the call would do so in a day.
fn nothing_is_left_in(containerd: &Containerd, client: Client) -> Result<()> {
    let namespace = client.namespace(containerd);
    let gone = |seconds| {
        eventually("nothing is left of the pull", seconds, || has_no_snapshots(containerd, namespace))
    };
    if gone(10).is_ok() {
        return Ok(());
    }
    let leases = containerd.ctr_in(namespace).args(["leases", "ls", "-q"]).check()?;
    for lease in leases.lines().filter(|lease| *lease != COLLECTING) {
        println!("  {client:?} has left the lease {lease}");
        containerd.ctr_in(namespace).args(["leases", "delete", lease]).check()?;
    }
    gone(20)
}

fn pulled_after_all(site: &Site, client: Client, data: &Data, reference: &str) -> Result<()> {
    let containerd = &site.node(0).containerd;
    let namespace = client.namespace(containerd);
    client.pull(containerd, reference).check()?;
    let blobs = containerd.layer_blobs_in(namespace, &data.image)?.len();
    ensure!(blobs == 0, "{blobs} layer blobs are in the content store");
    site.check_in(namespace, 0, data, reference, "again")?;
    client.remove(containerd, reference)
}
