//! After a restart: the kernel knows inode numbers whose trees are still being merged again.
//!
//! The numbers say by themselves what they mean, so nothing has to be remembered but which directories were in use. Until
//! their trees are there, a number that leads nowhere isn't stale: whoever asks for it waits.

use std::sync::Arc;

use super::dirs::Place;
use super::{FileSystem, Ino, Notice, ROOT_INO};

impl FileSystem {
    /// Merges the trees of `dirs`, which are shown already and which the kernel may know from an earlier process. Returns at
    /// once. A tree whose maps don't come is given up after [`super::Limits::map_wait`].
    pub fn recover(self: &Arc<Self>, dirs: Vec<u32>) {
        self.awaited.send_replace(dirs.len());
        for dir in dirs {
            let fs = self.clone();
            self.runtime.spawn(async move {
                if let Ok(Err(error)) = tokio::time::timeout(fs.limits.map_wait, fs.ready(dir)).await {
                    tracing::warn!(dir, %error, "what containers had open is not found again");
                }
                fs.awaited.send_modify(|awaited| *awaited -= 1);
            });
        }
        // What the earlier process had no more time to say.
        self.notify(Notice::Inode { ino: ROOT_INO });
    }

    /// Whether there are trees that are still to be found again.
    pub fn is_recovering(&self) -> bool {
        *self.awaited.borrow() > 0
    }

    /// Whether the tree is there in which `ino` is, or in which `name` would be in the mount's root.
    pub fn is_found(&self, ino: u64, name: Option<&[u8]>) -> bool {
        match (self.place(ino), name) {
            (Place::Node(_), _) | (Place::Root, None) => true,
            (Place::Root, Some(name)) => !matches!(self.place_of_dir(name), Some(Place::Pending(_))),
            (Place::Pending(_) | Place::Unknown, _) => false,
        }
    }

    /// Resolves when [`FileSystem::is_found`] is true, or never will be by what is being found again.
    pub async fn found(&self, ino: u64, name: Option<&[u8]>) {
        let mut awaited = self.awaited.subscribe();
        // It can't fail: the sender lives in `self`.
        let _ = awaited.wait_for(|awaited| *awaited == 0 || self.is_found(ino, name)).await;
    }

    fn place_of_dir(&self, name: &[u8]) -> Option<Place> {
        let dir = super::operations::parse_dir(name)?;
        Some(self.place(Ino::Dir(dir).encode()))
    }
}
