//! Who may use the API: whoever shows an API token.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::AUTHORIZATION;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::{Api, answer};
use crate::root::api_token_hash;

/// The name of the token that a request showed; handlers write it to the audit log.
#[derive(Clone)]
pub(super) struct Caller(pub(super) String);

pub(super) async fn guard(State(api): State<Arc<Api>>, mut request: Request, next: Next) -> Response {
    let Some(token) = bearer(&request) else {
        return refused(
            "show an API token: `Authorization: Bearer TOKEN`; the first one is in the manager's file api-token",
        );
    };
    // The hash is looked up, so how long it takes says nothing of any stored token.
    let hash = api_token_hash(token);
    match api.store.call(move |storage| storage.api_token(&hash)).await {
        Ok(Some(name)) => {
            request.extensions_mut().insert(Caller(format!("API token {name}")));
            next.run(request).await
        }
        Ok(None) => refused("this API token is not known: the first one is in the manager's file api-token"),
        Err(error) => answer::internal(error).into_response(),
    }
}

fn bearer(request: &Request) -> Option<&str> {
    let value = request.headers().get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

fn refused(words: &str) -> Response {
    let mut response = answer::error(StatusCode::UNAUTHORIZED, words).into_response();
    let scheme = axum::http::HeaderValue::from_static("Bearer");
    response.headers_mut().insert(axum::http::header::WWW_AUTHENTICATE, scheme);
    response
}
