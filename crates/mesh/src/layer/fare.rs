//! What a piece costs of the limit of downloads.

use tokio::sync::watch;

use super::Priority;
use crate::limits::{Bucket, Urgency};

/// What was taken from the limit of downloads for a piece, before its size on the way is known.
pub(super) struct Fare<'a> {
    limit: &'a Bucket,
    left: u64,
}

impl<'a> Fare<'a> {
    /// Waits for its turn: a container's read before all others, also if it comes later.
    pub(super) async fn pay(limit: &'a Bucket, bytes: u64, mut priority: watch::Receiver<Priority>) -> Self {
        if !limit.is_limited() {
            return Self { limit, left: 0 };
        }
        loop {
            let urgency = urgency(*priority.borrow_and_update());
            tokio::select! {
                () = limit.take(bytes, urgency) => return Self { limit, left: bytes },
                Ok(()) = priority.changed() => {}
            }
        }
    }

    /// So much has come.
    pub(super) fn came(&mut self, bytes: u64) {
        let paid = bytes.min(self.left);
        self.left -= paid;
        self.limit.spend(bytes - paid);
    }
}

impl Drop for Fare<'_> {
    fn drop(&mut self) {
        self.limit.give_back(self.left);
    }
}

fn urgency(priority: Priority) -> Urgency {
    match priority {
        Priority::Background => Urgency::Background,
        Priority::Recorded | Priority::Ahead => Urgency::Ahead,
        Priority::Demand => Urgency::Demand,
    }
}
