//! The directories that are shown, from "maps are awaited" to "the tree is there", and which inode number leads where.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use darter_layer::{LayerMap, Tree};
use darter_types::RootHash;
use futures_util::future::try_join_all;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinError};

use super::shown::{Merged, Node, Shown};
use super::{ContentError, FileSystem, Ino, LayerContent};

/// How long to leave a layer alone that was not available, before its map is asked for again.
const MAP_RETRY: Duration = Duration::from_secs(1);

#[derive(Clone)]
enum State {
    Waiting,
    Ready(Arc<Shown>),
    Failed(ContentError),
    Gone,
}

/// One `<dir>`.
pub(super) struct Dir {
    pub(super) number: u32,
    layers: Vec<Arc<dyn LayerContent>>,
    state: watch::Sender<State>,
    started: AtomicBool,
    task: Mutex<Option<AbortHandle>>,
}

impl Dir {
    pub(super) fn new(number: u32, layers: Vec<Arc<dyn LayerContent>>) -> Self {
        let state = watch::Sender::new(State::Waiting);
        Self { number, layers, state, started: AtomicBool::new(false), task: Mutex::default() }
    }

    pub(super) fn now(&self) -> Option<Arc<Shown>> {
        match &*self.state.borrow() {
            State::Ready(shown) => Some(shown.clone()),
            _ => None,
        }
    }

    /// Waits for the tree. `Err(None)`: the directory was removed meanwhile.
    pub(super) async fn wait(&self) -> Result<Arc<Shown>, Option<ContentError>> {
        let mut receiver = self.state.subscribe();
        let state = receiver.wait_for(|state| !matches!(state, State::Waiting)).await.map_err(|_| None)?;
        match &*state {
            State::Ready(shown) => Ok(shown.clone()),
            State::Failed(error) => Err(Some(error.clone())),
            State::Waiting | State::Gone => Err(None),
        }
    }

    /// The end: whoever waits learns it, and nothing is waited for any more.
    fn gone(&self) {
        self.state.send_replace(State::Gone);
        if let Some(task) = self.task.lock().take() {
            task.abort();
        }
    }

    async fn maps(&self) -> Result<Vec<Arc<LayerMap>>, ContentError> {
        try_join_all(self.layers.iter().map(|layer| patient_map(layer.as_ref()))).await
    }
}

async fn patient_map(layer: &dyn LayerContent) -> Result<Arc<LayerMap>, ContentError> {
    loop {
        match layer.map().await {
            Err(ContentError::Unavailable(reason)) => {
                tracing::debug!(reason, "a layer's map is not available, asking again");
                tokio::time::sleep(MAP_RETRY).await;
            }
            settled => return settled,
        }
    }
}

/// What stands behind an inode number.
pub(super) enum Place {
    Root,
    /// The root of a tree that isn't there yet.
    Pending(Arc<Dir>),
    Node(Node),
    /// Nothing, or nothing any more.
    Unknown,
}

/// All directories, and the way from a number to the trees in which it occurs.
#[derive(Default)]
pub(super) struct Table {
    dirs: BTreeMap<u32, Arc<Dir>>,
    numbers: HashMap<u32, Vec<Arc<Shown>>>,
    merged: HashMap<Vec<RootHash>, Weak<Merged>>,
}

impl Table {
    pub(super) fn dir(&self, dir: u32) -> Option<Arc<Dir>> {
        self.dirs.get(&dir).cloned()
    }

    pub(super) fn dirs(&self) -> impl Iterator<Item = &Arc<Dir>> {
        self.dirs.values()
    }

    pub(super) fn count(&self) -> usize {
        self.dirs.len()
    }

    /// True if there was one of that number before; it is gone now.
    pub(super) fn insert(&mut self, dir: Arc<Dir>) -> bool {
        let replaced = self.remove(dir.number);
        self.dirs.insert(dir.number, dir);
        replaced
    }

    /// True if it was there.
    pub(super) fn remove(&mut self, dir: u32) -> bool {
        let Some(dir) = self.dirs.remove(&dir) else { return false };
        if let Some(shown) = dir.now() {
            self.forget(&shown);
        }
        dir.gone();
        true
    }

    fn forget(&mut self, shown: &Arc<Shown>) {
        for number in shown.numbers() {
            if let Some(trees) = self.numbers.get_mut(&number) {
                trees.retain(|other| !Arc::ptr_eq(other, shown));
                if trees.is_empty() {
                    self.numbers.remove(&number);
                }
            }
        }
        self.merged.retain(|_, merged| merged.strong_count() > 0);
    }

    /// From now on the numbers in `shown` lead to it; unless `dir` was removed or replaced meanwhile.
    fn show(&mut self, dir: &Arc<Dir>, shown: &Arc<Shown>) {
        if !self.dirs.get(&dir.number).is_some_and(|current| Arc::ptr_eq(current, dir)) {
            return;
        }
        for number in shown.numbers() {
            self.numbers.entry(number).or_default().push(shown.clone());
        }
        self.merged.insert(shown.roots(), Arc::downgrade(shown.merged()));
        dir.state.send_replace(State::Ready(shown.clone()));
    }

    pub(super) fn resolve(&self, ino: u64) -> Place {
        match Ino::decode(ino) {
            None => Place::Unknown,
            Some(Ino::Root) => Place::Root,
            Some(Ino::Dir(dir)) => match self.dirs.get(&dir) {
                None => Place::Unknown,
                Some(dir) => {
                    dir.now().map_or_else(|| Place::Pending(dir.clone()), |shown| Place::Node(shown.root()))
                }
            },
            Some(Ino::Numbered { number, position }) => {
                let trees = self.numbers.get(&number).map_or(&[][..], Vec::as_slice);
                trees
                    .iter()
                    .find_map(|shown| shown.node(number, position))
                    .map_or(Place::Unknown, Place::Node)
            }
        }
    }
}

impl FileSystem {
    /// Begins to fetch the maps of `dir` and to merge its tree, once.
    pub(super) fn start(self: &Arc<Self>, dir: &Arc<Dir>) {
        if !dir.started.swap(true, Ordering::AcqRel) {
            let task = self.runtime.spawn(self.clone().build(dir.clone())).abort_handle();
            *dir.task.lock() = Some(task.clone());
            // Who took it away meanwhile has found no task to end.
            if matches!(*dir.state.borrow(), State::Gone) {
                task.abort();
            }
        }
    }

    async fn build(self: Arc<Self>, dir: Arc<Dir>) {
        match self.merge(&dir).await {
            Ok(shown) => self.table.write().show(&dir, &shown),
            Err(error) => {
                tracing::warn!(dir = dir.number, %error, "the layers of a snapshot can't be shown");
                dir.state.send_replace(State::Failed(error));
            }
        }
    }

    async fn merge(self: &Arc<Self>, dir: &Arc<Dir>) -> Result<Arc<Shown>, ContentError> {
        let maps = dir.maps().await?;
        loop {
            let (fs, dir, maps) = (self.clone(), dir.clone(), maps.clone());
            let merged = self.in_turn(move || fs.merge_now(&dir, maps)).await;
            match merged.map_err(|error| ContentError::Impossible(error.to_string()))? {
                Err(ContentError::Unavailable(reason)) => {
                    tracing::warn!(reason, "a tree can't be numbered, trying again");
                    tokio::time::sleep(MAP_RETRY).await;
                }
                settled => return settled,
            }
        }
    }

    /// Which layer of a chain can't be merged with those below it, if one can't.
    pub async fn refused_layer(&self, maps: Vec<Arc<LayerMap>>) -> Option<usize> {
        let memory = self.limits.tree_memory;
        let merged = self.in_turn(move || Tree::merge(&maps, memory).map(drop)).await;
        let merged = merged.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
        merged.err().map(|error| error.layer)
    }

    /// Runs a merge on a thread for such work when it is its turn. The turn is the merge's, also when nobody waits for it any
    /// more, since it can't be called off.
    async fn in_turn<T: Send + 'static>(
        &self,
        merge: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, JoinError> {
        let turn = self.merges.clone().acquire_owned().await.expect("the semaphore is never closed");
        let merging = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            merge()
        });
        merging.await
    }

    /// Merges the tree, or takes the one that another directory made of the same layers, and numbers it.
    fn merge_now(&self, dir: &Dir, maps: Vec<Arc<LayerMap>>) -> Result<Arc<Shown>, ContentError> {
        let roots: Vec<RootHash> = maps.iter().map(|map| map.root_hash()).collect();
        let known = self.table.read().merged.get(&roots).and_then(Weak::upgrade);
        let merged = match known {
            Some(merged) => merged,
            None => Arc::new(Merged::new(maps, self.limits.tree_memory, self.numbers.as_ref())?),
        };
        let shown = Shown::new(dir.number, merged, dir.layers.clone(), self.numbers.as_ref())?;
        Ok(Arc::new(shown))
    }
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use bytes::Bytes;
    use darter_types::PieceIndex;
    use tokio::runtime::Handle;

    use super::*;
    use crate::fs::{Limits, MemoryNumbers};

    /// A layer whose map never comes.
    struct Never;

    #[async_trait]
    impl LayerContent for Never {
        fn map_now(&self) -> Option<Arc<LayerMap>> {
            None
        }
        async fn map(&self) -> Result<Arc<LayerMap>, ContentError> {
            std::future::pending().await
        }
        fn read_local(&self, _: PieceIndex) -> Option<Bytes> {
            None
        }
        async fn read(&self, _: PieceIndex) -> Result<Bytes, ContentError> {
            std::future::pending().await
        }
        fn want(&self, _: PieceIndex, _: u32) {}
    }

    #[tokio::test]
    async fn nothing_waits_for_a_directory_that_went_when_its_tree_was_begun() {
        let fs = FileSystem::new(Arc::new(MemoryNumbers::default()), Handle::current(), Limits::default());
        let dir = Arc::new(Dir::new(1, vec![Arc::new(Never)]));
        dir.gone();
        fs.start(&dir);
        let left = async {
            // The task that waits for the maps holds the directory as well.
            while Arc::strong_count(&dir) > 1 {
                tokio::task::yield_now().await;
            }
        };
        assert!(tokio::time::timeout(Duration::from_secs(10), left).await.is_ok());
    }
}
