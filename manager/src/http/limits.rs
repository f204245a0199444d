//! How much seeds and nodes may move: for all of them, and for one.

use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use darter_types::{NodeName, RateKind, Rates, Role};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::answer::{self, Answer, bad_request};
use super::auth::Caller;
use super::request::{Named, Sent};
use super::{Api, Shared};
use crate::core::limits::{Whose, checked};
use crate::db::Audit;
use crate::root::{Actor, now};

/// Bytes per second; 0: no limit; null or left out: nothing is set.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Shown {
    download: Option<u64>,
    upload: Option<u64>,
    registry: Option<u64>,
    background: Option<u64>,
}

impl From<Rates> for Shown {
    fn from(rates: Rates) -> Self {
        Self {
            download: rates.get(RateKind::Download),
            upload: rates.get(RateKind::Upload),
            registry: rates.get(RateKind::Registry),
            background: rates.get(RateKind::Background),
        }
    }
}

impl From<Shown> for Rates {
    fn from(shown: Shown) -> Self {
        Rates::default()
            .with(RateKind::Download, shown.download)
            .with(RateKind::Upload, shown.upload)
            .with(RateKind::Registry, shown.registry)
            .with(RateKind::Background, shown.background)
    }
}

/// How the audit log names those of the cluster.
const CLUSTER: &str = "the cluster";

type Outcome = Result<Answer<Shown>, Answer<Value>>;

pub(super) async fn get_cluster(State(api): Shared) -> Outcome {
    Ok(Answer(StatusCode::OK, api.limits.table().borrow().cluster.into()))
}

pub(super) async fn set_cluster(
    State(api): Shared,
    Extension(Caller(actor)): Extension<Caller>,
    Sent(wanted): Sent<Shown>,
) -> Outcome {
    set(&api, actor, Whose::Cluster, wanted).await
}

pub(super) async fn get_member(State(api): Shared, Named((role, name)): Named<(String, String)>) -> Outcome {
    let (role, node) = member(&role, &name)?;
    checked(&Whose::Member(role, node.clone()), &Rates::default()).map_err(bad_request)?;
    let name = node.clone();
    let known = api.store.call(move |storage| storage.member(role, &name)).await.map_err(answer::internal)?;
    known.ok_or_else(|| nobody(role, &node))?;
    Ok(Answer(StatusCode::OK, api.limits.table().borrow().of(role, &node).into()))
}

pub(super) async fn set_member(
    State(api): Shared,
    Extension(Caller(actor)): Extension<Caller>,
    Named((role, name)): Named<(String, String)>,
    Sent(wanted): Sent<Shown>,
) -> Outcome {
    let (role, node) = member(&role, &name)?;
    set(&api, actor, Whose::Member(role, node), wanted).await
}

async fn set(api: &Api, actor: Actor, whose: Whose, wanted: Shown) -> Outcome {
    let rates = Rates::from(wanted);
    checked(&whose, &rates).map_err(bad_request)?;
    let subject = match &whose {
        Whose::Cluster => CLUSTER.to_owned(),
        Whose::Member(role, node) => format!("{role} {node}"),
    };
    let audit = Audit { at: now(), actor: actor.name, action: "limited", subject };
    let is_set = api.limits.set(whose.clone(), rates, audit).await.map_err(answer::internal)?;
    match whose {
        Whose::Member(role, node) if !is_set => Err(nobody(role, &node)),
        _ => Ok(Answer(StatusCode::OK, wanted)),
    }
}

fn member(role: &str, node: &str) -> Result<(Role, NodeName), Answer<Value>> {
    Ok((role.parse().map_err(bad_request)?, node.parse().map_err(bad_request)?))
}

fn nobody(role: Role, node: &NodeName) -> Answer<Value> {
    answer::error(StatusCode::NOT_FOUND, format_args!("no {role} {node} ever joined"))
}
