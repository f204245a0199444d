//! What is needed to serve a layer: its table of pieces, who may read it, who vouches for it. Small, so that many fit.

use std::collections::HashMap;
use std::sync::Arc;

use darter_layer::LayerMap;
use darter_proto::v1::Proof;
use darter_store::{Store, StoreError, StoredMap};
use darter_types::{LayerTask, PIECES_PER_SPAN, PieceHash, PieceIndex, RootHash};
use parking_lot::Mutex;
use prost::Message;

use crate::bits::Bits;
use crate::note::Note;

/// Layers on the shelf; one more takes the place of the one that was used longest ago. With a thousand pieces each (a
/// 250 MB layer) a full shelf takes 16 MB.
const LAYERS_MAX: usize = 512;

pub(crate) struct Shelved {
    pub root: RootHash,
    pub proof: Option<Proof>,
    pub hashes: Vec<PieceHash>,
    note: Mutex<Note>,
}

impl Shelved {
    /// `None` if the bytes are not the map that they say they are.
    fn new(stored: &StoredMap, map: &LayerMap) -> Option<Self> {
        let hashes = (0..map.piece_count()).map(|index| map.piece(PieceIndex(index)).hash).collect();
        (map.root_hash() == stored.root).then(|| Self {
            root: stored.root,
            proof: Proof::decode(stored.proof.as_slice()).ok().filter(|proof| !proof.signature.is_empty()),
            hashes,
            note: Mutex::new(Note::decode(&stored.access)),
        })
    }

    pub(crate) fn note(&self) -> Note {
        self.note.lock().clone()
    }

    /// Whether a peer whose containerd read `repository` may have this layer.
    pub(crate) fn allows(&self, repository: &str) -> bool {
        self.note.lock().allows(repository)
    }

    /// Which pieces are in the store now.
    pub(crate) fn held(&self, store: &Store) -> Bits {
        Bits::from_fn(self.hashes.len() as u32, |index| store.has(&self.hashes[index as usize]))
    }

    /// Which spans are, one bit each.
    pub(crate) fn spans(&self, store: &Store) -> Bits {
        self.held(store).runs(PIECES_PER_SPAN)
    }
}

#[derive(Default)]
pub(crate) struct Shelf {
    layers: Mutex<HashMap<LayerTask, (Arc<Shelved>, u64)>>,
}

/// A map from the store, whole.
pub(crate) struct Loaded {
    pub shelved: Arc<Shelved>,
    pub map: LayerMap,
}

impl Shelf {
    /// What is on the shelf, without a look at the disk.
    fn at_hand(&self, task: LayerTask) -> Option<Arc<Shelved>> {
        let mut layers = self.layers.lock();
        let next = layers.values().map(|(_, used)| *used).max().unwrap_or(0) + 1;
        let (shelved, used) = layers.get_mut(&task)?;
        *used = next;
        Some(shelved.clone())
    }

    /// What is needed to serve the layer, from the shelf or the store. Blocks on the disk.
    pub(crate) fn get(&self, store: &Store, task: LayerTask) -> Option<Arc<Shelved>> {
        self.at_hand(task).or_else(|| self.load(store, task).map(|loaded| loaded.shelved))
    }

    /// The layer's map from the store. What is there and is no map is removed. Blocks on the disk.
    pub(crate) fn load(&self, store: &Store, task: LayerTask) -> Option<Loaded> {
        let loaded = self.load_only(store, task)?;
        self.put(task, loaded.shelved.clone());
        Some(loaded)
    }

    fn load_only(&self, store: &Store, task: LayerTask) -> Option<Loaded> {
        let stored = store.map(task).unwrap_or_else(|error| {
            tracing::warn!(%task, %error, "a stored map can't be read");
            None
        })?;
        let map = LayerMap::decode(&stored.core).ok();
        let shelved = map.as_ref().and_then(|map| Shelved::new(&stored, map));
        let (Some(map), Some(shelved)) = (map, shelved) else {
            tracing::warn!(%task, "a stored map is not valid and is removed");
            let _ = store.remove_map(task);
            return None;
        };
        Some(Loaded { shelved: Arc::new(shelved), map })
    }

    /// Like [`Self::get`], but what is not on the shelf isn't put there: for a look at all of them.
    pub(crate) fn peek(&self, store: &Store, task: LayerTask) -> Option<Arc<Shelved>> {
        let at_hand = self.layers.lock().get(&task).map(|(shelved, _)| shelved.clone());
        at_hand.or_else(|| self.load_only(store, task).map(|loaded| loaded.shelved))
    }

    fn put(&self, task: LayerTask, shelved: Arc<Shelved>) {
        let mut layers = self.layers.lock();
        let next = layers.values().map(|(_, used)| *used).max().unwrap_or(0) + 1;
        layers.insert(task, (shelved, next));
        if layers.len() > LAYERS_MAX {
            let oldest = layers.iter().min_by_key(|(_, (_, used))| *used).map(|(task, _)| *task);
            layers.remove(&oldest.expect("it is not empty"));
        }
    }

    /// Stores a map that was proven, with what is known about it.
    pub(crate) fn store(
        &self,
        store: &Store,
        stored: &StoredMap,
        map: &LayerMap,
    ) -> Result<Arc<Shelved>, StoreError> {
        store.put_map(stored)?;
        Ok(self.lend(stored, map))
    }

    /// Knows a map that was proven as long as there is room, though it could not be stored.
    pub(crate) fn lend(&self, stored: &StoredMap, map: &LayerMap) -> Arc<Shelved> {
        let shelved =
            Arc::new(Shelved::new(stored, map).expect("the caller took the root hash from this map"));
        self.put(stored.task, shelved.clone());
        shelved
    }

    /// Changes what is noted beside the map, here and in the store. Blocks on the disk.
    pub(crate) fn change_note(&self, store: &Store, task: LayerTask, change: impl FnOnce(&mut Note)) {
        let Some(shelved) = self.get(store, task) else { return };
        let encoded = {
            let mut note = shelved.note.lock();
            change(&mut note);
            note.encode()
        };
        if let Err(error) = store.set_access(task, &encoded) {
            tracing::warn!(%task, %error, "who may read a layer could not be written down");
        }
    }

    pub(crate) fn forget(&self, task: LayerTask) {
        self.layers.lock().remove(&task);
    }
}
