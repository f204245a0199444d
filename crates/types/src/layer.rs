//! Layer tasks: the content of an OCI layer as the mesh carries it.

use std::fmt;
use std::str::FromStr;

use crate::{BlobDigest, DiffId, Repository};

/// The version of the layer map and of how a tar stream is cut into pieces. Two peers that have the same version make
/// the same map and the same pieces of the same tar stream.
pub const FORMAT_VERSION: u32 = 1;

/// A span is this many pieces in a row: what peers announce and the scheduler counts.
pub const PIECES_PER_SPAN: u32 = 16;

/// The position of a piece in its layer, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PieceIndex(pub u32);

/// The position of a span in its layer, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpanIndex(pub u32);

impl PieceIndex {
    pub fn span(self) -> SpanIndex {
        SpanIndex(self.0 / PIECES_PER_SPAN)
    }
}

/// One layer to distribute: named by its diff ID and the format's version, written `layer-v1:sha256:<hex>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerTask {
    pub diff_id: DiffId,
    pub format: u32,
}

/// Why a text is not the name of a task.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a layer task: it must read layer-v<number>:sha256:<hex>")]
pub struct TaskError(String);

impl LayerTask {
    /// The task for this layer in the format of this version of the program.
    pub fn current(diff_id: DiffId) -> Self {
        Self { diff_id, format: FORMAT_VERSION }
    }
}

impl fmt::Display for LayerTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer-v{}:{}", self.format, self.diff_id)
    }
}

impl FromStr for LayerTask {
    type Err = TaskError;
    fn from_str(text: &str) -> Result<Self, TaskError> {
        let parse = || {
            let (format, diff_id) = text.strip_prefix("layer-v")?.split_once(':')?;
            Some(Self { format: format.parse().ok()?, diff_id: diff_id.parse().ok()? })
        };
        parse().ok_or_else(|| TaskError(text.chars().take(120).collect()))
    }
}

/// A blob in a repository that holds, as far as a manifest says, the tar stream of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LayerSource {
    pub repository: Repository,
    pub blob: BlobDigest,
    /// Bytes of the blob, as the manifest says; 0 if unknown.
    pub size: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Digest;

    #[test]
    fn task_name_round_trips() {
        let task = LayerTask::current(DiffId(Digest::of(b"x")));
        assert_eq!(task.to_string().parse::<LayerTask>().unwrap(), task);
        assert!("blob:sha256:00".parse::<LayerTask>().is_err());
    }
}
