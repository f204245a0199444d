//! Places for what is being sent. Where uploads are limited there are fewer: each of those who have one then hears something
//! before it loses patience, and gets all of what it waits for. Many at once would all get too little, and begin again.

use std::sync::Arc;

use darter_types::RateKind;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::shared::Shared;

/// Bytes per second of the limit for each place. A child gives a map up that comes with less than half of it.
const RATE_OF_ONE: u64 = 128 << 10;

pub(super) struct Slots {
    semaphore: Arc<Semaphore>,
    max: usize,
    /// How many there are, taken ones included.
    count: Mutex<usize>,
    /// Bytes per second that may be sent; `None`: no limit.
    rate: Box<dyn Fn() -> Option<u64> + Send + Sync>,
}

/// A place, free again when it is dropped.
pub(super) struct Slot {
    slots: Arc<Slots>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Slots {
    /// So many at most; as many as this peer's limit of uploads, which may change, has room for.
    pub(super) fn of_uploads(shared: &Arc<Shared>, max: usize) -> Arc<Self> {
        let owner = shared.clone();
        Self::new(max, move || owner.limits.of(RateKind::Upload).rate())
    }

    fn new(max: usize, rate: impl Fn() -> Option<u64> + Send + Sync + 'static) -> Arc<Self> {
        let semaphore = Arc::new(Semaphore::new(max));
        Arc::new(Self { semaphore, max, count: Mutex::new(max), rate: Box::new(rate) })
    }

    fn wanted(&self) -> usize {
        let enough_for = |rate: u64| usize::try_from(rate / RATE_OF_ONE).unwrap_or(self.max);
        (self.rate)().map_or(self.max, |rate| enough_for(rate).clamp(1, self.max))
    }

    /// As many as there should be now. What is taken stays taken.
    fn fit(&self) {
        let (wanted, mut count) = (self.wanted(), self.count.lock());
        if wanted > *count {
            self.semaphore.add_permits(wanted - *count);
            *count = wanted;
        } else {
            *count -= self.semaphore.forget_permits(*count - wanted);
        }
    }

    /// Waits for one; who came first is first.
    pub(super) async fn wait(self: &Arc<Self>) -> Slot {
        self.fit();
        let permit = self.semaphore.clone().acquire_owned().await;
        Slot { slots: self.clone(), permit: Some(permit.expect("the semaphore is never closed")) }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut count = self.slots.count.lock();
        // One too many goes to nobody, also if somebody waits for it.
        if *count > self.slots.wanted() {
            self.permit.take().into_iter().for_each(OwnedSemaphorePermit::forget);
            *count -= 1;
        }
        drop(count);
        self.permit = None;
        self.slots.fit();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use futures_util::FutureExt;

    use super::*;

    /// How many can be had at once, all of them given back at the end.
    fn free(slots: &Arc<Slots>) -> usize {
        let taken: Vec<Slot> = std::iter::from_fn(|| slots.wait().now_or_never()).collect();
        taken.len()
    }

    fn limited(max: usize) -> (Arc<Slots>, Arc<AtomicU64>) {
        let rate = Arc::<AtomicU64>::default();
        let now = rate.clone();
        let slots = Slots::new(max, move || Some(now.load(Ordering::Relaxed)).filter(|rate| *rate > 0));
        (slots, rate)
    }

    #[test]
    fn there_are_as_many_as_the_limit_has_room_for() {
        let (slots, rate) = limited(16);
        for (limit, count) in
            [(0, 16), (100_000, 1), (4 * RATE_OF_ONE, 4), (1 << 40, 16), (2 * RATE_OF_ONE, 2), (0, 16)]
        {
            rate.store(limit, Ordering::Relaxed);
            assert_eq!(free(&slots), count, "at {limit}");
        }
    }

    #[test]
    fn places_that_are_too_many_go_to_nobody_and_more_of_them_to_who_waits() {
        let (slots, rate) = limited(4);
        let mut taken: Vec<Slot> = (0..4).filter_map(|_| slots.wait().now_or_never()).collect();
        rate.store(2 * RATE_OF_ONE, Ordering::Relaxed);
        let mut waiting: Vec<_> = (0..3).map(|_| Box::pin(slots.wait())).collect();
        let mut come = || waiting.iter_mut().filter_map(|slot| slot.now_or_never()).collect::<Vec<_>>();
        taken.truncate(2);
        assert!(come().is_empty(), "two are taken still");
        taken.truncate(1);
        taken.extend(come());
        assert_eq!(taken.len(), 2);
        rate.store(0, Ordering::Relaxed);
        taken.truncate(1);
        assert_eq!(free(&slots), 1, "one is taken, and two wait");
    }
}
