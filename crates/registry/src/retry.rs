//! How long what is waited for, and how often a request is tried.

use std::time::{Duration, Instant};

use darter_daemon::backoff::Backoff;

use crate::error::RegistryError;

/// How long what is waited for.
#[derive(Debug, Clone)]
pub struct Patience {
    /// A connection to be made, TLS included.
    pub connect: Duration,
    /// An answer to begin, and each next byte of it to come.
    pub stall: Duration,
    /// Tries of a request to go on before there was an answer.
    pub answer: Duration,
    /// Tries to connect to a registry that has never answered: its place may be a guess.
    pub contact: Duration,
    /// Tries to go on with a blob since its last byte came.
    pub resume: Duration,
    /// The first wait between two tries; it doubles up to `wait_max`.
    pub wait_min: Duration,
    pub wait_max: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(3),
            stall: Duration::from_secs(30),
            answer: Duration::from_secs(10),
            contact: Duration::from_millis(500),
            resume: Duration::from_secs(60),
            wait_min: Duration::from_millis(200),
            wait_max: Duration::from_secs(5),
        }
    }
}

/// The tries of one request.
pub(crate) struct Retry {
    backoff: Backoff,
    bound: Duration,
    until: Instant,
    connect_until: Option<Instant>,
}

impl Retry {
    pub fn new(patience: &Patience, bound: Duration) -> Self {
        let backoff = Backoff::new(patience.wait_min, patience.wait_max);
        Self { backoff, bound, until: Instant::now() + bound, connect_until: None }
    }

    /// The registry has never answered.
    pub fn first_contact(mut self, patience: &Patience) -> Self {
        self.connect_until = Some(Instant::now() + patience.contact);
        self
    }

    /// Something came: the time starts anew.
    pub fn progress(&mut self) {
        self.backoff.reset();
        self.until = Instant::now() + self.bound;
    }

    /// Waits before the next try, or gives the error back if there should be none.
    pub async fn pause(&mut self, error: RegistryError) -> Result<(), RegistryError> {
        let asked = match &error {
            RegistryError::TooManyRequests { retry_after, .. } => retry_after.unwrap_or_default(),
            _ => Duration::ZERO,
        };
        let wait = self.backoff.next().max(asked);
        let until = match error {
            RegistryError::Unreachable { .. } => self.connect_until.unwrap_or(self.until),
            _ => self.until,
        };
        // What a registry asks for may be longer than time itself.
        let too_late = Instant::now().checked_add(wait).is_none_or(|then| then > until);
        if !error.retryable() || too_late {
            return Err(error);
        }
        tracing::debug!(%error, ?wait, "a registry is asked again");
        tokio::time::sleep(wait).await;
        Ok(())
    }
}
