//! Requests that are being worked on, so that the kernel can call them off.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::dying::is_dying;
use super::notes::{Notes, Slot};

/// The kernel says only once that a request is called off: whether the signal was followed by a fatal one has to be seen.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Interrupts that came before another thread had entered their request; the oldest is forgotten, as a rule one for a request
/// that was answered long ago.
const EARLY_MAX: usize = 64;

#[derive(Default)]
struct Requests {
    waiting: HashMap<u64, Arc<Notify>>,
    early: VecDeque<u64>,
}

/// The requests that wait, by their unique number. How many there can be is up to the kernel: one for each process that
/// waits, and `max_background` others.
#[derive(Default)]
pub(super) struct Pending {
    requests: Mutex<Requests>,
    notes: Option<Notes>,
    is_left: AtomicBool,
}

/// A place in [`Pending`], held as long as the request is worked on.
pub(super) struct Ticket {
    pending: Arc<Pending>,
    unique: u64,
    thread: u32,
    interrupt: Arc<Notify>,
    was_interrupted: AtomicBool,
    slot: Option<Slot>,
}

impl Pending {
    /// With `notes` the next process finds what this one hasn't answered.
    pub(super) fn new(notes: Option<Notes>) -> Self {
        Self { notes, ..Self::default() }
    }

    pub(super) fn notes(&self) -> Option<&Notes> {
        self.notes.as_ref()
    }

    /// From now on notes stay, since nobody can tell any more whether a request was answered.
    pub(super) fn leave(&self) {
        self.is_left.store(true, Ordering::Release);
    }

    pub(super) fn is_left(&self) -> bool {
        self.is_left.load(Ordering::Acquire)
    }

    /// The request in `slot` was answered, or is noted elsewhere.
    pub(super) fn release(&self, slot: Option<Slot>) {
        if let (Some(slot), Some(notes)) = (slot, &self.notes)
            && !self.is_left()
        {
            notes.leave(slot);
        }
    }

    /// `message` is the whole request.
    pub(super) fn enter(self: &Arc<Self>, unique: u64, thread: u32, message: &[u8]) -> Ticket {
        let slot = self.notes.as_ref().and_then(|notes| notes.enter(message));
        let interrupt = Arc::new(Notify::new());
        let mut requests = self.requests.lock();
        if requests.early.contains(&unique) {
            interrupt.notify_one();
        }
        requests.waiting.insert(unique, interrupt.clone());
        drop(requests);
        let was_interrupted = AtomicBool::new(false);
        Ticket { pending: self.clone(), unique, thread, interrupt, was_interrupted, slot }
    }

    /// Whoever waits for that request has a signal. If nobody waits, it was answered, or will be entered in a moment.
    pub(super) fn interrupt(&self, unique: u64) {
        let mut requests = self.requests.lock();
        match requests.waiting.get(&unique) {
            Some(interrupt) => interrupt.notify_one(),
            None => {
                requests.early.truncate(EARLY_MAX - 1);
                requests.early.push_front(unique);
            }
        }
    }
}

impl Ticket {
    pub(super) fn unique(&self) -> u64 {
        self.unique
    }

    /// Resolves when the thread that waits for the answer is dying. An interrupt that came before counts.
    pub(super) async fn called_off(&self) {
        self.interrupt.notified().await;
        self.was_interrupted.store(true, Ordering::Relaxed);
        while !is_dying(self.thread) {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

impl Ticket {
    /// For another ticket of the same request: whether an interrupt came, which the kernel won't repeat, and the note, which
    /// outlives this ticket until [`Pending::release`].
    pub(super) fn hand_on(mut self) -> (bool, Option<Slot>) {
        let (slot, interrupt) = (self.slot.take(), self.interrupt.clone());
        let was_seen = self.was_interrupted.load(Ordering::Relaxed);
        drop(self);
        // From now on interrupts don't find this ticket; one that did may have been seen by nobody.
        (was_seen || interrupt.notified().now_or_never().is_some(), slot)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.pending.requests.lock().waiting.remove(&self.unique);
        self.pending.release(self.slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No such thread: it counts as dying.
    const DEAD: u32 = 0;

    #[tokio::test]
    async fn an_interrupt_before_the_wait_counts() {
        let pending = Arc::new(Pending::default());
        let ticket = pending.enter(4, DEAD, &[]);
        pending.interrupt(4);
        assert!(ticket.called_off().now_or_never().is_some());
        pending.interrupt(6);
        assert!(pending.enter(6, DEAD, &[]).called_off().now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_signal_that_is_not_fatal_calls_nothing_off() {
        let pending = Arc::new(Pending::default());
        let ticket = pending.enter(4, nix::unistd::gettid().as_raw() as u32, &[]);
        pending.interrupt(4);
        assert!(ticket.called_off().now_or_never().is_none());
    }

    #[tokio::test]
    async fn an_interrupt_that_nobody_has_seen_is_handed_on() {
        let pending = Arc::new(Pending::default());
        let ticket = || pending.enter(4, nix::unistd::gettid().as_raw() as u32, &[]);
        assert!(!ticket().hand_on().0);
        let unseen = ticket();
        pending.interrupt(4);
        assert!(unseen.hand_on().0);
        let seen = ticket();
        pending.interrupt(4);
        assert!(seen.called_off().now_or_never().is_none());
        assert!(seen.hand_on().0);
    }

    #[test]
    fn interrupts_of_answered_requests_take_no_more_room() {
        let pending = Pending::default();
        (0..1000).for_each(|unique| pending.interrupt(unique));
        assert_eq!(pending.requests.lock().early.len(), EARLY_MAX);
    }
}
