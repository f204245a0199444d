//! Who may use the API: whoever shows an API token, as far as its role and scopes go.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::{AUTHORIZATION, HeaderValue, WWW_AUTHENTICATE};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::{Api, answer};
use crate::core::access::Need;
use crate::core::harbor::basic;
use crate::root::{Actor, api_token_hash, now};

/// Whose token a request showed.
#[derive(Clone)]
pub(super) struct Caller(pub(super) Actor);

/// Lets nobody in without a token that counts.
pub(super) async fn guard(State(api): State<Arc<Api>>, mut request: Request, next: Next) -> Response {
    let Some(token) = shown(&request) else {
        return unknown(
            "show an API token: `Authorization: Bearer TOKEN`; the first one is in the manager's file api-token, and \
             `darter-manager api-token add NAME --role admin` on the manager's host makes another",
        );
    };
    // The hash is looked up, so how long it takes says nothing of any stored token.
    let hash = api_token_hash(&token);
    match api.store.call(move |storage| storage.api_token(&hash)).await {
        Ok(Some(token)) if token.grant.has_expired(now()) => {
            unknown("this API token has expired: make another with `darter-manager api-token add`")
        }
        Ok(Some(token)) => {
            let name = format!("API token {} ({})", token.name, token.id);
            request.extensions_mut().insert(Caller(Actor {
                name,
                grant: token.grant,
                token: Some(token.id),
            }));
            next.run(request).await
        }
        Ok(None) => unknown(
            "this API token is not known: the first one is in the manager's file api-token, and \
             `darter-manager api-token add NAME --role admin` on the manager's host makes another",
        ),
        Err(error) => answer::internal(error).into_response(),
    }
}

/// Lets on who has what `need` says; behind [`guard`].
pub(super) async fn allow(need: Need, request: Request, next: Next) -> Response {
    let allowed = request.extensions().get::<Caller>().is_some_and(|Caller(actor)| actor.grant.allows(need));
    if allowed {
        return next.run(request).await;
    }
    let words = format!(
        "this API token does not let you do that: it takes role {} and scope {}",
        need.role.as_str(),
        need.scope.as_str()
    );
    answer::error(StatusCode::FORBIDDEN, words).into_response()
}

/// The token of a request; with `Basic`, which some clients have only, it is the password.
fn shown(request: &Request) -> Option<String> {
    let value = request.headers().get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(token.trim().to_owned());
    }
    basic(value).map(|(_, password)| password)
}

fn unknown(words: &str) -> Response {
    let mut response = answer::error(StatusCode::UNAUTHORIZED, words).into_response();
    response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    response
}
