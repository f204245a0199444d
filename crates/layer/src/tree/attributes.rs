//! Times and extended attributes: what containerd makes of those in an archive.

use crate::Time;

/// The last point in time that fits into 64 bits of nanoseconds.
const LAST: Time = Time { seconds: 9_223_372_036, nanos: 854_775_807 };

/// A time that containerd can't set becomes the epoch.
pub(super) fn bound(time: Time) -> Time {
    if time.seconds < 0 || time > LAST { Time::default() } else { time }
}

/// Modification and access time of an entry; the latter is never before the former.
pub(super) fn times(mtime: Time, atime: Option<Time>) -> (Time, Time) {
    (bound(mtime), bound(atime.map_or(mtime, |atime| atime.max(mtime))))
}

/// What becomes of an extended attribute.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Set,
    /// containerd warns and goes on.
    Ignore,
    /// The kernel's words, with which unpacking ends.
    Refuse(&'static str),
}

const NAME_MAX: usize = 255;
const VALUE_MAX: usize = 65536;
pub(super) const CAPABILITY: &[u8] = b"security.capability";

/// `plain` tells whether the file is a regular one or a directory.
pub(super) fn judge(name: &[u8], value: &[u8], plain: bool) -> Verdict {
    if name.starts_with(b"trusted.") {
        return Verdict::Ignore;
    }
    if name.is_empty() || name.len() > NAME_MAX {
        return Verdict::Refuse("numerical result out of range");
    }
    if value.len() > VALUE_MAX {
        return Verdict::Refuse("argument list too long");
    }
    let named = |prefix: &[u8]| name.strip_prefix(prefix).map(|rest| !rest.is_empty());
    match (named(b"user."), named(b"security.")) {
        (Some(_), _) if !plain => Verdict::Ignore,
        (Some(false), _) | (_, Some(false)) => Verdict::Refuse("invalid argument"),
        (_, Some(true)) if name == CAPABILITY && !is_capability(value) => Verdict::Refuse("invalid argument"),
        (Some(true), _) | (_, Some(true)) => Verdict::Set,
        (None, None) if name.starts_with(b"system.posix_acl_") => Verdict::Set,
        (None, None) => Verdict::Ignore,
    }
}

/// Version 2 has 20 bytes, version 3 has 24.
fn is_capability(value: &[u8]) -> bool {
    match (value.len(), value.get(3)) {
        (20, Some(2)) | (24, Some(3)) => value[1..3] == [0, 0],
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_outside_64_bits_of_nanoseconds_become_the_epoch() {
        let time = |seconds, nanos| Time { seconds, nanos };
        assert_eq!(bound(time(-1, 999_999_999)), Time::default());
        assert_eq!(bound(time(9_223_372_036, 854_775_807)), LAST);
        assert_eq!(bound(time(9_223_372_036, 854_775_808)), Time::default());
        assert_eq!(times(time(10, 0), Some(time(5, 0))), (time(10, 0), time(10, 0)));
        assert_eq!(times(time(10, 0), Some(time(15, 0))), (time(10, 0), time(15, 0)));
    }

    #[test]
    fn only_attributes_that_a_kernel_would_keep_are_kept() {
        let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(judge(CAPABILITY, &capability, true), Verdict::Set);
        assert!(matches!(judge(CAPABILITY, b"x", true), Verdict::Refuse(_)));
        assert_eq!(judge(b"user.a", b"", true), Verdict::Set);
        assert_eq!(judge(b"user.a", b"", false), Verdict::Ignore);
        assert_eq!(judge(b"trusted.overlay.opaque", b"y", true), Verdict::Ignore);
        assert_eq!(judge(b"com.apple.quarantine", b"y", true), Verdict::Ignore);
        assert_eq!(judge(b"security.ima", b"y", false), Verdict::Set);
    }
}
