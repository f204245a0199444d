//! One order: from an image's name to its layers, and on until each is there.

use std::collections::BTreeSet;
use std::time::Duration;

use darter_identity::attend::PreheatUpdate;
use darter_mesh::orders::Board;
use darter_mesh::{Layer, LayerError, LayerRequest};
use darter_proto::v1;
use darter_registry::{
    Credential, Document, Image, ImageRef, Index, Manifest, Platform, RegistryError, Resolved,
};
use darter_types::{BlobDigest, Digest, LayerSource, LayerTask, Repository};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};

use super::Seed;

/// How often the manager is told, at most.
const REPORT_EVERY: Duration = Duration::from_millis(500);

/// A layer that nobody can give or make is tried again for this long.
const PATIENCE: Duration = Duration::from_secs(120);

/// The platform that stands for all of an index: those for Linux, as others can't run from Darter.
const ALL_PLATFORMS: &str = "all";

/// Images of one index that an order for all of them may have.
const PLATFORMS_MAX: usize = 32;

/// What the manager ordered.
pub(super) struct Order {
    pub(super) id: String,
    pub(super) image: String,
    /// `os/architecture`, `os/architecture/variant` or `all`.
    pub(super) platform: Option<String>,
    pub(super) credential: Option<v1::Credential>,
}

impl Order {
    /// The image's layers, lowest first, each once; those of all its platforms, one after the other, if all are wanted.
    pub(super) async fn resolve(&self, seed: &Seed) -> Result<Vec<LayerRequest>, String> {
        let name: ImageRef = self.image.parse().map_err(|error| format!("{error}"))?;
        let given = darter_mesh::credential_from_wire(self.credential.clone());
        let credential = match given {
            Some(given) => Some(given),
            None => seed.registry.credential_for(&name.registry_authority, &name.name).await,
        };
        let found = seed.registry.resolve(&name, false, credential.as_ref()).await;
        let found = found.map_err(|error| error.to_string())?;
        let repository = found.repository.clone();
        let images = self.images(seed, found, credential.as_ref()).await;
        let images = images.map_err(|error| format!("{name}: {error}"))?;
        layers(&images, &repository, credential.as_ref())
    }

    async fn images(
        &self,
        seed: &Seed,
        found: Resolved,
        credential: Option<&Credential>,
    ) -> Result<Vec<Image>, String> {
        let words = |error: RegistryError| error.to_string();
        let (repository, manifest) = (found.repository, found.manifest);
        let one = async |manifest: Manifest, platform: &Platform| {
            seed.registry.image(&repository, manifest, platform, credential).await.map_err(words)
        };
        if self.platform.as_deref() != Some(ALL_PLATFORMS) {
            let platform = self.platform.as_deref().map_or_else(|| Ok(Platform::host()), str::parse)?;
            return Ok(vec![one(manifest, &platform).await?]);
        }
        let Document::Index(index) = manifest.document().map_err(words)? else {
            return Ok(vec![one(manifest, &Platform::host()).await?]);
        };
        let mut images = Vec::new();
        for (digest, platform) in for_linux(&index)? {
            let manifest = seed.registry.manifest(&repository, &digest.into(), credential).await;
            images.push(one(manifest.map_err(words)?, &platform).await?);
        }
        Ok(images)
    }

    /// Has each layer made or found, and reports how far it is; returns the last report.
    pub(super) async fn fetch(
        &self,
        requests: Vec<LayerRequest>,
        seed: &Seed,
        updates: &mpsc::Sender<PreheatUpdate>,
    ) -> PreheatUpdate {
        let layers: Vec<Layer> =
            requests.iter().map(|request| seed.mesh.open_ordered(request.clone())).collect();
        let mut board = Board::new(self.id.clone(), &requests);
        let asked = layers.iter().zip(&requests).enumerate();
        let waits = asked.map(|(at, (layer, request))| async move { (at, settled(layer, request).await) });
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
                    for (at, layer) in layers.iter().enumerate() {
                        let progress = layer.progress();
                        let progress = progress.borrow();
                        board.see(at, progress.read, progress.size);
                    }
                    // A manager that does not take it, takes the next one.
                    board.news().into_iter().for_each(|update| drop(updates.try_send(update)));
                }
            }
        }
    }
}

/// Waits for the map, and sees to it that the image's repository holds the layer: nodes are let in by that. `Unavailable`
/// ends one round of the layer's search; a few more may succeed.
async fn settled(layer: &Layer, request: &LayerRequest) -> Result<(), LayerError> {
    let until = Instant::now() + PATIENCE;
    loop {
        let proven = async {
            layer.map().await?;
            layer.prove(request).await
        };
        match proven.await {
            Ok(()) => return Ok(()),
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

/// What an index has for Linux. Attestations say that they are for no system that is known.
fn for_linux(index: &Index) -> Result<Vec<(Digest, Platform)>, String> {
    let entries = index.manifests.iter().map(|entry| (entry.digest, entry.platform.clone()));
    let entries = entries.map(|(digest, platform)| (digest, platform.unwrap_or_else(Platform::host)));
    let linux: Vec<_> = entries.filter(|(_, platform)| platform.os == "linux").collect();
    match linux.len() {
        0 => Err("its index has no image for Linux".to_owned()),
        count if count > PLATFORMS_MAX => {
            Err(format!("its index has {count} images for Linux, and an order takes {PLATFORMS_MAX}"))
        }
        _ => Ok(linux),
    }
}

fn layers(
    images: &[Image],
    repository: &Repository,
    credential: Option<&Credential>,
) -> Result<Vec<LayerRequest>, String> {
    let mut seen = BTreeSet::new();
    let mut requests = Vec::new();
    for image in images {
        let (blobs, diff_ids) = (&image.document.layers, &image.config.diff_ids);
        if blobs.len() != diff_ids.len() {
            let (blobs, diff_ids) = (blobs.len(), diff_ids.len());
            return Err(format!("the manifest has {blobs} layers, the configuration {diff_ids}"));
        }
        let fresh = blobs.iter().zip(diff_ids).filter(|(_, diff_id)| seen.insert(**diff_id));
        requests.extend(fresh.map(|(blob, diff_id)| LayerRequest {
            task: LayerTask::current(*diff_id),
            sources: vec![LayerSource {
                repository: repository.clone(),
                blob: BlobDigest(blob.digest),
                size: blob.size,
            }],
            credential: credential.cloned(),
        }));
    }
    Ok(requests)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use darter_registry::{Descriptor, ImageConfig, ImageManifest};
    use darter_types::DiffId;

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
        let images = [image(&["a", "bb", "a"], &["x", "y", "x"]), image(&["a"], &["x"])];
        let requests = layers(&images, &repository(), None).unwrap();
        assert_eq!(requests.len(), 2);
        assert_eq!(requests[1].task, LayerTask::current(DiffId(Digest::of(b"y"))));
        assert_eq!((requests[1].sources[0].size, &requests[1].sources[0].repository), (2, &repository()));
    }

    #[test]
    fn image_whose_parts_do_not_fit_is_refused() {
        assert!(layers(&[image(&["a"], &["x", "y"])], &repository(), None).is_err());
    }

    #[test]
    fn all_platforms_are_those_for_linux() {
        let entry = |os: &str, architecture: &str| Descriptor {
            platform: Some(Platform { os: os.into(), architecture: architecture.into(), variant: "".into() }),
            ..Descriptor::new("m", Digest::of(architecture.as_bytes()), 1)
        };
        let of = |manifests| for_linux(&Index { manifests });
        let mixed = vec![
            entry("linux", "amd64"),
            entry("linux", "arm64"),
            entry("unknown", "unknown"),
            entry("windows", "amd64"),
        ];
        assert_eq!(of(mixed).unwrap().len(), 2);
        assert!(of(vec![entry("windows", "amd64")]).is_err());
        assert!(of(vec![entry("linux", "amd64"); 33]).is_err());
    }
}
