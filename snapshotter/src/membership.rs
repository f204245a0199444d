//! How this node stands with its cluster: what joining and attending know, for those who ask the daemon.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use darter_identity::Identity;
use darter_identity::attend::Standing;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::watch;

/// Shared by who joins and who is asked. At first there is no cluster.
#[derive(Clone, Default)]
pub struct Membership(Arc<Mutex<State>>);

#[derive(Default)]
enum State {
    #[default]
    Alone,
    Joining {
        manager: String,
        trouble: String,
    },
    Joined {
        identity: Identity,
        standing: watch::Receiver<Standing>,
    },
}

/// The manager, as this node finds it. Times are seconds since 1970.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct ManagerHealth {
    /// `host:port`
    pub address: String,
    pub joined: bool,
    /// Whether it is there for this node now.
    pub attends: bool,
    /// It is there, but refuses this node: it was revoked, mostly.
    pub refused: bool,
    /// Why not, in words.
    pub trouble: String,
    /// When it was there last; `None`: not since the daemon's start, or it is there now.
    pub heard: Option<u64>,
    /// When another program with this node's certificate last took its place.
    pub replaced: Option<u64>,
    pub certificate_ends: Option<u64>,
}

impl Membership {
    /// The node has not joined, for now, and why.
    pub(crate) fn joining(&self, manager: &str, trouble: String) {
        *self.0.lock() = State::Joining { manager: manager.to_owned(), trouble };
    }

    pub fn joined(&self, identity: Identity, standing: watch::Receiver<Standing>) {
        *self.0.lock() = State::Joined { identity, standing };
    }

    /// `None` without a cluster.
    pub(crate) fn health(&self) -> Option<ManagerHealth> {
        match &*self.0.lock() {
            State::Alone => None,
            State::Joining { manager, trouble } => Some(ManagerHealth {
                address: manager.clone(),
                joined: false,
                attends: false,
                refused: false,
                trouble: trouble.clone(),
                heard: None,
                replaced: None,
                certificate_ends: None,
            }),
            State::Joined { identity, standing } => Some(told(standing.borrow().clone(), identity.expires())),
        }
    }
}

fn told(standing: Standing, certificate_ends: SystemTime) -> ManagerHealth {
    let Standing { manager, attends, heard, trouble, refused, replaced } = standing;
    let heard = heard.filter(|_| !attends).map(seconds);
    let (replaced, ends) = (replaced.map(seconds), Some(seconds(certificate_ends)));
    ManagerHealth {
        address: manager,
        joined: true,
        attends,
        refused,
        trouble,
        heard,
        replaced,
        certificate_ends: ends,
    }
}

fn seconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_keeps_a_node_from_joining_is_told() {
        let membership = Membership::default();
        assert_eq!(membership.health(), None);
        membership.joining("m:7400", "no join token".to_owned());
        let health = membership.health().unwrap();
        assert_eq!((health.joined, health.trouble.as_str()), (false, "no join token"));
    }

    #[test]
    fn manager_that_is_there_is_not_told_by_when_it_was() {
        let at = UNIX_EPOCH + std::time::Duration::from_secs(7);
        let gone = Standing { heard: Some(at), ..Standing::default() };
        assert_eq!(told(gone.clone(), at).heard, Some(7));
        assert_eq!(told(Standing { attends: true, ..gone }, at).heard, None);
    }
}
