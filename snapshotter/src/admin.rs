//! HTTP on `<root>/admin.sock`, for the `darter` command and for root only:
//!
//! - `GET /status`: `{"version": "0.1.0", "lazy": true, "mounts": ["/var/lib/darter/s/m", "/var/lib/darter/s/n"], "store": STORE,
//!   "traffic": TRAFFIC, "manager": MANAGER, "layers": [LAYER, ...]}`, where MANAGER is as in `/health`, STORE is `{"dir", "used", "quota": bytes or null, "evicted", "total", "available", "high_percent", "beyond_mark": bool, "tight": bool}` (bytes;
//!   `total` and `available` of the file system; `beyond_mark`: it is fuller than `high_percent`, so nothing comes that nobody waits for; `tight`: something did not come for want of room) or null without a mesh, TRAFFIC is
//!   `{"limits": [{"kind", "rate": bytes per second, "set_by": "host", "cluster" or "member"}, ...], "yields_to": ["disk",
//!   "network"]}` (limits that are in force, and what others keep busy) or null, and LAYER is
//!   `{"diff_id", "images": ["host/name@sha256:..."], "pieces", "have", "from": {"<peer or origin>": bytes}, "state": "words"}`,
//!   one for each layer that is open; one that only an order of the manager brings has no `images`. `pieces` is 0 as long as there is no map.
//! - `GET /why?image=REF`: `{"image": REF, "lazy": true, "looking": 0, "images": [IMAGE, ...]}`, the newest decision first, one for each of containerd's namespaces that has the image, where IMAGE is
//!   `{"manifest", "config", "namespace", "names": [...], "decided": <seconds since 1970> or null, "layers": [{"diff_id", "blob", "size",
//!   "lazy": bool or null, "reason": "words"}, ...]}`, the lowest layer first. REF is a reference as containerd has it, a short one, a
//!   repository, or the digest of manifest or configuration. Without `image`: all decisions. `decided` and
//!   `lazy` are null while it is being decided, and `reason` says who is asked; `looking` is the number of layers of which it isn't even
//!   known yet to which image they belong. None at all: the image was not
//!   asked for through this snapshotter, or by a client that never pulls lazily.
//! - `GET /trace?image=REF`: `{"image": REF, "reads": [READ, ...]}`, what the newest such image read first since the daemon's start, in
//!   order, where READ is `{"at_ms", "waited_ms", "path", "layer", "piece", "local": bool, "from": "<peer>"}`, one for each piece, at
//!   most 4,096. 404 if none was started.
//! - `POST /blob?namespace=NS&manifest=DIGEST&blob=DIGEST[&image=REF]`: brings a layer's blob into containerd's content store, and
//!   answers when it is there. `image` is the image's reference: containerd's labels lack the registry's port.
//! - `GET /health`: `{"version", "lazy": bool, "schedulers": [{"node", "address", "connected": bool, "trouble": "words",
//!   "clock_ahead_seconds": 3 or null}], "manager": MANAGER, "store": STORE}`, the schedulers that the manager has named, and MANAGER is `{"address", "joined": bool,
//!   "attends": bool, "refused": bool, "trouble": "words", "heard", "replaced", "certificate_ends"}` (the last three seconds since 1970 or null:
//!   when a manager that is away was there last, when another program with this certificate took this node's place) or null without a cluster.
//! - `GET /stats`: `{"fuse": {"lookup": 12, ...}}`, requests since the start.
//!
//! `lazy` at the top is false where the daemon runs without a mesh. An error is a status other than 200 with words as its body.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use darter_registry::ImageRef;
use darter_types::Digest;
use serde::{Deserialize, Serialize};

use crate::lazy::ports::{SchedulerHealth, StoreHealth, TrafficHealth};
use crate::lazy::{ImageReport, LayerReport, ReadReport};
use crate::membership::{ManagerHealth, Membership};
use crate::snapshot::{Decision, SnapshotError};
use crate::start::{LazyParts, LazySlot};

/// What the requests are answered from.
#[derive(Clone)]
pub(crate) struct Admin {
    /// Empty without a mesh.
    pub slot: LazySlot,
    /// Where the merged layers are mounted.
    pub mounts: Vec<String>,
    pub membership: Membership,
}

#[derive(Serialize)]
struct Status {
    version: &'static str,
    lazy: bool,
    mounts: Vec<String>,
    /// `None` without a mesh.
    store: Option<StoreHealth>,
    traffic: Option<TrafficHealth>,
    /// `None` without a cluster.
    manager: Option<ManagerHealth>,
    layers: Vec<LayerReport>,
}

#[derive(Deserialize)]
struct WhyQuery {
    #[serde(default)]
    image: String,
}

#[derive(Serialize)]
struct Why {
    image: String,
    lazy: bool,
    looking: usize,
    images: Vec<ImageReport>,
}

#[derive(Serialize)]
struct StatsAnswer {
    fuse: BTreeMap<&'static str, u64>,
}

pub(crate) fn router(admin: Admin) -> Router {
    Router::new()
        .route("/status", get(status))
        .route("/why", get(why))
        .route("/trace", get(trace))
        .route("/health", get(health))
        .route("/blob", post(blob))
        .route("/stats", get(stats))
        .with_state(admin)
}

impl IntoResponse for SnapshotError {
    fn into_response(self) -> Response {
        (StatusCode::INTERNAL_SERVER_ERROR, self.to_string()).into_response()
    }
}

async fn status(State(admin): State<Admin>) -> Result<Json<Status>, SnapshotError> {
    let layers = admin.slot.get().map_or(Ok(Vec::new()), layers)?;
    let lazy = admin.slot.get().is_some();
    let store = admin.slot.get().map(|parts| parts.mesh.store());
    let traffic = admin.slot.get().map(|parts| parts.mesh.traffic());
    let version = env!("CARGO_PKG_VERSION");
    let manager = admin.membership.health();
    Ok(Json(Status { version, lazy, mounts: admin.mounts, store, traffic, manager, layers }))
}

/// Those that snapshots have, and those that an order of the manager brings.
fn layers(parts: &LazyParts) -> Result<Vec<LayerReport>, SnapshotError> {
    let mut layers = parts.lazy.layers()?;
    let known: HashSet<String> = layers.iter().map(|layer| layer.diff_id.clone()).collect();
    let others = parts.mesh.layers().into_iter().map(|(diff_id, status)| LayerReport {
        diff_id: diff_id.to_string(),
        images: BTreeSet::new(),
        pieces: status.pieces,
        have: status.have,
        from: status.from,
        state: status.state,
    });
    layers.extend(others.filter(|layer| !known.contains(&layer.diff_id)));
    Ok(layers)
}

async fn why(State(admin): State<Admin>, Query(query): Query<WhyQuery>) -> Result<Json<Why>, SnapshotError> {
    let image = query.image;
    let Some(parts) = admin.slot.get() else {
        return Ok(Json(Why { image, lazy: false, looking: 0, images: Vec::new() }));
    };
    let (full, manifests) = meant(parts, &image).await;
    let images = parts.lazy.images(|decision| fits(decision, &image, &full, &manifests))?;
    Ok(Json(Why { image, lazy: true, looking: parts.lazy.looking(), images }))
}

/// The image's full reference, and the manifests that containerd has for it.
async fn meant(parts: &LazyParts, image: &str) -> (String, HashSet<String>) {
    let full = image.parse::<ImageRef>().map(|image| image.to_string()).unwrap_or_default();
    let mut manifests: HashSet<String> = HashSet::new();
    for reference in [image, &full] {
        let digests = parts.containerd.manifests_of(reference).await;
        manifests.extend(digests.iter().map(ToString::to_string));
    }
    (full, manifests)
}

#[derive(Serialize)]
struct Trace {
    image: String,
    reads: Vec<ReadReport>,
}

async fn trace(State(admin): State<Admin>, Query(query): Query<WhyQuery>) -> Response {
    let image = query.image;
    let Some(parts) = admin.slot.get() else {
        return (StatusCode::NOT_FOUND, "Darter runs without a mesh here: nothing is lazy").into_response();
    };
    let (full, manifests) = meant(parts, &image).await;
    let lazy = parts.lazy.clone();
    let wanted = image.clone();
    // The names of the files are looked for in the whole tree.
    let reads = tokio::task::spawn_blocking(move || {
        lazy.trace(|decision| fits(decision, &wanted, &full, &manifests))
    });
    match reads.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic())) {
        Ok(Some(reads)) => Json(Trace { image, reads }).into_response(),
        Ok(None) => {
            let words = format!("no container of {image} has read anything since the daemon was started");
            (StatusCode::NOT_FOUND, words).into_response()
        }
        Err(error) => error.into_response(),
    }
}

fn fits(decision: &Decision, image: &str, full: &str, manifests: &HashSet<String>) -> bool {
    let named = |name: &String| name == image || name == full;
    image.is_empty()
        || manifests.contains(&decision.image)
        || decision.image == image
        || decision.config == image
        || image.split_once('@').is_some_and(|(_, digest)| digest == decision.image)
        || decision.names.iter().any(named)
}

#[derive(Serialize)]
struct Health {
    version: &'static str,
    lazy: bool,
    schedulers: Vec<SchedulerHealth>,
    manager: Option<ManagerHealth>,
    store: Option<StoreHealth>,
}

async fn health(State(admin): State<Admin>) -> Json<Health> {
    let parts = admin.slot.get();
    let schedulers = parts.map(|parts| parts.mesh.schedulers()).unwrap_or_default();
    let manager = admin.membership.health();
    let store = parts.map(|parts| parts.mesh.store());
    Json(Health { version: env!("CARGO_PKG_VERSION"), lazy: parts.is_some(), schedulers, manager, store })
}

#[derive(Deserialize)]
struct BlobQuery {
    namespace: String,
    manifest: String,
    blob: String,
    image: Option<String>,
}

async fn blob(State(admin): State<Admin>, Query(query): Query<BlobQuery>) -> Response {
    match bring(&admin, &query).await {
        Ok(()) => Json(serde_json::json!({})).into_response(),
        Err((status, words)) => (status, words).into_response(),
    }
}

async fn bring(admin: &Admin, query: &BlobQuery) -> Result<(), (StatusCode, String)> {
    let digest = |text: &str| {
        text.parse::<Digest>().map_err(|error| (StatusCode::BAD_REQUEST, format!("{text:?}: {error}")))
    };
    let (manifest, blob) = (digest(&query.manifest)?, digest(&query.blob)?);
    let missing = |what: &str| (StatusCode::NOT_FOUND, what.to_owned());
    let parts =
        admin.slot.get().ok_or_else(|| missing("Darter runs without a mesh here: nothing is lazy"))?;
    let found = parts.containerd.image_of(&query.namespace, manifest).await;
    let found = found.map_err(|words| (StatusCode::BAD_GATEWAY, words))?;
    let found = found.ok_or_else(|| missing("containerd has no such image in this namespace"))?;
    let layer = parts.lazy.layer_with_blob(found, &query.namespace, query.image.as_deref(), blob);
    let layer = layer.ok_or_else(|| missing("the image has no such layer"))?;
    let brought = parts.containerd.bring(&query.namespace, &layer).await;
    brought.map_err(|error| (StatusCode::BAD_GATEWAY, error.to_string()))
}

async fn stats(State(admin): State<Admin>) -> Json<StatsAnswer> {
    let fuse = admin.slot.get().into_iter().flat_map(|parts| parts.fs.stats().all()).collect();
    Json(StatsAnswer { fuse })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decision() -> Decision {
        Decision {
            image: "sha256:aa".into(),
            config: "sha256:bb".into(),
            namespace: "default".into(),
            names: vec!["r.example/app".into()],
            decided_ns: 0,
            layers: vec![],
        }
    }

    #[test]
    fn an_image_is_found_by_digest_repository_and_what_containerd_says() {
        let none = HashSet::new();
        for image in ["", "sha256:aa", "sha256:bb", "r.example/app", "r.example/app@sha256:aa"] {
            assert!(fits(&decision(), image, "", &none), "{image:?}");
        }
        assert!(!fits(&decision(), "r.example/other", "", &none));
        assert!(fits(&decision(), "r.example/app:1", "", &["sha256:aa".to_owned()].into()));
    }
}
