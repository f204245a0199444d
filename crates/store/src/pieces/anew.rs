//! Packing a piece anew, smaller.

use std::sync::atomic::Ordering;

use darter_types::PieceHash;

use super::{Location, Pieces, sum};
use crate::error::StoreError;
use crate::pack::Header;
use crate::piece::StoredPiece;

/// A new record is worth its writing if it is smaller by one byte in this many (2 %).
const WORTH_ONE_IN: usize = 50;

impl Pieces {
    /// Compresses a piece again, at `level`, and keeps that instead if it is smaller; whether it is. Nobody who reads the piece
    /// meanwhile misses it. A piece that is not here, or damaged, is left alone.
    pub(crate) fn pack_anew(&self, hash: &PieceHash, level: i32) -> Result<bool, StoreError> {
        let before = self.index.read().get(hash).copied();
        let (Some(before), Some(plain)) = (before, self.read(hash)) else { return Ok(false) };
        let piece = StoredPiece::encode(&plain, level);
        let stored_len = before.stored_len as usize;
        if piece.bytes.len() + stored_len / WORTH_ONE_IN >= stored_len {
            return Ok(false);
        }
        let header = Header::of(hash, &piece);
        let mut active = self.active.lock();
        let (pack, offset) = self.append(&mut active, &header.encode(), &piece.bytes)?;
        let Header { encoding, stored_len, .. } = header;
        let sum = Some(sum(&piece.bytes));
        let mut index = self.index.write();
        let known = index.get_mut(hash).filter(|known| known.is_same_record(&before));
        let is_there = known.is_some();
        // What was dropped meanwhile stays so.
        let mut retired = Location { pack, offset, encoding, stored_len, sum, ..before };
        if let Some(known) = known {
            *known = Location { since: known.since, kept: known.kept, ..retired };
            retired = before;
        }
        drop(index);
        drop(active);
        self.bytes.fetch_sub(retired.len(), Ordering::Relaxed);
        self.erase(hash, retired, retired.stored_len);
        Ok(is_there)
    }
}
