//! `darter doctor` on a node that is well, and in ten states in which it is not.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use darter_integration::cluster::Node;
use darter_integration::command::{Run, eventually};
use rcgen::{CertificateParams, Issuer, KeyPair, SanType, date_time_ymd};

use crate::site::Site;

pub const STORIES: crate::Stories =
    &[("doctor_names_what_is_wrong_and_what_mends_it", 180, doctor_names_what_is_wrong_and_what_mends_it)];

fn doctor(node: &Node) -> Run {
    let socket = node.socket().display().to_string();
    node.darter("doctor").args(["--address", &socket])
}

fn of_containerd(node: &Node, run: Run) -> Run {
    run.arg("--containerd-address").arg(node.containerd.socket().display())
}

/// It fails, and says this on a line with a cross, with a way out below it.
fn finds(run: Run, wrong: &str, cure: &str) -> Result<()> {
    let said = run.output()?;
    let mut lines = said.stdout.lines().skip_while(|line| !(line.starts_with('✗') && line.contains(wrong)));
    let (found, below) = (lines.next(), lines.next().unwrap_or_default());
    ensure!(found.is_some() && !said.success(), "not found: {wrong:?}\n{}", said.said());
    ensure!(below.contains(cure), "no cure {cure:?} below {wrong:?}:\n{}", said.said());
    Ok(())
}

/// In this order: each of the last ones leaves the site as it made it.
const STATES: [fn(&mut Site) -> Result<()>; 9] =
    [well, no_containerd, not_configured, no_fuse, full_disk, certificates, revoked, cluster_gone, killed];

/// All that isn't told as it should be is reported together.
fn doctor_names_what_is_wrong_and_what_mends_it() -> Result<()> {
    let mut site = Site::with_nodes(1)?;
    let wrong = STATES.iter().filter_map(|state| state(&mut site).err());
    let wrong: Vec<String> = wrong.map(|error| format!("{error:#}")).collect();
    ensure!(wrong.is_empty(), "{} of {} states:\n{}", wrong.len(), STATES.len(), wrong.join("\n"));
    Ok(())
}

fn well(site: &mut Site) -> Result<()> {
    let node = site.node(0);
    eventually("the scheduler is connected", 20, || {
        Ok(of_containerd(node, doctor(node)).output()?.success())
    })?;
    let well = of_containerd(node, doctor(node)).check()?;
    ensure!(!well.contains('✗') && well.contains("connected to 1 of 1"), "{well}");
    // By the date of the scheduler's own answer.
    ensure!(well.contains("the clock agrees with the schedulers'"), "{well}");
    Ok(())
}

fn no_containerd(site: &mut Site) -> Result<()> {
    let run = doctor(site.node(0)).args(["--containerd-address", "/nowhere.sock"]);
    finds(run, "no containerd answers", "start containerd")
}

fn not_configured(site: &mut Site) -> Result<()> {
    let other = of_containerd(site.node(0), doctor(site.node(0))).args(["--snapshotter", "another"]);
    finds(other, "no snapshotter \"another\"", "darter setup containerd --apply")
}

fn revoked(site: &mut Site) -> Result<()> {
    site.cluster.rest("DELETE", "/api/v1/nodes/node/node-1", "")?;
    let node = site.node(0);
    eventually("the node hears that it was revoked", 20, || {
        Ok(!of_containerd(node, doctor(node)).output()?.success())
    })?;
    finds(of_containerd(node, doctor(node)), "refuses this node", "another node_name")?;
    let status = node.darter("status").check()?;
    ensure!(status.contains("node-1 was revoked"), "{status}");
    Ok(())
}

fn cluster_gone(site: &mut Site) -> Result<()> {
    // The manager would take a scheduler that is gone off its list.
    site.cluster.manager.kill();
    site.cluster.scheduler.kill();
    let node = site.node(0);
    eventually("both deaths are noticed", 60, || {
        let said = of_containerd(node, doctor(node)).output()?.stdout;
        Ok(said.contains("schedulers out of reach") && said.contains("has not answered for"))
    })?;
    finds(of_containerd(node, doctor(node)), "1 of 1 schedulers out of reach", "darter-scheduler")?;
    finds(of_containerd(node, doctor(node)), "has not answered for", "systemctl start darter-manager")
}

/// A daemon that was killed leaves its socket: connections to it are refused.
fn killed(site: &mut Site) -> Result<()> {
    site.cluster.nodes[0].snapshotter.kill();
    let node = site.node(0);
    finds(of_containerd(node, doctor(node)), "Connection refused", "systemctl start darter-snapshotter")
}

fn no_fuse(site: &mut Site) -> Result<()> {
    let node = site.node(0);
    let darter = darter_integration::darter::program("darter");
    let script = "mount --bind /dev/null /dev/fuse && exec \"$@\"";
    let root = node.snapshotter.folder().join("root");
    let run = node.host.run("unshare").args(["-m", "sh", "-c", script, "sh"]).arg(darter.display());
    let run =
        run.args(["doctor", "--root"]).arg(root.display()).arg("--address").arg(node.socket().display());
    finds(of_containerd(node, run), "this kernel has no FUSE", "modprobe fuse")
}

fn full_disk(site: &mut Site) -> Result<()> {
    let small = site.world.folder("small")?;
    let mount = |words: &[&str]| Run::new(words[0]).args(&words[1..]).arg(small.display()).check();
    mount(&["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs"])?;
    let run = Run::new(darter_integration::darter::program("darter")).args(["doctor", "--root"]);
    let found = finds(run.arg(small.display()), "the disk is nearly full", "prune");
    mount(&["umount"])?;
    found
}

fn certificates(site: &mut Site) -> Result<()> {
    for (years, wrong, cure) in
        [((2001, 2002), "has expired", "fresh join token"), ((2090, 2091), "this clock is late", "set-ntp")]
    {
        let root = site.world.folder(&format!("certificate-{}", years.0))?;
        write_certificate(&root.join("identity"), years)?;
        let run = Run::new(darter_integration::darter::program("darter")).args(["doctor", "--root"]);
        finds(run.arg(root.display()), wrong, cure)?;
    }
    Ok(())
}

/// An identity as a node keeps it, valid from the start of one year to the start of another.
fn write_certificate(folder: &Path, (from, to): (i32, i32)) -> Result<()> {
    let (ca_key, key) = (KeyPair::generate()?, KeyPair::generate()?);
    let ca_params = CertificateParams::default();
    let ca = ca_params.self_signed(&ca_key)?;
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI("spiffe://darter/default/node/n1".try_into()?)];
    params.not_before = date_time_ymd(from, 1, 1);
    params.not_after = date_time_ymd(to, 1, 1);
    let leaf = params.signed_by(&key, &Issuer::from_params(&ca_params, &ca_key))?;
    fs::create_dir_all(folder)?;
    let text = [key.serialize_pem(), leaf.pem(), ca.pem()].concat();
    Ok(fs::write(folder.join("identity.pem"), text)?)
}
