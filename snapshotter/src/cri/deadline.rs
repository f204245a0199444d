//! The time that a caller gives its call, and what it is told when that is over.
//!
//! tonic keeps it too, on its way in and on its way out, but answers "cancelled" and "unavailable".

use std::error::Error;
use std::future::Future;
use std::time::Duration;

use http::HeaderMap;
use tonic::{Status, TimeoutExpired};

/// The header `grpc-timeout`: up to eight digits and a unit ("gRPC over HTTP2", Requests). `None` also for what isn't that.
pub(super) fn given(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let count: u32 = digits.parse().ok()?;
    let seconds = |each: u64| Duration::from_secs(u64::from(count) * each);
    Some(match unit {
        "H" => seconds(3600),
        "M" => seconds(60),
        "S" => seconds(1),
        "m" => Duration::from_millis(count.into()),
        "u" => Duration::from_micros(count.into()),
        "n" => Duration::from_nanos(count.into()),
        _ => return None,
    })
}

/// `work`, but not for longer than was `given`. The clock runs from this call on, not from the first poll: to be before tonic's.
pub(super) fn bounded<T>(
    given: Option<Duration>,
    work: impl Future<Output = Result<T, Status>>,
) -> impl Future<Output = Result<T, Status>> {
    let timer = given.map(tokio::time::sleep);
    async move {
        let Some(timer) = timer else { return work.await };
        tokio::select! {
            biased;
            answer = work => answer,
            () = timer => Err(over()),
        }
    }
}

/// What to say of a call to containerd that brought no answer.
pub(super) fn unanswered(error: &tonic::transport::Error) -> Status {
    let mut cause: Option<&dyn Error> = Some(error);
    while let Some(error) = cause {
        if error.is::<TimeoutExpired>() {
            return over();
        }
        cause = error.source();
    }
    Status::unavailable(format!("containerd: {error}"))
}

fn over() -> Status {
    Status::deadline_exceeded("containerd has not answered in the time that the caller gave it")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_is_read_and_nothing_else() {
        let given = |text: &str| {
            given(
                &[(http::HeaderName::from_static("grpc-timeout"), text.parse().unwrap())]
                    .into_iter()
                    .collect(),
            )
        };
        assert_eq!(given("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(given("3M"), Some(Duration::from_secs(180)));
        assert_eq!(given("99999999S"), Some(Duration::from_secs(99_999_999)));
        assert_eq!(given("20m"), Some(Duration::from_millis(20)));
        assert_eq!(given("1u"), Some(Duration::from_micros(1)));
        assert_eq!(given("5n"), Some(Duration::from_nanos(5)));
        for wrong in ["", "S", "5", "5s", "-5S", "5é"] {
            assert_eq!(given(wrong), None, "{wrong}");
        }
        assert_eq!(super::given(&HeaderMap::new()), None);
    }
}
