//! What the daemon says of its manager, in the words of `darter doctor` and `darter status`.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Deserialize;

/// A second machine comes back within 15 s; what happened longer ago is over.
const REPLACED_WITHIN: Duration = Duration::from_secs(300);

/// As the daemon tells it; times are seconds since 1970.
#[derive(Deserialize)]
pub struct Manager {
    pub address: String,
    pub joined: bool,
    pub attends: bool,
    pub refused: bool,
    /// Why it doesn't attend, or has not joined.
    pub trouble: String,
    /// When a manager that is away was there last; `None`: not since the daemon's start.
    pub heard: Option<u64>,
    /// When another program with this certificate took this node's place.
    pub replaced: Option<u64>,
    pub certificate_ends: Option<u64>,
}

/// What is wrong between a node and its manager.
pub struct Trouble {
    pub what: String,
    /// What mends it.
    pub cure: String,
}

impl Manager {
    /// `None` if nothing is wrong, or if the node has not joined at all. `root` is the daemon's.
    pub fn trouble(&self, root: &Path, now: SystemTime) -> Option<Trouble> {
        let replaced = self.replaced.map(|at| ago(at, now)).filter(|ago| *ago < REPLACED_WITHIN);
        match replaced {
            _ if !self.joined => None,
            _ if self.refused => Some(self.refusal(root, now)),
            Some(ago) => Some(self.replacement(root, ago)),
            None if self.attends => None,
            None => Some(self.absence(now)),
        }
    }

    fn refusal(&self, root: &Path, now: SystemTime) -> Trouble {
        let (address, trouble, ends) = (&self.address, &self.trouble, self.ends(now));
        Trouble {
            what: format!("the manager {address} refuses this node: {trouble}{ends}"),
            cure: format!("if the machine is to stay: {}", join_anew(root)),
        }
    }

    fn replacement(&self, root: &Path, ago: Duration) -> Trouble {
        let (address, ago) = (&self.address, words(ago));
        Trouble {
            what: format!(
                "another machine attends the manager {address} with this node's certificate, {ago} ago for the last time"
            ),
            cure: format!("on whichever of the two is a copy: {}", join_anew(root)),
        }
    }

    fn absence(&self, now: SystemTime) -> Trouble {
        let since_start = || "since the daemon's start".to_owned();
        let since = self.heard.map_or_else(since_start, |at| format!("for {}", words(ago(at, now))));
        let (address, trouble, ends) = (&self.address, &self.trouble, self.ends(now));
        let cure = "on its host: systemctl start darter-manager, and let its port through the firewall; what is known goes on until then";
        Trouble {
            what: format!("the manager {address} has not answered {since} ({trouble}){ends}"),
            cure: cure.to_owned(),
        }
    }

    /// Until when the others take this node for a member.
    fn ends(&self, now: SystemTime) -> String {
        match self.certificate_ends.map(|at| ahead(at, now)) {
            Some(left) if left.is_zero() => "; this node's certificate has ended".to_owned(),
            Some(left) => format!("; this node's certificate ends in {}", words(left)),
            None => String::new(),
        }
    }
}

fn join_anew(root: &Path) -> String {
    format!(
        "systemctl stop darter-snapshotter, move {} away, set another node_name in /etc/darter/snapshotter.toml, put a fresh join token \
         into /etc/darter/node.token, and start it again",
        root.join("identity").display()
    )
}

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

fn ago(seconds: u64, now: SystemTime) -> Duration {
    now.duration_since(at(seconds)).unwrap_or_default()
}

fn ahead(seconds: u64, now: SystemTime) -> Duration {
    at(seconds).duration_since(now).unwrap_or_default()
}

/// A length of time, in the unit that people would use.
pub fn words(length: Duration) -> String {
    let seconds = length.as_secs();
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_000_000;

    fn manager() -> Manager {
        Manager {
            address: "m:7400".into(),
            joined: true,
            attends: true,
            refused: false,
            trouble: String::new(),
            heard: None,
            replaced: None,
            certificate_ends: Some(NOW + 3 * 86_400),
        }
    }

    fn said(manager: &Manager) -> Option<String> {
        manager
            .trouble(Path::new("/r"), at(NOW))
            .map(|trouble| format!("{} | {}", trouble.what, trouble.cure))
    }

    #[test]
    fn manager_that_is_there_is_no_trouble() {
        assert_eq!(said(&manager()), None);
        assert_eq!(said(&Manager { joined: false, attends: false, ..manager() }), None);
    }

    #[test]
    fn manager_that_is_away_is_told_with_since_when_and_until_when() {
        let away = Manager { attends: false, trouble: "can't reach it".into(), ..manager() };
        let words = said(&Manager { heard: Some(NOW - 3 * 3600), ..away }).unwrap();
        assert!(
            words.contains(
                "m:7400 has not answered for 3 h (can't reach it); this node's certificate ends in 3 days"
            ),
            "{words}"
        );
        let never = Manager { attends: false, certificate_ends: Some(NOW - 1), ..manager() };
        let words = said(&never).unwrap();
        assert!(
            words.contains("since the daemon's start") && words.contains("certificate has ended"),
            "{words}"
        );
    }

    #[test]
    fn revoked_node_is_told_so() {
        let revoked =
            Manager { attends: false, refused: true, trouble: "n1 was revoked".into(), ..manager() };
        let words = said(&revoked).unwrap();
        assert!(
            words.contains("refuses this node: n1 was revoked; ") && words.contains("another node_name"),
            "{words}"
        );
    }

    #[test]
    fn copied_identity_is_told_while_it_goes_on() {
        let replaced = |ago| Manager { replaced: Some(NOW - ago), ..manager() };
        let words = said(&replaced(20)).unwrap();
        assert!(
            words.contains("another machine attends") && words.contains("move /r/identity away"),
            "{words}"
        );
        assert_eq!(said(&replaced(3600)), None);
    }
}
