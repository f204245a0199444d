//! How long a child may keep one answer waiting by reading slowly. The place that it has is another's turn.

use std::time::Duration;

use tokio::time::error::Elapsed;
use tokio::time::{Instant, timeout};

/// Counted is only the time for which the child is waited for, not what a limit on uploads takes.
pub(super) struct Patience(Duration);

impl Patience {
    /// For all of one answer.
    pub(super) fn new(in_all: Duration) -> Self {
        Self(in_all)
    }

    /// Hands the child the next part of the answer.
    pub(super) async fn with<T>(&mut self, hand: impl Future<Output = T>) -> Result<T, Elapsed> {
        let begun = Instant::now();
        let handed = timeout(self.0, hand).await;
        self.0 = self.0.saturating_sub(begun.elapsed());
        handed
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    #[tokio::test]
    async fn who_takes_each_part_slowly_uses_it_up_and_who_waits_for_us_does_not() {
        const PART: Duration = Duration::from_millis(300);
        let mut patience = Patience::new(PART * 2);
        assert!(patience.with(sleep(PART)).await.is_ok());
        sleep(PART * 2).await;
        assert!(patience.with(sleep(Duration::ZERO)).await.is_ok());
        assert!(patience.with(sleep(PART * 3 / 2)).await.is_err());
        assert!(patience.with(std::future::pending::<()>()).await.is_err());
    }
}
