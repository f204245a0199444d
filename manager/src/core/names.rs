//! Who may have a member's name: a join token gives any name, so it must not give that of somebody who is there.

use std::time::Duration;

use darter_identity::Member;

/// How long after its last sign of life a member's name is its own. A machine that is installed anew comes back after it.
pub(crate) const HELD_FOR: Duration = Duration::from_secs(600);

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
    fn name_is_held_by_who_attended_lately_with_a_certificate_that_is_valid() {
        assert!(is_held(2000, Some(1000), 1001));
        assert!(is_held(2000, Some(1000), 1599));
        assert!(!is_held(2000, Some(1000), 1600), "it has been away for ten minutes");
        assert!(!is_held(1001, Some(1000), 1001), "its certificate has expired");
        assert!(!is_held(2000, None, 1001), "it never came");
    }
}
