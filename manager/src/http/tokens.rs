//! Join tokens for new members.

use std::time::Duration;

use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use darter_types::Role;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Shared;
use super::answer::{Answer, bad_request};
use super::auth::Caller;
use super::request::Sent;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    role: String,
    ttl_seconds: u64,
    #[serde(default = "one")]
    uses: u32,
}

fn one() -> u32 {
    1
}

pub(super) async fn make(
    State(api): Shared,
    Extension(Caller(actor)): Extension<Caller>,
    Sent(wanted): Sent<Wanted>,
) -> Result<Answer<Value>, Answer<Value>> {
    let role: Role = wanted.role.parse().map_err(bad_request)?;
    let life = Duration::from_secs(wanted.ttl_seconds);
    let root = api.root.clone();
    let made =
        tokio::task::spawn_blocking(move || root.mint_token(&actor.name, role, life, wanted.uses)).await;
    let token = made.expect("making a token does not panic")?;
    Ok(Answer(StatusCode::CREATED, json!({ "token": token.to_string(), "id": token.id_text() })))
}
