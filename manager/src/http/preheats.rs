//! Preheat orders: give one, see how far it is, cancel it.

use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use darter_identity::attend::PreheatLayer;
use darter_proto::v1::{Basic, Credential, credential};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Shared;
use super::answer::{self, Answer, bad_request};
use super::auth::Caller;
use super::request::{Named, Sent};
use crate::core::job::{self, Preheat};
use crate::db::Audit;
use crate::root::{now, rfc3339};

/// Longer than any reference that registries take.
const IMAGE_MAX: usize = 512;

/// Characters of a user's name or a password.
const SECRET_MAX: usize = 4_096;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Order {
    image: String,
    platform: Option<String>,
    username: Option<String>,
    password: Option<String>,
}

#[derive(Serialize)]
pub(super) struct View {
    id: String,
    image: String,
    platform: Option<String>,
    state: &'static str,
    seed: Option<String>,
    error: Option<String>,
    created_at: String,
    layers: Vec<Layer>,
}

#[derive(Serialize)]
struct Layer {
    diff_id: String,
    blob: String,
    size: u64,
    read: u64,
    done: bool,
    error: Option<String>,
}

impl From<&PreheatLayer> for Layer {
    fn from(layer: &PreheatLayer) -> Self {
        Self {
            diff_id: layer.diff_id.to_string(),
            blob: layer.blob.to_string(),
            size: layer.size,
            read: layer.read,
            done: layer.done,
            error: layer.error.clone(),
        }
    }
}

impl From<Preheat> for View {
    fn from(preheat: Preheat) -> Self {
        Self {
            layers: preheat.layers.iter().map(Layer::from).collect(),
            id: preheat.id,
            image: preheat.image,
            platform: preheat.platform,
            state: preheat.state.as_str(),
            seed: preheat.seed.map(|seed| seed.to_string()),
            error: preheat.error,
            created_at: rfc3339(preheat.created_at),
        }
    }
}

fn checked_image(image: &str) -> Result<(), Answer<Value>> {
    let part = |part: &str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._:@+[]-".contains(&b))
    };
    let first = image.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'[');
    if !first || image.len() > IMAGE_MAX || !image.split('/').all(part) {
        return Err(bad_request("image must be a reference such as registry.example/team/app:1.0"));
    }
    Ok(())
}

fn checked_platform(platform: &str) -> Result<(), Answer<Value>> {
    let word = |part: &str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    };
    let parts: Vec<&str> = platform.split('/').collect();
    if !(2..=3).contains(&parts.len()) || !parts.into_iter().all(word) || platform.len() > 64 {
        return Err(bad_request("platform must be os/architecture, for example linux/amd64"));
    }
    Ok(())
}

impl Order {
    fn credential(&self) -> Result<Option<Credential>, Answer<Value>> {
        match (self.username.clone(), self.password.clone()) {
            (None, None) => Ok(None),
            (Some(username), Some(password))
                if username.chars().count().max(password.chars().count()) > SECRET_MAX =>
            {
                Err(bad_request(format_args!("username and password may have {SECRET_MAX} characters each")))
            }
            (Some(username), Some(password)) => {
                let kind = credential::Kind::Basic(Basic { username, password });
                Ok(Some(Credential { kind: Some(kind) }))
            }
            _ => Err(bad_request("username and password come together or not at all")),
        }
    }
}

fn new_id() -> Result<String, Answer<Value>> {
    let mut bytes = [0; 8];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| answer::internal("no random bytes"))?;
    Ok(hex::encode(bytes))
}

pub(super) async fn order(
    State(api): Shared,
    Extension(Caller(actor)): Extension<Caller>,
    Sent(order): Sent<Order>,
) -> Result<Answer<View>, Answer<Value>> {
    checked_image(&order.image)?;
    order.platform.as_deref().map_or(Ok(()), checked_platform)?;
    let credential = order.credential()?;
    let preheat = Preheat {
        id: new_id()?,
        image: order.image,
        platform: order.platform,
        private: credential.is_some(),
        state: job::State::Pending,
        seed: None,
        error: None,
        created_at: now(),
        layers: Vec::new(),
    };
    let subject = format!("{} of {}", preheat.id, preheat.image);
    let audit = Audit { at: now(), actor: actor.name, action: "preheat ordered", subject };
    let taken = api.preheats.order(preheat, credential).await?;
    api.store.call(move |storage| storage.record(&audit)).await.map_err(answer::internal)?;
    Ok(Answer(StatusCode::CREATED, taken.into()))
}

fn no_such(id: &str) -> Answer<Value> {
    let shown: String = id.chars().take(64).collect();
    answer::error(StatusCode::NOT_FOUND, format_args!("there is no preheat {shown:?}"))
}

pub(super) async fn get(State(api): Shared, Named(id): Named<String>) -> Result<Answer<View>, Answer<Value>> {
    let found = api.preheats.get(id.clone()).await?;
    found.map(|preheat| Answer(StatusCode::OK, preheat.into())).ok_or_else(|| no_such(&id))
}

pub(super) async fn cancel(
    State(api): Shared,
    Extension(Caller(actor)): Extension<Caller>,
    Named(id): Named<String>,
) -> Result<Answer<View>, Answer<Value>> {
    let preheat = api.preheats.cancel(id.clone()).await?.ok_or_else(|| no_such(&id))?;
    let audit = Audit { at: now(), actor: actor.name, action: "preheat cancelled", subject: id };
    api.store.call(move |storage| storage.record(&audit)).await.map_err(answer::internal)?;
    Ok(Answer(StatusCode::OK, preheat.into()))
}
