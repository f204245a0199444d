//! Whether a layer can probably be had, found out quickly: for `Prepare`, which may not wait for a map.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use crate::layer::{Found, Layer, LayerRequest};
use crate::origin::OriginError;
use crate::shared::Shared;

/// How long the mesh may still say that it knows the layer, after the source has refused.
const MESH_PATIENCE: Duration = Duration::from_millis(300);

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
    if shared.store.has_map(request.task) {
        return Probe::Known;
    }
    let layer = Layer::join(shared, request.clone(), true);
    layer.open().join_mesh();
    let mut known = std::pin::pin!(mesh_knows(&layer));
    let reason = tokio::select! {
        () = &mut known => return Probe::Known,
        answer = source_answers(shared, &request) => match answer {
            Ok(()) => return Probe::Answering,
            Err(reason) => reason,
        },
    };
    match timeout(MESH_PATIENCE, known).await {
        Ok(()) => Probe::Known,
        Err(_) => Probe::Refused(reason),
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

/// The first source that has the blob; else the first one's words.
async fn source_answers(shared: &Shared, request: &LayerRequest) -> Result<(), String> {
    let mut words = None;
    for source in &request.sources {
        let first = &request.sources[0].repository.registry;
        let credential = request.credential.as_ref().filter(|_| *first == source.repository.registry);
        let reason = match shared.origin.size(source, credential).await {
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
