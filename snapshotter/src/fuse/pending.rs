//! Requests that are being worked on, so that the kernel can call them off.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

/// The requests that wait, by their unique number. How many there can be is up to the kernel: one for each process that
/// waits, and `max_background` others.
#[derive(Default)]
pub(super) struct Pending(Mutex<HashMap<u64, Arc<Notify>>>);

/// A place in [`Pending`], held as long as the request is worked on.
pub(super) struct Ticket {
    pending: Arc<Pending>,
    unique: u64,
    interrupt: Arc<Notify>,
}

impl Pending {
    pub(super) fn enter(self: &Arc<Self>, unique: u64) -> Ticket {
        let interrupt = Arc::new(Notify::new());
        self.0.lock().insert(unique, interrupt.clone());
        Ticket { pending: self.clone(), unique, interrupt }
    }

    /// False if there is no such request: it has been answered, or will be known in a moment.
    pub(super) fn interrupt(&self, unique: u64) -> bool {
        let waiting = self.0.lock().get(&unique).cloned();
        waiting.inspect(|interrupt| interrupt.notify_one()).is_some()
    }
}

impl Ticket {
    pub(super) fn unique(&self) -> u64 {
        self.unique
    }

    /// Resolves when the kernel calls the request off, also if that was before.
    pub(super) async fn interrupted(&self) {
        self.interrupt.notified().await;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.pending.0.lock().remove(&self.unique);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_interrupt_before_the_wait_counts() {
        let pending = Arc::new(Pending::default());
        let ticket = pending.enter(4);
        assert!(pending.interrupt(4));
        ticket.interrupted().await;
        drop(ticket);
        assert!(!pending.interrupt(4), "an answered request is unknown");
    }
}
