//! How to be let in: challenges (RFC 9110, section 11.6.1), and tokens from token servers (distribution
//! specification, "Token authentication").
//!
//! A registry's challenge is remembered, so that later requests bring their authorization at once; a token is kept
//! until shortly before it expires, and asked for once however many requests wait for it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use darter_types::{Digest, Registry, Scheme};
use http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Method};
use parking_lot::Mutex;
use serde::Deserialize;
use url::Url;

use crate::credential::Credential;
use crate::error::{RegistryError, shown};
use crate::near;
use crate::transport::{Outgoing, Transport};

/// Tokens kept at a time; when there are more, those that expired go, and then all.
const TOKENS_MAX: usize = 4096;
/// Registries whose challenge is remembered.
const CHALLENGES_MAX: usize = 4096;
/// A token is not used in the last part of its life, so that it does not expire on its way.
const EXPIRY_MARGIN: Duration = Duration::from_secs(10);
/// What a token lives if its server does not say (distribution specification).
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// The longest answer of a token server.
const ANSWER_MAX: usize = 256 * 1024;

/// What a registry wants to see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    Bearer {
        realm: Url,
        service: Option<String>,
        /// What to ask a token for, as the registry sees it: a mirror may call the repository otherwise.
        scope: Option<String>,
        /// Why it was not content with what it got, in its own words.
        error: Option<String>,
    },
    Basic,
}

impl Challenge {
    /// What of it holds for other repositories too.
    fn for_any_repository(self) -> Self {
        match self {
            Self::Bearer { realm, service, .. } => Self::Bearer { realm, service, scope: None, error: None },
            Self::Basic => Self::Basic,
        }
    }
}

/// The challenge to answer: a token server's before a password's. Unknown schemes are passed over.
pub(crate) fn challenge(headers: &HeaderMap) -> Option<Challenge> {
    let texts = headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
    let all: Vec<(String, Parameters)> = texts.flat_map(parse).collect();
    let bearer = |(scheme, parameters): &(String, Parameters)| {
        let realm = (scheme == "bearer").then(|| parameters.get("realm"))??;
        let of = |key: &str| parameters.get(key).cloned();
        Some(Challenge::Bearer {
            realm: realm.parse().ok()?,
            service: of("service"),
            scope: of("scope").filter(|scope| !scope.is_empty()),
            error: of("error"),
        })
    };
    let basic = || all.iter().any(|(scheme, _)| scheme == "basic").then_some(Challenge::Basic);
    all.iter().find_map(bearer).or_else(basic)
}

type Parameters = HashMap<String, String>;

/// Splits `Bearer realm="a",service="b", Basic realm="c"` into schemes, in lower case, with their parameters.
fn parse(text: &str) -> Vec<(String, Parameters)> {
    let mut found: Vec<(String, Parameters)> = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let end = rest.find([' ', ',', '=']).unwrap_or(rest.len());
        let word = rest[..end].to_ascii_lowercase();
        rest = rest[end..].trim_start();
        match (rest.strip_prefix('='), found.last_mut()) {
            (Some(value), Some((_, parameters))) => {
                let (value, behind) = take_value(value.trim_start());
                parameters.insert(word, value);
                rest = behind;
            }
            (Some(_), None) => return found,
            (None, _) if !word.is_empty() => found.push((word, Parameters::new())),
            (None, _) => {}
        }
        rest = rest.trim_start_matches([' ', ',']);
    }
    found
}

/// A token or a quoted string, and what is behind it.
fn take_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([' ', ',']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            other => value.push(other),
        }
    }
    (value, "")
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    registry: Registry,
    scope: String,
    credential: Option<Digest>,
}

struct Token {
    text: String,
    until: Instant,
}

type Slot = Arc<tokio::sync::Mutex<Option<Token>>>;

/// What a request is about: enough to find its authorization.
pub(crate) struct Purpose<'a> {
    pub registry: &'a Registry,
    /// For example `repository:library/alpine:pull`.
    pub scope: &'a str,
    pub credential: Option<&'a Credential>,
}

impl Purpose<'_> {
    fn key(&self) -> Key {
        Key {
            registry: self.registry.clone(),
            scope: self.scope.to_owned(),
            credential: self.credential.map(Credential::fingerprint),
        }
    }

    fn refused(&self, words: impl Into<String>) -> RegistryError {
        RegistryError::Unauthorized { url: self.registry.to_string(), words: words.into() }
    }
}

#[derive(Default)]
pub(crate) struct Auth {
    challenges: Mutex<HashMap<Registry, Challenge>>,
    tokens: Mutex<HashMap<Key, Slot>>,
}

impl Auth {
    /// The challenge that this registry posed before.
    pub fn known(&self, registry: &Registry) -> Option<Challenge> {
        self.challenges.lock().get(registry).cloned()
    }

    /// Remembers a challenge. A token that was refused is dropped with it.
    pub async fn learn(&self, purpose: &Purpose<'_>, challenge: Challenge, refused: Option<&HeaderValue>) {
        {
            let mut challenges = self.challenges.lock();
            if challenges.len() >= CHALLENGES_MAX {
                challenges.clear();
            }
            challenges.insert(purpose.registry.clone(), challenge.for_any_repository());
        }
        let slot = self.tokens.lock().get(&purpose.key()).cloned();
        if let (Some(slot), Some(refused)) = (slot, refused) {
            let mut token = slot.lock().await;
            // Another request may have got a new one meanwhile.
            if token.as_ref().is_some_and(|token| bearer(&token.text).as_ref() == Some(refused)) {
                *token = None;
            }
        }
    }

    /// The `Authorization` that answers `challenge`.
    pub async fn answer(
        &self,
        transport: &Transport,
        http: &reqwest::Client,
        purpose: &Purpose<'_>,
        challenge: &Challenge,
    ) -> Result<HeaderValue, RegistryError> {
        let text = match (challenge, purpose.credential) {
            (_, Some(Credential::Bearer(token))) => format!("Bearer {token}"),
            (Challenge::Basic, Some(credential)) => {
                credential.basic_header().ok_or_else(|| purpose.refused("no basic auth credentials"))?
            }
            (Challenge::Basic, None) => return Err(purpose.refused("no basic auth credentials")),
            (Challenge::Bearer { .. }, _) => {
                format!("Bearer {}", self.token(transport, http, purpose, challenge).await?)
            }
        };
        sensitive(&text).ok_or_else(|| purpose.refused("the credential has characters that can't be sent"))
    }

    /// A token for this purpose, from the cache or from the token server.
    pub async fn token(
        &self,
        transport: &Transport,
        http: &reqwest::Client,
        purpose: &Purpose<'_>,
        challenge: &Challenge,
    ) -> Result<String, RegistryError> {
        let Challenge::Bearer { realm, service, scope, .. } = challenge else {
            return Err(purpose.refused("the registry has no token server"));
        };
        let slot = self.slot(purpose.key());
        let mut cached = slot.lock().await;
        if let Some(token) = cached.as_ref().filter(|token| Instant::now() < token.until) {
            return Ok(token.text.clone());
        }
        let asked =
            Asked { realm, service: service.as_deref(), scope: scope.as_deref().unwrap_or(purpose.scope) };
        let token = ask_token_server(transport, http, purpose, &asked).await?;
        Ok(cached.insert(token).text.clone())
    }

    fn slot(&self, key: Key) -> Slot {
        let mut tokens = self.tokens.lock();
        if tokens.len() >= TOKENS_MAX {
            let live = |token: &Option<Token>| token.as_ref().is_some_and(|t| Instant::now() < t.until);
            tokens.retain(|_, slot| slot.try_lock().map_or(true, |token| live(&token)));
            if tokens.len() >= TOKENS_MAX {
                tokens.clear();
            }
        }
        tokens.entry(key).or_default().clone()
    }
}

fn bearer(token: &str) -> Option<HeaderValue> {
    sensitive(&format!("Bearer {token}"))
}

fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::try_from(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// What a token server answers; the specification has both names for the token.
#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

/// What a token server is asked for.
struct Asked<'a> {
    realm: &'a Url,
    service: Option<&'a str>,
    /// One or more, with spaces between.
    scope: &'a str,
}

async fn ask_token_server(
    transport: &Transport,
    http: &reqwest::Client,
    purpose: &Purpose<'_>,
    asked: &Asked<'_>,
) -> Result<Token, RegistryError> {
    let realm = asked.realm;
    let secret = purpose.credential.is_some();
    if secret && realm.scheme() != "https" && purpose.registry.scheme == Scheme::Https {
        return Err(purpose.refused(format!("the token server {} is not asked in the clear", shown(realm))));
    }
    let registry = Url::parse(&purpose.registry.to_string());
    if let Ok(registry) = registry
        && near::leads_astray(&registry, realm).await
    {
        return Err(
            purpose.refused(format!("the token server {} is on this machine or its link", shown(realm)))
        );
    }
    let kind = if secret { "failed to fetch oauth token" } else { "failed to fetch anonymous token" };
    let request = token_request(purpose, asked);
    let sent = Instant::now();
    let incoming = transport.send(http, request).await?;
    let incoming = match transport.checked(incoming, purpose.credential).await {
        Err(error @ (RegistryError::Unauthorized { .. } | RegistryError::Forbidden { .. })) => {
            return Err(purpose.refused(format!("{kind}: {}", token_refusal(&error))));
        }
        other => other?,
    };
    let body = transport.body(incoming, ANSWER_MAX).await?;
    // The error's own text could quote the token.
    let answer: Answer = serde_json::from_slice(&body)
        .map_err(|_| RegistryError::protocol(realm, "the answer is no token"))?;
    let text = answer.token.or(answer.access_token).filter(|token| !token.is_empty());
    let text =
        text.ok_or_else(|| purpose.refused("authorization server did not include a token in the response"))?;
    let life = answer.expires_in.map_or(DEFAULT_LIFE, Duration::from_secs);
    let until = sent + life.saturating_sub(EXPIRY_MARGIN).max(life / 2).min(Duration::from_secs(86_400));
    Ok(Token { text, until })
}

fn token_refusal(error: &RegistryError) -> String {
    match error {
        RegistryError::Unauthorized { url, words } => format!("{url}: 401 Unauthorized: {words}"),
        other => other.to_string(),
    }
}

/// A GET with the password if there is one; a refresh token goes into a form (OAuth 2).
fn token_request(purpose: &Purpose<'_>, asked: &Asked<'_>) -> Outgoing {
    let mut fields: Vec<_> = asked.service.map(|service| ("service", service)).into_iter().collect();
    if let Some(Credential::IdentityToken(refresh)) = purpose.credential {
        fields.extend([
            ("scope", asked.scope),
            ("grant_type", "refresh_token"),
            ("client_id", "darter"),
            ("refresh_token", refresh),
        ]);
        let body = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(fields).finish();
        let mut request = Outgoing::new(Method::POST, asked.realm.clone());
        let form = HeaderValue::from_static("application/x-www-form-urlencoded");
        request.headers.insert(http::header::CONTENT_TYPE, form);
        request.body = body.into();
        return request;
    }
    fields.extend(asked.scope.split_whitespace().map(|scope| ("scope", scope)));
    let mut url = asked.realm.clone();
    url.query_pairs_mut().extend_pairs(fields);
    let mut request = Outgoing::new(Method::GET, url);
    let basic = purpose.credential.and_then(Credential::basic_header);
    if let Some(value) = basic.and_then(|text| sensitive(&text)) {
        request.headers.insert(AUTHORIZATION, value);
    }
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(texts: &[&str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for text in texts {
            headers.append(WWW_AUTHENTICATE, HeaderValue::from_str(text).unwrap());
        }
        challenge(&headers)
    }

    #[test]
    fn bearer_challenge_is_read_with_commas_in_its_scope() {
        let text = r#"Bearer realm="https://auth.example/token",service="registry",scope="repository:a:pull,push",error="insufficient_scope""#;
        let expected = Challenge::Bearer {
            realm: "https://auth.example/token".parse().unwrap(),
            service: Some("registry".to_owned()),
            scope: Some("repository:a:pull,push".to_owned()),
            error: Some("insufficient_scope".to_owned()),
        };
        assert_eq!(read(&[text]), Some(expected));
    }

    #[test]
    fn token_server_is_preferred_to_a_password() {
        let one = r#"Basic realm="x", Bearer realm="https://a/t""#;
        assert!(matches!(read(&[one]), Some(Challenge::Bearer { .. })));
        assert!(matches!(read(&["Basic", "Bearer realm=https://a/t"]), Some(Challenge::Bearer { .. })));
        assert_eq!(read(&[r#"BASIC realm="a \" b""#]), Some(Challenge::Basic));
    }

    #[test]
    fn unknown_and_broken_challenges_are_none() {
        for bad in ["Negotiate", "Bearer", "Bearer realm=\"no address\"", "=,=", ",", "Bearer realm=\"", ""] {
            assert_eq!(read(&[bad]), None, "{bad:?}");
        }
    }
}
