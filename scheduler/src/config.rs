//! The scheduler's settings: `packaging/etc/scheduler.toml` shows them all.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use darter_daemon::address;
use darter_daemon::numbers::Listen;
use darter_identity::enrol::Enrolment;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The certificate is kept here. Default: `/var/lib/darter-scheduler`.
    pub root: PathBuf,
    /// `host:port` of the manager. Default: `127.0.0.1:7400`.
    #[serde(deserialize_with = "address::host_port")]
    pub manager: String,
    /// A token for a scheduler. Empty: it is read from `join_token_file`. Default: empty.
    pub join_token: String,
    /// Default: `/etc/darter/scheduler.token`.
    pub join_token_file: PathBuf,
    /// Its name in the cluster. Empty: the host's name. Default: empty.
    pub node_name: String,
    /// Where nodes and seeds reach it. Default: `0.0.0.0:7410`.
    #[serde(deserialize_with = "address::listen")]
    pub listen: SocketAddr,
    /// `host:port` that others are told. Empty: the address that this host has on its way to the manager. Default: empty.
    #[serde(deserialize_with = "address::host_port_or_empty")]
    pub advertise: String,
    /// A file to write every event to, for a replay. Empty: none. Default: empty.
    pub record: PathBuf,
    /// Where numbers are told (`/metrics`, `/livez`, `/readyz`). Empty: nowhere. Default: `127.0.0.1:7482`.
    pub metrics_listen: Listen,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: PathBuf::from("/var/lib/darter-scheduler"),
            manager: "127.0.0.1:7400".to_owned(),
            join_token: String::new(),
            join_token_file: PathBuf::from("/etc/darter/scheduler.token"),
            node_name: String::new(),
            listen: (Ipv4Addr::UNSPECIFIED, 7410).into(),
            advertise: String::new(),
            record: PathBuf::new(),
            metrics_listen: Listen::local(7482),
        }
    }
}

impl Config {
    pub(crate) fn enrolment(&self) -> Enrolment {
        Enrolment {
            root: self.root.clone(),
            manager: self.manager.clone(),
            join_token: self.join_token.clone(),
            join_token_file: self.join_token_file.clone(),
            node_name: self.node_name.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn sample_file_equals_the_defaults_and_shows_every_key() {
        let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/etc/scheduler.toml");
        assert_eq!(darter_daemon::config::load::<Config>(&sample).unwrap(), Config::default());
        let text = std::fs::read_to_string(sample).unwrap();
        let keys = [
            "root",
            "manager",
            "join_token",
            "join_token_file",
            "node_name",
            "listen",
            "advertise",
            "record",
            "metrics_listen",
        ];
        for key in keys {
            assert!(text.lines().any(|line| line.starts_with(&format!("{key} = "))), "{key} is not shown");
        }
    }
}
