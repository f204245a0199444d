//! Where in a trace something belongs: the identifiers of W3C's trace context, here and on the wire.

use std::num::{NonZeroU64, NonZeroU128};
use std::pin::Pin;
use std::task::{Context, Poll};

use pin_project_lite::pin_project;

use super::Step;

/// The key of the header or metadata that carries a trail.
pub const HEADER: &str = "traceparent";

/// Of a header of the only version that there is.
const HEADER_LEN: usize = 55;

tokio::task_local! {
    static CURRENT: Trail;
}

/// A place in a trace that is followed, to which further steps belong; or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Trail(pub(super) Option<Place>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub trace: NonZeroU128,
    pub step: NonZeroU64,
}

pin_project! {
    /// See [`Trail::over`]. It is not an `async fn`, which would be twice as large as the future: futures with many steps would
    /// become too large for a stack.
    pub struct Over<F> {
        trail: Trail,
        #[pin]
        future: F,
    }
}

impl<F: Future> Future for Over<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        if this.trail.is_followed() {
            CURRENT.sync_scope(*this.trail, || this.future.poll(context))
        } else {
            this.future.poll(context)
        }
    }
}

impl Trail {
    pub const NONE: Trail = Trail(None);

    /// As [`Trail::to_bytes`] gives it.
    pub const LEN: usize = 24;

    pub fn is_followed(self) -> bool {
        self.0.is_some()
    }

    /// That of the future that is being polled, see [`Trail::over`].
    pub fn current() -> Trail {
        super::now().and_then(|_| CURRENT.try_with(|trail| *trail).ok()).unwrap_or_default()
    }

    /// What happens in `future` belongs here. Tasks that it spawns are not in it.
    pub fn over<F: Future>(self, future: F) -> Over<F> {
        Over { trail: self, future }
    }

    /// The same for what doesn't wait.
    pub fn over_now<T>(self, work: impl FnOnce() -> T) -> T {
        if self.is_followed() { CURRENT.sync_scope(self, work) } else { work() }
    }

    /// A step that begins now and belongs here.
    pub fn step(self, name: &'static str) -> Step {
        Step::below(self, name, false)
    }

    /// The value of [`HEADER`]; `None` if nothing is followed.
    pub fn to_header(self) -> Option<String> {
        let Place { trace, step } = self.0?;
        Some(format!("00-{trace:032x}-{step:016x}-01"))
    }

    /// What somebody else sent. Nothing is followed if it isn't valid, or wasn't sampled there.
    pub fn from_header(text: &str) -> Trail {
        Trail(parse(text))
    }

    pub fn to_bytes(self) -> Option<[u8; Self::LEN]> {
        let Place { trace, step } = self.0?;
        let mut bytes = [0; Self::LEN];
        bytes[..16].copy_from_slice(&trace.get().to_be_bytes());
        bytes[16..].copy_from_slice(&step.get().to_be_bytes());
        Some(bytes)
    }

    /// The reverse; nothing is followed if it can't be right.
    pub fn from_bytes(bytes: [u8; Self::LEN]) -> Trail {
        let (trace, step) = bytes.split_at(16);
        let trace = NonZeroU128::new(u128::from_be_bytes(trace.try_into().expect("16 bytes")));
        let step = NonZeroU64::new(u64::from_be_bytes(step.try_into().expect("8 bytes")));
        Trail(trace.zip(step).map(|(trace, step)| Place { trace, step }))
    }
}

/// `00-<trace: 32>-<step: 16>-<flags: 2>`, hexadecimal in small letters; later versions may append to it.
fn parse(text: &str) -> Option<Place> {
    let bytes = text.as_bytes();
    let is_longer = bytes.get(HEADER_LEN) == Some(&b'-') && !text.starts_with("00");
    if bytes.len() != HEADER_LEN && !is_longer {
        return None;
    }
    let part = |from: usize, to: usize| {
        let part = text.get(from..to)?;
        part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')).then_some(part)
    };
    let (version, flags) = (part(0, 2)?, part(53, 55)?);
    let is_sampled = u8::from_str_radix(flags, 16).ok()? & 1 == 1;
    let has_dashes = [2, 35, 52].iter().all(|at| bytes[*at] == b'-');
    if version == "ff" || !has_dashes || !is_sampled {
        return None;
    }
    let trace = NonZeroU128::new(u128::from_str_radix(part(3, 35)?, 16).ok()?)?;
    let step = NonZeroU64::new(u64::from_str_radix(part(36, 52)?, 16).ok()?)?;
    Some(Place { trace, step })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn trails_go_over_the_wire_and_back() {
        let trail = Trail::from_header(GOOD);
        assert!(trail.is_followed());
        assert_eq!(trail.to_header().as_deref(), Some(GOOD));
        assert_eq!(Trail::from_bytes(trail.to_bytes().unwrap()), trail);
        assert_eq!(Trail::NONE.to_header(), None);
        assert_eq!(Trail::from_bytes([0; Trail::LEN]), Trail::NONE);
    }

    #[test]
    fn headers_of_later_versions_are_read_as_far_as_they_are_known() {
        let later = format!("01{}-and-more", &GOOD[2..]);
        assert_eq!(Trail::from_header(&later), Trail::from_header(GOOD));
    }

    #[test]
    fn what_is_no_trail_or_was_not_sampled_is_not_followed() {
        let not_sampled = format!("{}00", &GOOD[..53]);
        let no_trace = format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32));
        let no_step = format!("{}{}-01", &GOOD[..36], "0".repeat(16));
        let capital = GOOD.to_uppercase();
        let longer = format!("{GOOD}-00");
        let other = GOOD.replace("4bf9", "+bf9");
        let wide = GOOD.replace("4bf9", "é9f");
        let forbidden = format!("ff{}", &GOOD[2..]);
        let bad = [&not_sampled, &no_trace, &no_step, &capital, &longer, &other, &wide, &forbidden];
        for text in bad.iter().map(|text| text.as_str()).chain(["", "00", &GOOD[..54]]) {
            assert_eq!(Trail::from_header(text), Trail::NONE, "{text:?} was taken");
        }
        for end in 0..GOOD.len() {
            assert_eq!(Trail::from_header(&GOOD[..end]), Trail::NONE);
        }
    }
}
