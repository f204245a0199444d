//! State that was lost or damaged, and a node that starts without anybody: what is whole works, what is not is fetched again.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use darter_identity::StoredCertificate;
use darter_integration::cluster::{Node, Options, Program, token};
use darter_integration::command::{Run, eventually};
use darter_integration::containerd::{DARTER, MountedSnapshot};
use darter_integration::darter::{self, program};
use darter_integration::image::Packing;
use darter_integration::sweep;
use darter_integration::tar::Entry;

use crate::disk::{status, top_layer};
use crate::site::{Data, SUM, Site, files, found_again, start_again};
use crate::takeover::holders;

pub const STORIES: crate::Stories = &[
    ("a_node_without_a_network_starts_what_it_has_whole", 300, a_node_alone_starts_what_is_whole),
    ("a_node_whose_certificate_has_expired_goes_on_with_what_it_has", 300, an_expired_certificate),
    ("lost_or_damaged_state_of_a_node_is_fetched_again", 900, damaged_state_of_a_node),
    ("lost_or_damaged_state_of_a_seed_is_made_again", 900, damaged_state_of_a_seed),
    ("lost_or_damaged_state_of_manager_and_scheduler", 400, damaged_state_of_manager_and_scheduler),
];

const FILES: usize = 8;
const FILE_LEN: usize = 1_000_000;

/// A container that is there and doesn't run, as before a reboot.
fn create(node: &Node, reference: &str, id: &str) -> Result<()> {
    let words =
        ["containers", "create", "--net-host", "--snapshotter", DARTER, reference, id, "sh", "-c", SUM];
    node.containerd.ctr().args(words).check().map(drop)
}

fn start(node: &Node, id: &str) -> Run {
    node.containerd.ctr().args(["tasks", "start", id]).timeout(200)
}

/// Everything on the node ends at once, and no mount is left.
fn reboot(node: &mut Node) -> Result<()> {
    node.containerd.daemon().kill();
    let keeping = holders(node)?;
    node.snapshotter.kill();
    for pid in keeping {
        Run::new("kill").args(["-9", &pid.to_string()]).check()?;
    }
    node.unmount()?;
    let root = node.snapshotter.folder().join("root");
    ensure!(sweep::mounts_below(&root).is_empty(), "something is still mounted below {}", root.display());
    node.containerd.restart()?;
    node.start_snapshotter()?;
    found_again(node)
}

/// One image is whole on the node, of another the data is missing, of a third the map.
fn a_node_alone_starts_what_is_whole() -> Result<()> {
    let quota = FILES * FILE_LEN * 3 / 2;
    let node_config =
        format!("mount_wait_seconds = 5\nbackground_idle_ms = 200\nstore_quota_bytes = {quota}\n");
    let mut site = Site::new(Options { nodes: 1, node_config, ..Options::default() })?;
    let images: Vec<(Data, String)> = ["whole", "part", "mapless"]
        .into_iter()
        .enumerate()
        .map(|(salt, name)| {
            let data = Data::new(&site.blobs, salt as u64, FILES, FILE_LEN)?;
            let reference = site.add(&data, &format!("alone/{name}"));
            site.pull(0, &data, &reference)?;
            create(site.node(0), &reference, name)?;
            if salt == 0 {
                eventually("the first image is whole", 60, || {
                    top_layer(site.node(0), &data).map(|(have, pieces)| have == pieces && pieces > 0)
                })?;
            }
            Ok((data, reference))
        })
        .collect::<Result<_>>()?;
    let (part, mapless) = (&images[1].0, &images[2].0);
    eventually("the maps are there", 30, || {
        let known = |data| top_layer(site.node(0), data).map(|(_, pieces)| pieces > 0);
        Ok(known(part)? && known(mapless)?)
    })?;
    site.node(0).host.connected(false)?;
    remove_map(site.node(0), mapless)?;
    reboot(&mut site.cluster.nodes[0])?;

    let node = site.node(0);
    let ran = start(node, "whole").output()?;
    ensure!(ran.stdout.starts_with(&images[0].0.sum), "what is whole doesn't run: {}", ran.said());
    site.check(0, &images[0].0, &images[0].1, "another")?;
    let words = start(node, "mapless").output()?;
    let layer = &mapless.image.layers.last().context("it has layers")?.diff_id;
    ensure!(
        !words.success() && words.said().contains(layer.as_str()),
        "not said what is missing: {}",
        words.said()
    );
    let mut waiting = start(node, "part").start()?;
    eventually("the status says what is missing", 60, || {
        Ok(status(node)?.to_string().contains("pieces are missing, and nobody in reach has them"))
    })?;
    ensure!(waiting.is_running(), "it ended: {:?}", waiting.finish());
    node.host.connected(true)?;
    let ran = waiting.finish()?;
    ensure!(ran.stdout.starts_with(&part.sum), "it doesn't go on when the others are back: {}", ran.said());
    Ok(())
}

fn remove_map(node: &Node, data: &Data) -> Result<()> {
    let layer = data.image.layers.last().context("it has layers")?;
    let hex = layer.diff_id.trim_start_matches("sha256:");
    let maps = node.snapshotter.folder().join("root/store/maps");
    Ok(fs::remove_file(maps.join(format!("{hex}-v1.map")))?)
}

/// Short enough to be waited for, long enough to be renewed while the machine is busy.
const LIFE_SECONDS: u64 = 30;

/// First nobody can be reached, then everybody refuses the node.
fn an_expired_certificate() -> Result<()> {
    let node_config = "background_idle_ms = 200\n".to_owned();
    let options =
        Options { nodes: 1, certificate_life_seconds: LIFE_SECONDS, node_config, ..Options::default() };
    let mut site = Site::new(options)?;
    let data = Data::new(&site.blobs, 1, FILES, FILE_LEN)?;
    let reference = site.add(&data, "state/expired");
    site.pull(0, &data, &reference)?;
    create(site.node(0), &reference, "made")?;
    let mounted = site.mount(0, &data, "kept")?;
    eventually("all of the image is there", 60, || is_whole(site.node(0)))?;

    site.node(0).host.connected(false)?;
    // A certificate is good for the whole of its last second.
    eventually("the certificate has expired", 2 * LIFE_SECONDS, || {
        Ok(!has_certificate_at(site.node(0), SystemTime::now() - Duration::from_secs(2))?)
    })?;
    site.cluster.nodes[0].snapshotter.kill();
    start_again(&mut site.cluster.nodes[0])?;
    // Not read before, so it isn't in the page cache.
    let sum = format!("cat {}/data/* | sha256sum", mounted.path().display());
    let read = Run::new("sh").args(["-c", &sum]).timeout(60).check()?;
    ensure!(read.starts_with(&data.sum), "not {}: {read}", data.sum);
    let ran = start(site.node(0), "made").output()?;
    ensure!(ran.stdout.starts_with(&data.sum), "what is whole doesn't run: {}", ran.said());
    site.node(0).host.connected(true)?;
    site.check(0, &data, &reference, "refused")?;
    expiry_is_told(&mut site.cluster.nodes[0])?;

    let_in_again(&site.cluster.manager, "node", "node-1", &site.cluster.nodes[0].snapshotter)?;
    eventually("the node has joined again", 90, || {
        Ok(has_certificate_at(site.node(0), SystemTime::now())?
            && status(site.node(0))?["manager"]["attends"] == true)
    })
}

fn is_whole(node: &Node) -> Result<bool> {
    let status = status(node)?;
    let layers = status["layers"].as_array().context("a list of layers")?;
    let whole = |layer: &serde_json::Value| {
        layer["pieces"].as_u64().is_some_and(|pieces| pieces > 0) && layer["have"] == layer["pieces"]
    };
    Ok(!layers.is_empty() && layers.iter().all(whole))
}

/// Whether the node has one that is not over by then.
fn has_certificate_at(node: &Node, at: SystemTime) -> Result<bool> {
    let stored = StoredCertificate::of(&node.snapshotter.folder().join("root/identity"))?;
    Ok(stored.is_some_and(|stored| stored.expires > at))
}

fn expiry_is_told(node: &mut Node) -> Result<()> {
    let doctor = node.darter("doctor").arg("--address").arg(node.socket().display());
    let doctor = doctor.arg("--containerd-address").arg(node.containerd.socket().display()).output()?;
    ensure!(!doctor.success() && doctor.stdout.contains("has expired"), "{}", doctor.said());
    let status = node.darter("status").check()?;
    ensure!(status.contains("this node's certificate has ended"), "{status}");
    let log = node.snapshotter.daemon()?.log_text();
    ensure!(log.contains("the stored certificate has expired"), "{log}");
    Ok(())
}

/// What can happen to a file.
#[derive(Clone, Copy, Debug)]
enum Damage {
    CutInHalf,
    Emptied,
    Flipped,
    Deleted,
}

const DAMAGES: [Damage; 4] = [Damage::CutInHalf, Damage::Emptied, Damage::Flipped, Damage::Deleted];

impl Damage {
    fn on(self, file: &Path) -> Result<()> {
        let mut bytes = fs::read(file)?;
        match self {
            Damage::CutInHalf => bytes.truncate(bytes.len() / 2),
            Damage::Emptied => bytes.clear(),
            Damage::Flipped => {
                let first = (bytes.len() / 2).min(40);
                bytes.iter_mut().skip(first).step_by(997).for_each(|byte| *byte ^= 0x10);
            }
            Damage::Deleted => return Ok(fs::remove_file(file)?),
        }
        Ok(fs::write(file, bytes)?)
    }
}

/// All files that the program keeps, by their names below its root: not what containers wrote, nor what is mounted there.
fn state(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_file() {
            found.push(path);
        } else if path.is_dir() && name != "s" && name != "lost" {
            found.extend(files(&path, &[""])?);
        }
    }
    found.iter().map(|path| Ok(path.strip_prefix(root)?.to_owned())).collect()
}

fn is_certificate(file: &Path) -> bool {
    file.ends_with("identity.pem")
}

/// The name of a layer's file differs from run to run.
fn told(damage: Damage, file: &Path) -> String {
    format!("{damage:?}: {}", file.display())
}

fn damaged_state_of_a_node() -> Result<()> {
    let mut site = Site::with_nodes(1)?;
    let data = Data::new(&site.blobs, 1, FILES, FILE_LEN)?;
    let reference = site.add(&data, "state/node");
    keep_a_credential(&mut site)?;
    site.pull(0, &data, &reference)?;
    site.check(0, &data, &reference, "before")?;
    let root = site.node(0).snapshotter.folder().join("root");
    let all = state(&root)?;
    for wanted in ["records.db", "credentials"] {
        ensure!(all.len() > 8 && all.iter().any(|file| file.ends_with(wanted)), "no {wanted} in {all:?}");
    }
    let right = sums(&site.mount(0, &data, "right")?)?;
    ensure!(right.lines().count() == FILES, "not all is read: {right}");
    let mut round = 0;
    for file in &all {
        for damage in DAMAGES {
            round += 1;
            let held = site.mount(0, &data, &format!("held-{round}"))?;
            let node = &mut site.cluster.nodes[0];
            node.snapshotter.kill();
            without_token(&node.snapshotter)?;
            if !root.join(file).exists() {
                // It isn't there at each moment.
                start_again(node)?;
                continue;
            }
            damage.on(&root.join(file)).with_context(|| told(damage, file))?;
            start_again(node).with_context(|| told(damage, file))?;
            if is_certificate(file) {
                join_again(&mut site).with_context(|| told(damage, file))?;
            }
            reads_nothing_else(held, &right).with_context(|| told(damage, file))?;
            let again = runs(&site, &data, &reference, round, is_of_records(file));
            again.with_context(|| told(damage, file))?;
        }
    }
    Ok(())
}

/// The sum of each file that can be read, in lines, by a process that ends in any case. What the kernel has of them goes first.
fn sums(held: &MountedSnapshot) -> Result<String> {
    let forget = "for file in *; do dd if=$file of=/dev/null iflag=nocache count=0 status=none; done";
    let script = format!("cd {}/data && {{ {forget}; sha256sum *; }}", held.path().display());
    Ok(Run::new("sh").args(["-c", &script]).timeout(200).output()?.stdout)
}

/// A container that was there before the damage reads the right bytes or gets an error, file by file. Then it is gone.
fn reads_nothing_else(held: MountedSnapshot, right: &str) -> Result<()> {
    let read = sums(&held)?;
    let other = read.lines().find(|line| !right.lines().any(|known| known == *line));
    ensure!(other.is_none(), "wrong bytes: {other:?}");
    Ok(())
}

/// Without what is in these nobody knows any more what the snapshots were.
fn is_of_records(file: &Path) -> bool {
    file.to_string_lossy().starts_with("records.db")
}

/// That of a pull from the registry that has a password. Its layer is in no other image: what another registry's image may have of it
/// is another story's.
fn keep_a_credential(site: &mut Site) -> Result<()> {
    let key = site.world.folder("keys")?.join("credentials.key");
    let node = &mut site.cluster.nodes[0];
    node.snapshotter.set("credentials_key_file", &format!("\"{}\"", key.display()))?;
    node.snapshotter.stop(30)?;
    start_again(node)?;
    let layer = site.blobs.layer(Packing::Gzip, &[Entry::dir("private")])?;
    let image = site.blobs.image(&[layer], &["true"])?;
    site.registry.push(&site.blobs, &image, "state/private")?;
    let reference = site.registry.reference("state/private");
    darter::pull(&site.node(0).containerd, &reference).check()?;
    let kept = site.node(0).snapshotter.folder().join("root/credentials");
    eventually("the credential is kept", 20, || Ok(kept.exists()))?;
    site.node(0).containerd.remove_image(&reference)
}

/// What an operator does for a member whose certificate is lost: the name is free again, and there is a new token.
fn let_in_again(manager: &Program, role: &str, name: &str, member: &Program) -> Result<()> {
    let release =
        manager.host().run(program("darter-manager")).arg("--config").arg(manager.config().display());
    release.args(["release", "--force", "--role", role, name]).check()?;
    Ok(fs::write(member.folder().join("token"), token(manager, role)?)?)
}

/// The secret that let the member in once is taken away: its certificate is enough for the next start.
fn without_token(member: &Program) -> Result<()> {
    let file = member.folder().join("token");
    match file.exists() {
        true => Ok(fs::remove_file(file)?),
        false => Ok(()),
    }
}

/// There is no token: until there is another one the node serves plain snapshots.
fn join_again(site: &mut Site) -> Result<()> {
    let node = site.node(0);
    ensure!(status(node)?["lazy"] == false, "it is a member without a certificate");
    let_in_again(&site.cluster.manager, "node", "node-1", &node.snapshotter)?;
    eventually("the node has joined again", 60, || Ok(status(node)?["lazy"] == true))
}

/// The image runs as it is, within a minute; where the records of it may be lost, after it was removed and pulled again.
fn runs(site: &Site, data: &Data, reference: &str, round: usize, may_be_unknown: bool) -> Result<()> {
    let mut words = refusal(site, data, reference, &format!("round-{round}"))?;
    if words.is_none() {
        return Ok(());
    }
    if may_be_unknown {
        site.node(0).containerd.remove_image(reference)?;
        site.pull(0, data, reference)?;
        return site.check(0, data, reference, &format!("round-{round}-again"));
    }
    let mut tries = 0;
    let ran = eventually("the image runs without another pull", 60, || {
        tries += 1;
        words = refusal(site, data, reference, &format!("round-{round}-{tries}"))?;
        Ok(words.is_none())
    });
    ran.with_context(|| words.unwrap_or_default())
}

/// What is said where the image does not run; `None` if it does, and reads all that it has.
fn refusal(site: &Site, data: &Data, reference: &str, id: &str) -> Result<Option<String>> {
    let command = ["sh", "-c", SUM];
    let ran = site.node(0).containerd.ctr_run_command(reference, DARTER, id, &command).output()?;
    if ran.success() {
        ensure!(ran.stdout.starts_with(&data.sum), "wrong bytes: {}", ran.said());
        return Ok(None);
    }
    ensure!(!ran.stdout.contains("  -"), "a sum, and a failure: {}", ran.said());
    Ok(Some(ran.said()))
}

fn damaged_state_of_a_seed() -> Result<()> {
    let mut site = Site::with_nodes(1)?;
    let data = Data::new(&site.blobs, 1, FILES, FILE_LEN)?;
    let reference = site.add(&data, "state/seed");
    site.pull(0, &data, &reference)?;
    site.check(0, &data, &reference, "before")?;
    let root = site.cluster.seed.folder().join("root");
    let all = state(&root)?;
    ensure!(all.iter().any(|file| file.starts_with("store/packs")), "only {all:?}");
    let mut round = 0;
    for file in &all {
        for damage in DAMAGES {
            round += 1;
            site.cluster.seed.kill();
            without_token(&site.cluster.seed)?;
            if root.join(file).exists() {
                damage.on(&root.join(file)).with_context(|| told(damage, file))?;
            }
            if is_certificate(file) {
                let_in_again(&site.cluster.manager, "seed", "seed", &site.cluster.seed)?;
            }
            site.cluster.start_seed().with_context(|| told(damage, file))?;
            forget(&mut site.cluster.nodes[0])?;
            runs(&site, &data, &reference, round, false).with_context(|| told(damage, file))?;
        }
    }
    Ok(())
}

/// The node has no piece and no map any more.
fn forget(node: &mut Node) -> Result<()> {
    node.snapshotter.stop(30)?;
    let store = node.snapshotter.folder().join("root/store");
    fs::remove_dir_all(store)?;
    node.start_snapshotter()?;
    found_again(node)
}

/// Without its CA a manager doesn't start: another one would lock every member out. It says so.
fn damaged_state_of_manager_and_scheduler() -> Result<()> {
    let mut site = Site::with_nodes(1)?;
    let root = site.cluster.scheduler.folder().join("root");
    for file in &state(&root)? {
        for damage in DAMAGES {
            site.cluster.scheduler.kill();
            without_token(&site.cluster.scheduler)?;
            if root.join(file).exists() {
                damage.on(&root.join(file))?;
            }
            if is_certificate(file) {
                let_in_again(&site.cluster.manager, "scheduler", "control", &site.cluster.scheduler)?;
            }
            site.cluster.start_scheduler().with_context(|| told(damage, file))?;
        }
    }
    let root = site.cluster.manager.folder().join("root");
    let all = state(&root)?;
    ensure!(all.iter().any(|file| file.ends_with("manager.db")), "only {all:?}");
    for file in &all {
        for damage in DAMAGES {
            manager_with(&mut site, &root.join(file), damage).with_context(|| told(damage, file))?;
        }
    }
    let data = Data::new(&site.blobs, 1, FILES, FILE_LEN)?;
    let reference = site.add(&data, "state/after");
    site.pull(0, &data, &reference)?;
    site.check(0, &data, &reference, "after")
}

fn manager_with(site: &mut Site, file: &Path, damage: Damage) -> Result<()> {
    site.cluster.manager.kill();
    if !file.exists() {
        return site.cluster.start_manager();
    }
    let whole = fs::read(file)?;
    damage.on(file)?;
    let started = site.cluster.start_manager();
    if !file.ends_with("ca.pem") {
        started?;
        return token(&site.cluster.manager, "node").map(drop);
    }
    let words = format!("{:#}", started.err().context("it started without its CA")?);
    ensure!(words.contains("ca.pem"), "no word of the file: {words}");
    fs::write(file, whole)?;
    site.cluster.start_manager()
}
