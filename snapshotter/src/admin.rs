//! HTTP on `<root>/admin.sock`, for the `darter` command and for root only:
//!
//! - `GET /status`: `{"version": "0.1.0", "lazy": true, "mounts": ["/var/lib/darter/s/m", "/var/lib/darter/s/n"], "layers": [LAYER, ...]}`, where LAYER is
//!   `{"diff_id", "images": ["host/name@sha256:..."], "pieces", "have", "from": {"<peer or origin>": bytes}, "state": "words"}`,
//!   one for each layer that is open. `pieces` is 0 as long as there is no map.
//! - `GET /why?image=REF`: `{"image": REF, "lazy": true, "images": [IMAGE, ...]}`, the newest decision first, where IMAGE is
//!   `{"manifest", "config", "namespace", "names": [...], "decided": <seconds since 1970>, "layers": [{"diff_id", "blob", "size",
//!   "lazy": bool, "reason": "words"}, ...]}`, the lowest layer first. REF is a reference as containerd has it, a short one, a
//!   repository, or the digest of manifest or configuration. Without `image`: all decisions. None at all: the image was not
//!   asked for through this snapshotter, or by a client that never pulls lazily.
//! - `GET /stats`: `{"fuse": {"lookup": 12, ...}}`, requests since the start.
//!
//! `lazy` at the top is false where the daemon runs without a mesh. An error is a status other than 200 with words as its body.

use std::collections::{BTreeMap, HashSet};

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use darter_registry::ImageRef;
use serde::{Deserialize, Serialize};

use crate::lazy::{ImageReport, LayerReport};
use crate::snapshot::{Decision, SnapshotError};
use crate::start::LazySlot;

/// What the requests are answered from.
#[derive(Clone)]
pub(crate) struct Admin {
    /// Empty without a mesh.
    pub slot: LazySlot,
    /// Where the merged layers are mounted.
    pub mounts: Vec<String>,
}

#[derive(Serialize)]
struct Status {
    version: &'static str,
    lazy: bool,
    mounts: Vec<String>,
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
        .route("/stats", get(stats))
        .with_state(admin)
}

impl IntoResponse for SnapshotError {
    fn into_response(self) -> Response {
        (StatusCode::INTERNAL_SERVER_ERROR, self.to_string()).into_response()
    }
}

async fn status(State(admin): State<Admin>) -> Result<Json<Status>, SnapshotError> {
    let layers = match admin.slot.get() {
        Some(parts) => parts.lazy.layers()?,
        None => Vec::new(),
    };
    let lazy = admin.slot.get().is_some();
    Ok(Json(Status { version: env!("CARGO_PKG_VERSION"), lazy, mounts: admin.mounts, layers }))
}

async fn why(State(admin): State<Admin>, Query(query): Query<WhyQuery>) -> Result<Json<Why>, SnapshotError> {
    let image = query.image;
    let Some(parts) = admin.slot.get() else {
        return Ok(Json(Why { image, lazy: false, images: Vec::new() }));
    };
    let full = image.parse::<ImageRef>().map(|image| image.to_string()).unwrap_or_default();
    let mut manifests: HashSet<String> = HashSet::new();
    for reference in [&image, &full] {
        let digests = parts.containerd.manifests_of(reference).await;
        manifests.extend(digests.iter().map(ToString::to_string));
    }
    let images = parts.lazy.images(|decision| fits(decision, &image, &full, &manifests))?;
    Ok(Json(Why { image, lazy: true, images }))
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
