//! The REST API. Every answer is JSON; an error is `{"error": "..."}` with words on what to do. Only translates.
//!
//! `GET /healthy` is open. All else asks for `Authorization: Bearer <API token>`.

mod answer;
mod auth;
mod nodes;
mod preheats;
mod tokens;

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::middleware::from_fn_with_state;
use axum::routing::{delete, get, post};
use serde_json::{Value, json};

use crate::db::Store;
use crate::preheats::Preheats;
use crate::root::Root;
use crate::roster::Roster;
use answer::Answer;

/// What handlers work with.
pub(crate) struct Api {
    pub(crate) root: Arc<Root>,
    pub(crate) store: Store,
    pub(crate) roster: Roster,
    pub(crate) preheats: Preheats,
}

type Shared = State<Arc<Api>>;

pub(crate) fn router(api: Arc<Api>) -> Router {
    let guarded = Router::new()
        .route("/nodes", get(nodes::list))
        .route("/nodes/{role}/{node}", delete(nodes::revoke))
        .route("/preheats", post(preheats::order))
        .route("/preheats/{id}", get(preheats::get).delete(preheats::cancel))
        .route("/join-tokens", post(tokens::make))
        .fallback(unknown)
        .method_not_allowed_fallback(other_method)
        .layer(from_fn_with_state(api.clone(), auth::guard));
    Router::new()
        .route("/healthy", get(healthy))
        .nest("/api/v1", guarded)
        .fallback(unknown)
        .method_not_allowed_fallback(other_method)
        .with_state(api)
}

async fn healthy(State(api): Shared) -> Result<Answer<Value>, Answer<Value>> {
    api.store.call(|storage| storage.healthy()).await.map_err(answer::internal)?;
    Ok(Answer(StatusCode::OK, json!({ "status": "ok", "version": env!("CARGO_PKG_VERSION") })))
}

async fn unknown() -> Answer<Value> {
    answer::error(StatusCode::NOT_FOUND, "there is nothing here: the API is under /api/v1")
}

async fn other_method() -> Answer<Value> {
    answer::error(StatusCode::METHOD_NOT_ALLOWED, "this address does not take that method")
}
