//! What requests bring: bodies, and names in the path. What is wrong with them is told in JSON as well.

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::answer::{self, Answer, bad_request};

/// A request's body, whatever its content type says; unknown keys are errors where the type says so.
pub(super) struct Sent<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Sent<T> {
    type Rejection = Answer<Value>;

    async fn from_request(request: Request, state: &S) -> Result<Self, Answer<Value>> {
        let bytes = Bytes::from_request(request, state).await;
        let bytes = bytes.map_err(|refused| answer::error(refused.status(), refused.body_text()))?;
        let sent = serde_json::from_slice(&bytes);
        sent.map(Self).map_err(|error| bad_request(format_args!("the body is not what is expected: {error}")))
    }
}

/// The names in the path that the route leaves open.
pub(super) struct Named<T>(pub(super) T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Named<T> {
    type Rejection = Answer<Value>;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Answer<Value>> {
        let path = Path::from_request_parts(parts, state).await;
        let Path(names) = path.map_err(|refused| answer::error(refused.status(), refused.body_text()))?;
        Ok(Self(names))
    }
}
