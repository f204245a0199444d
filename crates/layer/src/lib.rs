//! From a layer's tar stream to its map and pieces, and from the maps of an image to the tree that they show.
//!
//! - [`decompress`] gives the tar stream of a blob, [`make`] turns it into a [`LayerMap`] and pieces in one pass.
//! - [`Tree::merge`] shows what containerd and overlayfs would show for a chain of layers, oddities included; a layer
//!   that containerd would refuse is an error there or in [`make`].
//! - [`rebuild_tar`] puts the exact tar stream together again, so that its digest can be checked.
//!
//! Everything here is pure and synchronous: no network, no file, no clock. Map, cuts and the numbering of inodes are
//! frozen with [`darter_types::FORMAT_VERSION`] and described in `docs/formats.md`.

mod compression;
mod cut;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod make;
mod map;
mod path;
mod rebuild;
mod recipe;
mod tar;
#[cfg(any(test, fuzzing))]
#[cfg_attr(not(test), allow(dead_code))]
mod testing;
mod tree;
mod wire;

pub use compression::decompress;
pub use make::{Made, MakeError, PieceSink, make};
pub use map::{EncodedMap, LayerMap, MapError, PieceInfo};
pub use rebuild::{RebuildError, is_tar_section, rebuild_tar};
pub use tar::{Segment, TarError, Time};
pub use tree::{ApplyError, Attr, Children, Content, FileContent, FileKind, NodeIndex, Origin, Tree};

/// The longest piece. Part of the format.
pub const PIECE_LEN: usize = 256 * 1024;
