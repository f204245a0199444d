//! The REST API. Every answer is JSON; an error is `{"error": "..."}` with words on what to do. Only translates.
//!
//! [`ROUTES`] is all of it: what is not there does not exist. `docs/openapi.json` says the same for programs, and is served
//! to whoever asks, as is `GET /healthy`. All else asks for `Authorization: Bearer <API token>`.

mod answer;
mod api_tokens;
mod auth;
mod jobs;
mod limits;
mod nodes;
mod preheats;
mod request;
mod tokens;

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{Method, StatusCode};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::IntoResponse;
use axum::routing::{MethodFilter, MethodRouter, on};
use serde_json::{Value, json};

use crate::core::access::{ApiRole, ApiScope, Need};
use crate::db::Store;
use crate::limits::Limits;
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
    pub(crate) limits: Limits,
}

type Shared = State<Arc<Api>>;

/// The API for programs that write requests by themselves.
const OPENAPI: &str = include_str!("../../docs/openapi.json");

/// Below these, a request without a valid token learns nothing else.
const API: &str = "/api/v1";
const OPEN_API: &str = "/oapi/v1";

/// Makes the route's part of the router for its method.
type Handler = fn(MethodFilter) -> MethodRouter<Arc<Api>>;

struct Route {
    method: Method,
    path: &'static str,
    /// `None`: open to all.
    need: Option<Need>,
    handler: Handler,
}

const fn open(path: &'static str, handler: Handler) -> Route {
    Route { method: Method::GET, path, need: None, handler }
}

const fn guarded(
    method: Method,
    path: &'static str,
    scope: ApiScope,
    role: ApiRole,
    handler: Handler,
) -> Route {
    Route { method, path, need: Some(Need { scope, role }), handler }
}

const ROUTES: &[Route] = &[
    open("/healthy", |m| on(m, healthy)),
    open("/api/v1/openapi.json", |m| on(m, openapi)),
    guarded(Method::GET, "/api/v1/nodes", ApiScope::Nodes, ApiRole::Reader, |m| on(m, nodes::list)),
    guarded(Method::DELETE, "/api/v1/nodes/{role}/{node}", ApiScope::Nodes, ApiRole::Admin, |m| {
        on(m, nodes::revoke)
    }),
    guarded(Method::GET, "/api/v1/limits", ApiScope::Nodes, ApiRole::Reader, |m| on(m, limits::get_cluster)),
    guarded(Method::PUT, "/api/v1/limits", ApiScope::Nodes, ApiRole::Operator, |m| {
        on(m, limits::set_cluster)
    }),
    guarded(Method::GET, "/api/v1/nodes/{role}/{node}/limits", ApiScope::Nodes, ApiRole::Reader, |m| {
        on(m, limits::get_member)
    }),
    guarded(Method::PUT, "/api/v1/nodes/{role}/{node}/limits", ApiScope::Nodes, ApiRole::Operator, |m| {
        on(m, limits::set_member)
    }),
    guarded(Method::POST, "/api/v1/preheats", ApiScope::Preheats, ApiRole::Operator, |m| {
        on(m, preheats::order)
    }),
    guarded(Method::GET, "/api/v1/preheats", ApiScope::Preheats, ApiRole::Reader, |m| on(m, preheats::list)),
    guarded(Method::GET, "/api/v1/preheats/{id}", ApiScope::Preheats, ApiRole::Reader, |m| {
        on(m, preheats::get)
    }),
    guarded(Method::DELETE, "/api/v1/preheats/{id}", ApiScope::Preheats, ApiRole::Operator, |m| {
        on(m, preheats::cancel)
    }),
    guarded(Method::POST, "/api/v1/join-tokens", ApiScope::JoinTokens, ApiRole::Admin, |m| {
        on(m, tokens::make)
    }),
    guarded(Method::GET, "/api/v1/api-tokens", ApiScope::ApiTokens, ApiRole::Admin, |m| {
        on(m, api_tokens::list)
    }),
    guarded(Method::POST, "/api/v1/api-tokens", ApiScope::ApiTokens, ApiRole::Admin, |m| {
        on(m, api_tokens::make)
    }),
    guarded(Method::DELETE, "/api/v1/api-tokens/{id}", ApiScope::ApiTokens, ApiRole::Admin, |m| {
        on(m, api_tokens::remove)
    }),
    guarded(Method::POST, "/oapi/v1/jobs", ApiScope::Preheats, ApiRole::Operator, |m| on(m, jobs::order)),
    guarded(Method::GET, "/oapi/v1/jobs/{id}", ApiScope::Preheats, ApiRole::Reader, |m| on(m, jobs::get)),
];

pub(crate) fn router(api: Arc<Api>) -> Router {
    let mut outer = Router::new();
    for route in ROUTES.iter().filter(|route| route.need.is_none()) {
        outer = outer.route(route.path, made(route));
    }
    outer
        .nest(API, below(API, &api))
        .nest(OPEN_API, below(OPEN_API, &api))
        .fallback(unknown)
        .method_not_allowed_fallback(other_method)
        .with_state(api)
}

fn made(route: &Route) -> MethodRouter<Arc<Api>> {
    let method = MethodFilter::try_from(route.method.clone()).expect("a method that routers know");
    (route.handler)(method)
}

/// All guarded routes below `root`, behind the guard.
fn below(root: &str, api: &Arc<Api>) -> Router<Arc<Api>> {
    let mut inner = Router::new();
    for route in ROUTES {
        if let (Some(need), Some(path)) = (route.need, route.path.strip_prefix(root)) {
            let allow = from_fn(move |request, next| auth::allow(need, request, next));
            inner = inner.route(path, made(route).layer(allow));
        }
    }
    inner
        .fallback(unknown)
        .method_not_allowed_fallback(other_method)
        .layer(from_fn_with_state(api.clone(), auth::guard))
}

async fn healthy(State(api): Shared) -> Result<Answer<Value>, Answer<Value>> {
    api.store.call(|storage| storage.healthy()).await.map_err(answer::internal)?;
    Ok(Answer(StatusCode::OK, json!({ "status": "ok", "version": env!("CARGO_PKG_VERSION") })))
}

async fn openapi() -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], OPENAPI)
}

async fn unknown() -> Answer<Value> {
    answer::error(StatusCode::NOT_FOUND, "there is nothing here: /api/v1/openapi.json tells what there is")
}

async fn other_method() -> Answer<Value> {
    answer::error(StatusCode::METHOD_NOT_ALLOWED, "this address does not take that method")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn document() -> Value {
        serde_json::from_str(OPENAPI).unwrap()
    }

    #[test]
    fn document_and_router_have_the_same_requests() {
        let document = document();
        let mut written = BTreeSet::new();
        for (path, methods) in document["paths"].as_object().unwrap() {
            let methods = methods.as_object().unwrap().keys().filter(|key| *key != "parameters");
            written.extend(methods.map(|method| (method.to_uppercase(), path.clone())));
        }
        let routed = ROUTES.iter().map(|route| (route.method.to_string(), route.path.to_owned()));
        assert_eq!(written, routed.collect());
    }

    #[test]
    fn what_is_guarded_is_below_a_guard() {
        for route in ROUTES.iter().filter(|route| route.need.is_some()) {
            let below = [API, OPEN_API].iter().filter(|root| route.path.starts_with(&format!("{root}/")));
            assert_eq!(below.count(), 1, "{}", route.path);
        }
    }

    #[test]
    fn document_says_what_each_request_needs() {
        let document = document();
        for route in ROUTES {
            let operation = &document["paths"][route.path][route.method.as_str().to_lowercase()];
            let refusals = ["401", "403"].map(|status| operation["responses"].get(status).is_some());
            let secured = operation["security"] != json!([]);
            assert_eq!(
                (refusals, secured),
                ([route.need.is_some(); 2], route.need.is_some()),
                "{}",
                route.path
            );
            let Some(need) = route.need else { continue };
            let words = format!("Needs role {} and scope {}.", need.role.as_str(), need.scope.as_str());
            let described = operation["description"].as_str().unwrap_or_default();
            assert!(
                described.ends_with(&words),
                "{} {}: {described:?} lacks {words:?}",
                route.method,
                route.path
            );
        }
    }
}
