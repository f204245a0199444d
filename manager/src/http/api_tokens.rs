//! API tokens: made, listed, removed.

use std::time::Duration;

use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Shared;
use super::answer::{self, Answer, bad_request};
use super::auth::Caller;
use super::request::{Named, Sent};
use crate::core::access::{ApiScope, ApiToken};
use crate::root::{ApiTokenWish, now, rfc3339};

/// Of a token whose maker says nothing of it: 90 days.
const LIFE_SECONDS: u64 = 90 * 24 * 3600;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    name: String,
    role: String,
    #[serde(default)]
    scopes: Vec<String>,
    #[serde(default = "life_seconds")]
    ttl_seconds: u64,
}

fn life_seconds() -> u64 {
    LIFE_SECONDS
}

/// A token as the API shows it: never its secret.
#[derive(Serialize)]
pub(super) struct View {
    id: String,
    name: String,
    role: &'static str,
    scopes: Vec<&'static str>,
    created_at: String,
    expires_at: Option<String>,
    expired: bool,
}

impl From<ApiToken> for View {
    fn from(token: ApiToken) -> Self {
        Self {
            id: token.id,
            name: token.name,
            role: token.grant.role.as_str(),
            scopes: token.grant.scopes.iter().map(|scope| scope.as_str()).collect(),
            created_at: rfc3339(token.created_at),
            expires_at: token.grant.expires_at.map(rfc3339),
            expired: token.grant.has_expired(now()),
        }
    }
}

/// A token that was just made, with its secret.
#[derive(Serialize)]
pub(super) struct Made {
    token: String,
    #[serde(flatten)]
    view: View,
}

impl Wanted {
    fn wish(self) -> Result<ApiTokenWish, Answer<Value>> {
        if self.scopes.len() > ApiScope::ALL.len() {
            return Err(bad_request("name each scope once"));
        }
        let scopes = self.scopes.iter().map(|scope| scope.parse().map_err(bad_request));
        Ok(ApiTokenWish {
            name: self.name,
            role: self.role.parse().map_err(bad_request)?,
            scopes: scopes.collect::<Result<_, _>>()?,
            life: Duration::from_secs(self.ttl_seconds),
        })
    }
}

pub(super) async fn make(
    State(api): Shared,
    Extension(Caller(actor)): Extension<Caller>,
    Sent(wanted): Sent<Wanted>,
) -> Result<Answer<Made>, Answer<Value>> {
    let wish = wanted.wish()?;
    let root = api.root.clone();
    let made = tokio::task::spawn_blocking(move || root.mint_api_token(&actor, wish)).await;
    let (token, record) = made.expect("making a token does not panic")?;
    Ok(Answer(StatusCode::CREATED, Made { token, view: record.into() }))
}

pub(super) async fn list(State(api): Shared) -> Result<Answer<Value>, Answer<Value>> {
    let tokens = api.store.call(|storage| storage.api_tokens()).await.map_err(answer::internal)?;
    let views: Vec<View> = tokens.into_iter().map(View::from).collect();
    Ok(Answer(StatusCode::OK, json!({ "tokens": views })))
}

pub(super) async fn remove(
    State(api): Shared,
    Extension(Caller(actor)): Extension<Caller>,
    Named(id): Named<String>,
) -> Result<Answer<Value>, Answer<Value>> {
    let (root, removed) = (api.root.clone(), id.clone());
    let gone = tokio::task::spawn_blocking(move || root.remove_api_token(&actor, &removed)).await;
    if !gone.expect("removing a token does not panic")? {
        let shown: String = id.chars().take(64).collect();
        return Err(answer::error(StatusCode::NOT_FOUND, format_args!("there is no API token {shown:?}")));
    }
    Ok(Answer(StatusCode::OK, json!({ "id": id, "removed": true })))
}
