//! Manifests, indexes and image configurations: what of them Darter needs, read from their bytes. No I/O.

use bytes::Bytes;
use darter_types::{DiffId, Digest};
use serde::{Deserialize, Deserializer, de::Error as _};

use crate::error::RegistryError;
use crate::platform::Platform;

pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// A manifest or index as the registry has it; `digest` is that of `bytes`.
#[derive(Debug, Clone)]
pub struct Manifest {
    pub bytes: Bytes,
    pub digest: Digest,
    pub media_type: String,
}

impl Manifest {
    /// Fails for what is neither an image nor an index, schema 1 among it.
    pub fn document(&self) -> Result<Document, RegistryError> {
        parse(&self.bytes)
    }
}

/// What a manifest's bytes say.
#[derive(Debug, Clone)]
pub enum Document {
    Image(ImageManifest),
    Index(Index),
}

/// A pointer to content (OCI image specification, "Content Descriptors").
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    #[serde(deserialize_with = "digest")]
    pub digest: Digest,
    pub size: u64,
    #[serde(default)]
    pub platform: Option<Platform>,
    /// Where else the content may be; foreign layers have these.
    #[serde(default)]
    pub urls: Vec<String>,
}

impl Descriptor {
    pub fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self { media_type: media_type.to_owned(), digest, size, platform: None, urls: Vec::new() }
    }
}

/// An image for one platform; its layers lowest first.
#[derive(Debug, Clone, Deserialize)]
pub struct ImageManifest {
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

/// Images for several platforms. Entries that Darter can't name, by another digest algorithm say, are left out.
#[derive(Debug, Clone)]
pub struct Index {
    pub manifests: Vec<Descriptor>,
}

/// An image's configuration; `diff_ids` lowest layer first, as many as the manifest has layers.
#[derive(Debug, Clone)]
pub struct ImageConfig {
    pub platform: Platform,
    pub diff_ids: Vec<DiffId>,
}

impl ImageConfig {
    pub fn parse(bytes: &[u8]) -> Result<Self, RegistryError> {
        #[derive(Deserialize)]
        struct Raw {
            #[serde(flatten)]
            platform: Platform,
            rootfs: RootFs,
        }
        #[derive(Deserialize)]
        struct RootFs {
            #[serde(default)]
            diff_ids: Vec<String>,
        }
        let raw: Raw = serde_json::from_slice(bytes).map_err(|e| unreadable("image configuration", &e))?;
        let diff_ids = raw.rootfs.diff_ids.iter().map(|id| id.parse::<DiffId>());
        let diff_ids =
            diff_ids.collect::<Result<_, _>>().map_err(|e| unreadable("image configuration", &e))?;
        Ok(Self { platform: raw.platform, diff_ids })
    }
}

/// Reads an image manifest or an index; which of them it is, its content says.
pub fn parse(bytes: &[u8]) -> Result<Document, RegistryError> {
    #[derive(Deserialize)]
    struct Raw {
        config: Option<serde_json::Value>,
        layers: Option<Vec<serde_json::Value>>,
        manifests: Option<Vec<serde_json::Value>>,
    }
    let raw: Raw = serde_json::from_slice(bytes).map_err(|e| unreadable("manifest", &e))?;
    match raw {
        Raw { config: Some(config), layers: Some(layers), manifests: None } => {
            let config = serde_json::from_value(config).map_err(|e| unreadable("manifest", &e))?;
            let layers = layers.into_iter().map(serde_json::from_value).collect::<Result<_, _>>();
            Ok(Document::Image(ImageManifest {
                config,
                layers: layers.map_err(|e| unreadable("manifest", &e))?,
            }))
        }
        Raw { config: None, layers: None, manifests: Some(manifests) } => {
            let readable = manifests.into_iter().filter_map(|entry| serde_json::from_value(entry).ok());
            Ok(Document::Index(Index { manifests: readable.collect() }))
        }
        // A document that is both could be read one way by us and another way by containerd.
        _ => Err(unreadable("manifest", &"it is neither an image nor an index")),
    }
}

fn digest<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
}

fn unreadable(what: &str, error: &dyn std::fmt::Display) -> RegistryError {
    RegistryError::Protocol { url: what.to_owned(), reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_manifest_is_read() {
        let (config, layer) = (Digest::of(b"c"), Digest::of(b"l"));
        let text = format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"c","digest":"{config}","size":1}},
            "layers":[{{"mediaType":"l","digest":"{layer}","size":2,"urls":["https://x/"]}}]}}"#
        );
        let Document::Image(image) = parse(text.as_bytes()).unwrap() else { panic!("no image") };
        assert_eq!(image.config, Descriptor::new("c", config, 1));
        assert_eq!((image.layers[0].digest, image.layers[0].size), (layer, 2));
    }

    #[test]
    fn index_leaves_out_what_has_no_sha256() {
        let good = Digest::of(b"g");
        let text = format!(
            r#"{{"manifests":[{{"digest":"sha512:00","size":1}},
            {{"digest":"{good}","size":1,"platform":{{"os":"linux","architecture":"amd64"}}}}]}}"#
        );
        let Document::Index(index) = parse(text.as_bytes()).unwrap() else { panic!("no index") };
        assert_eq!(index.manifests.len(), 1);
        assert_eq!(index.manifests[0].platform.as_ref().unwrap().architecture, "amd64");
    }

    #[test]
    fn ambiguous_and_old_manifests_are_refused() {
        let both = r#"{"config":{},"layers":[],"manifests":[]}"#;
        let schema1 = r#"{"schemaVersion":1,"fsLayers":[]}"#;
        for bad in [both, schema1, "[]", "", r#"{"config":{},"layers":[]}"#] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn configuration_gives_diff_ids() {
        let id = Digest::of(b"x");
        let text = format!(
            r#"{{"os":"linux","architecture":"amd64","rootfs":{{"type":"layers","diff_ids":["{id}"]}}}}"#
        );
        let config = ImageConfig::parse(text.as_bytes()).unwrap();
        assert_eq!(config.diff_ids, [DiffId(id)]);
        assert_eq!(config.platform.os, "linux");
        assert!(ImageConfig::parse(br#"{"rootfs":{"diff_ids":["sha256:zz"]}}"#).is_err());
    }
}
