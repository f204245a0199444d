//! How a member stands with its manager, for people who ask.

use std::time::SystemTime;

use tonic::{Code, Status};

/// What a member knows of its manager now.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Standing {
    /// `host:port`
    pub manager: String,
    /// Whether there is a stream on which the manager has spoken.
    pub attends: bool,
    /// When the manager was there last, by a stream that has ended since; `None`: not since the start.
    pub heard: Option<SystemTime>,
    /// Why there is no stream, in words; empty while there is one.
    pub trouble: String,
    /// The manager is there, and refuses this very member: it was revoked, mostly.
    pub refused: bool,
    /// When another program with this certificate last took this one's place.
    pub replaced: Option<SystemTime>,
}

impl Standing {
    pub(super) fn toward(manager: &str) -> Self {
        let trouble = "no answer yet".to_owned();
        Self { manager: manager.to_owned(), trouble, ..Self::default() }
    }

    pub(super) fn begun(&mut self) {
        (self.attends, self.refused) = (true, false);
        self.trouble.clear();
    }

    /// A stream has ended, or there was none: with this status, which is `words` for people; `None`: the manager has ended it.
    pub(super) fn ended(&mut self, status: Option<&Status>, words: &str, at: SystemTime) {
        let code = status.map(Status::code);
        self.refused = code == Some(Code::PermissionDenied);
        if self.attends || self.refused {
            self.heard = Some(at);
        }
        if code == Some(Code::Aborted) {
            self.replaced = Some(at);
        }
        self.attends = false;
        words.clone_into(&mut self.trouble);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manager_that_goes_was_heard_until_then_and_not_later() {
        let mut standing = Standing::toward("m:7400");
        let (first, later) = (SystemTime::UNIX_EPOCH, SystemTime::now());
        standing.ended(Some(&Status::unavailable("refused")), "refused", first);
        assert_eq!((standing.attends, standing.heard), (false, None));
        standing.begun();
        assert!(standing.attends && standing.trouble.is_empty());
        standing.ended(None, "it ended", first);
        standing.ended(Some(&Status::unavailable("gone")), "gone", later);
        assert_eq!((standing.heard, standing.trouble.as_str()), (Some(first), "gone"));
        assert!(!standing.refused && standing.replaced.is_none());
    }

    #[test]
    fn refusal_and_replacement_are_told_apart() {
        let (mut standing, now) = (Standing::toward("m:7400"), SystemTime::now());
        standing.begun();
        standing.ended(Some(&Status::aborted("elsewhere")), "elsewhere", now);
        assert_eq!((standing.refused, standing.replaced), (false, Some(now)));
        standing.ended(Some(&Status::permission_denied("revoked")), "revoked", now);
        assert!(standing.refused);
        standing.begun();
        assert!(!standing.refused);
    }
}
