//! A limit in bytes per second over many that share it.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// So much may go out at once after a pause.
const BURST: Duration = Duration::from_millis(50);

/// Gives each taker its turn: a reservation of time, in order of arrival.
pub(crate) struct Bucket {
    rate: Option<u64>,
    /// When all that was taken will have gone out.
    free_at: Mutex<Option<Instant>>,
}

impl Bucket {
    /// `None`: no limit.
    pub(crate) fn new(rate: Option<u64>) -> Self {
        Self { rate: rate.filter(|rate| *rate > 0), free_at: Mutex::new(None) }
    }

    /// Waits until `bytes` more may go.
    pub(crate) async fn take(&self, bytes: u64) {
        let wait = self.reserve(bytes, Instant::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    fn reserve(&self, bytes: u64, now: Instant) -> Duration {
        let Some(rate) = self.rate else { return Duration::ZERO };
        let mut free_at = self.free_at.lock();
        let start = free_at.map_or(now, |at| at.max(now));
        *free_at = Some(start + Duration::from_secs_f64(bytes as f64 / rate as f64));
        (start - now).saturating_sub(BURST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takers_wait_for_those_before_them() {
        let bucket = Bucket::new(Some(1000));
        let now = Instant::now();
        assert_eq!(bucket.reserve(1000, now), Duration::ZERO);
        assert_eq!(bucket.reserve(500, now), Duration::from_millis(950));
        assert_eq!(bucket.reserve(1, now), Duration::from_millis(1450));
        assert_eq!(bucket.reserve(1, now + Duration::from_secs(10)), Duration::ZERO);
    }

    #[test]
    fn no_rate_is_no_limit() {
        let bucket = Bucket::new(None);
        assert_eq!(bucket.reserve(u64::MAX, Instant::now()), Duration::ZERO);
    }
}
