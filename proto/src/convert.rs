//! Wire messages to checked types and back.

use darter_types::{BlobDigest, DiffId, LayerSource, LayerTask, PROTOCOL_VERSION};

use crate::v1;

/// Why a message is refused. Its text names the field, and for a version what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("this program speaks protocol {ours}, the other side {theirs}: upgrade the older of the two")]
    Protocol { ours: u32, theirs: u32 },
    #[error("the message lacks {0}")]
    Missing(&'static str),
    #[error("the message's {field} is not valid: {reason}")]
    Invalid { field: &'static str, reason: String },
}

impl From<WireError> for tonic::Status {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Protocol { .. } => tonic::Status::failed_precondition(error.to_string()),
            WireError::Missing(_) | WireError::Invalid { .. } => {
                tonic::Status::invalid_argument(error.to_string())
            }
        }
    }
}

impl WireError {
    /// An error for `field`, with the words of `reason`.
    pub fn invalid(field: &'static str, reason: impl std::fmt::Display) -> Self {
        WireError::Invalid { field, reason: reason.to_string() }
    }
}

/// Refuses a first message of another protocol version.
pub fn check_protocol(theirs: u32) -> Result<(), WireError> {
    if theirs == PROTOCOL_VERSION {
        Ok(())
    } else {
        Err(WireError::Protocol { ours: PROTOCOL_VERSION, theirs })
    }
}

/// A diff ID of exactly 32 bytes.
pub fn diff_id(bytes: &[u8]) -> Result<DiffId, WireError> {
    DiffId::from_slice(bytes).map_err(|error| WireError::invalid("diff_id", error))
}

/// A task in any format version: whoever serves it decides whether it knows that version.
pub fn task(diff: &[u8], format: u32) -> Result<LayerTask, WireError> {
    Ok(LayerTask { diff_id: diff_id(diff)?, format })
}

impl From<&LayerSource> for v1::Source {
    fn from(source: &LayerSource) -> Self {
        v1::Source {
            repository: source.repository.to_string(),
            blob: source.blob.as_bytes().to_vec(),
            size: source.size,
        }
    }
}

impl TryFrom<&v1::Source> for LayerSource {
    type Error = WireError;
    fn try_from(source: &v1::Source) -> Result<Self, WireError> {
        Ok(LayerSource {
            repository: source.repository.parse().map_err(|error| WireError::invalid("repository", error))?,
            blob: BlobDigest::from_slice(&source.blob).map_err(|error| WireError::invalid("blob", error))?,
            size: source.size,
        })
    }
}

/// All sources of a message; one bad one refuses the message.
pub fn sources(list: &[v1::Source]) -> Result<Vec<LayerSource>, WireError> {
    list.iter().map(LayerSource::try_from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use darter_types::Digest;

    #[test]
    fn source_round_trips() {
        let source = LayerSource {
            repository: "https://registry.example/team/app".parse().unwrap(),
            blob: BlobDigest(Digest::of(b"blob")),
            size: 7,
        };
        assert_eq!(LayerSource::try_from(&v1::Source::from(&source)).unwrap(), source);
    }

    #[test]
    fn short_digest_is_refused_by_name() {
        assert!(diff_id(&[0; 31]).unwrap_err().to_string().contains("diff_id"));
    }

    #[test]
    fn other_protocol_version_says_both() {
        let text = check_protocol(PROTOCOL_VERSION + 1).unwrap_err().to_string();
        assert!(
            text.contains(&PROTOCOL_VERSION.to_string())
                && text.contains(&(PROTOCOL_VERSION + 1).to_string())
        );
    }
}
