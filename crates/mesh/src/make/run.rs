//! One pass over one blob: from the registry through the inflater into map and pieces, both digests checked.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use darter_layer::{LayerMap, Made, MakeError, PieceSink, decompress};
use darter_registry::Credential;
use darter_store::{StoreError, StoredMap};
use darter_types::{LayerSource, LayerTask, PieceHash, PieceIndex, RateKind};
use prost::Message;

use super::pack::Packer;
use super::stream::{BlobFault, ChunkReader, Feed, connect};
use super::turns::Turn;
use super::{Fault, Flight, Pilot};
use crate::limits::Bucket;
use crate::note::Note;
use crate::origin::OriginError;
use crate::proof;
use crate::shared::Shared;
use crate::upkeep;

/// How often a flight says how far it is.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// Bytes of a blob per second, below which a registry is slow: others don't wait for it. It goes on all the same.
const SLOW_RATE: u64 = 256 << 10;
/// Over how long that is looked at. In tests of this crate it is short.
const PACE_SPAN: Duration = if cfg!(test) { Duration::from_secs(1) } else { Duration::from_secs(30) };

/// Bytes that a blob may inflate to, beside the multiple of those that came: more is a bomb that would take the processors for
/// hours. No layer that means well comes near.
const INFLATED_MIN: u64 = 16 << 30;
const INFLATED_TIMES: u64 = 100;

impl From<OriginError> for Fault {
    fn from(error: OriginError) -> Self {
        match error {
            OriginError::Denied(text) => Fault::Denied(text),
            OriginError::Absent(text) => Fault::Absent(text),
            OriginError::Unavailable(text) => Fault::Failed(text),
        }
    }
}

/// What the blocking side found.
enum Outcome {
    Made(Box<Made>),
    Make(MakeError),
    Store(StoreError),
}

/// Makes the layer of this blob; map, proof and pieces are in the store afterwards.
pub(super) async fn of_source(
    shared: &Arc<Shared>,
    task: LayerTask,
    source: &LayerSource,
    credential: Option<&Credential>,
    flight: &Pilot,
    turn: &mut Turn,
) -> Result<(), Fault> {
    upkeep::room_to_make(shared, source.size).await.map_err(full)?;
    // Until the map is there nobody else knows who needs them.
    let _fresh = shared.store.fresh();
    let made = make_and_keep(shared, task, source, credential, (flight, turn)).await;
    if made.is_err() {
        shared.upkeep.left_orphans();
    }
    made
}

fn full(error: StoreError) -> Fault {
    Fault::Failed(error.to_string())
}

async fn make_and_keep(
    shared: &Arc<Shared>,
    task: LayerTask,
    source: &LayerSource,
    credential: Option<&Credential>,
    (flight, turn): (&Pilot, &mut Turn),
) -> Result<(), Fault> {
    let store = shared.store.clone();
    let work = move |reader: ChunkReader| {
        let mut packer = match Packer::start(store, reader.pressed()) {
            Ok(packer) => packer,
            Err(error) => return Outcome::Make(MakeError::Sink(error)),
        };
        let made = read_all(reader, &mut packer);
        match (packer.finish(), made) {
            (Err(error), _) => Outcome::Store(error),
            (Ok(()), Ok(made)) => Outcome::Made(Box::new(made)),
            (Ok(()), Err(error)) => Outcome::Make(error),
        }
    };
    let made = stream(shared, task, source, credential, (flight, turn), work).await?;
    let is_public = shared.origin.asks_as_anybody(&source.repository)
        && (credential.is_none() || shared.origin.size(source, None).await.is_ok());
    let _signing = flight.course.part("sign and keep map");
    keep(shared, task, source, is_public, made.map).await
}

/// Whether the blob gives the layer; nothing is kept. For a repository that wants to show that it holds a layer.
pub(crate) async fn verify_blob(
    shared: &Arc<Shared>,
    task: LayerTask,
    source: &LayerSource,
    credential: Option<&Credential>,
) -> Result<(), Fault> {
    let mut turn = shared.makes.turns.wait(Some(source)).await;
    let flight = Pilot::new(0);
    let work = |reader| {
        read_all(reader, &mut Nowhere).map_or_else(Outcome::Make, |made| Outcome::Made(Box::new(made)))
    };
    stream(shared, task, source, credential, (&flight, &mut turn), work).await.map(|_| ())
}

struct Nowhere;

impl PieceSink for Nowhere {
    fn piece(&mut self, _: PieceIndex, _: PieceHash, _: &[u8]) -> std::io::Result<()> {
        Ok(())
    }
}

fn read_all(reader: ChunkReader, sink: &mut dyn PieceSink) -> Result<Made, MakeError> {
    let came = reader.came();
    let tar = decompress(reader).map_err(MakeError::Read)?;
    darter_layer::make(Inflated { tar, len: 0, came, least: INFLATED_MIN }, sink)
}

/// The tar stream, which ends with an error when it grows out of all proportion to the blob.
struct Inflated<R> {
    tar: R,
    len: u64,
    came: Arc<AtomicU64>,
    least: u64,
}

impl<R: Read> Read for Inflated<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.tar.read(buffer)?;
        self.len += read as u64;
        let most = self.came.load(Ordering::Relaxed).saturating_mul(INFLATED_TIMES);
        if self.len > most.saturating_add(self.least) {
            return Err(io::Error::other("the blob inflates to more than any layer has"));
        }
        Ok(read)
    }
}

/// Streams the blob through `work` and checks both digests.
async fn stream(
    shared: &Arc<Shared>,
    task: LayerTask,
    source: &LayerSource,
    credential: Option<&Credential>,
    (flight, turn): (&Pilot, &mut Turn),
    work: impl FnOnce(ChunkReader) -> Outcome + Send + 'static,
) -> Result<Made, Fault> {
    let reading = flight.course.part("read blob");
    reading.say("darter.blob", source.blob.to_string());
    reading.say("darter.repository", source.repository.to_string());
    let blob = shared.origin.blob(source, credential).await?;
    if let Some(size) = blob.size.filter(|size| source.size > 0 && *size != source.size) {
        let LayerSource { repository, blob, size: said } = source;
        let text = format!("blob {blob} in {repository} has {size} bytes, its manifest says {said}");
        return Err(Fault::Impossible(text));
    }
    let announced = Some(source.size).filter(|size| *size > 0).or(blob.size);
    let Some(size) = announced else {
        // It might never end.
        let text = format!("neither manifest nor registry says how long blob {} is", source.blob);
        return Err(Fault::Impossible(text));
    };
    let read = Arc::new(AtomicU64::new(0));
    let (source_now, counted) =
        (LayerSource { size, ..source.clone() }, shared.metrics.from_registries.clone());
    let (feed, reader) = connect(blob.chunks, &source_now, read.clone(), counted);
    let worker = tokio::task::spawn_blocking(move || work(reader));
    let limit = shared.limits.of(RateKind::Registry);
    let fed = feed_with_progress(feed, limit, &read, size, flight, turn).await;
    reading.say("darter.bytes", read.load(Ordering::Relaxed));
    let outcome = worker.await.map_err(|error| Fault::Failed(format!("the maker broke: {error}")))?;
    judge(task, source, fed, outcome)
}

async fn feed_with_progress(
    feed: Feed,
    limit: &Bucket,
    read: &AtomicU64,
    size: u64,
    flight: &Pilot,
    turn: &mut Turn,
) -> Result<(), BlobFault> {
    let held = feed.held();
    let mut ticks = tokio::time::interval(PROGRESS_EVERY);
    let mut pace = Pace::new(Instant::now());
    let mut fed = std::pin::pin!(feed.run(limit));
    loop {
        tokio::select! {
            outcome = &mut fed => return outcome,
            _ = ticks.tick() => {
                let read = read.load(Ordering::Relaxed);
                // A registry isn't slow because we don't let it be quick.
                let now = Instant::now();
                let is_slow = pace.is_slow(read, now - held.total(now));
                flight.now.send_replace(Flight::Running { read, size, is_slow });
                if is_slow && !turn.step_aside() {
                    let words = "the registry is too slow while others wait".to_owned();
                    return Err(BlobFault::Origin(OriginError::Unavailable(words)));
                }
            }
        }
    }
}

/// How quickly a blob comes, by its mean over the last whole span of time.
struct Pace {
    since: Instant,
    read: u64,
    is_slow: bool,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { since: now, read: 0, is_slow: false }
    }

    fn is_slow(&mut self, read: u64, now: Instant) -> bool {
        let span = now - self.since;
        if span >= PACE_SPAN {
            self.is_slow = ((read - self.read) as f64) < SLOW_RATE as f64 * span.as_secs_f64();
            (self.since, self.read) = (now, read);
        }
        self.is_slow
    }
}

/// What went wrong first counts: a blob that is not the right one explains whatever the reader found in it.
fn judge(
    task: LayerTask,
    source: &LayerSource,
    fed: Result<(), BlobFault>,
    outcome: Outcome,
) -> Result<Made, Fault> {
    match (fed, outcome) {
        (_, Outcome::Store(error)) => Err(Fault::Failed(error.to_string())),
        (Err(BlobFault::Wrong(text)), _) => Err(Fault::Impossible(text)),
        (Err(BlobFault::Origin(error)), _) => Err(error.into()),
        (Ok(()), Outcome::Make(error @ MakeError::Sink(_))) => Err(Fault::Failed(error.to_string())),
        // The blob is the one that the manifest names: what is wrong with it will not change.
        (Ok(()), Outcome::Make(error)) => Err(Fault::Impossible(format!("blob {}: {error}", source.blob))),
        (Ok(()), Outcome::Made(made)) if made.diff_id != task.diff_id => Err(Fault::Impossible(format!(
            "wrong diff id calculated on extraction {:?}: blob {} in {} was to give {}",
            made.diff_id.to_string(),
            source.blob,
            source.repository,
            task.diff_id
        ))),
        (Ok(()), Outcome::Made(made)) => Ok(*made),
    }
}

/// The map is proven: signs it, if we are a seed, and stores it.
async fn keep(
    shared: &Arc<Shared>,
    task: LayerTask,
    source: &LayerSource,
    is_public: bool,
    mut map: LayerMap,
) -> Result<(), Fault> {
    let (owner, source) = (shared.clone(), source.clone());
    let kept = shared.work.run(move || store(&owner, task, &source, is_public, &mut map)).await;
    kept.map_err(full)
}

fn store(
    shared: &Shared,
    task: LayerTask,
    source: &LayerSource,
    is_public: bool,
    map: &mut LayerMap,
) -> Result<(), StoreError> {
    let root = map.root_hash();
    let mut note = Note::default();
    if let Some(before) = shared.shelf.get(&shared.store, task) {
        note.merge(&before.note());
        if before.root != root {
            // Ours comes from a blob with both digests right, so the other one was a lie.
            shared.store.quarantine(
                task,
                before.root,
                "the same layer, read from the origin, has another map",
            )?;
        }
    }
    note.verified = true;
    note.streamed(source);
    note.prove(&source.repository, is_public);
    let proof = if shared.is_seed() {
        proof::sign(&shared.identity, task, root, source, is_public)
    } else {
        Default::default()
    };
    let encoded = map.encode();
    let stored = StoredMap {
        task,
        root,
        core: encoded.core.into(),
        tar: Some(encoded.tar.into()),
        proof: proof.encode_to_vec(),
        access: note.encode(),
    };
    let shelved = shared.shelf.store(&shared.store, &stored, map)?;
    shared.upkeep.touch(task);
    shared.control.hold(task, shared.is_seed(), &shelved.spans(&shared.store));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_is_slow_by_its_mean_over_a_span() {
        let begun = Instant::now();
        let mut pace = Pace::new(begun);
        let whole = SLOW_RATE * PACE_SPAN.as_secs();
        assert!(!pace.is_slow(0, begun + PACE_SPAN / 2), "it is not known yet");
        assert!(pace.is_slow(whole - 1, begun + PACE_SPAN));
        assert!(pace.is_slow(whole * 2, begun + PACE_SPAN * 3 / 2));
        assert!(!pace.is_slow(whole * 2, begun + PACE_SPAN * 2));
    }

    #[test]
    fn a_bomb_is_an_error() {
        let inflated =
            |least| Inflated { tar: io::repeat(0).take(1000), len: 0, came: Arc::new(5.into()), least };
        let read = |least| io::copy(&mut inflated(least), &mut io::sink());
        assert_eq!(read(500).unwrap(), 1000);
        assert!(read(499).is_err());
    }
}
