//! Which image has this chain ID? Answered from the content store, where manifest and configuration of an image that is
//! being pulled lie before its first layer is asked for. Only reads, which wait for no lock of containerd's.

use std::collections::HashMap;
use std::sync::Arc;

use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::namespaces_client::NamespacesClient;
use containerd_client::services::v1::{
    GetImageRequest, Info, ListContentRequest, ListNamespacesRequest, ReadContentRequest,
};
use darter_types::{ChainId, Digest};
use futures_util::{StreamExt, TryStreamExt, stream};
use serde::de::DeserializeOwned;
use tonic::Status;
use tonic::transport::Channel;

use super::image::{ConfigJson, IndexJson, ManifestJson, ParsedImage};
use super::{ContainerdClient, IMAGES_MAX, MESSAGE_MAX, in_namespace};
use crate::lazy::ports::{FoundImage, FoundLayer, Place};

/// Every version of containerd puts this label on manifests, and on nothing else.
const MANIFEST_FILTER: &str = "labels.\"containerd.io/gc.ref.content.config\"";

/// `containerd.io/distribution.source.<host>` = `<repository>[,<repository>]`.
const SOURCE_PREFIX: &str = "containerd.io/distribution.source.";

/// The newest manifests that are looked at; an image that is being pulled is among them.
const MANIFESTS_MAX: usize = 200;

/// So many of them are read at the same time.
const READS_MAX: usize = 16;

/// Manifests, configurations and indexes are smaller, or not ours to read.
const DOCUMENT_MAX: usize = 8 << 20;

/// A manifest with where its blobs can be had.
struct Candidate {
    image: Arc<ParsedImage>,
    places: Vec<(String, String)>,
}

impl Candidate {
    fn has_chain(&self, chain_id: ChainId) -> bool {
        self.image.chain_ids.contains(&chain_id)
    }
}

impl ContainerdClient {
    /// The image with this manifest, with the places that any image names for its blobs.
    pub(super) async fn find_manifest(
        &self,
        namespace: &str,
        manifest: Digest,
    ) -> Result<Option<FoundImage>, Status> {
        let candidates = self.all_candidates(namespace).await?;
        let found = candidates.iter().find(|candidate| candidate.image.manifest == manifest);
        Ok(found.map(|found| to_found(found, &candidates)))
    }

    async fn all_candidates(&self, namespace: &str) -> Result<Vec<Candidate>, Status> {
        let reading =
            stream::iter(self.manifests(namespace).await?).map(|info| self.candidate(namespace, info));
        let read: Vec<Option<Candidate>> = reading.buffered(READS_MAX).try_collect().await?;
        Ok(read.into_iter().flatten().collect())
    }

    /// The newest image of the namespace that has `target`, each layer with all places that any image names for its blob.
    pub(super) async fn find(&self, namespace: &str, target: ChainId) -> Result<Option<FoundImage>, Status> {
        let candidates = self.all_candidates(namespace).await?;
        let found = candidates.iter().find(|candidate| candidate.image.chain_ids.contains(&target));
        Ok(found.map(|found| to_found(found, &candidates)))
    }

    async fn candidate(&self, namespace: &str, info: Info) -> Result<Option<Candidate>, Status> {
        let Ok(digest) = info.digest.parse() else { return Ok(None) };
        let image = self.image(namespace, digest).await?;
        Ok(image.map(|image| Candidate { image, places: places(&info.labels) }))
    }

    /// The newest first.
    async fn manifests(&self, namespace: &str) -> Result<Vec<Info>, Status> {
        let request = ListContentRequest { filters: vec![MANIFEST_FILTER.to_owned()] };
        let mut stream = self.content().list(in_namespace(namespace, request)?).await?.into_inner();
        let mut infos = Vec::new();
        while let Some(batch) = stream.message().await? {
            infos.extend(batch.info);
        }
        let created = |info: &Info| info.created_at.map_or((0, 0), |time| (time.seconds, time.nanos));
        infos.sort_by_key(|info| std::cmp::Reverse(created(info)));
        infos.truncate(MANIFESTS_MAX);
        Ok(infos)
    }

    /// `None` for what is no image, or whose configuration isn't there.
    async fn image(&self, namespace: &str, manifest: Digest) -> Result<Option<Arc<ParsedImage>>, Status> {
        if let Some(known) = self.images.lock().get(&manifest) {
            return Ok(Some(known.clone()));
        }
        let Some(json) = read::<ManifestJson>(&self.channel, namespace, &manifest.to_string()).await? else {
            return Ok(None);
        };
        let Some(config) = read::<ConfigJson>(&self.channel, namespace, &json.config.digest).await? else {
            return Ok(None);
        };
        let Some(image) = ParsedImage::new(manifest, json, &config).map(Arc::new) else { return Ok(None) };
        let mut images = self.images.lock();
        if images.len() >= IMAGES_MAX {
            images.clear();
        }
        images.insert(manifest, image.clone());
        Ok(Some(image))
    }

    fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_MAX)
    }
}

fn places(labels: &HashMap<String, String>) -> Vec<(String, String)> {
    let sources = labels.iter().filter_map(|(key, names)| Some((key.strip_prefix(SOURCE_PREFIX)?, names)));
    let each = sources
        .flat_map(|(host, names)| names.split(',').map(move |name| (host.to_owned(), name.to_owned())));
    let mut places: Vec<_> = each.collect();
    places.sort();
    places
}

fn to_found(found: &Candidate, all: &[Candidate]) -> FoundImage {
    let layers = found.image.layers.iter().enumerate().map(|(position, layer)| FoundLayer {
        diff_id: layer.diff_id,
        blob: layer.blob,
        size: layer.size,
        media_type: layer.media_type.clone(),
        // The image's own places come first: it is the one whose registry was reached a moment ago. Another image's count
        // where containerd shares the layer as well, for the same blob over the same layers: whoever names somebody's blob
        // or diff ID must not get it by their right.
        places: std::iter::once(found)
            .chain(all.iter().filter(|other| other.has_chain(found.image.chain_ids[position])))
            .flat_map(|candidate| layer_places(candidate, position))
            .filter(|place| place.blob == layer.blob)
            .collect(),
    });
    FoundImage {
        manifest: found.image.manifest,
        config: found.image.config,
        names: found.places.iter().map(|(host, name)| format!("{host}/{name}")).collect(),
        layers: layers.collect(),
    }
}

fn layer_places(candidate: &Candidate, position: usize) -> Vec<Place> {
    let layer = candidate.image.layers.get(position);
    let place = |(host, name): &(String, String)| {
        let layer = layer?;
        Some(Place { host: host.clone(), name: name.clone(), blob: layer.blob, size: layer.size })
    };
    candidate.places.iter().filter_map(place).collect()
}

/// A JSON document; `None` if it is not there, too large, or something else.
async fn read<T: DeserializeOwned>(
    channel: &Channel,
    namespace: &str,
    digest: &str,
) -> Result<Option<T>, Status> {
    let mut client = ContentClient::new(channel.clone()).max_decoding_message_size(MESSAGE_MAX);
    let request = ReadContentRequest { digest: digest.to_owned(), offset: 0, size: 0 };
    let mut stream = match client.read(in_namespace(namespace, request)?).await {
        Ok(response) => response.into_inner(),
        Err(status) if status.code() == tonic::Code::NotFound => return Ok(None),
        Err(status) => return Err(status),
    };
    let mut document = Vec::new();
    loop {
        match stream.message().await {
            Ok(Some(part)) => document.extend_from_slice(&part.data),
            Ok(None) => break,
            Err(status) if status.code() == tonic::Code::NotFound => return Ok(None),
            Err(status) => return Err(status),
        }
        if document.len() > DOCUMENT_MAX {
            return Ok(None);
        }
    }
    Ok(serde_json::from_slice(&document).ok())
}

/// See [`ContainerdClient::manifests_of`].
pub(super) async fn manifests_of(channel: &Channel, reference: &str) -> Result<Vec<Digest>, Status> {
    let request = ListNamespacesRequest { filter: String::new() };
    let namespaces = NamespacesClient::new(channel.clone()).list(request).await?.into_inner().namespaces;
    let mut digests = Vec::new();
    for namespace in namespaces {
        let request = GetImageRequest { name: reference.to_owned() };
        let found = ImagesClient::new(channel.clone()).get(in_namespace(&namespace.name, request)?).await;
        let target = found.ok().and_then(|response| response.into_inner().image?.target);
        let Some(target) = target else { continue };
        digests.extend(target.digest.parse::<Digest>());
        if let Some(index) = read::<IndexJson>(channel, &namespace.name, &target.digest).await? {
            digests.extend(index.manifests.iter().filter_map(|entry| entry.digest.parse::<Digest>().ok()));
        }
    }
    Ok(digests)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containerd::client::image::ParsedLayer;
    use darter_types::{BlobDigest, DiffId};

    fn candidate(name: &str, layers: &[&str]) -> Candidate {
        let diff_ids: Vec<_> = layers.iter().map(|layer| DiffId(Digest::of(layer.as_bytes()))).collect();
        let layer = |diff_id: &DiffId| ParsedLayer {
            diff_id: *diff_id,
            blob: BlobDigest(diff_id.0),
            size: 1,
            media_type: String::new(),
        };
        let image = ParsedImage {
            manifest: Digest::of(name.as_bytes()),
            config: Digest::of(name.as_bytes()),
            layers: diff_ids.iter().map(layer).collect(),
            chain_ids: ChainId::chain(&diff_ids),
        };
        Candidate { image: Arc::new(image), places: vec![("r.example".to_owned(), name.to_owned())] }
    }

    #[test]
    fn another_images_places_count_over_the_same_layers_only() {
        let (mine, twin) = (candidate("mine", &["a", "b"]), candidate("twin", &["a", "b", "c"]));
        let all = [candidate("mine", &["a", "b"]), twin, candidate("stranger", &["x", "b"])];
        let found = to_found(&mine, &all);
        let mut names: Vec<_> = found.layers[1].places.iter().map(|place| place.name.as_str()).collect();
        names.dedup();
        assert_eq!(names, ["mine", "twin"]);
    }

    #[test]
    fn one_host_may_name_several_repositories() {
        let labels = [
            ("containerd.io/distribution.source.r.example".to_owned(), "team/app,team/base".to_owned()),
            ("containerd.io/gc.ref.content.config".to_owned(), "sha256:aa".to_owned()),
        ];
        let wanted = [("r.example", "team/app"), ("r.example", "team/base")];
        assert_eq!(places(&labels.into()), wanted.map(|(host, name)| (host.to_owned(), name.to_owned())));
    }
}
