//! The words that every part of Darter shares: digests, ids, ranges, places.
//!
//! Nothing here does I/O, waits, or knows a wire format. A value of one of these types has been checked: whoever holds a
//! [`Digest`] or a [`NodeName`] need not check it again.

mod digest;
mod layer;
mod name;
mod range;
mod rates;
mod repository;

pub use digest::{BlobDigest, ChainId, DiffId, Digest, DigestError, Hash, PieceHash, RootHash};
pub use layer::{FORMAT_VERSION, LayerSource, LayerTask, PIECES_PER_SPAN, PieceIndex, SpanIndex, TaskError};
pub use name::{ClusterName, NameError, NodeName, Role};
pub use range::ByteRange;
pub use rates::{RateKind, RateKindError, Rates};
pub use repository::{Registry, Repository, RepositoryError, Scheme};

/// The version of the protocol between Darter's programs. The first message of every stream and request carries it; a
/// program refuses a peer whose version differs, and says both.
pub const PROTOCOL_VERSION: u32 = 1;
