//! The settings of the node daemon: one TOML file, every key with its default. `packaging/etc/snapshotter.toml` shows them.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use darter_daemon::address;
use darter_daemon::numbers::{Listen, Numbers};
use darter_daemon::tasks::Tasks;
use darter_daemon::traces;
use darter_layer::Tree;
use darter_mesh::assemble::{AssembleError, PeerConfig, assemble, percent};
use darter_types::Role;
use serde::{Deserialize, Deserializer, Serialize};

use crate::keep::Launch;
use crate::membership::Membership;
use crate::peer::Sealed;
use crate::start::{Options, Peer};

/// The word that makes a program of ours a holder ([`crate::keep::hold`]), instead of everything else that it can do.
pub const HOLD: &str = "hold";

/// Before the manager is asked again.
const JOIN_RETRY: Duration = Duration::from_secs(10);

/// A folder that can be a root, from the command line: it stands in the options of each container's mount, where ':' and ',' part one
/// from the next.
pub fn root_folder(text: &str) -> Result<PathBuf, String> {
    match text.contains([':', ',']) {
        true => Err(format!("{text:?} has a ':' or ',', which no mount option takes: name another folder")),
        false => Ok(PathBuf::from(text)),
    }
}

fn root<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    root_folder(&String::deserialize(from)?).map_err(serde::de::Error::custom)
}

/// An empty text, path or list, and a rate of 0, mean that nothing was set.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Snapshots, pieces, maps and the certificate are kept here, on one file system. Default: `/var/lib/darter`.
    #[serde(deserialize_with = "root")]
    pub root: PathBuf,
    /// The socket for containerd, and for CRI's image service. Default: `/run/darter/darter.sock`.
    pub address: PathBuf,
    /// containerd's own socket. Default: `/run/containerd/containerd.sock`.
    pub containerd_address: PathBuf,
    /// How long Prepare may take for all layers of an image; what is undecided then is lazy. Default: 700.
    pub prepare_wait_ms: u64,
    /// How long the mounting of a container waits for the maps of its layers. Default: 25.
    pub mount_wait_seconds: u64,
    /// How long the answer of CRI's PullImage is held back until the maps are there. Default: 600.
    pub pull_wait_seconds: u64,
    /// How long a request to read or to look a name up waits for what is not on the node and nobody gives; then it ends with
    /// an I/O error. The kernel asks twice before a reader sees that. From 1 to 86400, a day. Default: 300.
    #[serde(deserialize_with = "read_wait")]
    pub read_wait_seconds: u64,
    /// Memory that merging the layers of an image may take; an image that takes more is unpacked by containerd, as without
    /// Darter. Default: 536870912, for about one and a half million files.
    pub tree_memory_bytes: u64,
    /// `host:port` of the manager. Empty: no mesh, everything is plain. Default: `127.0.0.1:7400`.
    #[serde(deserialize_with = "address::host_port_or_empty")]
    pub manager: String,
    /// A token for a node. Empty: it is read from `join_token_file`. Default: empty.
    pub join_token: String,
    /// Default: `/etc/darter/node.token`.
    pub join_token_file: PathBuf,
    /// Its name in the cluster. Empty: the host's name. Default: empty.
    pub node_name: String,
    /// Where other peers reach it. Default: `0.0.0.0:7420`.
    #[serde(deserialize_with = "address::listen")]
    pub listen: SocketAddr,
    /// `host:port` that others are told. Empty: the address that this host has on its way to the manager. Default: empty.
    #[serde(deserialize_with = "address::host_port_or_empty")]
    pub advertise: String,
    /// Peers of one zone are preferred to others. Default: empty.
    pub zone: String,
    /// Where registries are described, as for containerd. Default: `/etc/containerd/certs.d`.
    pub hosts_dir: PathBuf,
    /// Docker's `config.json`, for credentials. Empty: `$DOCKER_CONFIG/config.json`, or `~/.docker/config.json`. Default: empty.
    pub docker_config: PathBuf,
    /// Registries, `host:port`, that a host's name without its port may mean. Default: none.
    pub registries: Vec<String>,
    /// The file with the key by which credentials of pulls are kept encrypted below the root, so that they outlive a restart; a
    /// name without a slash is one of systemd's credentials. Empty: they are in memory only. Default: empty.
    pub credentials_key_file: PathBuf,
    /// Pieces that are sent at the same time. Default: 64.
    pub upload_slots: u32,
    /// Bytes per second of all that comes from other peers. The manager's word on this and the next three goes before what is set
    /// here. Default: 0, no limit.
    pub download_rate_bytes: u64,
    /// Bytes per second of all uploads together. Default: 0, no limit.
    pub upload_rate_bytes: u64,
    /// Bytes per second of the blobs that are read from registries to make layers. Default: 0, no limit.
    pub registry_rate_bytes: u64,
    /// Bytes per second of what is fetched in the background. Default: 0, no limit.
    pub background_rate_bytes: u64,
    /// How long no container may have waited for a piece before the background goes on. Default: 3000.
    pub background_idle_ms: u64,
    /// Whether the background stands back while others keep the host's disk or link busy. Default: true.
    pub background_yields: bool,
    /// Bytes per second that the host's link takes in one direction, by which it is judged whether it is busy. Default: 0, as the
    /// kernel tells.
    pub link_rate_bytes: u64,
    /// Where numbers are told (`/metrics`, `/livez`, `/readyz`). Empty: nowhere. Default: `127.0.0.1:7484`.
    pub metrics_listen: Listen,
    /// Which reads and pulls are followed, and where they are told.
    pub traces: traces::Settings,
    /// Whether what earlier starts of an image read first, on any node, is fetched before a container asks. Default: true.
    pub prefetch: bool,
    /// The most bytes of pieces that are kept. Default: 0, no limit.
    pub store_quota_bytes: u64,
    /// When the file system is this full, in percent, nothing is fetched that nobody waits for, and pieces of layers go that no
    /// container uses. Default: 80.
    #[serde(deserialize_with = "percent")]
    pub store_high_percent: u8,
    /// They go until it is only this full; not more than the above. Default: 75.
    #[serde(deserialize_with = "percent")]
    pub store_low_percent: u8,
    /// How long a layer stays after it was used while the disk isn't full but for the mark. Default: 600.
    pub store_keep_seconds: u64,
}

impl Default for Config {
    fn default() -> Self {
        let peer = PeerConfig::default();
        Self {
            root: "/var/lib/darter".into(),
            address: "/run/darter/darter.sock".into(),
            containerd_address: "/run/containerd/containerd.sock".into(),
            prepare_wait_ms: 700,
            mount_wait_seconds: 25,
            pull_wait_seconds: 600,
            read_wait_seconds: 300,
            tree_memory_bytes: Tree::MEMORY_DEFAULT,
            manager: peer.manager,
            join_token: String::new(),
            join_token_file: "/etc/darter/node.token".into(),
            node_name: String::new(),
            listen: (Ipv4Addr::UNSPECIFIED, 7420).into(),
            advertise: String::new(),
            zone: String::new(),
            hosts_dir: peer.hosts_dir,
            docker_config: PathBuf::new(),
            registries: Vec::new(),
            credentials_key_file: PathBuf::new(),
            upload_slots: peer.upload_slots,
            download_rate_bytes: peer.download_rate_bytes,
            upload_rate_bytes: peer.upload_rate_bytes,
            registry_rate_bytes: peer.registry_rate_bytes,
            background_rate_bytes: peer.background_rate_bytes,
            background_idle_ms: peer.background_idle_ms,
            background_yields: peer.background_yields,
            link_rate_bytes: peer.link_rate_bytes,
            metrics_listen: Listen::local(7484),
            traces: peer.traces,
            prefetch: peer.prefetch,
            store_quota_bytes: peer.store_quota_bytes,
            store_high_percent: peer.store_high_percent,
            store_low_percent: peer.store_low_percent,
            store_keep_seconds: peer.store_keep_seconds,
        }
    }
}

impl Config {
    /// What the command line says goes before the file.
    pub fn set(&mut self, root: Option<PathBuf>, address: Option<PathBuf>, containerd: Option<PathBuf>) {
        let settings = [&mut self.root, &mut self.address, &mut self.containerd_address];
        for (setting, given) in settings.into_iter().zip([root, address, containerd]) {
            if let Some(given) = given {
                *setting = given;
            }
        }
    }

    pub fn options(&self) -> Options {
        Options {
            root: self.root.clone(),
            address: self.address.clone(),
            containerd_address: self.containerd_address.clone(),
            prepare_wait: Duration::from_millis(self.prepare_wait_ms),
            mount_wait: Duration::from_secs(self.mount_wait_seconds),
            pull_wait: Duration::from_secs(self.pull_wait_seconds),
            read_wait: Duration::from_secs(self.read_wait_seconds),
            tree_memory: self.tree_memory_bytes,
            holder: Some(Launch::this_program(HOLD)),
        }
    }

    /// Where credentials of pulls are kept; `None`: nowhere, and no longer.
    fn sealed(&self) -> Option<Sealed> {
        let (file, key) = (self.root.join("credentials"), &self.credentials_key_file);
        if key.as_os_str().is_empty() {
            // Of a time when they were kept; there may be none.
            let _ = std::fs::remove_file(file);
            return None;
        }
        Some(Sealed { file, key: key_file(key) })
    }

    /// The part of the settings that every peer has.
    pub fn peer_config(&self) -> PeerConfig {
        PeerConfig {
            root: self.root.clone(),
            manager: self.manager.clone(),
            join_token: self.join_token.clone(),
            join_token_file: self.join_token_file.clone(),
            node_name: self.node_name.clone(),
            listen: self.listen,
            advertise: self.advertise.clone(),
            zone: self.zone.clone(),
            hosts_dir: self.hosts_dir.clone(),
            docker_config: self.docker_config.clone(),
            registries: self.registries.clone(),
            upload_slots: self.upload_slots,
            download_rate_bytes: self.download_rate_bytes,
            upload_rate_bytes: self.upload_rate_bytes,
            registry_rate_bytes: self.registry_rate_bytes,
            background_rate_bytes: self.background_rate_bytes,
            background_idle_ms: self.background_idle_ms,
            background_yields: self.background_yields,
            link_rate_bytes: self.link_rate_bytes,
            metrics_listen: self.metrics_listen,
            traces: self.traces.clone(),
            prefetch: self.prefetch,
            store_quota_bytes: self.store_quota_bytes,
            store_high_percent: self.store_high_percent,
            store_low_percent: self.store_low_percent,
            store_keep_seconds: self.store_keep_seconds,
        }
    }

    /// Joins the mesh; `None` without a manager. As long as it can't, for whatever reason, it tries again and again: to end would
    /// take plain snapshots from containerd, too.
    pub(crate) async fn peer(
        &self,
        tasks: &Tasks,
        numbers: &Numbers,
        membership: &Membership,
    ) -> Result<Option<Peer>, AssembleError> {
        if self.manager.is_empty() {
            return Ok(None);
        }
        membership.joining(&self.manager, "it has not answered yet".to_owned());
        loop {
            match assemble(&self.peer_config(), Role::Node, tasks).await {
                Ok(assembled) => {
                    numbers.add(|registry| assembled.parts.mesh.register(registry));
                    let (mesh, orders) = (assembled.parts.mesh, assembled.attendance);
                    membership.joined(assembled.identity, orders.standing);
                    darter_mesh::orders::fetch(mesh.clone(), orders.preheats, orders.updates, tasks);
                    return Ok(Some(Peer::new(mesh, assembled.parts.registry, self.sealed(), tasks)));
                }
                Err(AssembleError::Enrol(error)) => {
                    tracing::error!(manager = self.manager, %error, "not joined; until then every snapshot is plain");
                    membership.joining(&self.manager, error.to_string());
                    tokio::time::sleep(JOIN_RETRY).await;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// Not at all would fail each read that isn't local, and for ever is longer than a clock can tell.
fn read_wait<'de, D: serde::Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    let value = u64::deserialize(from)?;
    match value {
        1..=86_400 => Ok(value),
        _ => Err(serde::de::Error::custom(format!("{value} is no number of seconds from 1 to 86400"))),
    }
}

/// A name alone is one of the files that systemd passes (`LoadCredential=`).
fn key_file(given: &Path) -> PathBuf {
    let is_name = given.components().count() == 1 && given.is_relative();
    match std::env::var_os("CREDENTIALS_DIRECTORY").filter(|_| is_name) {
        Some(folder) => PathBuf::from(folder).join(given),
        None => given.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sample_file_equals_the_defaults_and_shows_every_key() {
        let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/etc/snapshotter.toml");
        assert_eq!(darter_daemon::config::load::<Config>(&sample).unwrap(), Config::default());
        let text = std::fs::read_to_string(sample).unwrap();
        let shown = text.lines().filter(|line| !line.starts_with('#') && line.contains(" = ")).count();
        // The derived text names every field once, and beside those of `traces` the part itself.
        let fields = format!("{:?}", Config::default()).matches(": ").count() - 1;
        assert_eq!(shown, fields);
    }

    #[test]
    fn a_root_that_no_mount_takes_is_a_mistake_of_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("c.toml");
        for (root, is_wrong) in [("/data/a:b", true), ("/data/a,b", true), ("/data/a-b", false)] {
            std::fs::write(&file, format!("root = \"{root}\"\n")).unwrap();
            let loaded = darter_daemon::config::load::<Config>(&file);
            assert_eq!(loaded.is_err(), is_wrong, "{root}");
            assert_eq!(root_folder(root).is_err(), is_wrong, "{root}");
        }
    }

    #[test]
    fn the_command_line_goes_before_the_file() {
        let mut config = Config::default();
        config.set(None, Some("/x.sock".into()), None);
        assert_eq!(config.address, Path::new("/x.sock"));
        assert_eq!(config.root, Config::default().root);
    }

    #[test]
    fn a_read_waits_for_a_second_at_least_and_for_a_day_at_most() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("c.toml");
        for (seconds, is_good) in [(0, false), (1, true), (86_400, true), (86_401, false), (i64::MAX, false)]
        {
            std::fs::write(&file, format!("read_wait_seconds = {seconds}\n")).unwrap();
            assert_eq!(darter_daemon::config::load::<Config>(&file).is_ok(), is_good, "{seconds}");
        }
    }
}
