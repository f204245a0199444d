//! `darter doctor`: looks at everything that Darter needs on this node, says what is wrong, and the fix.
//!
//! It works without the daemon, too: what only the daemon knows is left out then. Each check is on its own; one that can't be
//! made because of another's trouble says so.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Result, bail};
use containerd_client::services::v1::PluginsRequest;
use containerd_client::services::v1::introspection_client::IntrospectionClient;
use darter_identity::{IdentityError, StoredCertificate};
use nix::errno::Errno;
use nix::sys::statvfs::statvfs;
use serde::Deserialize;

use crate::admin;
use crate::hydrate::Node;
use crate::member::{self, Manager};
use crate::reach;
use crate::status::Store;

/// `/dev/fuse`'s device number, from the kernel's list of devices.
const FUSE_DEVICE: (u64, u64) = (10, 229);
/// Below this the next pull will not fit; kubelet removes images below 15 %.
const FREE_SHARE_MIN: f64 = 0.05;
const FREE_BYTES_MIN: u64 = 512 << 20;
/// Certificates are back-dated by five minutes; beyond that, clocks that differ refuse one another.
const CLOCK_OFF_MAX: i64 = 120;
const AS_ROOT: &str = "run this as root";
/// The daemon's, as packages install it.
const CONFIG: &str = "/etc/darter/snapshotter.toml";
const ANSWER_MAX: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    node: Node,
    /// The name that containerd's configuration gives to Darter
    #[arg(long, default_value = "darter")]
    snapshotter: String,
    /// Darter's socket
    #[arg(long, value_name = "SOCKET", default_value = "/run/darter/darter.sock")]
    address: PathBuf,
}

/// What a check finds.
enum Finding {
    Good(String),
    /// What is wrong, and the command or the step that mends it.
    Bad(String, String),
    /// What isn't as it should be, though all works; and what mends it.
    Poor(String, String),
    /// It can't be told, because of what.
    Unknown(String),
}

use Finding::{Bad, Good, Poor, Unknown};

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Good(what) => write!(f, "✓ {what}"),
            Bad(what, cure) => write!(f, "✗ {what}\n    {cure}"),
            Poor(what, cure) => write!(f, "! {what}\n    {cure}"),
            Unknown(why) => write!(f, "- {why}"),
        }
    }
}

#[derive(Deserialize)]
struct Health {
    version: String,
    lazy: bool,
    schedulers: Vec<Scheduler>,
    /// `None` without a cluster.
    manager: Option<Manager>,
    /// `None` without a mesh.
    store: Option<Store>,
}

#[derive(Deserialize)]
struct Scheduler {
    node: String,
    address: String,
    connected: bool,
    trouble: String,
    clock_ahead_seconds: Option<i64>,
}

pub async fn run(options: Options) -> Result<()> {
    if is_no_node(&options, Path::new(CONFIG)) {
        bail!(
            "this is no node: there is neither {}, nor {}, nor {CONFIG}; on the manager, a scheduler or a seed ask \
             `curl -f http://127.0.0.1:PORT/readyz` (port 7481, 7482, 7483)",
            options.node.root.display(),
            options.address.display()
        );
    }
    let health = health(&options).await;
    let (containerd, version) = containerd(&options).await;
    let mut findings = vec![fuse(Path::new("/dev/fuse")), containerd];
    findings.push(match version {
        true => configured(&options).await,
        false => Unknown("containerd's configuration: containerd doesn't answer".to_owned()),
    });
    findings.push(socket(&options, health.as_ref()).await);
    findings.push(disk(&options.node.root, health.as_ref()));
    findings.push(certificate(&options.node.root, SystemTime::now()));
    findings.push(clock(health.as_ref()));
    findings.push(schedulers(health.as_ref()));
    findings.push(manager(&options.node.root, health.as_ref(), SystemTime::now()));
    findings.iter().for_each(|finding| println!("{finding}"));
    let bad = findings.iter().filter(|finding| matches!(finding, Bad(..))).count();
    if bad > 0 {
        let unknown = findings.iter().filter(|finding| matches!(finding, Unknown(_))).count();
        bail!(
            "of {} checks {bad} found something wrong and {unknown} could not be made; the fix stands below each",
            findings.len()
        );
    }
    Ok(())
}

/// A host of the manager, a scheduler or a seed has nothing of what is looked at here.
fn is_no_node(options: &Options, config: &Path) -> bool {
    ![options.node.root.as_path(), &options.address, config].iter().any(|path| path.exists())
}

async fn health(options: &Options) -> Option<Health> {
    tokio::time::timeout(ANSWER_MAX, admin::get(&options.node.root, "/health")).await.ok()?.ok()
}

fn fuse(device: &Path) -> Finding {
    let is_fuse = |found: &fs::Metadata| {
        let number = (nix::sys::stat::major(found.rdev()), nix::sys::stat::minor(found.rdev()));
        found.file_type().is_char_device() && number == FUSE_DEVICE
    };
    match fs::metadata(device) {
        Ok(found) if is_fuse(&found) => match fs::OpenOptions::new().read(true).write(true).open(device) {
            Ok(_) => Good("FUSE is there".to_owned()),
            Err(error) => Bad(
                format!("{} can't be opened: {error}", device.display()),
                "run this as root; in a container, give it the device".to_owned(),
            ),
        },
        _ => Bad(
            format!("{} is not there: this kernel has no FUSE", device.display()),
            "modprobe fuse (and `echo fuse >/etc/modules-load.d/fuse.conf` for the next start)".to_owned(),
        ),
    }
}

async fn containerd(options: &Options) -> (Finding, bool) {
    let socket = options.node.containerd.path();
    let place = socket.display();
    match crate::setup::version_of(&socket).await {
        Some(version) => (Good(format!("containerd {version} answers at {place}")), true),
        None if reach::is_denied(&socket).await => (denied(&socket), false),
        None => {
            let what = format!("no containerd answers at {place}");
            let cure = "systemctl start containerd (k3s: k3s or k3s-agent; RKE2: rke2-server or rke2-agent)";
            (Bad(what, cure.to_owned()), false)
        }
    }
}

fn denied(path: &Path) -> Finding {
    Bad(format!("{} may be opened by root only", path.display()), AS_ROOT.to_owned())
}

/// Whether containerd has the plug-in, and at the socket where Darter is.
async fn configured(options: &Options) -> Finding {
    let name = &options.snapshotter;
    let ask = async {
        let channel = containerd_client::connect(&options.node.containerd.path()).await.ok()?;
        let filters = vec![format!("type==io.containerd.snapshotter.v1,id=={name}")];
        let answer = IntrospectionClient::new(channel).plugins(PluginsRequest { filters }).await.ok()?;
        Some(answer.into_inner().plugins)
    };
    let Some(plugins) = tokio::time::timeout(ANSWER_MAX, ask).await.ok().flatten() else {
        return Unknown("containerd's configuration: it doesn't say which plug-ins it has".to_owned());
    };
    let mend = || {
        let (flag, then) = match options.node.containerd.is_k3s_by_default() {
            true => (" --k3s", ", and what that says"),
            false => ("", " && systemctl restart containerd"),
        };
        let (address, root) = (options.address.display(), options.node.root.display());
        format!(
            "darter setup containerd --apply{flag} --snapshotter {name} --address {address} --root {root}{then}"
        )
    };
    let Some(plugin) = plugins.first() else {
        return Bad(format!("containerd has no snapshotter {name:?} in its configuration"), mend());
    };
    match plugin.exports.get("address") {
        Some(address) if Path::new(address) == options.address => {
            Good(format!("containerd has the snapshotter {name:?}"))
        }
        Some(address) => Bad(
            format!("containerd looks for Darter at {address}, not at {}", options.address.display()),
            mend(),
        ),
        None => Bad(
            format!("{name:?} is one of containerd's own snapshotters"),
            "name Darter's with --snapshotter".to_owned(),
        ),
    }
}

async fn socket(options: &Options, health: Option<&Health>) -> Finding {
    let connecting = tokio::net::UnixStream::connect(&options.address);
    let start = "systemctl start darter-snapshotter (then: journalctl -u darter-snapshotter)";
    let trouble = match tokio::time::timeout(ANSWER_MAX, connecting).await {
        Ok(Ok(_)) => {
            return match health {
                Some(health) if health.lazy => Good(format!("Darter {} answers", health.version)),
                Some(health) => not_joined(health),
                None => Bad(
                    format!(
                        "Darter answers at {}, but not at {}/admin.sock",
                        options.address.display(),
                        options.node.root.display()
                    ),
                    "run this as root, and name the daemon's state directory with --root".to_owned(),
                ),
            };
        }
        Ok(Err(error)) if error.kind() == ErrorKind::PermissionDenied => return denied(&options.address),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "no answer in time".to_owned(),
    };
    Bad(format!("no Darter answers at {}: {trouble}", options.address.display()), start.to_owned())
}

fn not_joined(health: &Health) -> Finding {
    let why = health.manager.as_ref().map_or("no manager is configured", |manager| manager.trouble.as_str());
    Bad(
        format!("Darter runs, but has not joined a mesh ({why}): every image is pulled plainly"),
        "give it its manager's address in /etc/darter/snapshotter.toml, and a join token in /etc/darter/node.token; it tries every ten seconds".to_owned(),
    )
}

fn disk(root: &Path, health: Option<&Health>) -> Finding {
    let stat = match statvfs(root) {
        Ok(stat) => stat,
        Err(Errno::EACCES) => return denied(root),
        Err(error) => {
            let error = std::io::Error::from(error);
            return Bad(
                format!("Darter's state directory {} can't be looked at: {error}", root.display()),
                "name it with --root; the daemon makes it when it starts".to_owned(),
            );
        }
    };
    let (free, all) = (stat.blocks_available() * stat.fragment_size(), stat.blocks() * stat.fragment_size());
    let inodes = stat.files() > 0 && (stat.files_available() as f64) < stat.files() as f64 * FREE_SHARE_MIN;
    room(root, (free, all), inodes, health.and_then(|health| health.store.as_ref()?.mark_passed()))
}

/// `free` and `all` are bytes; `passed` is the mark if the disk is fuller than that.
fn room(root: &Path, (free, all): (u64, u64), few_inodes: bool, passed: Option<u8>) -> Finding {
    let words = format!("{} has {:.1} of {:.1} GB free", root.display(), free as f64 / 1e9, all as f64 / 1e9);
    let cure = "remove images that nobody uses (`nerdctl image prune`, `crictl rmi --prune`), or give the directory a larger disk";
    if free < FREE_BYTES_MIN || (free as f64) < all as f64 * FREE_SHARE_MIN {
        return Bad(format!("the disk is nearly full: {words}"), cure.to_owned());
    }
    if few_inodes {
        return Bad(format!("{} has hardly an inode left", root.display()), cure.to_owned());
    }
    match passed {
        Some(mark) => {
            let what = format!(
                "{words}: above store_high_percent ({mark}), so nothing is fetched that nobody waits for"
            );
            Poor(what, format!("{cure}, or raise store_high_percent in /etc/darter/snapshotter.toml"))
        }
        None => Good(words),
    }
}

fn certificate(root: &Path, now: SystemTime) -> Finding {
    let folder = root.join("identity");
    let found = match StoredCertificate::of(&folder) {
        Ok(Some(found)) => found,
        Ok(None) => {
            return Unknown(format!(
                "no certificate in {}: `darter standalone` keeps none, or the node has not joined",
                folder.display()
            ));
        }
        Err(IdentityError::File { path, source }) if source.kind() == ErrorKind::PermissionDenied => {
            return denied(&path);
        }
        Err(error) => {
            return Bad(
                format!("the node's certificate can't be read: {error}"),
                format!(
                    "move {} away and restart the daemon: it joins again with its token",
                    folder.display()
                ),
            );
        }
    };
    // It is back-dated when it is issued, so a clock that is only a little late has seen its beginning.
    if found.issued > now {
        return Bad(
            format!("the certificate is from the future ({}): this clock is late", ago(found.issued, now)),
            "timedatectl set-ntp true (or chronyc makestep), then restart the daemon".to_owned(),
        );
    }
    if found.expires <= now {
        return Bad(
            format!("the certificate of {} has expired ({})", found.member, ago(found.expires, now)),
            "put a fresh join token into /etc/darter/node.token: the node joins by it within a minute; if the manager was down for \
             long, start it first; if this clock is wrong, set it"
                .to_owned(),
        );
    }
    Good(format!("the certificate of {} is valid for {}", found.member, ago(found.expires, now)))
}

/// The distance of two times, in words.
fn ago(one: SystemTime, other: SystemTime) -> String {
    member::words(one.duration_since(other).unwrap_or_else(|error| error.duration()))
}

fn clock(health: Option<&Health>) -> Finding {
    let known = health.iter().flat_map(|health| &health.schedulers);
    let known: Vec<(&Scheduler, i64)> =
        known.filter_map(|scheduler| Some((scheduler, scheduler.clock_ahead_seconds?))).collect();
    let off = |(_, ahead): &&(&Scheduler, i64)| ahead.abs() > CLOCK_OFF_MAX;
    match known.iter().find(off) {
        Some((scheduler, ahead)) => Bad(
            format!(
                "this clock is {} s {} that of the scheduler {}",
                ahead.abs(),
                if *ahead > 0 { "behind" } else { "ahead of" },
                scheduler.node
            ),
            "timedatectl set-ntp true (or chronyc makestep) on whichever of the two is wrong".to_owned(),
        ),
        None if known.is_empty() => Unknown("the clock: no scheduler to compare it with".to_owned()),
        None => Good("the clock agrees with the schedulers'".to_owned()),
    }
}

fn schedulers(health: Option<&Health>) -> Finding {
    let Some(health) = health else { return Unknown("the schedulers: the daemon doesn't answer".to_owned()) };
    let lost: Vec<String> = health
        .schedulers
        .iter()
        .filter(|scheduler| !scheduler.connected)
        .map(|scheduler| format!("{} at {} ({})", scheduler.node, scheduler.address, scheduler.trouble))
        .collect();
    match (health.schedulers.len(), lost.len()) {
        (0, _) => Bad(
            "the manager has named no scheduler".to_owned(),
            "systemctl start darter-scheduler on the host that is to be one; `GET /api/v1/nodes` of the manager lists who is there".to_owned(),
        ),
        (all, 0) => Good(format!("connected to {all} of {all} schedulers")),
        (all, _) => Bad(
            format!("{} of {all} schedulers out of reach: {}", lost.len(), lost.join("; ")),
            "on that host: systemctl start darter-scheduler, and let its port through the firewall; images still come, from peers and seeds that are known".to_owned(),
        ),
    }
}

/// Whether the manager is there, and for this very node.
fn manager(root: &Path, health: Option<&Health>, now: SystemTime) -> Finding {
    let Some(health) = health else { return Unknown("the manager: the daemon doesn't answer".to_owned()) };
    match health.manager.as_ref().filter(|manager| manager.joined) {
        None => Unknown("the manager: the node has not joined a cluster".to_owned()),
        Some(manager) => match manager.trouble(root, now) {
            Some(trouble) => Bad(trouble.what, trouble.cure),
            None => Good(format!("the manager {} answers", manager.address)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health(ahead: Option<i64>, connected: bool) -> Health {
        let scheduler = Scheduler {
            node: "s1".into(),
            address: "10.0.0.1:7410".into(),
            connected,
            trouble: "connection refused".into(),
            clock_ahead_seconds: ahead,
        };
        let manager = serde_json::json!({
            "address": "m:7400", "joined": true, "attends": connected, "refused": !connected, "trouble": "n1 was revoked"
        });
        let manager = serde_json::from_value(manager).unwrap();
        Health { version: "1".into(), lazy: true, schedulers: vec![scheduler], manager, store: None }
    }

    #[test]
    fn a_disk_above_the_mark_is_told_but_one_that_is_nearly_full_is_worse() {
        let found = |free, passed| room(Path::new("/d"), (free, 100 << 30), false, passed);
        let Poor(what, _) = found(12 << 30, Some(80)) else { panic!("it is above the mark") };
        assert!(what.contains("12.9 of 107.4 GB free: above store_high_percent (80)"), "{what}");
        assert!(matches!(found(30 << 30, None), Good(_)));
        assert!(matches!(found(1 << 30, Some(80)), Bad(..)));
    }

    #[test]
    fn a_manager_that_refuses_the_node_is_a_finding() {
        let found = |health: Option<&Health>| manager(Path::new("/r"), health, SystemTime::now());
        assert!(matches!(found(Some(&health(None, true))), Good(_)));
        let Bad(what, _) = found(Some(&health(None, false))) else { panic!("it refuses the node") };
        assert!(what.contains("the manager m:7400 refuses this node: n1 was revoked"), "{what}");
        assert!(matches!(found(None), Unknown(_)));
    }

    #[test]
    fn a_node_that_has_not_joined_says_why() {
        let manager = serde_json::json!({
            "address": "m:7400", "joined": false, "attends": false, "refused": false, "trouble": "no join token"
        });
        let manager = serde_json::from_value(manager).unwrap();
        let Bad(what, _) = not_joined(&Health { lazy: false, manager, ..health(None, true) }) else {
            panic!("not joined")
        };
        assert!(what.contains("has not joined a mesh (no join token)"), "{what}");
    }

    #[test]
    fn a_clock_that_is_off_is_named_with_its_direction() {
        assert!(matches!(clock(Some(&health(Some(3), true))), Good(_)));
        assert!(matches!(clock(Some(&health(None, true))), Unknown(_)));
        let Bad(late, _) = clock(Some(&health(Some(3600), true))) else { panic!("an hour is off") };
        assert!(late.contains("3600 s behind"), "{late}");
        let Bad(early, _) = clock(Some(&health(Some(-3600), true))) else { panic!("an hour is off") };
        assert!(early.contains("3600 s ahead of"), "{early}");
    }

    #[test]
    fn a_scheduler_out_of_reach_is_named() {
        let Bad(what, _) = schedulers(Some(&health(None, false))) else { panic!("it is out of reach") };
        assert!(what.contains("s1 at 10.0.0.1:7410 (connection refused)"), "{what}");
        assert!(matches!(schedulers(Some(&health(None, true))), Good(_)));
        assert!(matches!(schedulers(None), Unknown(_)));
    }

    #[test]
    fn a_host_with_nothing_of_a_node_is_none() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            options: Options,
        }
        let of = |root: &str| {
            <Line as clap::Parser>::parse_from(["doctor", "--root", root, "--address", "/nowhere/d.sock"])
                .options
        };
        assert!(is_no_node(&of("/nowhere"), Path::new("/nowhere/c.toml")));
        assert!(!is_no_node(&of("/"), Path::new("/nowhere/c.toml")));
        assert!(!is_no_node(&of("/nowhere"), Path::new("/")));
    }

    #[test]
    fn what_is_no_fuse_device_is_none() {
        assert!(matches!(fuse(Path::new("/dev/null")), Bad(..)));
        assert!(matches!(fuse(Path::new("/dev/there-is-no-such-device")), Bad(..)));
    }
}
