//! Who is in the cluster, and putting somebody out of it.

use std::collections::HashMap;
use std::time::Duration;

use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use darter_types::{NodeName, Role};
use serde::Serialize;
use serde_json::{Value, json};

use super::answer::{self, Answer};
use super::auth::Caller;
use super::limits::Shown;
use super::request::Named;
use super::{Shared, answer::bad_request};
use crate::core::limits::Table;
use crate::core::liveness::is_alive;
use crate::db::{Audit, MemberRecord};
use crate::root::{now, rfc3339};

/// A member as the API shows it. Times are RFC 3339.
#[derive(Serialize)]
struct Node {
    node: String,
    role: &'static str,
    alive: bool,
    address: String,
    zone: String,
    version: String,
    last_seen: Option<String>,
    certificate: String,
    revoked: bool,
    /// Its own, which go before the cluster's.
    limits: Shown,
}

fn node(record: MemberRecord, silences: &HashMap<(Role, NodeName), Duration>, limits: &Table) -> Node {
    let silence = silences.get(&(record.role, record.node.clone())).copied();
    let seen = silence.map(|silence| now().saturating_sub(silence.as_secs())).or(record.last_seen);
    Node {
        alive: is_alive(silence),
        limits: limits.of(record.role, &record.node).into(),
        node: record.node.to_string(),
        role: record.role.as_str(),
        address: record.address,
        zone: record.zone,
        version: record.version,
        last_seen: seen.map(rfc3339),
        certificate: record.serial,
        revoked: record.revoked,
    }
}

pub(super) async fn list(State(api): Shared) -> Result<Answer<Value>, Answer<Value>> {
    // In this order: who attends was written down before, so nobody is shown alive with an older record.
    let silences = api.roster.silences();
    let records = api.store.call(|storage| storage.members()).await.map_err(answer::internal)?;
    let limits = api.limits.table().borrow().clone();
    let nodes: Vec<Node> = records.into_iter().map(|record| node(record, &silences, &limits)).collect();
    Ok(Answer(StatusCode::OK, json!({ "nodes": nodes })))
}

/// The member gets no certificate any more and may not attend; the one it has ends by itself.
pub(super) async fn revoke(
    State(api): Shared,
    Extension(Caller(actor)): Extension<Caller>,
    Named((role, name)): Named<(String, String)>,
) -> Result<Answer<Value>, Answer<Value>> {
    let role: Role = role.parse().map_err(bad_request)?;
    let node: NodeName = name.parse().map_err(bad_request)?;
    let revoked = node.clone();
    let known = api.store.call(move |storage| {
        let known = storage.revoke(role, &revoked)?;
        if known {
            storage.record(&Audit {
                at: now(),
                actor: actor.name,
                action: "revoked",
                subject: format!("{role} {revoked}"),
            })?;
        }
        Ok(known)
    });
    if !known.await.map_err(answer::internal)? {
        return Err(answer::error(StatusCode::NOT_FOUND, format_args!("no {role} {node} ever joined")));
    }
    api.roster.expel(role, &node);
    Ok(Answer(StatusCode::OK, json!({ "node": node.as_str(), "role": role.as_str(), "revoked": true })))
}
