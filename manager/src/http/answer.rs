//! Answers: a status and JSON.

use std::fmt::Display;

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};

use crate::ManagerError;
use crate::core::access::AccessError;
use crate::preheats::PreheatError;

pub(super) struct Answer<T>(pub(super) StatusCode, pub(super) T);

impl<T: Serialize> IntoResponse for Answer<T> {
    fn into_response(self) -> Response {
        (self.0, Json(self.1)).into_response()
    }
}

pub(super) fn error(status: StatusCode, words: impl Display) -> Answer<Value> {
    Answer(status, json!({ "error": words.to_string() }))
}

pub(super) fn bad_request(words: impl Display) -> Answer<Value> {
    error(StatusCode::BAD_REQUEST, words)
}

/// The manager's own trouble: the caller learns that, the log learns which.
pub(super) fn internal(cause: impl Display) -> Answer<Value> {
    tracing::error!(error = %cause, "a request failed");
    error(StatusCode::INTERNAL_SERVER_ERROR, "the manager can't do this now; its log says why")
}

impl From<PreheatError> for Answer<Value> {
    fn from(cause: PreheatError) -> Self {
        match cause {
            PreheatError::TooMany => error(StatusCode::TOO_MANY_REQUESTS, cause),
            PreheatError::Order(cause) if cause.is_conflict() => error(StatusCode::CONFLICT, cause),
            PreheatError::Order(cause) => bad_request(cause),
            PreheatError::Stopping => error(StatusCode::SERVICE_UNAVAILABLE, cause),
            PreheatError::Storage(cause) => internal(cause),
        }
    }
}

impl From<ManagerError> for Answer<Value> {
    fn from(cause: ManagerError) -> Self {
        match cause {
            ManagerError::Access(AccessError::More) => error(StatusCode::FORBIDDEN, AccessError::More),
            ManagerError::Access(AccessError::Itself) => error(StatusCode::CONFLICT, AccessError::Itself),
            ManagerError::Access(_) | ManagerError::Token(_) => bad_request(cause),
            ManagerError::TooManyTokens | ManagerError::SameName(_) => error(StatusCode::CONFLICT, cause),
            _ => internal(cause),
        }
    }
}
