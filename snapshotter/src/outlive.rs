//! Mounts that outlive the daemon: taken over at the start, left at a stop while containers use them, and taken away when
//! nobody needs them or somebody says so ([`unmount`]).

use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

use crate::fuse::{self, Live, MountError, Mounted, Mountpoint};
use crate::keep::{self, KeepError, Keeper, Kept, Launch};
use crate::snapshot::{Records, RecordsError};

/// How long an earlier daemon may take to end.
const END_WAIT: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The root of a daemon, for itself alone: two that serve the same mounts would answer for each other. Taken before anything else
/// is started, and kept as long as this lives.
pub struct RootLock(#[expect(dead_code, reason = "it is locked as long as it is open")] File);

/// Why a root can't be worked in.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    #[error("{}: {error}", path.display())]
    Place { path: PathBuf, error: io::Error },
    /// `holder` is the other's process, if it has said so: behind a space, in brackets.
    #[error("{} is in use by another daemon of Darter{holder}: stop it first", root.display())]
    InUse { root: PathBuf, holder: String },
}

impl RootLock {
    fn try_take(root: &Path) -> io::Result<Option<RootLock>> {
        let mut file = Self::file(root)?;
        match file.try_lock() {
            Ok(()) => {
                // For people alone: on a full disk it is missing.
                let _ = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
                Ok(Some(RootLock(file)))
            }
            Err(std::fs::TryLockError::WouldBlock) => Ok(None),
            Err(std::fs::TryLockError::Error(error)) => Err(error),
        }
    }

    fn file(root: &Path) -> io::Result<File> {
        let file =
            File::options().create(true).truncate(false).read(true).write(true).open(root.join("lock"))?;
        // Whoever may read it may lock it, and keep the next daemon from starting.
        file.set_permissions(Permissions::from_mode(0o600))?;
        Ok(file)
    }

    /// Makes the root if it isn't there, and waits for an earlier daemon that is ending.
    pub async fn take(root: &Path) -> Result<RootLock, RootError> {
        let place = |error| RootError::Place { path: root.to_owned(), error };
        std::fs::create_dir_all(root).map_err(place)?;
        let (deadline, mut told) = (Instant::now() + END_WAIT, false);
        loop {
            if let Some(lock) = Self::try_take(root).map_err(place)? {
                return Ok(lock);
            }
            let holder = holder(root);
            if !std::mem::replace(&mut told, true) {
                tracing::info!(root = %root.display(), holder, "waiting for the daemon that works here to end");
            }
            if Instant::now() > deadline {
                return Err(RootError::InUse { root: root.to_owned(), holder });
            }
            sleep(LOOK_EVERY).await;
        }
    }
}

/// The process that has the root, ` (process 7)`; empty if it can't be told.
fn holder(root: &Path) -> String {
    let mut text = String::new();
    let read = RootLock::file(root).and_then(|file| file.take(16).read_to_string(&mut text));
    match read.ok().and_then(|_| text.parse::<u32>().ok()) {
        Some(pid) => format!(" (process {pid})"),
        None => String::new(),
    }
}

/// Mounts and those who keep them.
pub(crate) struct Outliving {
    keeper: Keeper,
    left: Mutex<Kept>,
}

impl Outliving {
    /// Waits for other processes for a moment; for half a minute where one has the mounts of containers and doesn't answer.
    pub async fn open(root: &Path, launch: Launch) -> Result<Outliving, KeepError> {
        let root = root.to_owned();
        let opened = tokio::task::spawn_blocking(move || Keeper::open(&root, launch)).await;
        let (keeper, left) = opened.expect("it doesn't panic, and nobody cancels it")?;
        Ok(Outliving { keeper, left: Mutex::new(left) })
    }

    /// A mount at each of `points`: the one that an earlier process left there, or a new one. What is to outlive this process goes
    /// by the names that come with them, to [`Outliving::keep`].
    pub fn mount(
        &self,
        points: &[Mountpoint],
        records: &Records,
    ) -> Result<(Vec<Mounted>, Vec<String>), MountError> {
        let (mut mounts, mut names) = (Vec::new(), Vec::new());
        for point in points {
            let name = name(point);
            let mounted = match self.left(point, &name, records) {
                Some(mounted) => mounted,
                None => self.fresh(point, &name, records)?,
            };
            let what = [(name.clone(), Some(mounted.descriptor())), (keep::notes_of(&name), mounted.notes())];
            for (name, descriptor) in what.into_iter().filter_map(|(name, there)| Some((name, there?))) {
                self.keeper.remember(&name, descriptor);
                names.push(name);
            }
            mounts.push(mounted);
        }
        Ok((mounts, names))
    }

    /// Whether all of `names` outlive this process from now on. Waits half a minute at most for a holder that is late, on a
    /// thread that asks no more than once for each when this is dropped.
    pub async fn keep(&self, names: Vec<String>) -> bool {
        let (keeper, (tell, told)) = (self.keeper.clone(), oneshot::channel());
        tokio::task::spawn_blocking(move || {
            let kept = keeper.keep(&names, &|| !tell.is_closed());
            // Nobody may want to know it any more.
            let _ = tell.send(kept);
        });
        let outlive = told.await.unwrap_or(false);
        if !outlive {
            tracing::error!(
                "nobody else keeps the mounts: containers lose their files when this process ends"
            );
        }
        outlive
    }

    fn left(&self, point: &Mountpoint, name: &str, records: &Records) -> Option<Mounted> {
        let (descriptor, notes) = {
            let mut left = self.left.lock();
            (left.remove(name)?, left.remove(&keep::notes_of(name)))
        };
        let read = records.read(|tx| tx.mount(name));
        let live: Live = read
            .inspect_err(|error: &RecordsError| tracing::warn!(%error, name, "a mount is not known"))
            .ok()??;
        let mounted = Mounted::resumed(point, descriptor, live, notes)?;
        tracing::info!(place = %point.path.display(), connection = live.connection, "taken over from an earlier process");
        Some(mounted)
    }

    fn fresh(&self, point: &Mountpoint, name: &str, records: &Records) -> Result<Mounted, MountError> {
        // Whoever still waits for a connection that nobody can go on with learns that it has ended.
        self.keeper.forget(name);
        self.keeper.forget(&keep::notes_of(name));
        let mounted = Mounted::fresh(point)?;
        if let Err(error) = records.write(|tx| tx.save_mount(name, &mounted.live())) {
            let error: RecordsError = error;
            tracing::error!(%error, name, "the mount is not recorded: containers that use it won't survive this process");
        }
        Ok(mounted)
    }

    /// Whether an earlier process left something that [`Outliving::mount`] has not taken.
    pub fn has_left(&self) -> bool {
        !self.left.lock().is_empty()
    }

    /// Nothing is to outlive this process any more.
    pub fn end(&self) {
        self.keeper.end();
    }
}

/// Under which a mount is kept and recorded.
fn name(point: &Mountpoint) -> String {
    point.path.file_name().expect("a mount point has a name").to_string_lossy().into_owned()
}

/// Why mounts stay.
#[derive(Debug, thiserror::Error)]
pub enum UnmountError {
    #[error("{}: {error}", path.display())]
    Place { path: PathBuf, error: io::Error },
    #[error("the daemon of {} runs; stop it first", .0.display())]
    Running(PathBuf),
    #[error("containers use lazy images: {}", list(.0))]
    InUse(Vec<PathBuf>),
}

fn list(paths: &[PathBuf]) -> String {
    let words: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
    words.join(", ")
}

/// Takes away what a daemon that doesn't run any more has left mounted below `root`, and ends the holder. Returns what was
/// mounted. Containers that still use it are a reason against it, unless `force` is set: then every read of theirs that the
/// kernel hasn't cached fails.
pub fn unmount(root: &Path, force: bool) -> Result<Vec<PathBuf>, UnmountError> {
    let fail = |error| UnmountError::Place { path: root.to_owned(), error };
    let _lock =
        RootLock::try_take(root).map_err(fail)?.ok_or_else(|| UnmountError::Running(root.to_owned()))?;
    let mounts = fuse::mounts_below(root).map_err(fail)?;
    let users: Vec<_> = mounts.iter().flat_map(|mount| mount.users.clone()).collect();
    if !users.is_empty() && !force {
        return Err(UnmountError::InUse(users));
    }
    for mount in &mounts {
        mount.take_away();
    }
    keep::end_holder_below(root);
    Ok(mounts.into_iter().map(|mount| mount.path).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_is_for_one_and_names_its_process() {
        let root = tempfile::tempdir().unwrap();
        let lock = RootLock::try_take(root.path()).unwrap().unwrap();
        assert!(RootLock::try_take(root.path()).unwrap().is_none());
        let words = RootError::InUse { root: "/r".into(), holder: holder(root.path()) }.to_string();
        let id = std::process::id();
        assert_eq!(words, format!("/r is in use by another daemon of Darter (process {id}): stop it first"));
        drop(lock);
        assert!(RootLock::try_take(root.path()).unwrap().is_some());
    }

    #[test]
    fn a_lock_that_names_nobody_names_nobody() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("lock"), "no number at all, and far too long").unwrap();
        assert_eq!(holder(root.path()), "");
    }
}
