//! What can go wrong with a registry, in words like containerd's.
//!
//! Every text here is safe to show: addresses come without query and user, and what a registry says has the
//! credential cut out.

use std::error::Error as StdError;
use std::time::Duration;

use darter_types::Digest;
use http::{Method, StatusCode};
use url::Url;

/// Why a registry did not give what was asked for.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RegistryError {
    /// 401, or a token server's refusal. `words` are the registry's own.
    #[error(
        "pull access denied, repository does not exist or may require authorization: authorization failed{}",
        colon(words)
    )]
    Unauthorized { url: String, words: String },
    #[error("unexpected status from {method} request to {url}: 403 Forbidden{}", colon(words))]
    Forbidden { method: String, url: String, words: String },
    #[error("{what}: not found")]
    NotFound { what: String },
    #[error("unexpected status from {method} request to {url}: 429 Too Many Requests")]
    TooManyRequests { method: String, url: String, retry_after: Option<Duration> },
    /// 5xx.
    #[error("unexpected status from {method} request to {url}: {status}{}", colon(words))]
    Server { method: String, url: String, status: StatusCode, words: String },
    /// Any other status that makes no sense here.
    #[error("unexpected status from {method} request to {url}: {status}{}", colon(words))]
    Status { method: String, url: String, status: StatusCode, words: String },
    /// The host that the registry sent us to refused, or sent us in circles.
    #[error("redirected to {url}: {reason}")]
    Redirect { url: String, reason: String },
    #[error("failed to do request: {url}: tls: {reason}")]
    Tls { url: String, reason: String },
    #[error("failed to do request: {url}: {reason}")]
    Unreachable { url: String, reason: String },
    /// The connection broke, or nothing came for too long, after the request was sent.
    #[error("failed to read from {url}: {reason}")]
    Broken { url: String, reason: String },
    #[error("{url}: {reason}")]
    Protocol { url: String, reason: String },
    #[error("unexpected digest: got {found}, expected {expected}")]
    Digest { expected: Digest, found: Digest },
    #[error("{what} is larger than {limit} bytes")]
    TooLarge { what: String, limit: u64 },
    #[error("no match for platform in manifest: not found")]
    Platform,
    /// `hosts.toml` leaves no host that may be asked.
    #[error("no available registry endpoint: {0}")]
    NoEndpoint(String),
    #[error("failed to resolve reference {reference:?}: {source}")]
    Resolve { reference: String, source: Box<RegistryError> },
    /// The client itself can't be made: an unreadable CA file, say.
    #[error("{0}")]
    Setup(String),
}

impl RegistryError {
    /// Whether the same request may succeed a little later.
    pub fn retryable(&self) -> bool {
        match self {
            Self::TooManyRequests { .. }
            | Self::Server { .. }
            | Self::Redirect { .. }
            | Self::Unreachable { .. }
            | Self::Broken { .. } => true,
            Self::Resolve { source, .. } => source.retryable(),
            Self::Unauthorized { .. }
            | Self::Forbidden { .. }
            | Self::NotFound { .. }
            | Self::Status { .. }
            | Self::Tls { .. }
            | Self::Protocol { .. }
            | Self::Digest { .. }
            | Self::TooLarge { .. }
            | Self::Platform
            | Self::NoEndpoint(_)
            | Self::Setup(_) => false,
        }
    }

    /// Whether it came from the registry, and not from what lies between.
    pub fn is_answer(&self) -> bool {
        !matches!(
            self.root(),
            Self::Tls { .. }
                | Self::Unreachable { .. }
                | Self::Broken { .. }
                | Self::NoEndpoint(_)
                | Self::Setup(_)
        )
    }

    /// The error itself, without the reference that it was met with.
    pub fn root(&self) -> &RegistryError {
        match self {
            Self::Resolve { source, .. } => source.root(),
            other => other,
        }
    }

    pub(crate) fn status(
        method: &Method,
        url: &Url,
        status: StatusCode,
        words: String,
        retry_after: Option<Duration>,
    ) -> Self {
        let (method, shown) = (method.to_string(), shown(url));
        match status {
            StatusCode::UNAUTHORIZED => Self::Unauthorized { url: shown, words },
            StatusCode::FORBIDDEN => Self::Forbidden { method, url: shown, words },
            StatusCode::NOT_FOUND => Self::NotFound { what: shown },
            StatusCode::TOO_MANY_REQUESTS => Self::TooManyRequests { method, url: shown, retry_after },
            status if status.is_server_error() => Self::Server { method, url: shown, status, words },
            status => Self::Status { method, url: shown, status, words },
        }
    }

    /// What `reqwest` met before there was a response.
    pub(crate) fn request(url: &Url, error: reqwest::Error) -> Self {
        let url = shown(url);
        if let Some(reason) = tls_reason(&error) {
            return Self::Tls { url, reason };
        }
        let reason = innermost(&error);
        if error.is_connect() { Self::Unreachable { url, reason } } else { Self::Broken { url, reason } }
    }

    pub(crate) fn body(url: &Url, error: reqwest::Error) -> Self {
        Self::Broken { url: shown(url), reason: innermost(&error) }
    }

    pub(crate) fn protocol(url: &Url, reason: impl Into<String>) -> Self {
        Self::Protocol { url: shown(url), reason: reason.into() }
    }

    /// It was asked a moment ago, and no connection could be made.
    pub(crate) fn out_of_reach(url: &Url) -> Self {
        let reason = "no connection could be made a moment ago".to_owned();
        Self::Unreachable { url: shown(url), reason }
    }

    pub(crate) fn timeout(url: &Url, after: Duration) -> Self {
        Self::Broken { url: shown(url), reason: format!("nothing came for {} s", after.as_secs_f32()) }
    }
}

fn colon(words: &str) -> String {
    if words.is_empty() { String::new() } else { format!(": {words}") }
}

/// The address without what may be secret in it: user, password, query, fragment.
pub(crate) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    // These fail only for addresses that can't have a user.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.set_fragment(None);
    url.to_string()
}

fn chain<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |error| (*error).source())
}

/// The last cause says most, and names no address.
fn innermost(error: &reqwest::Error) -> String {
    chain(error).skip(1).last().map_or_else(|| "the request failed".to_owned(), ToString::to_string)
}

fn tls_reason(error: &reqwest::Error) -> Option<String> {
    match chain(error).find_map(tls_within)? {
        rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType) => {
            Some("server gave HTTP response to HTTPS client".to_owned())
        }
        tls => Some(tls.to_string()),
    }
}

/// I/O errors wrap others, and one another, out of sight of `source()`.
fn tls_within<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a rustls::Error> {
    let wrapped = || tls_within(error.downcast_ref::<std::io::Error>()?.get_ref()?);
    error.downcast_ref::<rustls::Error>().or_else(wrapped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shown_addresses_have_no_user_and_no_query() {
        let url = Url::parse("https://me:secret@cdn.example/blob?signature=abc#x").unwrap();
        assert_eq!(shown(&url), "https://cdn.example/blob");
    }

    #[test]
    fn statuses_are_told_apart() {
        let url = Url::parse("https://r.example/v2/a/manifests/b").unwrap();
        let of = |code: u16| {
            let status = StatusCode::from_u16(code).unwrap();
            RegistryError::status(&Method::HEAD, &url, status, String::new(), None)
        };
        assert!(matches!(of(401), RegistryError::Unauthorized { .. }));
        assert!(matches!(of(404), RegistryError::NotFound { .. }));
        assert!(matches!(of(429), RegistryError::TooManyRequests { .. }));
        assert!(of(503).retryable() && !of(403).retryable() && !of(418).retryable());
        let text = "unexpected status from HEAD request to https://r.example/v2/a/manifests/b: 403 Forbidden";
        assert_eq!(of(403).to_string(), text);
    }
}
