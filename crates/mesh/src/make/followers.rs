//! Who waits for what a flight makes. A flight that nobody has followed for a while ends: it has one of a few turns, and a
//! registry pays for it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

/// How long a flight goes on whose followers have gone: whoever lost the connection asks again, and a pull that was given up
/// is tried again, after five minutes at most where it was a kubelet's. What was read by then must not be read again.
pub(crate) const LINGERS: Duration = Duration::from_secs(600);

/// The same where none but orders to preheat wanted it: these end because somebody says so, or because they are late. One that
/// is given anew with something else in it takes a moment to come back to its layers.
pub(crate) const LINGERS_FOR_ORDER: Duration = Duration::from_secs(5);

/// Those of one flight. Clones are of the same.
#[derive(Clone)]
pub(super) struct Followers(Arc<watch::Sender<Now>>);

#[derive(Clone, Copy, Default)]
struct Now {
    count: usize,
    /// What the most patient of all that ever followed gives it.
    lingers: Duration,
}

/// One of them; it leaves when this is dropped.
pub(super) struct Follower(Followers);

impl Default for Followers {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(Now::default())))
    }
}

impl Followers {
    pub(super) fn join(&self, lingers: Duration) -> Follower {
        self.0.send_modify(|now| {
            now.count += 1;
            now.lingers = now.lingers.max(lingers);
        });
        Follower(self.clone())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.borrow().count == 0
    }

    /// Waits until there was none for as long as the flight lingers. One may have come since.
    pub(super) async fn gone(&self) {
        let mut seen = self.0.subscribe();
        loop {
            let now = *seen.borrow_and_update();
            let patience = if now.count == 0 { now.lingers } else { Duration::MAX };
            // The sender is ours, so a change is one of their number.
            if timeout(patience, seen.changed()).await.is_err() {
                return;
            }
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.0.send_modify(|now| now.count -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn a_flight_is_left_when_its_last_follower_has_gone() {
        let followers = Followers::default();
        let [first, second] = [(); 2].map(|()| followers.join(Duration::ZERO));
        drop(first);
        assert!(!followers.is_empty() && followers.gone().now_or_never().is_none(), "one is there");
        drop(second);
        assert!(followers.is_empty());
        timeout(Duration::from_secs(20), followers.gone()).await.expect("both have gone");
    }

    #[tokio::test]
    async fn a_flight_lingers_for_the_most_patient_that_ever_followed() {
        let followers = Followers::default();
        drop(followers.join(LINGERS));
        drop(followers.join(Duration::ZERO));
        let waited = timeout(Duration::from_millis(50), followers.gone()).await;
        assert!(waited.is_err(), "it forgot who wanted it first");
    }

    #[tokio::test]
    async fn who_comes_back_in_time_keeps_the_flight() {
        let followers = Followers::default();
        drop(followers.join(Duration::from_millis(20)));
        let mut gone = std::pin::pin!(followers.gone());
        assert!(gone.as_mut().now_or_never().is_none(), "it lingers");
        let back = followers.join(Duration::ZERO);
        let waited = timeout(Duration::from_millis(60), gone.as_mut()).await;
        assert!(waited.is_err(), "one is there again");
        drop(back);
        timeout(Duration::from_secs(20), gone).await.expect("it has gone");
    }
}
