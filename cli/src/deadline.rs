//! Calls to containerd, each with an end: a daemon that hangs is no reason to hang as well.

use std::time::Duration;

use tokio::time::timeout;
use tonic::Status;

/// What containerd says to `what`, or that it said nothing for `bound`.
pub async fn within<T>(
    bound: Duration,
    what: &str,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    timeout(bound, call).await.unwrap_or_else(|_| Err(overdue(bound, what)))
}

pub fn overdue(bound: Duration, what: &str) -> Status {
    Status::deadline_exceeded(format!(
        "containerd has not answered {what} for {} s; look at its log, restart it if it hangs, then try again",
        bound.as_secs_f32()
    ))
}
