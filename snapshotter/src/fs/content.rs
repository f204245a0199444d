//! What the file system needs of a layer: its map, and the plain bytes of its pieces.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use darter_layer::LayerMap;
use darter_types::PieceIndex;

/// Why a layer's map or piece didn't come.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ContentError {
    /// It never will: the layer has to be demoted. Whoever waits gets an I/O error at once.
    #[error("the layer can't be served: {0}")]
    Impossible(String),
    /// Not now; asking again may help. Whoever waits goes on waiting, up to a bound.
    #[error("the layer is not available: {0}")]
    Unavailable(String),
}

/// One layer as the file system reads it. The mesh's layers implement it, and the tests' layers in memory.
///
/// Futures may be dropped at any moment: a process that waited was killed.
#[async_trait]
pub trait LayerContent: Send + Sync + 'static {
    /// The map, if it is already there. Never blocks.
    fn map_now(&self) -> Option<Arc<LayerMap>>;

    /// The map, once it is there.
    async fn map(&self) -> Result<Arc<LayerMap>, ContentError>;

    /// The plain bytes of a piece that this machine has; `None` if it hasn't. May wait for the disk, never for the network.
    fn read_local(&self, piece: PieceIndex) -> Option<Bytes>;

    /// The plain bytes of a piece that was decoded a moment ago or ahead. Never blocks.
    fn in_memory(&self, piece: PieceIndex) -> Option<Bytes> {
        let _ = piece;
        None
    }

    /// The plain bytes of a piece, wherever they have to come from, before anything that nobody waits for.
    async fn read(&self, piece: PieceIndex) -> Result<Bytes, ContentError>;

    /// A container is about to read the piece, and has first read anything of its tree so long ago. Returns at once and may
    /// do nothing.
    fn touched(&self, piece: PieceIndex, since_first: Duration) {
        let _ = (piece, since_first);
    }

    /// The peer that gave the piece; `None` if it was on this machine when the layer was opened, or isn't.
    fn giver(&self, piece: PieceIndex) -> Option<String> {
        let _ = piece;
        None
    }

    /// A hint: these pieces will probably be read soon. Returns at once and may do nothing.
    fn want(&self, first: PieceIndex, count: u32);
}
