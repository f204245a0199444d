//! The bodies of the rows.

use std::fmt::Display;
use std::str::FromStr;

use darter_types::{BlobDigest, ChainId, DiffId, LayerSource, Repository};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::snapshot::{Info, Kind, Labels, Usage};

/// Types of `darter-types` are written as their text.
mod text {
    use super::*;

    pub fn serialize<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Names its directory; 0 until it is recorded.
    pub id: i64,
    pub name: String,
    pub kind: Kind,
    pub parent: Option<i64>,
    pub created_ns: i64,
    pub updated_ns: i64,
    pub labels: Labels,
    /// Size and inodes, as found at Commit.
    pub usage: Option<(i64, i64)>,
    /// The chain that shows it, if it is lazy.
    pub chain: Option<u32>,
}

impl Row {
    pub fn new(name: &str, kind: Kind, parent: Option<i64>, labels: Labels, now_ns: i64) -> Row {
        Row {
            id: 0,
            name: name.to_owned(),
            kind,
            parent,
            created_ns: now_ns,
            updated_ns: now_ns,
            labels,
            usage: None,
            chain: None,
        }
    }

    pub fn info(self, parent: String) -> Info {
        Info {
            name: self.name,
            parent,
            kind: self.kind,
            created_ns: self.created_ns,
            updated_ns: self.updated_ns,
            labels: self.labels,
        }
    }

    pub fn usage(&self) -> Option<Usage> {
        self.usage.map(|(size, inodes)| Usage { size, inodes })
    }
}

/// The layers that one directory of the file system shows merged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Chain {
    pub dir: u32,
    #[serde(with = "text")]
    pub chain_id: ChainId,
    /// Where containerd keeps the content, should a layer have to be demoted.
    pub namespace: String,
    /// The lowest first.
    pub layers: Vec<ChainLayer>,
}

impl Chain {
    /// Another image that has this chain may know further places for its blobs.
    pub fn add_sources(&mut self, layers: &[ChainLayer]) {
        for (mine, other) in self.layers.iter_mut().zip(layers) {
            for source in &other.sources {
                if !mine.sources.contains(source) && mine.sources.len() < SOURCES_MAX {
                    mine.sources.push(source.clone());
                }
            }
        }
    }
}

/// So many places are remembered for one layer; further ones are not.
const SOURCES_MAX: usize = 16;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChainLayer {
    #[serde(with = "text")]
    pub diff_id: DiffId,
    pub media_type: String,
    pub sources: Vec<Source>,
}

impl ChainLayer {
    pub fn layer_sources(&self) -> Vec<LayerSource> {
        self.sources.iter().map(LayerSource::from).collect()
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Source {
    #[serde(with = "text")]
    pub repository: Repository,
    #[serde(with = "text")]
    pub blob: BlobDigest,
    pub size: u64,
}

impl From<&Source> for LayerSource {
    fn from(source: &Source) -> LayerSource {
        LayerSource { repository: source.repository.clone(), blob: source.blob, size: source.size }
    }
}

impl From<LayerSource> for Source {
    fn from(source: LayerSource) -> Source {
        Source { repository: source.repository, blob: source.blob, size: source.size }
    }
}

/// What was decided for an image, for `darter why`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// The digest of its manifest.
    pub image: String,
    /// The digest of its configuration: CRI's name for the image.
    pub config: String,
    pub namespace: String,
    /// References and repositories, as far as known.
    pub names: Vec<String>,
    pub decided_ns: i64,
    /// The lowest first.
    pub layers: Vec<DecidedLayer>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DecidedLayer {
    #[serde(with = "text")]
    pub diff_id: DiffId,
    #[serde(with = "text")]
    pub blob: BlobDigest,
    pub size: u64,
    pub lazy: bool,
    /// Why it is plain, or by what it is lazy.
    pub reason: String,
}
