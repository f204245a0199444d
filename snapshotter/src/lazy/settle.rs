//! Waiting until what is to be mounted can be read, within a bound.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::ports::UnpackError;
use super::{Lazy, Result};
use crate::fs::ContentError;
use crate::snapshot::{Chain, SnapshotError};

/// Before a tree that is not available for now is asked for again.
const RETRY: Duration = Duration::from_millis(500);

/// How often a long wait says how far it is.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

impl Lazy {
    /// Waits until the layers below the active snapshot or view `key` can be read. Past the bound of Mounts it fails with
    /// words on who is how far; asking again goes on waiting.
    pub async fn settle(&self, key: &str) -> Result<()> {
        let deadline = Instant::now() + self.options.mount_wait;
        loop {
            let (snapshots, wanted) = (self.snapshots.clone(), key.to_owned());
            let plan = tokio::task::spawn_blocking(move || snapshots.mounts(&wanted)).await;
            let plan = plan.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
            let Some(dir) = plan.chain else { return Ok(()) };
            let mut step = self.chains.trail(dir).step("mount").answering().with("darter.dir", || dir);
            let settled = self.settle_chain(dir, deadline).await;
            if let Err(error) = &settled {
                step.fail(error);
            }
            if settled? {
                return Ok(());
            }
        }
    }

    /// After a pull: waits for the maps of the image with this configuration, says now and then how far it is, and never
    /// fails: what isn't there then is waited for when it is mounted.
    pub async fn settle_image(&self, config: &str, bound: Duration) {
        let Some(image) = self.chains.pulled(config) else { return };
        let (started, deadline) = (Instant::now(), Instant::now() + bound);
        // What was demoted is another chain, or none of ours any more.
        while let Some(dir) = self.chain_of(&image) {
            let step = deadline.min(Instant::now() + PROGRESS_EVERY);
            match self.settle_chain(dir, step).await {
                Ok(is_ready) if is_ready || Instant::now() >= deadline => return,
                Ok(_) => sleep(RETRY).await,
                Err(SnapshotError::Unavailable(state)) if Instant::now() < deadline => {
                    tracing::info!(image = %image.found.manifest, waited = ?started.elapsed(), state, "pulling");
                    // A demotion that fails at once is tried again no more often than it is told.
                    sleep_until(step).await;
                }
                Err(error) => {
                    tracing::warn!(image = %image.found.manifest, %error, "the image is pulled, but not ready");
                    return;
                }
            }
        }
    }

    /// The merged layers of a whole image; `None` if nothing of it is served lazily.
    fn chain_of(&self, image: &Arc<super::Image>) -> Option<u32> {
        let chains = self.snapshots.records().read(|tx| tx.chains()).ok()?;
        let top = image.top();
        let is_it = |chain: &&Chain| Some(chain.chain_id) == top && chain.namespace == image.namespace;
        chains.iter().find(is_it).map(|chain| chain.dir)
    }

    /// `false`: something was demoted, so what is below is to be looked up again.
    async fn settle_chain(&self, dir: u32, deadline: Instant) -> Result<bool> {
        loop {
            self.shown(dir)?;
            if let Some(words) = self.demoter.refusal(dir) {
                return Err(SnapshotError::Refused(words));
            }
            match timeout_at(deadline, self.chains.fs().ready(dir)).await {
                Ok(Ok(_)) => return Ok(true),
                Ok(Err(ContentError::Impossible(_))) => {
                    return self.demoted(dir, deadline).await.map(|()| false);
                }
                Ok(Err(ContentError::Unavailable(reason))) if Instant::now() + RETRY > deadline => {
                    return Err(SnapshotError::Unavailable(reason));
                }
                Ok(Err(ContentError::Unavailable(_))) => sleep(RETRY).await,
                Err(_) => return Err(SnapshotError::Unavailable(self.still_missing(dir))),
            }
        }
    }

    async fn demoted(&self, dir: u32, deadline: Instant) -> Result<()> {
        let mut progress = self.demoter.start(dir);
        let done = timeout_at(deadline, progress.wait_for(Option::is_some)).await;
        let outcome = match &done {
            Ok(Ok(outcome)) => (**outcome).clone(),
            _ => None,
        };
        match outcome {
            Some(Ok(())) => Ok(()),
            Some(Err(UnpackError::Refused(words))) => Err(SnapshotError::Refused(words)),
            Some(Err(UnpackError::Unavailable(words))) => Err(SnapshotError::Unavailable(words)),
            None => {
                let words = "a layer can't be served lazily; containerd is still unpacking it";
                Err(SnapshotError::Unavailable(words.to_owned()))
            }
        }
    }

    /// Which layer is waited for, how far it is, and who makes it.
    fn still_missing(&self, dir: u32) -> String {
        let layers = self.chains.layers(dir);
        let missing = layers.iter().filter(|layer| layer.content.map_now().is_none());
        let words = missing.map(|layer| format!("layer {}: {}", layer.diff_id, layer.content.status().state));
        let words: Vec<_> = words.collect();
        match words.as_slice() {
            [] => "the layers are there and being merged; ask again".to_owned(),
            [first, rest @ ..] => {
                let more = if rest.is_empty() { String::new() } else { format!(", and {} more", rest.len()) };
                format!("not ready yet, ask again: {first}{more}")
            }
        }
    }
}

impl super::Image {
    /// The chain ID of the whole image.
    fn top(self: &Arc<Self>) -> Option<darter_types::ChainId> {
        self.layers.len().checked_sub(1).map(|last| self.chain_id(last))
    }
}
