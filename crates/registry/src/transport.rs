//! One request and its answer: connections by TLS settings, redirects by hand, every wait with an end.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{AUTHORIZATION, LOCATION, RETRY_AFTER};
use http::{HeaderMap, Method, StatusCode};
use parking_lot::Mutex;
use serde::Deserialize;
use url::Url;

use crate::auth;
use crate::credential::Credential;
use crate::directory::{Endpoint, is_loopback};
use crate::error::{RegistryError, shown};
use crate::hosts::TlsSettings;
use crate::near;
use crate::retry::Patience;

/// Redirects that one request may take.
const REDIRECTS_MAX: usize = 5;
/// Different TLS settings with connections of their own; beyond that all are made anew.
const CLIENTS_MAX: usize = 64;
/// As much of an error's body is read.
const WORDS_MAX: usize = 8 * 1024;

pub(crate) struct Outgoing {
    pub method: Method,
    pub url: Url,
    /// Go to the host of `url` and to no other.
    pub headers: HeaderMap,
    /// Go wherever a redirect leads.
    pub open_headers: HeaderMap,
    pub body: Bytes,
}

impl Outgoing {
    pub fn new(method: Method, url: Url) -> Self {
        Self { method, url, headers: HeaderMap::new(), open_headers: HeaderMap::new(), body: Bytes::new() }
    }
}

pub(crate) struct Incoming {
    pub response: reqwest::Response,
    pub method: Method,
    /// Where the answer came from, behind all redirects.
    pub url: Url,
    /// Whether that is another host than the one that was asked.
    pub foreign: bool,
}

impl Incoming {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name)?.to_str().ok()
    }
}

pub(crate) struct Transport {
    patience: Patience,
    extra_ca: Vec<Vec<u8>>,
    clients: Mutex<HashMap<(TlsSettings, bool), reqwest::Client>>,
}

/// Who is believed to sign for a registry.
#[derive(Clone, Copy)]
enum Roots {
    /// The system's CAs and those that were given.
    System,
    /// The latter alone.
    Given,
}

impl Transport {
    pub fn new(patience: Patience, extra_ca: &[PathBuf]) -> Result<Self, RegistryError> {
        let read = |path: &PathBuf| {
            std::fs::read(path).map_err(|error| RegistryError::Setup(format!("{}: {error}", path.display())))
        };
        let extra_ca = extra_ca.iter().map(read).collect::<Result<_, _>>()?;
        Ok(Self { patience, extra_ca, clients: Mutex::default() })
    }

    /// The connections for this endpoint. A proxy of the environment is not asked for this machine itself.
    pub fn client(&self, endpoint: &Endpoint) -> Result<reqwest::Client, RegistryError> {
        let key = (endpoint.tls.clone(), is_loopback(&endpoint.place.registry.authority));
        if let Some(client) = self.clients.lock().get(&key) {
            return Ok(client.clone());
        }
        let client = self.build(&key.0, key.1, Roots::System).or_else(|error| {
            // A host without any CA still has registries of plain http, and such that bring their own.
            tracing::warn!(%error, "going on without the system's CAs: is ca-certificates installed?");
            self.build(&key.0, key.1, Roots::Given)
        })?;
        let mut clients = self.clients.lock();
        if clients.len() >= CLIENTS_MAX {
            clients.clear();
        }
        clients.insert(key, client.clone());
        Ok(client)
    }

    fn build(
        &self,
        tls: &TlsSettings,
        loopback: bool,
        roots: Roots,
    ) -> Result<reqwest::Client, RegistryError> {
        let broken = |error: reqwest::Error| {
            let reason =
                std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            RegistryError::Setup(format!("TLS settings of a registry: {reason}"))
        };
        let mut builder = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .user_agent(concat!("darter/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(self.patience.connect)
            .tls_danger_accept_invalid_certs(tls.skip_verify);
        let mut extra = Vec::new();
        for pem in self.extra_ca.iter().chain(&tls.ca) {
            extra.extend(reqwest::Certificate::from_pem_bundle(pem).map_err(broken)?);
        }
        builder = match roots {
            Roots::System => builder.tls_certs_merge(extra),
            Roots::Given => builder.tls_certs_only(extra),
        };
        if let Some(pem) = &tls.client {
            builder = builder.identity(reqwest::Identity::from_pem(pem).map_err(broken)?);
        }
        if loopback {
            builder = builder.no_proxy();
        }
        builder.build().map_err(broken)
    }

    /// Sends the request and follows redirects. Any status is an answer; see [`Transport::checked`].
    pub async fn send(&self, http: &reqwest::Client, request: Outgoing) -> Result<Incoming, RegistryError> {
        let mut url = request.url.clone();
        for _ in 0..=REDIRECTS_MAX {
            let foreign = url.origin() != request.url.origin();
            let mut headers = request.open_headers.clone();
            if !foreign {
                headers.extend(request.headers.clone());
            }
            let sent = http.request(request.method.clone(), url.clone()).headers(headers);
            let sent = sent.body(request.body.clone()).send();
            let response = tokio::time::timeout(self.patience.stall, sent)
                .await
                .map_err(|_| RegistryError::timeout(&url, self.patience.stall))?
                .map_err(|error| RegistryError::request(&url, error))?;
            match next_hop(&request.method, &url, &response)? {
                Some(next) if near::leads_astray(&request.url, &next).await => {
                    let reason = format!("a location on this machine or its link: {}", shown(&next));
                    return Err(RegistryError::Redirect { url: shown(&url), reason });
                }
                Some(next) => url = next,
                None => return Ok(Incoming { response, method: request.method, url, foreign }),
            }
        }
        Err(RegistryError::Redirect { url: shown(&url), reason: "too many redirects".to_owned() })
    }

    /// The answer if its status is a success, else the error that it means. `credential` is cut from the words.
    pub async fn checked(
        &self,
        incoming: Incoming,
        credential: Option<&Credential>,
    ) -> Result<Incoming, RegistryError> {
        let status = incoming.response.status();
        if status.is_success() {
            return Ok(incoming);
        }
        let (method, url, foreign) = (incoming.method.clone(), incoming.url.clone(), incoming.foreign);
        let retry_after = incoming.header(RETRY_AFTER.as_str()).and_then(wait_asked_for);
        let challenge = auth::challenge(incoming.response.headers());
        let body = self.body(incoming, WORDS_MAX).await.unwrap_or_default();
        let mut words = server_words(&body, challenge);
        if let Some(credential) = credential {
            words = credential.cut_from(&words);
        }
        // A signed address that expired: the registry gives a new one.
        let expired = foreign && status.is_client_error();
        if expired && !matches!(status, StatusCode::NOT_FOUND | StatusCode::TOO_MANY_REQUESTS) {
            return Err(RegistryError::Redirect { url: shown(&url), reason: status.to_string() });
        }
        Err(RegistryError::status(&method, &url, status, words, retry_after))
    }

    /// The whole body, which may have at most `limit` bytes.
    pub async fn body(&self, mut incoming: Incoming, limit: usize) -> Result<Bytes, RegistryError> {
        let mut body = BytesMut::new();
        while let Some(bytes) = self.chunk(&mut incoming).await? {
            if body.len() + bytes.len() > limit {
                return Err(RegistryError::TooLarge { what: shown(&incoming.url), limit: limit as u64 });
            }
            body.extend_from_slice(&bytes);
        }
        Ok(body.freeze())
    }

    /// The next bytes of the body, for which it waits no longer than the stall limit.
    pub async fn chunk(&self, incoming: &mut Incoming) -> Result<Option<Bytes>, RegistryError> {
        match tokio::time::timeout(self.patience.stall, incoming.response.chunk()).await {
            Err(_) => Err(RegistryError::timeout(&incoming.url, self.patience.stall)),
            Ok(chunk) => chunk.map_err(|error| RegistryError::body(&incoming.url, error)),
        }
    }
}

/// What `Retry-After` says, seconds or a date (RFC 9110, section 10.2.3).
fn wait_asked_for(text: &str) -> Option<Duration> {
    let seconds = text.trim().parse().ok().map(Duration::from_secs);
    seconds.or_else(|| {
        let then = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(text.trim()).ok()?;
        Some(Duration::try_from(then.duration_since(jiff::Timestamp::now())).unwrap_or_default())
    })
}

/// Where the answer sends us; `None` if it is the answer.
fn next_hop(method: &Method, url: &Url, response: &reqwest::Response) -> Result<Option<Url>, RegistryError> {
    let redirects = matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308);
    // What we send is not sent on: a registry has no reason to redirect an upload or a refresh token.
    if !redirects || !matches!(*method, Method::GET | Method::HEAD) {
        return Ok(None);
    }
    let refuse = |reason: &str| RegistryError::Redirect { url: shown(url), reason: reason.to_owned() };
    let location = response.headers().get(LOCATION).ok_or_else(|| refuse("a redirect without a location"))?;
    let text = location.to_str().map_err(|_| refuse("a location that is no text"))?;
    let next = url.join(text).map_err(|_| refuse("a location that is no address"))?;
    if !matches!(next.scheme(), "http" | "https") {
        return Err(refuse("a location that is not http"));
    }
    Ok(Some(next))
}

/// What the registry says: its JSON errors (distribution specification, "Error codes"), else the challenge's.
fn server_words(body: &[u8], challenge: Option<auth::Challenge>) -> String {
    #[derive(Deserialize)]
    struct Errors {
        #[serde(default)]
        errors: Vec<One>,
        #[serde(default)]
        details: String,
    }
    #[derive(Deserialize)]
    struct One {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let said = serde_json::from_slice::<Errors>(body).ok();
    let one = |e: &One| format!("{}: {}", e.code.to_ascii_lowercase().replace('_', " "), e.message);
    let listed = said.as_ref().map(|said| said.errors.iter().take(3).map(one).collect::<Vec<_>>().join("; "));
    let words = listed.filter(|words| !words.is_empty()).or_else(|| said.map(|said| said.details));
    let words = match (words.filter(|words| !words.is_empty()), challenge) {
        (Some(words), _) => words,
        (None, Some(auth::Challenge::Bearer { error: Some(error), .. })) => {
            format!("server message: {error}")
        }
        (None, _) => String::new(),
    };
    words.chars().filter(|c| !c.is_control()).take(300).collect()
}

/// Adds the authorization, which goes to the asked host alone.
pub(crate) fn set_authorization(request: &mut Outgoing, value: http::HeaderValue) {
    request.headers.insert(AUTHORIZATION, value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registry_may_say_in_seconds_or_by_a_date_when_to_come_again() {
        let seconds = |text: &str| wait_asked_for(text).map(|wait| wait.as_secs());
        assert_eq!(seconds(" 7 "), Some(7));
        assert_eq!(seconds("Sun, 06 Nov 1994 08:49:37 GMT"), Some(0));
        let later = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(100);
        let later = later.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
        assert!(seconds(&later).is_some_and(|wait| (90..=100).contains(&wait)), "{later}");
        assert_eq!(seconds("soon"), None);
    }
}
