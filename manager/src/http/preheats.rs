//! Preheat orders: give one, see how far it is, cancel it.

use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use darter_identity::attend::PreheatLayer;
use darter_proto::v1::{Basic, Credential, credential};
use darter_types::Role;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Shared;
use super::answer::{self, Answer, bad_request};
use super::auth::Caller;
use super::request::{Named, Sent, given};
use crate::core::job::Part;
use crate::core::order::{Preheat, Scope};
use crate::db::Audit;
use crate::preheats::Wish;
use crate::root::{now, rfc3339};

/// Characters of a user's name or a password.
const SECRET_MAX: usize = 4_096;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Order {
    #[serde(default, deserialize_with = "given")]
    image: Option<String>,
    #[serde(default, deserialize_with = "given")]
    images: Option<Vec<String>>,
    #[serde(default, deserialize_with = "given")]
    platform: Option<String>,
    #[serde(default)]
    scope: Scope,
    #[serde(default, deserialize_with = "given")]
    timeout_seconds: Option<u64>,
    #[serde(default, deserialize_with = "given")]
    username: Option<String>,
    #[serde(default, deserialize_with = "given")]
    password: Option<String>,
}

#[derive(Serialize)]
pub(super) struct View {
    id: String,
    /// The first one.
    image: String,
    images: Vec<String>,
    platform: Option<String>,
    scope: Scope,
    timeout_seconds: u64,
    state: &'static str,
    /// Of the only target, where there is one.
    seed: Option<String>,
    error: Option<String>,
    created_at: String,
    ended_at: Option<String>,
    /// Of the only target, where there is one.
    layers: Vec<Layer>,
    targets: Vec<Target>,
    /// Nodes that had joined and were not there when an order for all nodes was taken.
    away: Vec<String>,
}

/// One image at one member.
#[derive(Serialize)]
struct Target {
    image: String,
    /// One of the two, at most.
    seed: Option<String>,
    node: Option<String>,
    state: &'static str,
    error: Option<String>,
    layers: Vec<Layer>,
}

#[derive(Serialize, Clone)]
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

impl From<Part> for Target {
    fn from(part: Part) -> Self {
        let at = |role: Role| part.target().filter(|_| part.role == role).map(ToString::to_string);
        Self {
            seed: at(Role::Seed),
            node: at(Role::Node),
            layers: part.layers.iter().map(Layer::from).collect(),
            image: part.image,
            state: part.state.as_str(),
            error: part.error,
        }
    }
}

impl From<Preheat> for View {
    fn from(preheat: Preheat) -> Self {
        let images: Vec<String> = preheat.images().into_iter().map(str::to_owned).collect();
        let targets: Vec<Target> = preheat.parts.into_iter().map(Target::from).collect();
        let only = targets.first().filter(|_| targets.len() == 1);
        Self {
            image: images.first().cloned().unwrap_or_default(),
            images,
            seed: only.and_then(|target| target.seed.clone()),
            layers: only.map(|target| target.layers.clone()).unwrap_or_default(),
            targets,
            away: preheat.away,
            id: preheat.id,
            platform: preheat.platform,
            scope: preheat.scope,
            timeout_seconds: preheat.timeout_seconds,
            state: preheat.state.as_str(),
            error: preheat.error,
            created_at: rfc3339(preheat.created_at),
            ended_at: preheat.ended_at.map(rfc3339),
        }
    }
}

/// An order in a list: what its parts do is asked for one by one.
#[derive(Serialize)]
struct Line {
    id: String,
    images: Vec<String>,
    state: &'static str,
    error: Option<String>,
    created_at: String,
    ended_at: Option<String>,
}

impl From<Preheat> for Line {
    fn from(preheat: Preheat) -> Self {
        Self {
            images: preheat.images().into_iter().map(str::to_owned).collect(),
            id: preheat.id,
            state: preheat.state.as_str(),
            error: preheat.error,
            created_at: rfc3339(preheat.created_at),
            ended_at: preheat.ended_at.map(rfc3339),
        }
    }
}

impl Order {
    fn wish(self) -> Result<Wish, Answer<Value>> {
        let credential = self.credential()?;
        let images = match (self.image, self.images) {
            (Some(image), None) => vec![image],
            (None, Some(images)) => images,
            _ => return Err(bad_request("name either image or images")),
        };
        Ok(Wish {
            id: new_id()?,
            images,
            platform: self.platform,
            scope: self.scope,
            timeout_seconds: self.timeout_seconds,
            credential,
        })
    }

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

pub(super) fn new_id() -> Result<String, Answer<Value>> {
    let mut bytes = [0; 8];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| answer::internal("no random bytes"))?;
    Ok(hex::encode(bytes))
}

pub(super) async fn order(
    State(api): Shared,
    Extension(Caller(actor)): Extension<Caller>,
    Sent(order): Sent<Order>,
) -> Result<Answer<View>, Answer<Value>> {
    let taken = api.preheats.order(order.wish()?).await?;
    let subject = format!("{} of {}", taken.id, taken.images().join(" "));
    let audit = Audit { at: now(), actor: actor.name, action: "preheat ordered", subject };
    api.store.call(move |storage| storage.record(&audit)).await.map_err(answer::internal)?;
    Ok(Answer(StatusCode::CREATED, taken.into()))
}

fn no_such(id: &str) -> Answer<Value> {
    let shown: String = id.chars().take(64).collect();
    answer::error(StatusCode::NOT_FOUND, format_args!("there is no preheat {shown:?}"))
}

pub(super) async fn list(State(api): Shared) -> Result<Answer<Value>, Answer<Value>> {
    let lines: Vec<Line> = api.preheats.list().await?.into_iter().map(Line::from).collect();
    Ok(Answer(StatusCode::OK, json!({ "preheats": lines })))
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
