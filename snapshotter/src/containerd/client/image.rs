//! Manifest and configuration of an image, read for its layers.

use darter_types::{BlobDigest, ChainId, DiffId, Digest};
use serde::Deserialize;

/// Media types, for a name without which JSON says nothing: an index has `manifests`, a manifest `config` and `layers`.
#[derive(Debug, Deserialize)]
pub(super) struct ManifestJson {
    pub config: DescriptorJson,
    #[serde(default)]
    pub layers: Vec<DescriptorJson>,
}

#[derive(Debug, Deserialize)]
pub(super) struct IndexJson {
    pub manifests: Vec<DescriptorJson>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct DescriptorJson {
    #[serde(default)]
    pub media_type: String,
    pub digest: String,
    #[serde(default)]
    pub size: u64,
}

#[derive(Debug, Deserialize)]
pub(super) struct ConfigJson {
    rootfs: RootfsJson,
}

#[derive(Debug, Deserialize)]
struct RootfsJson {
    diff_ids: Vec<String>,
}

/// An image's layers, the lowest first.
#[derive(Debug)]
pub(super) struct ParsedImage {
    pub manifest: Digest,
    pub config: Digest,
    pub layers: Vec<ParsedLayer>,
    pub chain_ids: Vec<ChainId>,
}

#[derive(Debug)]
pub(super) struct ParsedLayer {
    pub diff_id: DiffId,
    pub blob: BlobDigest,
    pub size: u64,
    pub media_type: String,
}

impl ParsedImage {
    /// `None` if the two don't belong together as an image's do: artifacts and attestations have no root file system.
    pub fn new(manifest: Digest, json: ManifestJson, config: &ConfigJson) -> Option<ParsedImage> {
        if json.layers.is_empty() || json.layers.len() != config.rootfs.diff_ids.len() {
            return None;
        }
        let layer = |(layer, diff_id): (DescriptorJson, &String)| {
            Some(ParsedLayer {
                diff_id: diff_id.parse().ok()?,
                blob: layer.digest.parse().ok()?,
                size: layer.size,
                media_type: layer.media_type,
            })
        };
        let layers = json.layers.into_iter().zip(&config.rootfs.diff_ids).map(layer);
        let layers = layers.collect::<Option<Vec<_>>>()?;
        let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id).collect();
        let config = json.config.digest.parse().ok()?;
        Some(ParsedImage { manifest, config, layers, chain_ids: ChainId::chain(&diff_ids) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_and_diff_ids_must_be_as_many() {
        let digest = Digest::of(b"x");
        let manifest = || {
            let text = format!(
                r#"{{"config":{{"digest":"{digest}"}},"layers":[{{"digest":"{digest}","size":3}}]}}"#
            );
            serde_json::from_str(&text).unwrap()
        };
        let config =
            |ids: &str| serde_json::from_str(&format!(r#"{{"rootfs":{{"diff_ids":[{ids}]}}}}"#)).unwrap();
        let image = ParsedImage::new(digest, manifest(), &config(&format!("\"{digest}\""))).unwrap();
        assert_eq!((image.layers[0].size, image.chain_ids[0].0), (3, digest));
        assert!(ParsedImage::new(digest, manifest(), &config("")).is_none());
    }
}
