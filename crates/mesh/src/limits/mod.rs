//! How many bytes this host may move in a second, for each [`RateKind`]: as it was configured, unless the manager says otherwise.

mod bucket;

use std::sync::Arc;

use darter_identity::attend::SetRates;
use darter_types::{RateKind, Rates};
use parking_lot::Mutex;
use tokio::sync::watch;

pub(crate) use bucket::{Bucket, Urgency};

use crate::shared::Shared;

/// Who has set a limit. What stands further down goes before what stands further up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SetBy {
    /// Its own configuration.
    Host,
    /// The manager, for the whole cluster.
    Cluster,
    /// The manager, for this member.
    Member,
}

impl SetBy {
    pub fn as_str(self) -> &'static str {
        match self {
            SetBy::Host => "host",
            SetBy::Cluster => "cluster",
            SetBy::Member => "member",
        }
    }
}

/// A limit in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateStatus {
    pub kind: RateKind,
    /// Bytes per second; 0: no limit.
    pub rate: u64,
    pub set_by: SetBy,
}

pub(crate) struct Limits {
    own: Rates,
    set: Mutex<SetRates>,
    buckets: [Bucket; RateKind::ALL.len()],
}

impl Limits {
    pub(crate) fn new(own: Rates, set: SetRates) -> Self {
        let bucket = |kind| match kind {
            // Maps go before pieces, but a member that asks for maps all the time must not starve those who read.
            RateKind::Upload => Bucket::sharing(),
            RateKind::Download | RateKind::Registry | RateKind::Background => Bucket::default(),
        };
        let limits = Self { own, set: Mutex::default(), buckets: RateKind::ALL.map(bucket) };
        limits.apply(set);
        limits
    }

    pub(crate) fn of(&self, kind: RateKind) -> &Bucket {
        &self.buckets[kind as usize]
    }

    pub(crate) fn status(&self) -> [RateStatus; RateKind::ALL.len()] {
        let set = *self.set.lock();
        RateKind::ALL.map(|kind| in_force(kind, &self.own, &set))
    }

    fn apply(&self, set: SetRates) {
        *self.set.lock() = set;
        for RateStatus { kind, rate, .. } in self.status() {
            self.of(kind).set_rate(Some(rate));
        }
    }
}

fn in_force(kind: RateKind, own: &Rates, set: &SetRates) -> RateStatus {
    let said = [(SetBy::Member, &set.member), (SetBy::Cluster, &set.cluster), (SetBy::Host, own)];
    let found = said.into_iter().find_map(|(set_by, rates)| Some((set_by, rates.get(kind)?)));
    let (set_by, rate) = found.unwrap_or((SetBy::Host, 0));
    RateStatus { kind, rate, set_by }
}

/// Does what the manager says until the program stops.
pub(crate) async fn follow(shared: Arc<Shared>, mut set: watch::Receiver<SetRates>) {
    loop {
        let now = *set.borrow_and_update();
        shared.limits.apply(now);
        if set.changed().await.is_err() {
            // Nobody will say anything else: what was said last stays.
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_counts() {
        let rates = |rate| Rates::default().with(RateKind::Upload, rate);
        let status = |own, cluster, member| {
            let set = SetRates { cluster: rates(cluster), member: rates(member) };
            let RateStatus { rate, set_by, .. } = in_force(RateKind::Upload, &rates(own), &set);
            (rate, set_by)
        };
        assert_eq!(status(None, None, None), (0, SetBy::Host));
        assert_eq!(status(Some(5), None, None), (5, SetBy::Host));
        assert_eq!(status(Some(5), Some(6), None), (6, SetBy::Cluster));
        assert_eq!(status(Some(5), Some(6), Some(0)), (0, SetBy::Member));
    }

    #[test]
    fn what_the_manager_takes_back_is_as_it_was_configured() {
        let limits = Limits::new(Rates::default().with(RateKind::Upload, Some(5)), SetRates::default());
        let cluster = Rates::default().with(RateKind::Upload, Some(0));
        limits.apply(SetRates { cluster, ..SetRates::default() });
        assert!(!limits.of(RateKind::Upload).is_limited());
        limits.apply(SetRates::default());
        assert!(limits.of(RateKind::Upload).is_limited() && !limits.of(RateKind::Download).is_limited());
    }
}
