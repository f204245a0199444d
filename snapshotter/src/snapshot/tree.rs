//! The operations on snapshots.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::mounts::{Lowers, Paths};
use super::records::{Row, Tx};
use super::{
    Chain, ChainLayer, Filter, Info, Kind, Labels, MountPlan, Overlay, Records, SnapshotError, Usage, Via,
    disk_usage,
};
use super::{remove, room};
use darter_types::{ChainId, DiffId};

type Result<T> = std::result::Result<T, SnapshotError>;

/// The label by which containerd asks for a layer that need not be fetched.
pub const REF_LABEL: &str = "containerd.io/snapshot.ref";

/// What is wanted of Prepare and View.
#[derive(Debug, Clone)]
pub struct NewSnapshot {
    pub kind: Kind,
    pub key: String,
    /// Empty for none.
    pub parent: String,
    pub labels: Labels,
}

/// Where the usage of a snapshot comes from.
#[derive(Debug, PartialEq, Eq)]
pub enum UsageOf {
    Known(Usage),
    /// The topmost layer of this chain.
    Chain(u32),
}

/// The tree of snapshots below one root.
pub struct Snapshots {
    records: Arc<Records>,
    root: PathBuf,
    paths: Paths,
    overlay: Overlay,
}

impl Snapshots {
    /// Opens what is below `root`, which must exist.
    pub fn open(root: &Path, overlay: Overlay) -> Result<Snapshots> {
        let (records, is_unknown) = Records::open(root)?;
        let paths = Paths::new(root);
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(paths.snapshots()).map_err(SnapshotError::disk("s"))?;
        let snapshots = Snapshots { records: Arc::new(records), root: root.to_owned(), paths, overlay };
        if is_unknown {
            snapshots.set_aside(&root.join("lost"))?;
        }
        // What can't be removed must not keep the node from starting; containerd asks for it again.
        if let Err(error) = snapshots.cleanup() {
            tracing::warn!(%error, "the directory of a snapshot that is no more stays");
        }
        Ok(snapshots)
    }

    pub fn records(&self) -> &Arc<Records> {
        &self.records
    }

    /// A mount point of the file system of merged layers.
    pub fn merged(&self, via: Via) -> PathBuf {
        self.paths.merged(via)
    }

    /// Whether there is room for a pull.
    pub fn room_for_a_pull(&self) -> Result<()> {
        room::for_a_pull(&self.root)
    }

    /// A full disk is told with its directory and what is missing there.
    pub fn explain(&self, error: SnapshotError) -> SnapshotError {
        if !error.is_full() {
            return error;
        }
        tracing::error!(%error, "an operation on snapshots found no room");
        self.room_for_a_pull().err().unwrap_or(error)
    }

    /// Creates an active snapshot or a view.
    pub fn create(&self, new: &NewSnapshot) -> Result<MountPlan> {
        let (row, lowers) = self.records.write(|tx| {
            absent(tx, &new.key)?;
            let parent = committed_parent(tx, &new.parent)?;
            let mut row =
                Row::new(&new.key, new.kind, parent.map(|row| row.id), new.labels.clone(), now_ns());
            tx.insert_snapshot(&mut row)?;
            let lowers = lowers(tx, row.parent)?;
            self.make_directories(&row, &lowers)?;
            Ok::<_, SnapshotError>((row, lowers))
        })?;
        Ok(self.plan(row.id, row.kind == Kind::Active, lowers))
    }

    /// How to mount an active snapshot or a view; cheap, and the same each time.
    pub fn mounts(&self, key: &str) -> Result<MountPlan> {
        let (row, lowers) = self.records.read(|tx| {
            let row = existing(tx, key)?;
            if row.kind == Kind::Committed {
                return Err(SnapshotError::Precondition(format!(
                    "snapshot {key:?} is committed, it has no mounts"
                )));
            }
            let lowers = lowers(tx, row.parent)?;
            Ok((row, lowers))
        })?;
        Ok(self.plan(row.id, row.kind == Kind::Active, lowers))
    }

    /// Makes an active snapshot a committed one. `parent` is empty, or names what a snapshot without parent is put upon.
    pub fn commit(&self, name: &str, key: &str, parent: &str, labels: Labels) -> Result<()> {
        let active = self.records.read(|tx| existing(tx, key))?;
        let usage = self.scan(active.id)?;
        self.records.write(|tx| {
            let mut row = existing(tx, key)?;
            absent(tx, name)?;
            if row.kind != Kind::Active {
                return Err(SnapshotError::Precondition(format!("snapshot {key:?} is not active")));
            }
            row.parent = rebased(tx, &row, parent)?;
            let now = now_ns();
            row = Row {
                name: name.to_owned(),
                kind: Kind::Committed,
                labels,
                created_ns: now,
                updated_ns: now,
                ..row
            };
            row.usage = Some((usage.size, usage.inodes));
            Ok(tx.save_snapshot(&row)?)
        })
    }

    /// Records a committed snapshot whose content is the topmost of `layers`, over `parent`. If it is there already that
    /// is fine. Returns the chain to show.
    pub fn commit_lazy(&self, lazy: &LazySnapshot<'_>) -> Result<Chain> {
        self.records.write(|tx| {
            let chain = tx.chain_for(lazy.namespace, lazy.chain_id, lazy.layers)?;
            if tx.snapshot(lazy.name)?.is_none() {
                let parent = committed_parent(tx, lazy.parent)?.map(|row| row.id);
                let mut row = Row::new(lazy.name, Kind::Committed, parent, lazy.labels.clone(), now_ns());
                row.chain = Some(chain.dir);
                tx.insert_snapshot(&mut row)?;
            }
            Ok(chain)
        })
    }

    /// Forgets a snapshot; its directory stays until [`Self::cleanup`]. Returns a chain that nobody needs any more.
    pub fn remove(&self, key: &str) -> Result<Option<u32>> {
        self.records.write(|tx| {
            let row = existing(tx, key)?;
            if tx.has_children(row.id)? {
                return Err(SnapshotError::Precondition(format!(
                    "cannot remove snapshot {key:?} with children"
                )));
            }
            tx.delete_snapshot(row.id)?;
            drop_unused_chain(tx, row.chain)
        })
    }

    pub fn stat(&self, key: &str) -> Result<Info> {
        self.records.read(|tx| {
            let row = existing(tx, key)?;
            info(tx, row)
        })
    }

    /// Replaces all labels, or those that `only` names; an empty value removes a label.
    pub fn update(&self, name: &str, labels: &Labels, only: Option<&[String]>) -> Result<Info> {
        self.records.write(|tx| {
            let mut row = existing(tx, name)?;
            match only {
                None => row.labels = labels.clone(),
                Some(keys) => {
                    for key in keys {
                        row.labels.insert(key.clone(), labels.get(key).cloned().unwrap_or_default());
                    }
                }
            }
            row.labels.retain(|_, value| !value.is_empty());
            row.updated_ns = now_ns().max(row.updated_ns + 1);
            tx.save_snapshot(&row)?;
            info(tx, row)
        })
    }

    /// All snapshots that match one of `filters`, parents before their children.
    pub fn list(&self, filters: &[Filter]) -> Result<Vec<Info>> {
        let rows = self.records.read(|tx| tx.snapshots())?;
        let name_of: std::collections::HashMap<i64, String> =
            rows.iter().map(|row| (row.id, row.name.clone())).collect();
        let infos = rows.into_iter().map(|row| {
            let parent = row.parent.and_then(|id| name_of.get(&id)).cloned().unwrap_or_default();
            row.info(parent)
        });
        Ok(infos.filter(|info| Filter::any(filters, info)).collect())
    }

    /// What a snapshot itself takes, without its parents.
    pub fn usage(&self, key: &str) -> Result<UsageOf> {
        let row = self.records.read(|tx| existing(tx, key))?;
        match (row.kind, row.chain, row.usage()) {
            (Kind::Committed, Some(dir), _) => Ok(UsageOf::Chain(dir)),
            (Kind::Committed, None, Some(usage)) => Ok(UsageOf::Known(usage)),
            _ => self.scan(row.id).map(UsageOf::Known),
        }
    }

    /// Frees the directories of snapshots that are no more.
    ///
    /// One that can't be removed keeps no other from it; the first error is the answer.
    pub fn cleanup(&self) -> Result<()> {
        let mut outcome = Ok(());
        for (id, path) in self.numbered_directories()? {
            // A snapshot that is being created has its row before its directory, so none is taken for garbage.
            if self.records.read(|tx| tx.snapshot_by_id(id))?.is_none() {
                let removed = remove::tree(&path).map_err(SnapshotError::disk(path.display()));
                outcome = outcome.and(removed);
            }
        }
        outcome
    }

    /// The chains that lie directly below an active snapshot or a view.
    pub fn chains_in_use(&self) -> Result<Vec<u32>> {
        self.records.read(|tx| {
            let mut dirs = std::collections::BTreeSet::new();
            for row in tx.snapshots()?.iter().filter(|row| row.kind != Kind::Committed) {
                dirs.extend(lowers(tx, row.parent)?.chain);
            }
            Ok(dirs.into_iter().collect())
        })
    }

    /// The layers of those chains.
    pub fn layers_in_use(&self) -> Result<HashSet<DiffId>> {
        let dirs = self.chains_in_use()?;
        self.records.read(|tx| {
            let mut layers = HashSet::new();
            for dir in dirs {
                let chain = tx.chain(dir)?;
                layers.extend(chain.into_iter().flat_map(|chain| chain.layers).map(|layer| layer.diff_id));
            }
            Ok(layers)
        })
    }

    /// An empty place for the content of the lazy snapshot `id`, over what lies below it, and its mounts. The snapshot
    /// itself shows its chain until [`Self::make_plain`].
    pub fn private_directory(&self, id: i64) -> Result<MountPlan> {
        let (row, lowers) = self.records.read(|tx| {
            let row = by_id(tx, id)?;
            let lowers = lowers(tx, row.parent)?;
            Ok::<_, SnapshotError>((row, lowers))
        })?;
        self.make_directories(&row, &lowers)?;
        Ok(self.plan(id, true, lowers))
    }

    /// From now on the snapshot `id` is what lies in its private directory. Returns a chain that nobody needs any more.
    pub fn make_plain(&self, id: i64) -> Result<Option<u32>> {
        let usage = self.scan(id)?;
        self.records.write(|tx| {
            let mut row = by_id(tx, id)?;
            let chain = row.chain.take();
            row.usage = Some((usage.size, usage.inodes));
            tx.save_snapshot(&row)?;
            drop_unused_chain(tx, chain)
        })
    }

    fn plan(&self, id: i64, writable: bool, lowers: Lowers) -> MountPlan {
        MountPlan::new(id, writable, lowers, &self.paths, self.overlay)
    }

    /// Makes the directories of a snapshot anew: what a crash or an attempt that failed left there goes.
    ///
    /// The upper directory has the owner of the one below it, as the root of the container has.
    fn make_directories(&self, row: &Row, lowers: &Lowers) -> Result<()> {
        let base = self.paths.snapshot(row.id);
        let make = |path: &Path, mode| {
            let made = fs::DirBuilder::new().mode(mode).create(path);
            made.and_then(|()| fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)))
        };
        let disk = || SnapshotError::disk(base.display());
        remove::tree(&base).map_err(disk())?;
        make(&base, 0o700).map_err(disk())?;
        let upper = self.paths.upper(row.id);
        make(&upper, 0o755).map_err(disk())?;
        if row.kind != Kind::View {
            make(&self.paths.work(row.id), 0o711).map_err(disk())?;
        }
        // The root of a chain belongs to root: containerd ignores an entry for "/" when it unpacks.
        if let Some(id) = lowers.plain.first() {
            let below = fs::symlink_metadata(self.paths.upper(*id)).map_err(disk())?;
            chown(&upper, Some(below.uid()), Some(below.gid())).map_err(disk())?;
        }
        Ok(())
    }

    fn scan(&self, id: i64) -> Result<Usage> {
        let path = self.paths.upper(id);
        disk_usage(&path).map_err(SnapshotError::disk(path.display()))
    }

    fn numbered_directories(&self) -> Result<Vec<(i64, PathBuf)>> {
        let disk = || SnapshotError::disk(self.paths.snapshots().display());
        let mut found = Vec::new();
        for entry in fs::read_dir(self.paths.snapshots()).map_err(disk())? {
            let entry = entry.map_err(disk())?;
            if let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) {
                found.push((id, entry.path()));
            }
        }
        Ok(found)
    }

    /// After damaged or lost records nobody knows what the directories are; they may hold somebody's work.
    fn set_aside(&self, lost: &Path) -> Result<()> {
        let place = lost.join(now_ns().to_string());
        for (id, path) in self.numbered_directories()? {
            fs::create_dir_all(&place).map_err(SnapshotError::disk(place.display()))?;
            fs::rename(&path, place.join(id.to_string())).map_err(SnapshotError::disk(path.display()))?;
            tracing::warn!(from = %path.display(), to = %place.display(), "kept the files of an unknown snapshot");
        }
        Ok(())
    }
}

/// A snapshot that is committed at once, without content of its own.
pub struct LazySnapshot<'a> {
    pub name: &'a str,
    pub parent: &'a str,
    pub labels: &'a Labels,
    pub namespace: &'a str,
    pub chain_id: ChainId,
    pub layers: &'a [ChainLayer],
}

fn now_ns() -> i64 {
    let age = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(age.as_nanos()).unwrap_or(i64::MAX)
}

fn existing(tx: &Tx<'_>, key: &str) -> Result<Row> {
    tx.snapshot(key)?.ok_or_else(|| SnapshotError::NotFound(key.to_owned()))
}

fn by_id(tx: &Tx<'_>, id: i64) -> Result<Row> {
    tx.snapshot_by_id(id)?.ok_or_else(|| SnapshotError::NotFound(format!("number {id}")))
}

fn absent(tx: &Tx<'_>, key: &str) -> Result<()> {
    match tx.snapshot(key)? {
        Some(_) => Err(SnapshotError::AlreadyExists(key.to_owned())),
        None => Ok(()),
    }
}

fn committed_parent(tx: &Tx<'_>, parent: &str) -> Result<Option<Row>> {
    if parent.is_empty() {
        return Ok(None);
    }
    let row = existing(tx, parent)?;
    if row.kind != Kind::Committed {
        return Err(SnapshotError::Invalid(format!("parent {parent:?} is not a committed snapshot")));
    }
    Ok(Some(row))
}

/// The parent that a commit gives to `row`.
fn rebased(tx: &Tx<'_>, row: &Row, parent: &str) -> Result<Option<i64>> {
    let wanted = committed_parent(tx, parent)?.map(|row| row.id);
    match (row.parent, wanted) {
        (present, None) => Ok(present),
        (None, wanted) => Ok(wanted),
        (present, wanted) if present == wanted => Ok(present),
        _ => {
            Err(SnapshotError::Invalid(format!("snapshot {:?} has another parent than {parent:?}", row.name)))
        }
    }
}

fn lowers(tx: &Tx<'_>, mut next: Option<i64>) -> Result<Lowers> {
    let mut lowers = Lowers::default();
    while let Some(id) = next {
        let row = by_id(tx, id)?;
        if row.chain.is_some() {
            lowers.chain = row.chain;
            break;
        }
        lowers.plain.push(id);
        next = row.parent;
    }
    Ok(lowers)
}

fn info(tx: &Tx<'_>, row: Row) -> Result<Info> {
    let parent = match row.parent {
        Some(id) => by_id(tx, id)?.name,
        None => String::new(),
    };
    Ok(row.info(parent))
}

fn drop_unused_chain(tx: &Tx<'_>, chain: Option<u32>) -> Result<Option<u32>> {
    let Some(dir) = chain else { return Ok(None) };
    if !tx.snapshots_of_chain(dir)?.is_empty() {
        return Ok(None);
    }
    tx.delete_chain(dir)?;
    Ok(Some(dir))
}

#[cfg(test)]
mod tests;
