//! Layer maps and what belongs to them, as files.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use bytes::Bytes;
use darter_types::{DiffId, Digest, LayerTask, RootHash};
use parking_lot::Mutex;

use crate::error::StoreError;
use crate::sections::{self, Found};

/// A layer's map and what belongs to it. To the store all of it is bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredMap {
    pub task: LayerTask,
    pub root: RootHash,
    /// What is needed to serve files.
    pub core: Bytes,
    /// What is needed, besides, to put the tar stream together again.
    pub tar: Option<Bytes>,
    /// Who vouches for the root hash.
    pub proof: Vec<u8>,
    /// Who may read.
    pub access: Vec<u8>,
}

pub(crate) struct Maps {
    maps: PathBuf,
    quarantine: PathBuf,
    damaged: AtomicU64,
    // One change of a task's files at a time; each takes a few milliseconds.
    change: Mutex<()>,
}

impl Maps {
    pub(crate) fn open(root: &Path) -> Result<Self, StoreError> {
        let (maps, quarantine) = (root.join("maps"), root.join("quarantine"));
        crate::create_dir(&maps)?;
        crate::create_dir(&quarantine)?;
        for name in names(&maps)? {
            if name.ends_with(".tmp") {
                let _ = fs::remove_file(maps.join(name));
            }
        }
        Ok(Self { maps, quarantine, damaged: AtomicU64::new(0), change: Mutex::new(()) })
    }

    fn path(&self, task: LayerTask, kind: &str) -> PathBuf {
        self.maps.join(format!("{}.{kind}", stem(task)))
    }

    pub(crate) fn put(&self, map: &StoredMap) -> Result<(), StoreError> {
        let _guard = self.change.lock();
        // The map comes last: where it is, the rest is too.
        if let Some(tar) = &map.tar {
            self.write(map.task, "tar", &[tar])?;
        }
        self.write(map.task, "access", &[&map.access])?;
        self.write(map.task, "map", &[map.root.as_bytes(), &map.core, &map.proof])
    }

    fn write(&self, task: LayerTask, kind: &str, content: &[&[u8]]) -> Result<(), StoreError> {
        let path = self.path(task, kind);
        let name = stem(task);
        // Its own name is a section, so that a file that was moved is not taken for another task's.
        let mut all = vec![name.as_bytes()];
        all.extend_from_slice(content);
        write(&path, &all)
    }

    fn read(&self, task: LayerTask, kind: &str, count: usize) -> Result<Option<Vec<Bytes>>, StoreError> {
        let path = self.path(task, kind);
        match sections::read(&path).map_err(|error| StoreError::io(&path, error))? {
            Found::Absent => Ok(None),
            Found::Sections(all) if all.len() == count + 1 && all[0] == stem(task).as_bytes() => {
                Ok(Some(all[1..].to_vec()))
            }
            Found::Sections(_) | Found::Damaged => {
                tracing::warn!(%task, kind, "a stored map is damaged and will be fetched again");
                self.damaged.fetch_add(1, Ordering::Relaxed);
                remove_file(&path)?;
                Ok(None)
            }
        }
    }

    pub(crate) fn get(&self, task: LayerTask) -> Result<Option<StoredMap>, StoreError> {
        let _guard = self.change.lock();
        let Some(map) = self.read(task, "map", 3)? else { return Ok(None) };
        let Ok(root) = RootHash::from_slice(&map[0]) else { return Ok(None) };
        // Without a word on who may read, the caller must find it out anew; the map itself is good.
        let access = self.read(task, "access", 1)?.map_or(Vec::new(), |access| access[0].to_vec());
        let (core, proof) = (map[1].clone(), map[2].to_vec());
        Ok(Some(StoredMap { task, root, core, tar: None, proof, access }))
    }

    pub(crate) fn tar(&self, task: LayerTask) -> Result<Option<Bytes>, StoreError> {
        let _guard = self.change.lock();
        Ok(self.read(task, "tar", 1)?.map(|tar| tar[0].clone()))
    }

    pub(crate) fn set_tar(&self, task: LayerTask, tar: &[u8]) -> Result<(), StoreError> {
        let _guard = self.change.lock();
        self.write(task, "tar", &[tar])
    }

    pub(crate) fn set_access(&self, task: LayerTask, access: &[u8]) -> Result<(), StoreError> {
        let _guard = self.change.lock();
        self.write(task, "access", &[access])
    }

    pub(crate) fn start(&self, task: LayerTask) -> Result<Option<Bytes>, StoreError> {
        let _guard = self.change.lock();
        Ok(self.read(task, "start", 1)?.map(|start| start[0].clone()))
    }

    pub(crate) fn set_start(&self, task: LayerTask, start: &[u8]) -> Result<(), StoreError> {
        let _guard = self.change.lock();
        self.write(task, "start", &[start])
    }

    pub(crate) fn has(&self, task: LayerTask) -> bool {
        self.path(task, "map").exists()
    }

    pub(crate) fn has_tar(&self, task: LayerTask) -> bool {
        self.path(task, "tar").exists()
    }

    pub(crate) fn list(&self) -> Vec<LayerTask> {
        let all = names(&self.maps).unwrap_or_default();
        all.iter().filter_map(|name| task_of(name.strip_suffix(".map")?)).collect()
    }

    pub(crate) fn remove(&self, task: LayerTask) -> Result<(), StoreError> {
        let _guard = self.change.lock();
        ["map", "access", "tar", "start"].iter().try_for_each(|kind| remove_file(&self.path(task, kind)))
    }

    /// When the layer was last used, as far as it was noted: that is its map's time of modification.
    pub(crate) fn last_used(&self, task: LayerTask) -> Option<SystemTime> {
        fs::metadata(self.path(task, "map")).and_then(|found| found.modified()).ok()
    }

    /// Nothing is lost if that fails but the right order of what goes first.
    pub(crate) fn set_last_used(&self, task: LayerTask, at: SystemTime) {
        let file = File::options().append(true).open(self.path(task, "map"));
        if let Err(error) = file.and_then(|file| file.set_modified(at)) {
            tracing::debug!(%task, %error, "when a layer was used can't be noted");
        }
    }

    pub(crate) fn quarantine(&self, task: LayerTask, root: RootHash, reason: &str) -> Result<(), StoreError> {
        let path = self.quarantine_path(task, root);
        write(&path, &[reason.as_bytes()])?;
        self.remove(task)
    }

    /// A note that can't be read still says that the map lied.
    pub(crate) fn quarantined(&self, task: LayerTask, root: RootHash) -> Option<String> {
        match sections::read(&self.quarantine_path(task, root)) {
            Ok(Found::Absent) => None,
            Ok(Found::Sections(all)) => Some(String::from_utf8_lossy(all.first()?).into_owned()),
            Ok(Found::Damaged) | Err(_) => Some("it was found to lie".to_owned()),
        }
    }

    fn quarantine_path(&self, task: LayerTask, root: RootHash) -> PathBuf {
        self.quarantine.join(format!("{}-{root}", stem(task)))
    }

    pub(crate) fn damaged(&self) -> u64 {
        self.damaged.load(Ordering::Relaxed)
    }
}

fn write(path: &Path, content: &[&[u8]]) -> Result<(), StoreError> {
    let len = content.iter().map(|section| section.len() as u64).sum();
    sections::write(path, content).map_err(|error| StoreError::write(path, error, len))
}

fn stem(task: LayerTask) -> String {
    format!("{}-v{}", task.diff_id.0.hex(), task.format)
}

fn task_of(stem: &str) -> Option<LayerTask> {
    let (hex, format) = stem.split_once("-v")?;
    let digest: Digest = format!("sha256:{hex}").parse().ok()?;
    Some(LayerTask { diff_id: DiffId(digest), format: format.parse().ok()? })
}

fn names(dir: &Path) -> Result<Vec<String>, StoreError> {
    let list = || -> io::Result<Vec<String>> {
        let entries = fs::read_dir(dir)?.collect::<io::Result<Vec<_>>>()?;
        Ok(entries.into_iter().filter_map(|entry| entry.file_name().into_string().ok()).collect())
    };
    list().map_err(|error| StoreError::io(dir, error))
}

fn remove_file(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StoreError::io(path, error)),
        _ => Ok(()),
    }
}
