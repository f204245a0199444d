//! Places for what is done for others, of which no member has more than its share.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use darter_identity::Member;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

pub(super) struct Shares {
    all: Arc<Semaphore>,
    each_max: usize,
    members: Mutex<HashMap<Member, Weak<Semaphore>>>,
}

/// A place, free again when it is dropped.
pub(super) struct Share {
    _own: OwnedSemaphorePermit,
    _all: OwnedSemaphorePermit,
}

impl Shares {
    /// So many places for all together, and for each.
    pub(super) fn new(all_max: usize, each_max: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(all_max)), each_max, members: Mutex::default() }
    }

    fn of(&self, member: &Member) -> Arc<Semaphore> {
        let mut members = self.members.lock();
        if let Some(own) = members.get(member).and_then(Weak::upgrade) {
            return own;
        }
        members.retain(|_, own| own.strong_count() > 0);
        let own = Arc::new(Semaphore::new(self.each_max));
        members.insert(member.clone(), Arc::downgrade(&own));
        own
    }

    /// A place, if there is one.
    pub(super) fn try_take(&self, member: &Member) -> Option<Share> {
        let own = self.of(member).try_acquire_owned().ok()?;
        let all = self.all.clone().try_acquire_owned().ok()?;
        Some(Share { _own: own, _all: all })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(node: &str) -> Member {
        format!("spiffe://darter/here/node/{node}").parse().unwrap()
    }

    #[test]
    fn no_member_has_more_than_its_share_and_all_no_more_than_there_is() {
        let shares = Shares::new(3, 2);
        let _first = shares.try_take(&member("a")).unwrap();
        let second = shares.try_take(&member("a"));
        assert!(second.is_some() && shares.try_take(&member("a")).is_none());
        let _other = shares.try_take(&member("b")).unwrap();
        assert!(shares.try_take(&member("b")).is_none());
        drop(second);
        assert!(shares.try_take(&member("a")).is_some());
    }
}
