//! When all pieces are here: the tar stream is put together again, slowly, and its digest compared with the diff ID. A map
//! that does not stand this test is put in quarantine, and the seed that signed it is reported.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use aws_lc_rs::digest::{Context, SHA256};
use darter_layer::{LayerMap, RebuildError, is_tar_section, rebuild_tar};
use darter_proto::v1::ParentFault;
use darter_types::{DiffId, PieceIndex};

use super::{LOOK_AGAIN, rest};
use crate::layer::{Open, tar_section};
use crate::proof;
use crate::shared::Shared;
use crate::work;

/// It works one part of the time and pauses three, so that nobody notices.
const PAUSES: u32 = 3;
/// How long no container must have read a piece before it goes on, and how long it waits for that, at each piece.
const CALM: Duration = Duration::from_millis(500);
const STAND_BACK_MAX: Duration = Duration::from_secs(2);
/// How long nobody must have given the section until the seed that signed the map is reported.
const WITHHELD_AFTER: Duration = Duration::from_secs(24 * 3600);

/// What came of it.
enum Verdict {
    Right,
    /// The bytes were another layer's, or none at all.
    Wrong(String),
    /// It could not be found out: a piece was lost.
    Unknown(String),
}

/// False if it makes sense to try it again later: nobody gave what is needed, or a piece was lost.
pub(super) async fn run(shared: &Arc<Shared>, open: &Arc<Open>) -> bool {
    if open.verified.load(Ordering::Relaxed) {
        return true;
    }
    rest(shared).await;
    let Some(map) = open.map_now() else { return true };
    let Some(tar) = section(shared, open, &map).await else {
        if open.age() > WITHHELD_AFTER {
            withheld(shared, open, &map).await;
        }
        return false;
    };
    let layer = open.clone();
    // Its own thread, not one of those that work on pieces: it takes long.
    match work::alone("verify", move || rebuild(&layer, &map, &tar)).await {
        Some(Verdict::Right) => note_right(shared, open).await,
        Some(Verdict::Wrong(reason)) => quarantine(shared, open, &reason).await,
        Some(Verdict::Unknown(reason)) => {
            tracing::info!(task = %open.task, reason, "a layer could not be verified as a whole");
            return false;
        }
        None => tracing::warn!(task = %open.task, "the verification of a layer broke"),
    }
    true
}

/// A seed that keeps back what its map could be verified with may have a reason to. Schedulers know better: they hear it from
/// others, too.
async fn withheld(shared: &Arc<Shared>, open: &Arc<Open>, map: &LayerMap) {
    let (owner, task, root) = (shared.clone(), open.task, map.root_hash());
    let work = move || {
        let shelved = owner.shelf.get(&owner.store, task)?;
        proof::verify(&owner.identity, task, root, shelved.proof.as_ref()).ok()
    };
    if let Some(word) = shared.work.run(work).await {
        tracing::warn!(%task, seed = word.seed, "nobody gives what this seed's map can be verified with");
        shared.control.report(task, &word.seed, ParentFault::Refused);
    }
}

async fn section(shared: &Arc<Shared>, open: &Arc<Open>, map: &Arc<LayerMap>) -> Option<Vec<u8>> {
    let (store, task, known) = (shared.store.clone(), open.task, map.clone());
    let stored = move || store.tar(task).ok().flatten().filter(|tar| is_tar_section(&known, tar));
    if let Some(tar) = shared.work.run(stored).await {
        return Some(tar.to_vec());
    }
    match tar_section(open, map).await {
        Ok(tar) => {
            let (store, copy) = (shared.store.clone(), tar.clone());
            if let Err(error) = shared.work.run(move || store.set_tar(task, &copy)).await {
                tracing::debug!(%task, %error, "the section for verification could not be stored");
            }
            Some(tar)
        }
        Err(reason) => {
            tracing::debug!(%task, reason, "nobody gave the section for verification");
            None
        }
    }
}

/// Hashes, and gives the processor away in between.
struct Slow {
    hash: Context,
    since: Instant,
}

impl Write for Slow {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.hash.update(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Slow {
    fn breathe(since: &mut Instant) {
        let worked = since.elapsed();
        if worked > Duration::from_millis(5) {
            std::thread::sleep(worked * PAUSES);
            *since = Instant::now();
        }
    }
}

/// Pauses for a while if containers read, or if the host's disk or link is busy.
fn stand_back(open: &Open) {
    let (demand, begun) = (&open.shared.demand, Instant::now());
    let is_busy = || demand.idle().min(demand.idle_local()) < CALM || open.shared.load.look().any();
    while is_busy() && begun.elapsed() < STAND_BACK_MAX && !open.stop.is_cancelled() {
        std::thread::sleep(LOOK_AGAIN);
    }
}

fn rebuild(open: &Open, map: &LayerMap, tar: &[u8]) -> Verdict {
    let mut out = Slow { hash: Context::new(&SHA256), since: Instant::now() };
    let mut since = out.since;
    let mut read = |index: PieceIndex| {
        Slow::breathe(&mut since);
        stand_back(open);
        if open.stop.is_cancelled() {
            return Err(io::Error::other("the layer was closed"));
        }
        let hash = map.piece(index).hash;
        let plain = open.shared.store.read(&hash).map_err(io::Error::other)?;
        let Some(plain) = plain else {
            open.missed(index.0, &hash);
            return Err(io::Error::other("a piece is not here any more"));
        };
        open.proved(index.0);
        Ok(plain)
    };
    match rebuild_tar(map, tar, &mut read, &mut out) {
        Ok(()) => {}
        Err(error @ (RebuildError::Piece(_) | RebuildError::Write(_))) => {
            return Verdict::Unknown(error.to_string());
        }
        // It is the one that was signed: no layer has it.
        Err(RebuildError::Recipe) => {
            return Verdict::Wrong(format!(
                "the map of {} comes with a recipe for nothing",
                open.task.diff_id
            ));
        }
    }
    let digest: [u8; 32] = out.hash.finish().as_ref().try_into().expect("SHA-256 has 32 bytes");
    let found = DiffId::from_bytes(digest);
    if found == open.task.diff_id {
        return Verdict::Right;
    }
    Verdict::Wrong(format!("the map of {} is of a layer with diff ID {found}", open.task.diff_id))
}

async fn note_right(shared: &Arc<Shared>, open: &Arc<Open>) {
    let (owner, task) = (shared.clone(), open.task);
    shared.work.run(move || owner.shelf.change_note(&owner.store, task, |note| note.verified = true)).await;
    open.verified.store(true, Ordering::Relaxed);
    tracing::debug!(task = %open.task, "all of a layer is here, and it has its diff ID");
}

/// The map lied: nothing of it is used or served any more, and whoever opens the layer anew gets another one.
async fn quarantine(shared: &Arc<Shared>, open: &Arc<Open>, reason: &str) {
    tracing::error!(task = %open.task, reason, "a signed map lied and is put in quarantine");
    let Some(map) = open.map_now() else { return };
    let (owner, task, root, text) = (shared.clone(), open.task, map.root_hash(), reason.to_owned());
    let work = move || {
        let signer = owner
            .shelf
            .get(&owner.store, task)
            .and_then(|shelved| proof::verify(&owner.identity, task, root, shelved.proof.as_ref()).ok());
        owner.shelf.forget(task);
        (signer, owner.store.quarantine(task, root, &text))
    };
    let (signer, quarantined) = shared.work.run(work).await;
    if let Err(error) = quarantined {
        tracing::error!(%error, "the quarantine could not be written down");
    }
    if let Some(word) = signer {
        shared.control.report(open.task, &word.seed, ParentFault::WrongBytes);
    }
    shared.control.drop_task(open.task);
    shared.upkeep.left_orphans();
    open.give_up(reason);
}
