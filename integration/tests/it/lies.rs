//! Lies: whoever says something false, be it a registry, a peer, the node's own disk or a manifest, nobody reads a wrong byte.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use darter_integration::cluster::{Program, token};
use darter_integration::command::eventually;
use darter_integration::containerd::DARTER;
use darter_integration::image::Packing;
use darter_integration::registry::{PASSWORD, USER};
use darter_integration::stub::Fault;
use darter_integration::tar::Entry;
use darter_integration::tree;

use crate::liar::Liar;
use crate::once::order;
use crate::site::{Data, Site, files, mount, start_again};

pub const STORIES: crate::Stories = &[
    ("a_blob_unlike_its_digest_is_never_shown", 240, a_blob_unlike_its_digest_is_never_shown),
    ("a_peer_that_sends_wrong_bytes_is_passed_over", 180, a_peer_that_sends_wrong_bytes_is_passed_over),
    ("a_signed_map_of_another_layer_is_not_taken", 240, a_signed_map_of_another_layer_is_not_taken),
    ("flipped_bits_are_fetched_again", 300, flipped_bits_are_fetched_again),
    ("a_flipped_database_shows_no_wrong_byte", 300, a_flipped_database_shows_no_wrong_byte),
    ("a_stranger_is_refused", 120, a_stranger_is_refused),
    ("a_node_is_no_seed", 120, a_node_is_no_seed),
    ("a_borrowed_diff_id_opens_nothing", 240, a_borrowed_diff_id_opens_nothing),
    ("a_preheated_private_layer_opens_nothing", 240, a_preheated_private_layer),
    ("a_borrowed_digest_at_a_slow_registry_opens_nothing", 300, a_borrowed_digest_opens_nothing),
];

const FILES: usize = 12;
const FILE_LEN: usize = 300_000;

fn a_blob_unlike_its_digest_is_never_shown() -> Result<()> {
    let site = Site::with_nodes(1)?;
    let data = Data::new(&site.blobs, 1, FILES, FILE_LEN)?;
    let reference = site.add(&data, "lies/flipped");
    site.stub.fault(data.top_blob(), Fault::Flipped);
    let containerd = &site.node(0).containerd;
    let pulled = containerd.ctr_pull(&reference, DARTER).output()?;
    let ran = containerd.ctr_run_command(&reference, DARTER, "flipped", &["cat", "/data/0000"]).output()?;
    ensure!(!ran.success() && ran.stdout.is_empty(), "it ran: {} bytes", ran.stdout.len());
    let words = format!("{}{}", pulled.said(), ran.said());
    ensure!(words.contains("digest"), "no word of a digest: {words}");
    site.stub.heal(data.top_blob());
    containerd.remove_image(&reference).context("an image that can't run is removed")?;
    // A refused source is left alone for a moment, as one that is slow to mend.
    eventually("the mended image runs", 120, || {
        let _ = containerd.ctr_pull(&reference, DARTER).output()?;
        let ran = site.check(0, &data, &reference, "mended");
        if ran.is_err() {
            let _ = containerd.ctr().args(["images", "rm", "--sync", &reference]).output()?;
        }
        Ok(ran.is_ok())
    })
}

fn a_peer_that_sends_wrong_bytes_is_passed_over() -> Result<()> {
    let site = Site::with_nodes(2)?;
    let data = Data::new(&site.blobs, 2, FILES, FILE_LEN)?;
    let reference = site.add(&data, "lies/peer");
    site.pull(0, &data, &reference)?;
    site.check(0, &data, &reference, "honest")?;
    let liar = Liar::in_place_of(site.node(0))?;
    site.pull(1, &data, &reference)?;
    site.check(1, &data, &reference, "lied-to")?;
    ensure!(liar.asked() > 0, "nobody asked the liar");
    let status = site.node(1).darter("status").arg("--json").check()?;
    ensure!(!status.contains("node-1"), "something was taken from the liar: {status}");
    Ok(())
}

/// The seed's disk has another layer's map, with its signature, in the place of the one that is asked for.
fn a_signed_map_of_another_layer_is_not_taken() -> Result<()> {
    let mut site = Site::with_nodes(2)?;
    let (one, other) =
        (Data::new(&site.blobs, 3, FILES, FILE_LEN)?, Data::new(&site.blobs, 4, FILES, FILE_LEN)?);
    let (first, second) = (site.add(&one, "lies/one"), site.add(&other, "lies/other"));
    for (data, reference) in [(&one, &first), (&other, &second)] {
        site.pull(0, data, reference)?;
        site.check(0, data, reference, "before")?;
    }
    let roots = [site.cluster.seed.folder().join("root"), site.node(0).snapshotter.folder().join("root")];
    site.cluster.seed.stop(30)?;
    site.cluster.nodes[0].snapshotter.stop(30)?;
    for root in &roots {
        swap_maps(&root.join("store/maps"), &one, &other)?;
    }
    site.cluster.start_seed()?;
    start_again(&mut site.cluster.nodes[0])?;
    for (index, id) in [(1, "elsewhere"), (0, "here")] {
        for (data, reference) in [(&one, &first), (&other, &second)] {
            if index == 1 {
                site.pull(index, data, reference)?;
            }
            site.check(index, data, reference, id)?;
        }
    }
    Ok(())
}

fn swap_maps(maps: &Path, one: &Data, other: &Data) -> Result<()> {
    let hex = |data: &Data| {
        let top = data.image.layers.last().expect("an image has layers");
        top.diff_id.trim_start_matches("sha256:").to_owned()
    };
    let (one, other) = (hex(one), hex(other));
    let mut swapped = 0;
    for file in files(maps, &[".map", ".tar", ".access"])? {
        let name = file.file_name().expect("a file has a name").to_string_lossy().into_owned();
        if name.contains(&one) {
            let twin = maps.join(name.replace(&one, &other));
            let (mine, theirs) = (fs::read(&file)?, fs::read(&twin)?);
            fs::write(&file, theirs)?;
            fs::write(&twin, mine)?;
            swapped += 1;
        }
    }
    ensure!(swapped > 0, "no map to swap");
    Ok(())
}

fn flipped_bits_are_fetched_again() -> Result<()> {
    let mut site = Site::with_nodes(1)?;
    let data = Data::new(&site.blobs, 5, FILES, FILE_LEN)?;
    let reference = site.add(&data, "lies/disk");
    site.pull(0, &data, &reference)?;
    site.check(0, &data, &reference, "whole")?;
    let since = SystemTime::now();
    let truth = tree::walk(site.mount(0, &data, "truth")?.path())?;
    for (round, ends) in [&[".pack"][..], &[".map"], &[".tar", ".access"], &[".pack", ".map", ".access"]]
        .into_iter()
        .enumerate()
    {
        let node = &mut site.cluster.nodes[0];
        node.snapshotter.stop(30)?;
        drop_cached()?;
        let store = node.snapshotter.folder().join("root/store");
        let spoiled = files(&store, ends)?;
        ensure!(!spoiled.is_empty(), "no file ends with {ends:?}");
        for file in spoiled {
            flip(&file, 10_007)?;
        }
        start_again(node)?;
        let mounted = mount(node, &data.image, &format!("flipped-{round}"))?;
        tree::compare(&truth, &tree::walk(mounted.path())?, since).with_context(|| format!("{ends:?}"))?;
    }
    site.check(0, &data, &reference, "after")
}

/// Bits flipped in the records of snapshots: the daemon says so and starts with none, or finds nothing wrong.
fn a_flipped_database_shows_no_wrong_byte() -> Result<()> {
    let mut site = Site::with_nodes(1)?;
    let data = Data::new(&site.blobs, 6, FILES, FILE_LEN)?;
    let reference = site.add(&data, "lies/records");
    for (round, every) in [60_000, 4_999, 997, 101].into_iter().enumerate() {
        site.pull(0, &data, &reference)?;
        site.check(0, &data, &reference, &format!("before-{round}"))?;
        let node = &mut site.cluster.nodes[0];
        node.snapshotter.stop(30)?;
        // Its folder isn't walked: who looks into a mount that was left waits for the next daemon.
        flip(&node.snapshotter.folder().join("root/records.db"), every)?;
        start_again(node).with_context(|| format!("a bit of {every} bytes was flipped"))?;
        recovers(&site, &data, &reference, &format!("after-{round}"))
            .with_context(|| format!("a bit of {every} bytes was flipped"))?;
    }
    Ok(())
}

/// It runs as it is, or after it was removed and pulled as the daemon's log says.
fn recovers(site: &Site, data: &Data, reference: &str, id: &str) -> Result<()> {
    let command = ["sh", "-c", crate::site::SUM];
    let containerd = &site.node(0).containerd;
    let ran = containerd.ctr_run_command(reference, DARTER, id, &command).output()?;
    if ran.success() {
        ensure!(ran.stdout.starts_with(&data.sum), "wrong bytes: {}", ran.said());
        return Ok(());
    }
    containerd.remove_image(reference)?;
    site.pull(0, data, reference)?;
    site.check(0, data, reference, &format!("{id}-again"))
}

/// Flips one bit in the middle of every `every` bytes.
fn flip(file: &Path, every: usize) -> Result<()> {
    let mut bytes = fs::read(file)?;
    let length = bytes.len();
    for at in (every.min(length) / 2..length).step_by(every) {
        bytes[at] ^= 0x10;
    }
    Ok(fs::write(file, bytes)?)
}

/// What the kernel remembers of a mount that is gone is no part of these tests, but costs nothing to exclude.
fn drop_cached() -> Result<()> {
    Ok(fs::write("/proc/sys/vm/drop_caches", "3")?)
}

fn a_stranger_is_refused() -> Result<()> {
    let site = Site::with_nodes(1)?;
    let stranger = site.world.host("stranger")?;
    let folder = site.world.folder("stranger")?;
    let key = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=x \
               -addext subjectAltName=URI:spiffe://darter/test/node/node-1 -keyout key.pem -out cert.pem";
    stranger.run("sh").args(["-c", key]).dir(&folder).check()?;
    let doors = [
        (site.cluster.seed.host().address(), 7420, "darter-piece/1"),
        (site.cluster.seed.host().address(), 7420, "h2"),
        (site.node(0).host.address(), 7420, "darter-piece/1"),
        (site.cluster.scheduler.host().address(), 7410, "h2"),
    ];
    for (address, port, alpn) in doors {
        for shown in ["", "-cert cert.pem -key key.pem"] {
            let connect = format!(
                "(echo hello; sleep 1) | timeout 20 openssl s_client -connect {address}:{port} -alpn {alpn} {shown} 2>&1"
            );
            let said = stranger.run("sh").args(["-c", &connect]).dir(&folder).output()?.said();
            ensure!(said.contains("CONNECTED"), "{address}:{port} is not there: {said}");
            ensure!(said.contains("alert"), "{address}:{port} {alpn} let a stranger in: {said}");
        }
    }
    // The manager speaks with those who have no certificate, but of nothing but joining.
    let forged = token(&site.cluster.manager, "node")?;
    let (head, _) = forged.rsplit_once('.').context("a token has parts")?;
    let (head, _) = head.rsplit_once('.').context("a token has parts")?;
    let pin = forged.rsplit('.').next().context("a token has a pin")?;
    let wrong = format!("{head}.{}.{pin}", "00".repeat(32));
    refused(&site, "peer", &wrong, &[], "token")
}

/// A node's token does not make a seed, and what has a node's certificate is not listed as one.
fn a_node_is_no_seed() -> Result<()> {
    let site = Site::with_nodes(1)?;
    let token = token(&site.cluster.manager, "node")?;
    refused(&site, "peer", &token, &["--seed"], "seed")?;
    let nodes = site.cluster.rest("GET", "/api/v1/nodes", "")?;
    ensure!(!nodes.to_string().contains("pretender"), "{nodes}");
    Ok(())
}

/// A program that joins with this token ends with an error that has `word` in it.
fn refused(site: &Site, name: &str, token: &str, flags: &[&str], word: &str) -> Result<()> {
    let host = site.world.host(&format!("bad-{}", flags.len()))?;
    let folder = site.world.folder(&format!("{}/{name}", host.role()))?;
    fs::write(folder.join("token"), token)?;
    let config = format!(
        "root = \"{0}/root\"\nmanager = \"{1}:7400\"\njoin_token_file = \"{0}/token\"\nnode_name = \"pretender\"\n\
         listen = \"{2}:7420\"\n",
        folder.display(),
        site.cluster.manager.host().address(),
        host.address(),
    );
    let mut program = Program::new(name, &host, &folder, &config, flags)?;
    let started = program.start(|| false);
    let words = format!("{:#}", started.expect_err("it is never ready"));
    ensure!(words.contains("ended") && words.contains(word), "{words}");
    Ok(())
}

/// A manifest names the diff ID of a layer that its repository does not hold, with a blob of its own: it gets neither the
/// layer nor the mesh's trust in that diff ID.
fn a_borrowed_diff_id_opens_nothing() -> Result<()> {
    let site = Site::with_nodes(2)?;
    let private = Data::new(&site.blobs, 7, FILES, FILE_LEN)?;
    site.registry.push(&site.blobs, &private.image, "team/private")?;
    let reference = site.registry.reference("team/private");
    site.pull(0, &private, &reference)?;
    site.check(0, &private, &reference, "mine")?;

    // Over another base than the real image's: of the same chain containerd would not even ask.
    let base = Data::new(&site.blobs, 8, 1, 1000)?.image.layers;
    let own =
        site.blobs.layer(Packing::Gzip, &[Entry::dir("data"), Entry::file("data/0000", "of the thief")])?;
    let mut borrowed = private.image.layers.last().context("it has layers")?.clone();
    borrowed.blob = own.blob;
    let thief = site.blobs.image(&[base, vec![borrowed]].concat(), &["cat", "/etc/motd"])?;
    let stolen = site.stub.add(&thief, "thief/public");
    opens_nothing(&site, 1, &stolen, "unknown")?;
    opens_nothing(&site, 0, &stolen, "known")?;
    site.pull(1, &private, &reference)?;
    site.check(1, &private, &reference, "theirs")?;
    opens_nothing(&site, 1, &stolen, "known-by-now")?;
    site.check(0, &private, &reference, "mine-still")
}

fn opens_nothing(site: &Site, index: usize, stolen: &str, id: &str) -> Result<()> {
    let containerd = &site.node(index).containerd;
    let pulled = containerd.ctr_pull(stolen, DARTER).output()?;
    let command = ["sh", "-c", "cat /data/*"];
    let ran = containerd.ctr_run_command(stolen, DARTER, id, &command).output()?;
    ensure!(!ran.success() && ran.stdout.is_empty(), "{id}: read {} bytes", ran.stdout.len());
    let words = format!("{}{}", pulled.said(), ran.said());
    ensure!(words.contains("diff"), "{id}: no word of the diff ID: {words}");
    Ok(())
}

/// The order has a password that the node is not told, and that its containerd may not have.
fn a_preheated_private_layer() -> Result<()> {
    let site = Site::with_nodes(1)?;
    let private = Data::new(&site.blobs, 10, FILES, FILE_LEN)?;
    site.registry.push(&site.blobs, &private.image, "team/preheated")?;
    let reference = site.registry.reference("team/preheated");
    let user = format!("{USER}:{PASSWORD}");
    order(&site, &[&reference, "--user", &user, "--nodes", "all", "--wait"]).check()?;

    let base = Data::new(&site.blobs, 8, 1, 1000)?.image.layers;
    let own =
        site.blobs.layer(Packing::Gzip, &[Entry::dir("data"), Entry::file("data/0000", "of the thief")])?;
    let layer = private.image.layers.last().context("it has layers")?;
    let (mut by_diff_id, by_digest) = (layer.clone(), layer.clone());
    by_diff_id.blob = own.blob;
    for (id, borrowed) in [("by-diff-id", by_diff_id), ("by-digest", by_digest)] {
        let thief = site.blobs.image(&[base.clone(), vec![borrowed]].concat(), &["cat", "/etc/motd"])?;
        let stolen = site.stub.add(&thief, &format!("thief/{id}"));
        site.stub.fault(private.top_blob(), Fault::Status(404));
        let containerd = &site.node(0).containerd;
        let pulled = containerd.ctr_pull(&stolen, DARTER).output()?;
        let ran = containerd.ctr_run_command(&stolen, DARTER, id, &["sh", "-c", "cat /data/*"]).output()?;
        ensure!(!ran.success() && ran.stdout.is_empty(), "{id}: {} {}", pulled.said(), ran.said());
    }
    let wrong = site.node(0).containerd.ctr_pull_as("nobody:wrong", &reference, DARTER).output()?;
    ensure!(!wrong.success(), "a wrong password pulled the image: {}", wrong.said());
    // Not all of it is lazy: what the thief's image has in common with it is on the node as containerd unpacked it.
    site.node(0).containerd.ctr_pull(&reference, DARTER).check()?;
    site.check(0, &private, &reference, "mine")
}

/// How long the thief's registry takes to say that it doesn't have the blob: longer than any decision.
const LATE: Duration = Duration::from_secs(4);

/// A manifest names a private layer as its owner does, digest and diff ID, in a repository that doesn't hold it and that
/// takes its time to say so. Undecided is lazy; but nothing is shown.
fn a_borrowed_digest_opens_nothing() -> Result<()> {
    let site = Site::with_nodes(2)?;
    let private = Data::new(&site.blobs, 9, FILES, FILE_LEN)?;
    site.registry.push(&site.blobs, &private.image, "team/private")?;
    let reference = site.registry.reference("team/private");
    site.pull(0, &private, &reference)?;
    site.check(0, &private, &reference, "mine")?;

    let base = Data::new(&site.blobs, 8, 1, 1000)?.image.layers;
    let borrowed = private.image.layers.last().context("it has layers")?.clone();
    let thief = site.blobs.image(&[base, vec![borrowed]].concat(), &["cat", "/etc/motd"])?;
    let stolen = site.stub.add(&thief, "thief/public");
    site.stub.fault(private.top_blob(), Fault::Late(LATE, 404));
    for index in [0, 1] {
        let namespace = site.node(index).containerd.namespace().to_owned();
        stays_shut(&site, index, &namespace, &stolen)?;
    }
    // In another namespace of the same containerd, with all the layers of the private image, one upon the other.
    let same = site.stub.add(&private.image, "thief/same");
    let other = format!("{}-other", site.node(0).containerd.namespace());
    stays_shut(&site, 0, &other, &same)?;
    site.check(0, &private, &reference, "mine-still")?;

    // Once that registry holds the blob, it is as good as any.
    site.stub.heal(private.top_blob());
    let containerd = &site.node(0).containerd;
    eventually("the image runs whose repository holds the layer", 120, || {
        containerd.remove_image(&stolen)?;
        let _ = containerd.ctr_pull(&stolen, DARTER).output()?;
        Ok(site.check(0, &private, &stolen, "honest").is_ok())
    })
}

/// The image is refused as without Darter: the registry's word is that there is no such blob.
fn stays_shut(site: &Site, index: usize, namespace: &str, stolen: &str) -> Result<()> {
    let containerd = &site.node(index).containerd;
    let pull = ["images", "pull", "--plain-http", "--snapshotter", DARTER, stolen];
    let pulled = containerd.ctr_in(namespace).args(pull).output()?;
    let run = ["run", "--rm", "--net-host", "--snapshotter", DARTER, stolen, "shut"];
    let read = ["sh", "-c", "cat /data/*"];
    let mut words = pulled.said();
    let refused = eventually("containerd refuses it", 60, || {
        let ran = containerd.ctr_in(namespace).args(run).args(read).output()?;
        ensure!(!ran.success() && ran.stdout.is_empty(), "{namespace}: read {} bytes", ran.stdout.len());
        words = format!("{}{}", pulled.said(), ran.said());
        Ok(words.contains("not found") || words.contains("404"))
    });
    refused.with_context(|| words)
}
