//! Whether a layer can probably be had, found out quickly: for `Prepare`, which may not wait for a map.

use std::sync::Arc;
use std::time::Duration;

use darter_types::{LayerSource, LayerTask};
use tokio::time::timeout;

use crate::layer::{Cause, Found, Layer, LayerRequest};
use crate::origin::OriginError;
use crate::right;
use crate::shared::Shared;
use crate::shelf::Shelved;

/// How long the mesh may still say that it knows the layer, after the source has refused.
const MESH_PATIENCE: Duration = Duration::from_millis(300);

/// A registry that has never answered, and that no connection can be made to for so long, has no route from here. How slow
/// it is to say something does not matter.
const ROUTE_PATIENCE: Duration = Duration::from_millis(500);

/// What a probe found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// The map is here, or another peer has it.
    Known,
    /// A source answers for the blob.
    Answering,
    /// Neither; the source's words.
    Refused(String),
}

/// Opens the layer for the time of the probe, so that the scheduler is asked; the caller who opens it too keeps that.
pub(crate) async fn probe(shared: &Arc<Shared>, request: LayerRequest) -> Probe {
    if let Some(shelved) = held(shared, request.task).await {
        return may_have(shared, request, &shelved).await;
    }
    let layer = Layer::join(shared, request.clone(), Cause::Probe);
    layer.open().join_mesh();
    let mut known = std::pin::pin!(mesh_knows(&layer));
    let reason = tokio::select! {
        () = &mut known => return Probe::Known,
        answer = source_answers(shared, &request) => match answer {
            Ok(()) => return Probe::Answering,
            Err(reason) => reason,
        },
        reason = no_route(shared, &request) => return Probe::Refused(reason),
    };
    match timeout(MESH_PATIENCE, known).await {
        Ok(()) => Probe::Known,
        Err(_) => Probe::Refused(reason),
    }
}

/// What is noted beside the map, if it is here.
async fn held(shared: &Arc<Shared>, task: LayerTask) -> Option<Arc<Shelved>> {
    if !shared.store.has_map(task) {
        return None;
    }
    let owner = shared.clone();
    // Where nothing is noted, its file was damaged: the map is asked for anew.
    let found = shared.work.run(move || owner.shelf.get(&owner.store, task)).await;
    found.filter(|shelved| !shelved.note().is_empty())
}

/// A layer that is here is not for everybody who names its diff ID: the image's repository must have been seen to hold it, or
/// answer for a blob that a seed has streamed to it. What any other repository has, containerd reads and checks itself.
async fn may_have(shared: &Arc<Shared>, request: LayerRequest, shelved: &Shelved) -> Probe {
    if right::is_open(Some(shelved), &request.sources) {
        return Probe::Known;
    }
    match right::admit(shared, shelved, &[request]).await {
        Ok(()) => Probe::Answering,
        Err(fault) => Probe::Refused(fault.to_string()),
    }
}

/// Ends when a peer is known that holds something of the layer.
async fn mesh_knows(layer: &Layer) {
    let open = layer.open();
    let (mut peers, mut found) = (open.peers.subscribe(), open.found.subscribe());
    let holder = peers.wait_for(|peers| peers.as_ref().is_some_and(|peers| !peers.parents.is_empty()));
    let ready = found.wait_for(|found| matches!(found, Found::Ready(_)));
    let has_ended = tokio::select! {
        holder = holder => holder.is_err(),
        ready = ready => ready.is_err(),
    };
    if has_ended {
        // The layer was closed: nothing will be known.
        std::future::pending::<()>().await;
    }
}

/// Ends when there is no route to any of the sources, and nobody else who may have one.
async fn no_route(shared: &Shared, request: &LayerRequest) -> String {
    let known = |source: &LayerSource| shared.origin.has_answered(&source.repository.registry);
    let other_seed = shared.members.borrow().seeds.iter().any(|seed| seed.address != shared.address);
    if other_seed || request.sources.is_empty() || request.sources.iter().any(known) {
        return std::future::pending().await;
    }
    let connecting = request.sources.iter().map(|source| shared.origin.listens(&source.repository));
    let connected = futures_util::future::join_all(connecting);
    if timeout(ROUTE_PATIENCE, connected).await.is_ok() {
        // Whoever listens answers, and a refusal has its own words.
        return std::future::pending().await;
    }
    let registry = &request.sources[0].repository.registry;
    format!("failed to do request: no connection to {registry} within {ROUTE_PATIENCE:?}")
}

/// The first source that has the blob; else the first one's words.
async fn source_answers(shared: &Shared, request: &LayerRequest) -> Result<(), String> {
    let mut words = None;
    for source in &request.sources {
        let reason = match shared.origin.size(source, request.credential_for(source).as_ref()).await {
            Ok(Some(size)) if source.size > 0 && size != source.size => {
                format!("{} has {size} bytes in {}, not {}", source.blob, source.repository, source.size)
            }
            Ok(_) => return Ok(()),
            Err(OriginError::Denied(text) | OriginError::Absent(text) | OriginError::Unavailable(text)) => {
                text
            }
        };
        words.get_or_insert(reason);
    }
    Err(words.unwrap_or_else(|| "no source of the layer is known".to_owned()))
}
