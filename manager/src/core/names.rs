//! Who may have a member's name: a join token gives any name, so it must not give that of somebody who is there.

use std::time::Duration;

use darter_identity::Member;

/// How long after its last sign of life a member's name is its own. A machine that is installed anew comes back after it.
pub(crate) const HELD_FOR: Duration = Duration::from_secs(600);

/// A member that attends is written down as seen once a minute; for so many seconds it can't be told from one that has left.
const SEEN_WITHIN: u64 = 90;

/// How many seconds ago the member was seen, if it may be attending still. Times are seconds since the epoch.
pub(crate) fn seen_just_now(last_seen: Option<u64>, now: u64) -> Option<u64> {
    last_seen.map(|seen| now.saturating_sub(seen)).filter(|ago| *ago < SEEN_WITHIN)
}

/// The member of that name is there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{member} is there, with a certificate that is still valid, and a join token does not take its name away: if that machine \
     was installed anew, run `darter-manager release --role {role} {node}` on the manager's machine, or wait until nobody has \
     attended by that name for {minutes} minutes",
    role = .member.role, node = .member.node, minutes = HELD_FOR.as_secs() / 60
)]
pub(crate) struct NameHeld {
    pub(crate) member: Member,
}

/// Times are seconds since the epoch; `last_seen` is `None` if it never attended.
pub(crate) fn is_held(certified_until: u64, last_seen: Option<u64>, now: u64) -> bool {
    let seen_lately = last_seen.is_some_and(|seen| now < seen + HELD_FOR.as_secs());
    now < certified_until && seen_lately
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn member_that_is_written_down_once_a_minute_may_be_attending() {
        assert_eq!(seen_just_now(Some(1000), 1060), Some(60));
        assert_eq!(seen_just_now(Some(1000), 990), Some(0), "the clock was set back");
        assert_eq!(seen_just_now(Some(1000), 1090), None);
        assert_eq!(seen_just_now(None, 1000), None);
    }

    #[test]
    fn name_is_held_by_who_attended_lately_with_a_certificate_that_is_valid() {
        assert!(is_held(2000, Some(1000), 1001));
        assert!(is_held(2000, Some(1000), 1599));
        assert!(!is_held(2000, Some(1000), 1600), "it has been away for ten minutes");
        assert!(!is_held(1001, Some(1000), 1001), "its certificate has expired");
        assert!(!is_held(2000, None, 1001), "it never came");
    }
}
