//! The layer map: a layer's tar entries as they were read, and the table of its pieces.
//!
//! In memory the entries stay in the form of their section, about thirty bytes each: whoever needs them, which is
//! [`crate::Tree::merge`] alone, runs through them once. A map that was decoded is well-formed: the pass over it that
//! [`LayerMap::decode`] makes checks everything that later code relies on.
//!
//! The bytes are drawn in `docs/formats.md`, "Layer map".

mod builder;
mod format;
mod rows;
#[cfg(test)]
mod tests;

pub(crate) use builder::MapBuilder;
use darter_types::{Hash, PieceHash, PieceIndex, RootHash};
use format::Table;
pub(crate) use rows::{Row, Rows};

use crate::wire::Cursor;

/// Why bytes are not a map.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    #[error("the layer map ends early")]
    Short,
    #[error("these bytes are no layer map")]
    Magic,
    #[error("the layer map has version {0}, which this program does not know")]
    Version(u32),
    #[error("the layer map has section {0}, which this program does not know and must")]
    UnknownSection(u16),
    #[error("section {0} of the layer map is damaged")]
    Damaged(u16),
    #[error("the layer map is invalid: {0}")]
    Invalid(&'static str),
}

/// A piece of the content stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PieceInfo {
    pub hash: PieceHash,
    pub plain_len: u32,
    /// Where in the content stream it starts.
    pub start: u64,
}

/// A map as it rests and travels. The bytes depend on the compressor, the root hash does not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedMap {
    /// All that is needed to show the layer and to read it.
    pub core: Vec<u8>,
    /// The recipe for the tar stream, needed to verify the layer only. Empty unless this map was just made.
    pub tar: Vec<u8>,
}

/// What a map says about the whole layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Summary {
    pub(crate) entries: u64,
    pub(crate) content_size: u64,
    pub(crate) tar_size: u64,
    pub(crate) unpacked_size: u64,
}

/// A layer's map.
#[derive(Debug)]
pub struct LayerMap {
    table: Table,
    root: RootHash,
    summary: Summary,
    /// The section as it is, uncompressed.
    entries: Vec<u8>,
    /// The section as it is, and where in it each set starts.
    xattrs: Vec<u8>,
    xattr_sets: Vec<u32>,
    hashes: Vec<PieceHash>,
    /// Where each piece ends in the content stream.
    ends: Vec<u64>,
    tar: Vec<u8>,
}

impl LayerMap {
    /// Reads a map's core. Hostile bytes give an error; they cost no more memory than a map of the stated limits. The
    /// caller compares [`Self::root_hash`] with the one that was signed.
    pub fn decode(core: &[u8]) -> Result<Self, MapError> {
        format::decode(core)
    }

    /// Like [`Self::decode`], for bytes from elsewhere of a map of which only the root hash is known to be right: nothing
    /// is inflated that it does not vouch for.
    pub fn decode_signed(core: &[u8], root: RootHash) -> Result<Self, MapError> {
        format::decode_signed(core, root)
    }

    /// The form to store and to send. Whoever got a map from elsewhere passes on the bytes that it got: they may have
    /// sections that this program does not know.
    ///
    /// The recipe is moved out: it may have hundreds of megabytes, which are held once.
    pub fn encode(&mut self) -> EncodedMap {
        format::encode(self)
    }

    /// Vouches for all sections, the recipe for the tar stream included.
    pub fn root_hash(&self) -> RootHash {
        self.root
    }

    pub fn piece_count(&self) -> u32 {
        self.hashes.len() as u32
    }

    /// Panics if there is no such piece.
    pub fn piece(&self, index: PieceIndex) -> PieceInfo {
        let i = index.0 as usize;
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        PieceInfo { hash: self.hashes[i], plain_len: (self.ends[i] - start) as u32, start }
    }

    /// The piece that has this byte of the content stream; the number of pieces if the stream ends before it.
    pub fn piece_at(&self, content_offset: u64) -> PieceIndex {
        PieceIndex(self.ends.partition_point(|end| *end <= content_offset) as u32)
    }

    /// Bytes of the content stream: what all pieces have together.
    pub fn content_size(&self) -> u64 {
        self.summary.content_size
    }

    /// Bytes of the uncompressed tar stream.
    pub fn tar_size(&self) -> u64 {
        self.summary.tar_size
    }

    /// About what the unpacked layer takes on a disk: files and directories rounded up to 4 KiB.
    pub fn unpacked_size(&self) -> u64 {
        self.summary.unpacked_size
    }

    /// Entries of the tar stream.
    pub fn entry_count(&self) -> u32 {
        self.summary.entries as u32
    }

    pub(crate) fn rows(&self) -> Rows<'_> {
        Rows::new(&self.entries)
    }

    /// The pairs of a set of extended attributes, in order of their names.
    pub(crate) fn xattr_set(&self, set: u32) -> impl Iterator<Item = (&[u8], &[u8])> {
        let mut cursor = Cursor::new(&self.xattrs[self.xattr_sets[set as usize] as usize..]);
        let count = cursor.number().expect("decoding checked the sets");
        (0..count).map(move |_| {
            let name = cursor.bytes().expect("decoding checked the sets");
            (name, cursor.bytes().expect("decoding checked the sets"))
        })
    }

    /// The entries and the extended attributes, as their sections have them.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn plain_sections(&self) -> (&[u8], &[u8]) {
        (&self.entries, &self.xattrs)
    }

    /// Hash and length of the recipe, uncompressed.
    pub(crate) fn tar_section(&self) -> (Hash, u64) {
        self.table.tar()
    }
}
