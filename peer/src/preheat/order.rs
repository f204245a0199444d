//! One order: from an image's name to its layers, and on until each is there.

use std::collections::BTreeSet;
use std::time::Duration;

use darter_identity::attend::PreheatUpdate;
use darter_mesh::{Layer, LayerError, LayerRequest};
use darter_proto::v1;
use darter_registry::{Credential, Image, ImageRef, Platform};
use darter_types::{BlobDigest, LayerSource, LayerTask, Repository};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};

use super::Seed;
use super::progress::Board;

/// How often the manager is told, at most.
const REPORT_EVERY: Duration = Duration::from_millis(500);

/// A layer that nobody can give or make is tried again for this long.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the manager ordered.
pub(super) struct Order {
    pub(super) id: String,
    pub(super) image: String,
    /// `os/architecture` or `os/architecture/variant`.
    pub(super) platform: Option<String>,
    pub(super) credential: Option<v1::Credential>,
}

impl Order {
    /// The order has failed as a whole.
    pub(super) fn failed(&self, error: String) -> PreheatUpdate {
        PreheatUpdate { id: self.id.clone(), done: true, error: Some(error), ..PreheatUpdate::default() }
    }

    /// The image's layers, lowest first, each once.
    pub(super) async fn resolve(&self, seed: &Seed) -> Result<Vec<LayerRequest>, String> {
        let name: ImageRef = self.image.parse().map_err(|error| format!("{error}"))?;
        let platform = self.platform.as_deref().map_or_else(|| Ok(Platform::host()), str::parse)?;
        let given = darter_mesh::credential_from_wire(self.credential.clone());
        let credential = given.or_else(|| seed.registry.credential_for(&name.registry_authority, &name.name));
        let found = seed.registry.resolve(&name, false, credential.as_ref()).await;
        let found = found.map_err(|error| error.to_string())?;
        let image = seed.registry.image(&found.repository, found.manifest, &platform, credential.as_ref());
        let image = image.await.map_err(|error| format!("{name}: {error}"))?;
        layers(&image, &found.repository, credential.as_ref())
    }

    /// Has each layer made or found, and reports how far it is; returns the last report.
    pub(super) async fn fetch(
        &self,
        requests: Vec<LayerRequest>,
        seed: &Seed,
        updates: &mpsc::Sender<PreheatUpdate>,
    ) -> PreheatUpdate {
        let layers: Vec<Layer> = requests.iter().map(|request| seed.mesh.open(request.clone())).collect();
        let mut board = Board::new(self.id.clone(), &requests);
        let waits = layers.iter().enumerate().map(|(at, layer)| async move { (at, settled(layer).await) });
        let mut waits: FuturesUnordered<_> = waits.collect();
        let mut report = interval(REPORT_EVERY);
        report.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                settled = waits.next() => match settled {
                    Some((at, Ok(()))) => {
                        layers[at].fill();
                        board.settle(at, None);
                    }
                    Some((at, Err(error))) => board.settle(at, Some(error.to_string())),
                    None => return board.last(),
                },
                _ = report.tick() => {
                    layers.iter().enumerate().for_each(|(at, layer)| board.see(at, &layer.progress().borrow()));
                    // A manager that does not take it, takes the next one.
                    board.news().into_iter().for_each(|update| drop(updates.try_send(update)));
                }
            }
        }
    }
}

/// Waits for the map. `Unavailable` ends one round of the layer's search; a few more may succeed.
async fn settled(layer: &Layer) -> Result<(), LayerError> {
    let until = Instant::now() + PATIENCE;
    loop {
        match layer.map().await {
            Ok(_) => return Ok(()),
            Err(error @ LayerError::Unavailable { .. }) if Instant::now() < until => {
                tracing::debug!(task = %layer.task(), %error, "not yet");
                // The next round is the layer's own; this only bounds how often we ask.
                let mut progress = layer.progress();
                let _ = timeout_at(Instant::now() + Duration::from_secs(1), progress.changed()).await;
            }
            Err(error) => return Err(error),
        }
    }
}

fn layers(
    image: &Image,
    repository: &Repository,
    credential: Option<&Credential>,
) -> Result<Vec<LayerRequest>, String> {
    let (blobs, diff_ids) = (&image.document.layers, &image.config.diff_ids);
    if blobs.len() != diff_ids.len() {
        return Err(format!("the manifest has {} layers, the configuration {}", blobs.len(), diff_ids.len()));
    }
    let mut seen = BTreeSet::new();
    let fresh = blobs.iter().zip(diff_ids).filter(|(_, diff_id)| seen.insert(**diff_id));
    Ok(fresh
        .map(|(blob, diff_id)| LayerRequest {
            task: LayerTask::current(*diff_id),
            sources: vec![LayerSource {
                repository: repository.clone(),
                blob: BlobDigest(blob.digest),
                size: blob.size,
            }],
            credential: credential.cloned(),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use darter_registry::{Descriptor, ImageConfig, ImageManifest, Manifest};
    use darter_types::{DiffId, Digest};

    fn image(blobs: &[&str], diff_ids: &[&str]) -> Image {
        let descriptor =
            |text: &str| Descriptor::new("layer", Digest::of(text.as_bytes()), text.len() as u64);
        let diff_ids = diff_ids.iter().map(|text| DiffId(Digest::of(text.as_bytes()))).collect();
        Image {
            indexes: Vec::new(),
            manifest: Manifest { bytes: Bytes::new(), digest: Digest::of(b""), media_type: String::new() },
            document: ImageManifest {
                config: descriptor("config"),
                layers: blobs.iter().map(|blob| descriptor(blob)).collect(),
            },
            config_bytes: Bytes::new(),
            config: ImageConfig { platform: Platform::host(), diff_ids },
        }
    }

    fn repository() -> Repository {
        "https://registry.example/app".parse().unwrap()
    }

    #[test]
    fn each_layer_is_fetched_once_from_where_the_image_is() {
        let requests = layers(&image(&["a", "bb", "a"], &["x", "y", "x"]), &repository(), None).unwrap();
        assert_eq!(requests.len(), 2);
        assert_eq!(requests[1].task, LayerTask::current(DiffId(Digest::of(b"y"))));
        assert_eq!((requests[1].sources[0].size, &requests[1].sources[0].repository), (2, &repository()));
    }

    #[test]
    fn image_whose_parts_do_not_fit_is_refused() {
        assert!(layers(&image(&["a"], &["x", "y"]), &repository(), None).is_err());
    }
}
