//! What requests bring: bodies, and names in the path. What is wrong with them is told in JSON as well.

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::answer::{self, Answer, bad_request};

/// Whole numbers up to here are exact in a float.
const EXACT_MAX: f64 = 9_007_199_254_740_992.0;

/// A request's body, whatever its content type says; unknown keys are errors where the type says so.
pub(super) struct Sent<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Sent<T> {
    type Rejection = Answer<Value>;

    async fn from_request(request: Request, state: &S) -> Result<Self, Answer<Value>> {
        let bytes = Bytes::from_request(request, state).await;
        let bytes = bytes.map_err(|refused| answer::error(refused.status(), refused.body_text()))?;
        let refuse = |error| bad_request(format_args!("the body is not what is expected: {error}"));
        let sent: Value = serde_json::from_slice(&bytes).map_err(refuse)?;
        // A list would be read as the fields in their order.
        if !sent.is_object() {
            return Err(bad_request("the body is not what is expected: it must be a JSON object"));
        }
        serde_json::from_value(with_integers(sent)).map(Self).map_err(refuse)
    }
}

/// To a JSON schema `60.0` is the integer 60, and some clients write it so.
fn with_integers(value: Value) -> Value {
    let whole = |float: &f64| float.fract() == 0.0 && float.abs() <= EXACT_MAX;
    match value {
        Value::Number(number) => match number.as_f64().filter(|float| number.is_f64() && whole(float)) {
            Some(float) => Value::from(float as i64),
            None => Value::Number(number),
        },
        Value::Array(items) => items.into_iter().map(with_integers).collect(),
        Value::Object(fields) => {
            fields.into_iter().map(|(name, value)| (name, with_integers(value))).collect()
        }
        other => other,
    }
}

/// For fields that may be left out, but not be null: what stands there is meant.
pub(super) fn given<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Option<T>, D::Error> {
    T::deserialize(from).map(Some)
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn whole_numbers_are_integers_however_they_are_written() {
        let sent: Value =
            serde_json::from_str(r#"{"a":60.0,"b":[1e3,-2.0],"c":1.5,"d":1e300,"e":"1.0"}"#).unwrap();
        assert_eq!(
            with_integers(sent),
            json!({ "a": 60, "b": [1000, -2], "c": 1.5, "d": 1e300, "e": "1.0" })
        );
    }
}
