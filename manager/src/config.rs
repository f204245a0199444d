//! The manager's settings: `packaging/etc/manager.toml` shows them all.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use darter_daemon::address;
use darter_daemon::numbers::Listen;
use darter_types::ClusterName;
use serde::{Deserialize, Serialize};

use crate::ManagerError;

/// A certificate that lives shorter than this would be renewed all the time.
const LIFE_MIN: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The database, the CA's key and the first API token are here. Default: `/var/lib/darter-manager`.
    pub root: PathBuf,
    /// The cluster that this manager is for; it is part of every certificate. Default: `default`.
    pub cluster: String,
    /// Where members reach it, over mutual TLS. Default: `0.0.0.0:7400`.
    #[serde(deserialize_with = "address::listen")]
    pub grpc_listen: SocketAddr,
    /// The REST API, plain HTTP with API tokens: put a TLS proxy before it if it must be reached from other machines.
    /// Default: `127.0.0.1:7480`.
    #[serde(deserialize_with = "address::listen")]
    pub http_listen: SocketAddr,
    /// How long a member's certificate is valid; it is renewed at half of that. A manager that is down for longer than the
    /// other half makes members join again. Default: 604800, a week.
    pub certificate_life_seconds: u64,
    /// Where numbers are told (`/metrics`, `/livez`, `/readyz`). Empty: nowhere. Default: `127.0.0.1:7481`.
    pub metrics_listen: Listen,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: PathBuf::from("/var/lib/darter-manager"),
            cluster: "default".to_owned(),
            grpc_listen: (Ipv4Addr::UNSPECIFIED, 7400).into(),
            http_listen: (Ipv4Addr::LOCALHOST, 7480).into(),
            certificate_life_seconds: 7 * 24 * 3600,
            metrics_listen: Listen::local(7481),
        }
    }
}

impl Config {
    pub(crate) fn cluster(&self) -> Result<ClusterName, ManagerError> {
        self.cluster.parse().map_err(|error| ManagerError::Config(format!("cluster: {error}")))
    }

    pub(crate) fn certificate_life(&self) -> Result<Duration, ManagerError> {
        let life = Duration::from_secs(self.certificate_life_seconds);
        if life < LIFE_MIN {
            let text = format!("certificate_life_seconds: it must be {} at least", LIFE_MIN.as_secs());
            return Err(ManagerError::Config(text));
        }
        Ok(life)
    }
}

/// The configuration of a command: the one that is `given`, or the `usual` one, which must be there. By the defaults alone a
/// command would work on whatever lies in their folder.
pub fn of_command(given: Option<&Path>, usual: &Path) -> Result<Config, ManagerError> {
    match given {
        Some(path) => Ok(darter_daemon::config::load(path)?),
        None if usual.exists() => Ok(darter_daemon::config::load(usual)?),
        None => Err(ManagerError::NoConfig { path: usual.to_owned() }),
    }
}

/// Reads a life such as `90s`, `30m`, `1h` or `7d`.
pub fn parse_life(text: &str) -> Result<Duration, String> {
    let refuse = || format!("{text:?} is no length of time: write 90s, 30m, 1h or 7d");
    let unit = match text.chars().last() {
        Some('s') => 1,
        Some('m') => 60,
        Some('h') => 3_600,
        Some('d') => 86_400,
        _ => return Err(refuse()),
    };
    let count: u64 = text[..text.len() - 1].parse().map_err(|_| refuse())?;
    count.checked_mul(unit).map(Duration::from_secs).ok_or_else(refuse)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sample_file_equals_the_defaults_and_shows_every_key() {
        let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/etc/manager.toml");
        assert_eq!(darter_daemon::config::load::<Config>(&sample).unwrap(), Config::default());
        let text = std::fs::read_to_string(sample).unwrap();
        for key in
            ["root", "cluster", "grpc_listen", "http_listen", "certificate_life_seconds", "metrics_listen"]
        {
            assert!(text.lines().any(|line| line.starts_with(&format!("{key} = "))), "{key} is not shown");
        }
    }

    #[test]
    fn command_without_a_configuration_does_not_go_by_the_defaults() {
        let folder = tempfile::tempdir().unwrap();
        let usual = folder.path().join("manager.toml");
        assert!(matches!(of_command(None, &usual), Err(ManagerError::NoConfig { .. })));
        assert!(matches!(of_command(Some(&usual), &usual), Err(ManagerError::ConfigFile(_))));
        std::fs::write(&usual, "cluster = \"here\"\n").unwrap();
        assert_eq!(of_command(None, &usual).unwrap().cluster, "here");
    }

    #[test]
    fn lengths_of_time_have_a_unit() {
        assert_eq!(parse_life("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_life("7d"), Ok(Duration::from_secs(7 * 86_400)));
        for bad in ["", "h", "1", "-1h", "1.5h", "1é", "99999999999999999d"] {
            assert!(parse_life(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn life_of_no_length_is_refused() {
        let config = Config { certificate_life_seconds: 0, ..Config::default() };
        assert!(config.certificate_life().is_err());
    }
}
