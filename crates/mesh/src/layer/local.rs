//! A layer's pieces that are on this machine: read, decoded ahead of their reader, found wrong or missing.

use bytes::Bytes;
use darter_types::{PieceHash, PieceIndex};

use super::open::Open;

impl Open {
    /// Plain bytes of the piece, if it has to be fetched.
    pub(crate) fn missing_len(&self, index: u32) -> Option<u64> {
        let map = self.map_now()?;
        let piece = (index < map.piece_count()).then(|| map.piece(PieceIndex(index)))?;
        (!self.shared.store.has(&piece.hash)).then_some(piece.plain_len.into())
    }

    /// The hash of a piece that the map has.
    fn hash(&self, index: PieceIndex) -> Option<PieceHash> {
        let map = self.map_now().filter(|map| index.0 < map.piece_count())?;
        Some(map.piece(index).hash)
    }

    pub(crate) fn in_memory(&self, index: PieceIndex) -> Option<Bytes> {
        self.shared.cache.get(&self.hash(index)?)
    }

    /// For a reader, who has it in mind from then on.
    pub(crate) fn read_local(&self, index: PieceIndex) -> Option<Bytes> {
        let (hash, shared) = (self.hash(index)?, &self.shared);
        if let Some(bytes) = shared.cache.get(&hash) {
            return Some(bytes);
        }
        if !self.is_stored(index, &hash) {
            return None;
        }
        let _turn = shared.cache.turn(hash);
        if let Some(bytes) = shared.cache.get(&hash) {
            return Some(bytes);
        }
        let plain = self.decode(index, &hash)?;
        shared.cache.put(hash, plain.clone());
        Some(plain)
    }

    /// Decodes what is on this machine, for the reader who will come.
    pub(crate) fn decode_ahead(&self, index: PieceIndex) {
        let Some(hash) = self.hash(index) else { return };
        let cache = &self.shared.cache;
        if cache.has(&hash) || !self.is_stored(index, &hash) {
            return;
        }
        let _turn = cache.turn(hash);
        if !cache.has(&hash)
            && let Some(plain) = self.decode(index, &hash)
        {
            cache.put_ahead(hash, plain);
        }
    }

    fn is_stored(&self, index: PieceIndex, hash: &PieceHash) -> bool {
        let is_stored = self.shared.store.has(hash);
        // Somebody else may have found it wrong.
        if !is_stored && self.unproven.lock().contains_key(&index.0) {
            self.missed(index.0, hash);
        }
        is_stored
    }

    fn decode(&self, index: PieceIndex, hash: &PieceHash) -> Option<Bytes> {
        self.shared.demand.touch_local();
        let read = self.shared.store.read(hash).unwrap_or_else(|error| {
            tracing::warn!(task = %self.task, piece = index.0, %error, "a stored piece can't be read");
            None
        });
        match read {
            Some(_) => self.proved(index.0),
            None => self.missed(index.0, hash),
        }
        read
    }

    /// A piece that should be here could not be read: it is to be fetched again. If it was given wrong, and not spoilt here, its giver
    /// is passed over.
    pub(crate) fn missed(&self, index: u32, hash: &PieceHash) {
        self.lost(index);
        let giver = self.unproven.lock().remove(&index);
        if let Some(giver) = giver.filter(|_| self.shared.store.was_wrong(hash)) {
            self.accuse(&giver, index);
        }
    }

    /// A piece that nobody had looked at is what it should be.
    pub(crate) fn proved(&self, index: u32) {
        self.unproven.lock().remove(&index);
    }

    /// A piece that was here is not any more.
    pub(crate) fn lost(&self, index: u32) {
        self.have.lock().clear(index);
    }
}
