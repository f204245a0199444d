//! Demotion: a layer that containerd was told to leave to us proves impossible, so containerd unpacks it after all.
//!
//! The original blob is brought into containerd's content store, and its own diff service unpacks it, and every layer above
//! it, into a private directory of the snapshot; from then on the snapshot is an ordinary one. What containerd refuses is
//! refused with its words. A snapshot is demoted once at a time, and none from within a call of containerd's. Those of different
//! images don't wait for each other's registries; that containerd unpacks one layer at a time is seen to where it is called.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use darter_daemon::tasks::{Tasks, alone};
use parking_lot::Mutex;
use tokio::sync::{OwnedMutexGuard, Semaphore, watch};

use super::chains::{Chains, Watched};
use super::ports::{Containerd, PlainLayer, UnpackError};
use crate::fs::ContentError;
use crate::metrics::Metrics;
use crate::snapshot::{Chain, Row, SnapshotError, Snapshots, Via};

/// Demotions at the same time; further ones wait. Most of the time they wait for a registry.
const DEMOTIONS_MAX: usize = 64;

/// How long the tree below a layer may take before its demotion is given up for now.
const LOWER_WAIT: Duration = Duration::from_secs(60);

/// How long a layer of the chain may take to say that it is impossible, too.
const MAP_WAIT: Duration = Duration::from_secs(2);

pub(super) type Outcome = Result<(), UnpackError>;
type Progress = watch::Receiver<Option<Outcome>>;

/// See the module's head.
pub(super) struct Demoter {
    snapshots: Arc<Snapshots>,
    chains: Arc<Chains>,
    containerd: Arc<dyn Containerd>,
    tasks: Tasks,
    metrics: Arc<Metrics>,
    places: Semaphore,
    turns: Turns,
    /// By chain; a refusal stays, so that the words are there whenever containerd asks again.
    known: Mutex<HashMap<u32, Progress>>,
}

impl Demoter {
    pub fn new(
        snapshots: Arc<Snapshots>,
        chains: Arc<Chains>,
        containerd: Arc<dyn Containerd>,
        tasks: Tasks,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        let (places, turns) = (Semaphore::new(DEMOTIONS_MAX), Turns::default());
        Arc::new(Self {
            snapshots,
            chains,
            containerd,
            tasks,
            metrics,
            places,
            turns,
            known: Mutex::default(),
        })
    }

    /// Has the snapshots of this chain demoted, unless that is under way or was found to be refused.
    pub fn start(self: &Arc<Self>, dir: u32) -> Progress {
        let mut known = self.known.lock();
        if let Some(progress) = known.get(&dir)
            && !matches!(&*progress.borrow(), Some(Ok(()) | Err(UnpackError::Unavailable(_))))
        {
            return progress.clone();
        }
        let (sender, progress) = watch::channel(None);
        known.insert(dir, progress.clone());
        let demoter = self.clone();
        self.tasks.spawn_until_stop("demote", async move {
            let run = alone("demote", demoter.run(dir)).await;
            let outcome = run.unwrap_or_else(|broken| Err(UnpackError::Unavailable(broken.to_string())));
            let counted =
                if outcome.is_ok() { &demoter.metrics.demoted } else { &demoter.metrics.demotions_failed };
            counted.inc();
            match &outcome {
                Ok(()) => tracing::info!(dir, "demoted: containerd has unpacked what could not be lazy"),
                Err(error) => tracing::warn!(dir, %error, "the demotion failed"),
            }
            sender.send_replace(Some(outcome));
        });
        progress
    }

    /// The words of a refusal that is already known.
    pub fn refusal(&self, dir: u32) -> Option<String> {
        match &*self.known.lock().get(&dir)?.borrow() {
            Some(Err(UnpackError::Refused(words))) => Some(words.clone()),
            _ => None,
        }
    }

    pub fn forget(&self, dir: u32) {
        self.known.lock().remove(&dir);
    }

    async fn run(&self, dir: u32) -> Outcome {
        let _place = self.places.acquire().await.expect("the semaphore is never closed");
        self.demote(dir).await
    }

    async fn demote(&self, dir: u32) -> Outcome {
        let Some(chain) = self.blocking(move |snapshots| chain(snapshots, dir)).await? else { return Ok(()) };
        let Some(first) = self.first_impossible(&chain).await else {
            self.chains.renew(&chain);
            return Ok(());
        };
        let rows = self.blocking(move |snapshots| rows_to_demote(snapshots, dir, first)).await?;
        for (row, layer) in rows {
            let diff_id = layer.diff_id;
            let outcome = self.unpack(row, layer).await;
            let reason = match &outcome {
                Ok(()) => "demoted: containerd has unpacked it".to_owned(),
                Err(error) => format!("it can't be lazy, and containerd can't unpack it: {error}"),
            };
            super::amend(&self.snapshots, &chain.namespace, diff_id, reason);
            outcome?;
        }
        Ok(())
    }

    /// The lowest layer that is impossible or that can't be merged; from there on everything is unpacked. `None`: nothing
    /// speaks against this chain. A layer that only takes its time doesn't, nor one that failed for another image's sources.
    async fn first_impossible(&self, chain: &Chain) -> Option<usize> {
        self.chains.show(chain);
        let layers = self.chains.layers(chain.dir);
        let mut maps = Vec::new();
        for (position, layer) in layers.iter().enumerate() {
            let has_failed = |layer: &Arc<Watched>| layer.failed.get().is_some();
            if has_failed(layer) {
                return Some(position);
            }
            match tokio::time::timeout(MAP_WAIT, layer.content.map()).await {
                Ok(Ok(map)) => maps.push(map),
                Ok(Err(ContentError::Impossible(_))) => return Some(position),
                // What lies below it can't be merged by itself, but one above may be known to be impossible.
                Ok(Err(ContentError::Unavailable(_))) | Err(_) => return layers.iter().position(has_failed),
            }
        }
        self.chains.fs().refused_layer(maps).await
    }

    async fn unpack(&self, row: Row, layer: PlainLayer) -> Outcome {
        let id = row.id;
        // Images share snapshots. Whoever has the turn for one waits at most for those of chains below it, so in no circle.
        let _turn = self.turns.take(id).await;
        let now = self.blocking(move |snapshots| Ok(snapshots.records().read(|tx| tx.snapshot_by_id(id))?));
        if now.await?.is_none_or(|now| now.chain.is_none()) {
            return Ok(());
        }
        tracing::info!(snapshot = row.name, layer = %layer.diff_id, "containerd unpacks the layer");
        let mut first = None;
        for blob in layer.by_blob() {
            match self.unpack_blob(&row, &blob).await {
                Ok(()) => return Ok(()),
                // The first blob is the image's own: its failure is the one to tell.
                Err(error) => drop(first.get_or_insert(error)),
            }
        }
        Err(first.unwrap_or_else(|| UnpackError::Refused("no registry is known for the layer".to_owned())))
    }

    async fn unpack_blob(&self, row: &Row, layer: &PlainLayer) -> Outcome {
        let (id, chain) = (row.id, row.chain);
        // What lies below may be demoted, too, and then is another one.
        if let Some(lower) = self.blocking(move |snapshots| snapshots.private_directory(id)).await?.chain {
            self.lower_is_ready(lower).await?;
        }
        let plan = self.blocking(move |snapshots| snapshots.private_directory(id)).await?;
        let of_chain = move |snapshots: &Snapshots| match chain {
            Some(dir) => self::chain(snapshots, dir),
            None => Ok(None),
        };
        let namespace = self.blocking(of_chain).await?.map(|chain| chain.namespace).unwrap_or_default();
        self.containerd.unpack(&namespace, layer, plan.mounts(Via::Full)).await?;
        let unused = self.blocking(move |snapshots| snapshots.make_plain(id)).await?;
        if let Some(dir) = unused {
            self.chains.forget(dir);
        }
        Ok(())
    }

    /// containerd looks into the lower directory while it unpacks. A tree that proves impossible there is demoted first.
    async fn lower_is_ready(&self, dir: u32) -> Outcome {
        let Some(chain) = self.blocking(move |snapshots| chain(snapshots, dir)).await? else { return Ok(()) };
        self.chains.show(&chain);
        match tokio::time::timeout(LOWER_WAIT, self.chains.fs().ready(dir)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(ContentError::Impossible(_))) => Box::pin(self.demote(dir)).await,
            Ok(Err(ContentError::Unavailable(reason))) => Err(UnpackError::Unavailable(reason)),
            Err(_) => {
                Err(UnpackError::Unavailable(format!("the layers below are not there after {LOWER_WAIT:?}")))
            }
        }
    }

    async fn blocking<T, F>(&self, work: F) -> Result<T, UnpackError>
    where
        T: Send + 'static,
        F: FnOnce(&Snapshots) -> Result<T, SnapshotError> + Send + 'static,
    {
        let snapshots = self.snapshots.clone();
        let done = tokio::task::spawn_blocking(move || work(&snapshots)).await;
        let done = done.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
        done.map_err(|error| UnpackError::Unavailable(error.to_string()))
    }
}

/// One at a time for each snapshot.
#[derive(Default)]
struct Turns(Mutex<HashMap<i64, Weak<tokio::sync::Mutex<()>>>>);

impl Turns {
    async fn take(&self, id: i64) -> OwnedMutexGuard<()> {
        let turn = self.of(id);
        turn.lock_owned().await
    }

    fn of(&self, id: i64) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.0.lock();
        turns.retain(|_, turn| turn.strong_count() > 0);
        turns.get(&id).and_then(Weak::upgrade).unwrap_or_else(|| {
            let turn = Arc::default();
            turns.insert(id, Arc::downgrade(&turn));
            turn
        })
    }
}

fn chain(snapshots: &Snapshots, dir: u32) -> Result<Option<Chain>, SnapshotError> {
    Ok(snapshots.records().read(|tx| tx.chain(dir))?)
}

/// The lazy snapshots of this chain and below it, from the layer `first` upwards, parents before children.
fn rows_to_demote(
    snapshots: &Snapshots,
    dir: u32,
    first: usize,
) -> Result<Vec<(Row, PlainLayer)>, SnapshotError> {
    snapshots.records().read(|tx| {
        let mut found: HashMap<i64, (Row, PlainLayer)> = HashMap::new();
        let mut pending = tx.snapshots_of_chain(dir)?;
        while let Some(row) = pending.pop() {
            if let Some(parent) = row.parent {
                pending.extend(tx.snapshot_by_id(parent)?);
            }
            let Some(chain) = row.chain.map(|dir| tx.chain(dir)).transpose()?.flatten() else { continue };
            let position = chain.layers.len().saturating_sub(1);
            if let Some(layer) = chain.layers.last().filter(|_| position >= first) {
                let plain = PlainLayer {
                    diff_id: layer.diff_id,
                    media_type: layer.media_type.clone(),
                    sources: layer.layer_sources(),
                };
                found.insert(row.id, (row, plain));
            }
        }
        let mut rows: Vec<_> = found.into_values().collect();
        // A child is recorded after its parent, so its number is larger.
        rows.sort_by_key(|(row, _)| row.id);
        Ok(rows)
    })
}
