//! Whether the session is over: because it was unmounted, or because one of its threads panicked.

use tokio::sync::watch;

/// Shared by all threads of a session.
#[derive(Clone)]
pub(super) struct Ending(watch::Sender<bool>);

impl Default for Ending {
    fn default() -> Self {
        Self(watch::Sender::new(false))
    }
}

impl Ending {
    pub(super) fn end(&self) {
        self.0.send_replace(true);
    }

    #[cfg(test)]
    pub(super) fn is_over(&self) -> bool {
        *self.0.borrow()
    }

    pub(super) async fn wait(&self) {
        let mut over = self.0.subscribe();
        // It can't fail: the sender lives in `self`.
        let _over = over.wait_for(|over| *over).await;
    }

    /// Ends the session if it is dropped by a panic.
    pub(super) fn on_panic(&self) -> PanicGuard {
        PanicGuard(self.clone())
    }
}

/// See [`Ending::on_panic`].
pub(super) struct PanicGuard(Ending);

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end();
        }
    }
}
