//! The snapshots of this node as containerd sees them: plain ones from [`Snapshots`], lazy ones from [`Lazy`].

use std::sync::Arc;

use crate::lazy::{Answer, Lazy, Wanted};
use crate::snapshot::{
    Filter, Info, Kind, Labels, Mount, MountPlan, NewSnapshot, REF_LABEL, SnapshotError, Snapshots, Usage,
    UsageOf, Via,
};
use crate::start::LazySlot;

type Result<T> = std::result::Result<T, SnapshotError>;

/// See the module's head.
pub struct Node {
    snapshots: Arc<Snapshots>,
    /// Empty where there is no mesh, or not yet: everything is plain.
    slot: LazySlot,
}

impl Node {
    pub(crate) fn new(snapshots: Arc<Snapshots>, slot: LazySlot) -> Self {
        Self { snapshots, slot }
    }

    fn engine(&self) -> Option<&Arc<Lazy>> {
        self.slot.get().map(|parts| &parts.lazy)
    }

    /// Prepare and View. For a layer that containerd need not fetch this fails with `AlreadyExists`, and a committed
    /// snapshot that has the layer is there.
    pub async fn create(&self, namespace: &str, new: NewSnapshot) -> Result<Vec<Mount>> {
        let wanted = wanted(namespace, &new);
        if wanted.is_some() {
            self.blocking(|snapshots| snapshots.room_for_a_pull()).await?;
        }
        if let Some(wanted) = wanted
            && let Some(lazy) = self.engine()
            && lazy.prepare(wanted).await? == Answer::Lazy
        {
            return Err(SnapshotError::AlreadyExists(new.key));
        }
        let plan = self.blocking(move |snapshots| snapshots.create(&new)).await?;
        self.shown(&plan)
    }

    /// Waits, within its bound, until what is to be mounted can be read.
    pub async fn mounts(&self, key: &str) -> Result<Vec<Mount>> {
        if let Some(lazy) = self.engine() {
            lazy.settle(key).await?;
        }
        let key = key.to_owned();
        let plan = self.blocking(move |snapshots| snapshots.mounts(&key)).await?;
        self.shown(&plan)
    }

    pub async fn commit(&self, name: String, key: String, parent: String, labels: Labels) -> Result<()> {
        self.blocking(move |snapshots| snapshots.commit(&name, &key, &parent, labels)).await
    }

    pub async fn remove(&self, key: String) -> Result<()> {
        let unused = self.blocking(move |snapshots| snapshots.remove(&key)).await?;
        if let (Some(dir), Some(lazy)) = (unused, self.engine()) {
            lazy.forget(dir);
        }
        Ok(())
    }

    pub async fn stat(&self, key: String) -> Result<Info> {
        self.blocking(move |snapshots| snapshots.stat(&key)).await
    }

    pub async fn update(&self, name: String, labels: Labels, only: Option<Vec<String>>) -> Result<Info> {
        self.blocking(move |snapshots| snapshots.update(&name, &labels, only.as_deref())).await
    }

    pub async fn list(&self, filters: Vec<Filter>) -> Result<Vec<Info>> {
        self.blocking(move |snapshots| snapshots.list(&filters)).await
    }

    /// Fails for a lazy layer whose map isn't there yet: containerd keeps the first answer for ever, an error not.
    pub async fn usage(&self, key: String) -> Result<Usage> {
        match self.blocking(move |snapshots| snapshots.usage(&key)).await? {
            UsageOf::Known(usage) => Ok(usage),
            UsageOf::Chain(dir) => self.lazy()?.usage(dir),
        }
    }

    pub async fn cleanup(&self) -> Result<()> {
        self.blocking(|snapshots| snapshots.cleanup()).await
    }

    /// The mounts, with the chain below them shown.
    fn shown(&self, plan: &MountPlan) -> Result<Vec<Mount>> {
        let Some(dir) = plan.chain else { return Ok(plan.mounts(Via::Full)) };
        let lazy = self.lazy()?;
        lazy.shown(dir)?;
        lazy.fill(dir);
        Ok(plan.mounts(lazy.via(dir)))
    }

    fn lazy(&self) -> Result<&Arc<Lazy>> {
        let missing = || {
            SnapshotError::Unavailable("the snapshot is lazy, but this node is in no mesh (yet)".to_owned())
        };
        self.engine().ok_or_else(missing)
    }

    async fn blocking<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Snapshots) -> Result<T> + Send + 'static,
    {
        let snapshots = self.snapshots.clone();
        let work = move || work(&snapshots).map_err(|error| snapshots.explain(error));
        let done = tokio::task::spawn_blocking(work).await;
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
    }
}

/// Only a Prepare with the label asks for a layer; AlreadyExists means something else everywhere else.
fn wanted(namespace: &str, new: &NewSnapshot) -> Option<Wanted> {
    let target = new.labels.get(REF_LABEL).filter(|_| new.kind == Kind::Active)?;
    let target = target.parse().ok()?;
    let (parent, labels) = (new.parent.clone(), new.labels.clone());
    Some(Wanted { namespace: namespace.to_owned(), target, parent, labels })
}
