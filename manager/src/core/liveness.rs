//! When a member counts as alive.

use std::time::Duration;

use darter_identity::attend::HEARTBEAT_SECONDS;

/// A member that was not heard for three of its heartbeats is dead.
pub(crate) const DEAD_AFTER: Duration = Duration::from_secs(3 * HEARTBEAT_SECONDS);

/// `silent_for`: since its last message, while its stream stands; `None` when it has no stream.
pub(crate) fn is_alive(silent_for: Option<Duration>) -> bool {
    silent_for.is_some_and(|silent| silent < DEAD_AFTER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn member_lives_for_three_heartbeats_and_only_with_a_stream() {
        assert!(is_alive(Some(Duration::ZERO)));
        assert!(is_alive(Some(Duration::from_secs(2 * HEARTBEAT_SECONDS + 1))));
        assert!(!is_alive(Some(DEAD_AFTER)));
        assert!(!is_alive(None));
    }
}
