//! Lazy snapshots: decided at Prepare, shown by the file system, waited for at Mounts, demoted if they prove impossible.
//!
//! ```text
//! Prepare ─ Decider ── containerd's content store, mesh.probe        (bounded, one decision an image)
//!     └──── Snapshots.commit_lazy, Chains.show ── FileSystem, mesh   (at once; maps and pieces follow)
//! Mounts ── settle ─── FileSystem.ready                              (bounded)
//!     └──── Demoter ── containerd's content store and diff service   (in a task of its own)
//! ```
//! The rules: no lock and no transaction of ours is held over a call to anybody else, and nothing is written to containerd
//! from within one of its calls. Arrows to the outside are the traits in [`ports`].

mod chains;
mod decide;
mod demote;
mod hydrate;
pub mod ports;
mod pull;
mod report;
mod settle;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use darter_daemon::tasks::Tasks;
use darter_types::{ChainId, DiffId, Digest};
use tokio::sync::mpsc;

use crate::fs::FileSystem;
use crate::metrics::Metrics;
use crate::snapshot::{Chain, Labels, LazySnapshot, SnapshotError, Snapshots, Usage, Via};
use chains::Chains;
use decide::{Decided, Decider, Image, Verdict};
use demote::Demoter;
use ports::{Containerd, LayerMesh, Registries};

pub use report::{ImageReport, LayerReport, ReadReport};

/// Layers that proved impossible wait here for their demotion.
const IMPOSSIBLE_MAX: usize = 256;

type Result<T> = std::result::Result<T, SnapshotError>;

/// A layer that containerd asks for by its chain ID.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub namespace: String,
    pub target: ChainId,
    /// The snapshot below it; empty for the lowest layer.
    pub parent: String,
    pub labels: Labels,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// A committed snapshot has it.
    Lazy,
    /// containerd shall fetch and unpack it.
    Plain,
}

#[derive(Debug, Clone)]
pub struct Options {
    /// How long Prepare may take for a whole image.
    pub prepare_wait: Duration,
    /// How long Mounts may take.
    pub mount_wait: Duration,
}

/// What the lazy half is made of.
pub struct Deps {
    pub snapshots: Arc<Snapshots>,
    pub fs: Arc<FileSystem>,
    pub mesh: Arc<dyn LayerMesh>,
    pub registries: Arc<dyn Registries>,
    pub containerd: Arc<dyn Containerd>,
    pub tasks: Tasks,
    pub metrics: Arc<Metrics>,
}

/// See the module's head.
pub struct Lazy {
    snapshots: Arc<Snapshots>,
    chains: Arc<Chains>,
    decider: Arc<Decider>,
    demoter: Arc<Demoter>,
    registries: Arc<dyn Registries>,
    options: Options,
    metrics: Arc<Metrics>,
}

impl Lazy {
    /// Shows again what containers use, from the records alone, and starts to look after what fails.
    pub fn start(options: Options, deps: Deps) -> Result<Arc<Lazy>> {
        let Deps { snapshots, fs, mesh, registries, containerd, tasks, metrics } = deps;
        mesh.keep(in_use(&snapshots));
        let (impossible, failed) = mpsc::channel(IMPOSSIBLE_MAX);
        let chains = Chains::new(fs, mesh.clone(), tasks.clone(), impossible);
        let decider =
            Decider::new(containerd.clone(), registries.clone(), mesh, options.prepare_wait, tasks.clone());
        let demoter =
            Demoter::new(snapshots.clone(), chains.clone(), containerd, tasks.clone(), metrics.clone());
        tasks.spawn_until_stop("demotions", demote_failed(failed, chains.clone(), demoter.clone()));
        let lazy = Lazy { snapshots, chains, decider, demoter, registries, options, metrics };
        for dir in lazy.snapshots.chains_in_use()? {
            lazy.shown(dir)?;
        }
        Ok(Arc::new(lazy))
    }

    /// Decides, and for a lazy layer sees to its snapshot. Bounded; waits for no map.
    pub async fn prepare(&self, wanted: Wanted) -> Result<Answer> {
        let answer = self.answer(wanted).await?;
        match answer {
            Answer::Lazy => self.metrics.lazy.inc(),
            Answer::Plain => self.metrics.plain.inc(),
        };
        Ok(answer)
    }

    async fn answer(&self, wanted: Wanted) -> Result<Answer> {
        let name = lazy_name(&wanted.namespace, &wanted.parent, &wanted.target.to_string());
        let known = self.known(&name).await?;
        if known == Known::Good {
            return Ok(Answer::Lazy);
        }
        let Decided { _pull, image, verdict, mut step } = self.decide(&wanted).await;
        let mut reason = verdict.reason;
        match image {
            None if known == Known::Untried => return Ok(Answer::Lazy),
            Some((image, position)) if verdict.lazy && self.fits(&image, position, &wanted.parent) => {
                match self.chains.impossible(&image.layers[..=position]) {
                    None => {
                        step.trail().over(self.take(name, &wanted, &image, position)).await?;
                        step.say("darter.answer", || "lazy");
                        tracing::info!(layer = %wanted.target, position, reason, "lazy");
                        return Ok(Answer::Lazy);
                    }
                    Some((diff_id, why)) => {
                        reason = format!("layer {diff_id} can't be served: {why}");
                        amend(
                            &self.snapshots,
                            &image.namespace,
                            image.layers[position].diff_id,
                            reason.clone(),
                        );
                    }
                }
            }
            _ => {}
        }
        step.say("darter.answer", || "plain");
        step.say("darter.reason", || reason.as_str());
        tracing::info!(layer = %wanted.target, reason, "plain: containerd fetches the layer itself");
        Ok(Answer::Plain)
    }

    /// Commits the layer's snapshot, and starts on the whole image.
    async fn take(&self, name: String, wanted: &Wanted, image: &Arc<Image>, position: usize) -> Result<()> {
        self.chains.open_ahead(image);
        let chain = self.commit(name, wanted, image, position).await?;
        self.show(&chain);
        Ok(())
    }

    async fn decide(&self, wanted: &Wanted) -> Decided {
        let report = || {
            let snapshots = self.snapshots.clone();
            move |image: Arc<Image>, verdicts: Arc<Vec<Verdict>>| record(&snapshots, &image, &verdicts)
        };
        let decided = self.decider.decide(wanted, report()).await;
        match &decided.image {
            // There may be another image with the same layers by now, and better places for them.
            Some((image, position)) if self.chains.impossible(&image.layers[..=*position]).is_some() => {
                self.decider.forget(image);
                self.decider.decide(wanted, report()).await
            }
            _ => decided,
        }
    }

    fn show(&self, chain: &Chain) {
        if self.chains.show(chain) {
            self.demoter.forget(chain.dir);
        }
    }

    /// Sees to it that a chain's directory is shown.
    pub fn shown(&self, dir: u32) -> Result<()> {
        if self.chains.is_shown(dir) {
            return Ok(());
        }
        let chain = self.snapshots.records().read(|tx| tx.chain(dir))?;
        let missing =
            || SnapshotError::Unavailable(format!("the layers of directory {dir} are not recorded"));
        self.show(&chain.ok_or_else(missing)?);
        Ok(())
    }

    /// Lets what is missing of a chain arrive, once somebody is about to use it: while nobody did, pieces may have gone.
    pub fn fill(&self, dir: u32) {
        self.chains.layers(dir).iter().for_each(|layer| layer.content.fill());
    }

    /// Through which mount a chain is to be used. As long as its tree isn't known, it may have extended attributes.
    pub fn via(&self, dir: u32) -> Via {
        let bare = self.chains.fs().tree_now(dir).is_some_and(|tree| !tree.has_xattrs());
        if bare { Via::Bare } else { Via::Full }
    }

    /// The last snapshot that showed this chain is gone.
    pub fn forget(&self, dir: u32) {
        self.demoter.forget(dir);
        self.chains.forget(dir);
    }

    /// What the topmost layer of a chain takes when it is unpacked; an error as long as its map isn't there.
    pub fn usage(&self, dir: u32) -> Result<Usage> {
        self.shown(dir)?;
        let layers = self.chains.layers(dir);
        let map = layers.last().and_then(|layer| layer.content.map_now());
        let map =
            map.ok_or_else(|| SnapshotError::Unavailable("the layer's size is not known yet".to_owned()))?;
        let count = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        Ok(Usage { size: count(map.unpacked_size()), inodes: count(u64::from(map.entry_count())) })
    }

    /// What is known of the snapshot of this name.
    async fn known(&self, name: &str) -> Result<Known> {
        let (snapshots, name) = (self.snapshots.clone(), name.to_owned());
        let found =
            tokio::task::spawn_blocking(move || snapshots.records().read(|tx| tx.snapshot(&name))).await;
        let row = found.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        Ok(match row.map(|row| row.chain) {
            None => Known::Nothing,
            Some(None) => Known::Good,
            Some(Some(dir)) if self.chains.fs().tree_now(dir).is_some() => Known::Good,
            Some(Some(dir)) if self.demoter.refusal(dir).is_some() => Known::Bad,
            Some(Some(_)) => Known::Untried,
        })
    }

    /// Whether what lies below is what the image has below this layer. An unpacked parent says so by its name's end.
    fn fits(&self, image: &Image, position: usize, parent: &str) -> bool {
        let below = position.checked_sub(1).map(|below| image.chain_id(below).to_string());
        match below {
            None => parent.is_empty(),
            Some(chain_id) => parent.contains(&chain_id),
        }
    }

    async fn commit(
        &self,
        name: String,
        wanted: &Wanted,
        image: &Arc<Image>,
        position: usize,
    ) -> Result<Chain> {
        let (snapshots, wanted, image) = (self.snapshots.clone(), wanted.clone(), image.clone());
        let committed = tokio::task::spawn_blocking(move || {
            snapshots.commit_lazy(&LazySnapshot {
                name: &name,
                parent: &wanted.parent,
                labels: &wanted.labels,
                namespace: &wanted.namespace,
                chain_id: wanted.target,
                layers: &image.layers[..=position],
            })
        });
        committed.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
    }
}

fn in_use(snapshots: &Arc<Snapshots>) -> ports::InUse {
    let snapshots = snapshots.clone();
    Arc::new(move || {
        let found = snapshots.layers_in_use();
        found.inspect_err(|error| tracing::warn!(%error, "it is not known which layers are in use")).ok()
    })
}

/// Of a snapshot that may be there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    Nothing,
    /// It was demoted, or its tree was merged.
    Good,
    /// It is there, but may still turn out to be somebody's lie about the layer.
    Untried,
    Bad,
}

/// The name of a lazy snapshot: a function of the layer, of what it lies upon, and of the namespace. containerd shares a
/// chain of layers among all images of a namespace, and with no other one: what one may read, another may not.
pub fn lazy_name(namespace: &str, parent: &str, target: &str) -> String {
    let below = Digest::of(format!("{namespace}\0{parent}").as_bytes()).hex();
    format!("darter/{}/{target}", &below[..16])
}

async fn demote_failed(mut failed: mpsc::Receiver<DiffId>, chains: Arc<Chains>, demoter: Arc<Demoter>) {
    while let Some(diff_id) = failed.recv().await {
        for dir in chains.failed_for(diff_id) {
            demoter.start(dir);
        }
    }
}

/// Writes a decision down, for `darter why`; a failure costs only the explanation.
fn record(snapshots: &Arc<Snapshots>, image: &Image, verdicts: &[Verdict]) {
    let age = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let decided_ns = i64::try_from(age.as_nanos()).unwrap_or(i64::MAX);
    let decision = image.decision(decided_ns, verdicts);
    let snapshots = snapshots.clone();
    tokio::task::spawn_blocking(move || {
        if let Err(error) = snapshots.records().write(|tx| tx.save_decision(&decision)) {
            tracing::warn!(%error, "a decision was not recorded");
        }
    });
}

/// Writes down that a layer isn't lazy after all, in this namespace.
fn amend(snapshots: &Arc<Snapshots>, namespace: &str, diff_id: DiffId, reason: String) {
    let (snapshots, namespace) = (snapshots.clone(), namespace.to_owned());
    tokio::task::spawn_blocking(move || {
        if let Err(error) = snapshots.records().write(|tx| tx.amend_decisions(&namespace, diff_id, &reason)) {
            tracing::warn!(%error, "a decision was not amended");
        }
    });
}

#[cfg(test)]
mod tests;
