//! Seeds that can't be reached at the moment: nobody waits for them, and a task of their own finds out when they are back.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use darter_daemon::backoff::Backoff;
use darter_types::Role;
use parking_lot::Mutex;

use crate::serve::ALPNS;
use crate::shared::Shared;

const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(crate) struct Reach(Mutex<HashSet<String>>);

impl Reach {
    pub(crate) fn is_away(&self, address: &str) -> bool {
        self.0.lock().contains(address)
    }
}

/// No connection could be made to this seed. It is tried again, in the background, for as long as it is a member.
pub(crate) fn lost(shared: &Arc<Shared>, address: &str) {
    if !shared.reach.0.lock().insert(address.to_owned()) {
        return;
    }
    tracing::warn!(seed = address, "a seed is out of reach");
    let (owner, address) = (shared.clone(), address.to_owned());
    shared.tasks.spawn_until_stop("seed out of reach", async move {
        let mut backoff = Backoff::new(RETRY_MIN, RETRY_MAX);
        while is_member(&owner, &address) {
            tokio::time::sleep(backoff.next()).await;
            if owner.identity.connect(&address, &[Role::Seed], ALPNS[0]).await.is_ok() {
                tracing::info!(seed = address, "a seed can be reached again");
                break;
            }
        }
        owner.reach.0.lock().remove(&address);
    });
}

fn is_member(shared: &Shared, address: &str) -> bool {
    shared.members.borrow().seeds.iter().any(|seed| seed.address == address)
}
