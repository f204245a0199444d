//! SHA-256 digests as OCI writes them, and BLAKE3 hashes as the mesh uses them.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

/// Why a text is not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    #[error("{0:?} is not a digest: it must read sha256: and 64 lower-case hexadecimal digits")]
    Sha256(String),
    #[error("{0:?} is not a hash: it must be 64 lower-case hexadecimal digits")]
    Blake3(String),
    #[error("a digest has 32 bytes, not {0}")]
    Length(usize),
}

fn parse_hex(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || text.bytes().any(|b| b.is_ascii_uppercase()) {
        return None;
    }
    let mut out = [0; 32];
    hex::decode_to_slice(text, &mut out).ok()?;
    Some(out)
}

fn array(bytes: &[u8]) -> Result<[u8; 32], DigestError> {
    bytes.try_into().map_err(|_| DigestError::Length(bytes.len()))
}

/// A SHA-256 digest, written `sha256:<hex>` (OCI image specification, "Digests").
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

impl Digest {
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
    /// The digest of `data`.
    pub fn of(data: &[u8]) -> Self {
        Self(Sha256::digest(data).into())
    }
    /// The 64 hexadecimal digits without the algorithm.
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }
}

impl FromStr for Digest {
    type Err = DigestError;
    fn from_str(text: &str) -> Result<Self, DigestError> {
        text.strip_prefix("sha256:")
            .and_then(parse_hex)
            .map(Self)
            .ok_or_else(|| DigestError::Sha256(text.chars().take(100).collect()))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", hex::encode(self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A BLAKE3 hash, written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hash([u8; 32]);

impl Hash {
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl FromStr for Hash {
    type Err = DigestError;
    fn from_str(text: &str) -> Result<Self, DigestError> {
        parse_hex(text).map(Self).ok_or_else(|| DigestError::Blake3(text.chars().take(100).collect()))
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

macro_rules! newtype {
    ($(#[$doc:meta])* $name:ident($inner:ident)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub $inner);

        impl $name {
            pub const fn from_bytes(bytes: [u8; 32]) -> Self {
                Self($inner::from_bytes(bytes))
            }
            /// Fails unless there are exactly 32 bytes.
            pub fn from_slice(bytes: &[u8]) -> Result<Self, DigestError> {
                array(bytes).map(Self::from_bytes)
            }
            pub const fn as_bytes(&self) -> &[u8; 32] {
                self.0.as_bytes()
            }
        }
        impl FromStr for $name {
            type Err = DigestError;
            fn from_str(text: &str) -> Result<Self, DigestError> {
                text.parse().map(Self)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

newtype!(
    /// The digest of a blob as the registry has it, usually compressed.
    BlobDigest(Digest)
);
newtype!(
    /// The digest of a layer's uncompressed tar stream (OCI image specification, "Layer DiffID").
    DiffId(Digest)
);
newtype!(
    /// The digest that names a layer together with all layers below it (OCI image specification, "Layer ChainID").
    ChainId(Digest)
);
newtype!(
    /// The hash of a piece's plain bytes; a piece has no other name.
    PieceHash(Hash)
);
newtype!(
    /// The hash of a layer map (`docs/formats.md`): it vouches for all that the map says.
    RootHash(Hash)
);

impl ChainId {
    /// The chain ID of `diff_id` on top of `parent`; `None` for the lowest layer.
    pub fn extend(parent: Option<ChainId>, diff_id: DiffId) -> ChainId {
        match parent {
            None => ChainId(diff_id.0),
            Some(parent) => ChainId(Digest::of(format!("{parent} {diff_id}").as_bytes())),
        }
    }

    /// The chain IDs of a whole image, lowest layer first: one for each diff ID.
    pub fn chain(diff_ids: &[DiffId]) -> Vec<ChainId> {
        let mut parent = None;
        diff_ids
            .iter()
            .map(|diff_id| {
                let chain = ChainId::extend(parent, *diff_id);
                parent = Some(chain);
                chain
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_text_round_trips() {
        let text = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let digest: Digest = text.parse().unwrap();
        assert_eq!(digest, Digest::of(b""));
        assert_eq!(digest.to_string(), text);
    }

    #[test]
    fn other_algorithms_and_upper_case_are_refused() {
        assert!("sha512:00".parse::<Digest>().is_err());
        let upper = format!("sha256:{}", "A".repeat(64));
        assert!(upper.parse::<Digest>().is_err());
    }

    #[test]
    fn lowest_chain_id_is_the_diff_id() {
        let a = DiffId(Digest::of(b"a"));
        let b = DiffId(Digest::of(b"b"));
        let chain = ChainId::chain(&[a, b]);
        assert_eq!(chain[0].0, a.0);
        assert_eq!(chain[1].0, Digest::of(format!("{a} {b}").as_bytes()));
    }
}
