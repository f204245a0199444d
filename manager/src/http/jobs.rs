//! Jobs as Harbor orders them: `POST /oapi/v1/jobs`, and `GET` of one until it is over. `core::harbor` reads them.

use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use darter_proto::v1::{Basic, Credential, credential};
use darter_types::Role;
use serde_json::{Value, json};

use super::Shared;
use super::answer::{self, Answer};
use super::auth::Caller;
use super::preheats::new_id;
use super::request::{Named, Sent};
use crate::core::harbor::{self, JobError, JobRequest, Login, Peer};
use crate::core::job::{Part, State as Stage};
use crate::core::order::Preheat;
use crate::db::{Audit, JobRecord, StorageError};
use crate::preheats::Wish;
use crate::root::{now, rfc3339};

/// The one cluster of a manager, as these answers number it.
const CLUSTER: u32 = 1;

/// Characters of the words that somebody puts beside a job.
const BIO_MAX: usize = 1_000;

/// Each seed and node that joined.
async fn peers(api: &super::Api) -> Result<Vec<Peer>, StorageError> {
    let members = api.store.call(|storage| storage.members()).await?;
    let is_peer = |role| matches!(role, Role::Seed | Role::Node);
    let peers = members.into_iter().filter(|member| is_peer(member.role) && !member.revoked);
    Ok(peers
        .map(|member| Peer {
            role: member.role,
            name: member.node.to_string(),
            host: harbor::host(&member.address).to_owned(),
        })
        .collect())
}

fn refused(cause: JobError) -> Answer<Value> {
    if cause.is_conflict() { answer::error(StatusCode::CONFLICT, cause) } else { unprocessable(cause) }
}

fn unprocessable(words: impl std::fmt::Display) -> Answer<Value> {
    answer::error(StatusCode::UNPROCESSABLE_ENTITY, words)
}

fn credential(login: Login) -> Credential {
    let kind = match login {
        Login::Bearer(token) => credential::Kind::Bearer(token),
        Login::Basic { username, password } => credential::Kind::Basic(Basic { username, password }),
    };
    Credential { kind: Some(kind) }
}

pub(super) async fn order(
    State(api): Shared,
    Extension(Caller(actor)): Extension<Caller>,
    Sent(request): Sent<JobRequest>,
) -> Result<Answer<Value>, Answer<Value>> {
    let peers = peers(&api).await.map_err(answer::internal)?;
    let job = request.read(&peers).map_err(refused)?;
    let bio = request.bio.unwrap_or_default();
    if bio.chars().count() > BIO_MAX {
        return Err(unprocessable(format_args!("bio may have {BIO_MAX} characters")));
    }
    let wish = Wish {
        id: new_id()?,
        images: vec![job.image],
        platform: job.platform,
        scope: job.scope,
        timeout_seconds: job.timeout_seconds,
        credential: job.login.map(credential),
    };
    let preheat = api.preheats.order(wish).await?;
    let subject = format!("{} of {}", preheat.id, preheat.images().join(" "));
    let audit = Audit { at: now(), actor: actor.name, action: "preheat ordered", subject };
    let mut record =
        JobRecord { number: 0, preheat: preheat.id.clone(), bio, user_id: request.user_id, shown: job.shown };
    let written = record.clone();
    let number = api.store.call(move |storage| {
        storage.record(&audit)?;
        storage.add_job(&written)
    });
    match number.await {
        Ok(number) => record.number = number,
        Err(cause) => {
            // Who ordered it asks again, and knows nothing of an order without a job. It can't be cancelled where it is over
            // already, or the manager stops.
            let _ = api.preheats.cancel(preheat.id).await;
            return Err(answer::internal(cause));
        }
    }
    Ok(Answer(StatusCode::OK, view(&record, &preheat, &peers)))
}

pub(super) async fn get(
    State(api): Shared,
    Named(number): Named<i64>,
) -> Result<Answer<Value>, Answer<Value>> {
    let found = api.store.call(move |storage| storage.job(number)).await.map_err(answer::internal)?;
    let Some((record, preheat)) = found else {
        return Err(answer::error(StatusCode::NOT_FOUND, format_args!("there is no job {number}")));
    };
    let peers = peers(&api).await.map_err(answer::internal)?;
    Ok(Answer(StatusCode::OK, view(&record, &preheat, &peers)))
}

fn view(record: &JobRecord, preheat: &Preheat, peers: &[Peer]) -> Value {
    json!({
        "id": record.number,
        "created_at": rfc3339(preheat.created_at),
        "updated_at": rfc3339(preheat.ended_at.unwrap_or(preheat.created_at)),
        "is_del": 0,
        "task_id": format!("group_{}", preheat.id),
        "bio": record.bio,
        "type": "preheat",
        "state": harbor::state(preheat.state),
        "args": record.shown,
        "result": preheat.state.is_over().then(|| result(record, preheat, peers)),
        "user_id": record.user_id.unwrap_or_default(),
        "user": {},
        "seed_peer_clusters": [],
        "scheduler_clusters": [],
    })
}

/// What became of it: a table of layers that are ready, and one of those that are not, with members and words.
fn result(record: &JobRecord, preheat: &Preheat, peers: &[Peer]) -> Value {
    let (state, created) = (harbor::state(preheat.state), rfc3339(preheat.created_at));
    let tables = preheat.parts.iter().map(|part| tables(record, part, peers));
    let (good, bad): (Vec<Vec<Value>>, Vec<Vec<Value>>) = tables.unzip();
    let results = json!([{
        "success_tasks": good.concat(), "failure_tasks": bad.concat(), "scheduler_cluster_id": CLUSTER,
    }]);
    json!({
        "group_uuid": format!("group_{}", preheat.id),
        "state": state,
        "created_at": created,
        "updated_at": rfc3339(preheat.ended_at.unwrap_or(preheat.created_at)),
        "job_states": [{
            "task_uuid": format!("task_{}", preheat.id),
            "task_name": "preheat",
            "state": state,
            "results": results,
            "error": preheat.error.as_deref().unwrap_or_default(),
            "created_at": created,
            "ttl": 0,
        }],
    })
}

/// The lines of both tables for one member. One that had no layer yet has one line with its own words.
fn tables(record: &JobRecord, part: &Part, peers: &[Peer]) -> (Vec<Value>, Vec<Value>) {
    let name = part.target().map(ToString::to_string).unwrap_or_default();
    let peer = peers.iter().find(|peer| peer.role == part.role && peer.name == name);
    let ip = peer.map(|peer| peer.host.as_str()).unwrap_or_default();
    let good = |url: String| json!({ "url": url, "hostname": name, "ip": ip });
    let bad =
        |url: String, words: &str| json!({ "url": url, "hostname": name, "ip": ip, "description": words });
    let words = part.error.as_deref().unwrap_or("it was not done");
    let (mut ready, mut failed) = (Vec::new(), Vec::new());
    for layer in &part.layers {
        let url = harbor::blob_url(&record.shown.url, &layer.blob.to_string());
        if layer.done {
            ready.push(good(url));
        } else {
            failed.push(bad(url, layer.error.as_deref().unwrap_or(words)));
        }
    }
    if failed.is_empty() && part.state != Stage::Succeeded {
        failed.push(bad(record.shown.url.clone(), words));
    }
    (ready, failed)
}
