//! How long to wait before the next try: twice as long each time, up to a limit, with jitter.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// The waits of one thing that is tried again and again.
#[derive(Debug, Clone)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    ceiling: Duration,
}

impl Backoff {
    /// The first wait is at most `min`, the longest at most `max`.
    pub fn new(min: Duration, max: Duration) -> Self {
        Self { min, max: max.max(min), ceiling: min }
    }

    /// The next wait: between half of the present ceiling and all of it, so that many clients that failed at the same
    /// moment don't come back at the same moment.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Duration {
        let ceiling = self.ceiling;
        self.ceiling = ceiling.saturating_mul(2).min(self.max);
        ceiling.mul_f64(0.5 + 0.5 * random_fraction())
    }

    /// Starts over with the shortest wait; call it after a success.
    pub fn reset(&mut self) {
        self.ceiling = self.min;
    }
}

/// Something in 0..1 that differs from call to call and from process to process; not fit for secrets.
pub fn random_fraction() -> f64 {
    let bits = RandomState::new().hash_one(0u8) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_limit_and_start_over() {
        let (min, max) = (Duration::from_millis(100), Duration::from_secs(1));
        let mut backoff = Backoff::new(min, max);
        let first = backoff.next();
        assert!(first >= min / 2 && first <= min, "{first:?}");
        let last = (0..20).map(|_| backoff.next()).last().unwrap();
        assert!(last >= max / 2 && last <= max, "{last:?}");
        backoff.reset();
        assert!(backoff.next() <= min);
    }

    #[test]
    fn fractions_differ() {
        let seen: std::collections::BTreeSet<u64> = (0..32).map(|_| random_fraction().to_bits()).collect();
        assert!(seen.len() > 16);
    }
}
