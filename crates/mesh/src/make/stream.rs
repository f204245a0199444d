//! From a registry's asynchronous chunks to a blocking reader, hashed and measured on the way.

use std::io::{self, BufRead, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use aws_lc_rs::digest::{Context, SHA256};
use bytes::{Buf, Bytes};
use darter_daemon::numbers::Counter;
use darter_types::{BlobDigest, LayerSource};
use futures_util::StreamExt;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use crate::limits::{Bucket, Urgency};
use crate::origin::{Chunks, OriginError};

/// Chunks between the network and the reader. A registry that is faster waits.
const CHUNKS_MAX: usize = 64;

/// The blocking end.
pub(super) struct ChunkReader {
    chunks: mpsc::Receiver<io::Result<Bytes>>,
    current: Bytes,
    pressed: Arc<AtomicBool>,
    came: Arc<AtomicU64>,
}

impl ChunkReader {
    /// Bytes of the blob that have come.
    pub(super) fn came(&self) -> Arc<AtomicU64> {
        self.came.clone()
    }

    /// True while the network is ahead of the reader, so that it is the processors that everybody waits for.
    pub(super) fn pressed(&self) -> Arc<AtomicBool> {
        self.pressed.clone()
    }
}

impl BufRead for ChunkReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.current.is_empty() {
            self.pressed.store(self.chunks.len() >= CHUNKS_MAX / 4, Ordering::Relaxed);
            match self.chunks.blocking_recv() {
                Some(chunk) => self.current = chunk?,
                None => break,
            }
        }
        Ok(&self.current)
    }

    fn consume(&mut self, amount: usize) {
        self.current.advance(amount);
    }
}

impl Read for ChunkReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let len = available.len().min(buffer.len());
        buffer[..len].copy_from_slice(&available[..len]);
        self.consume(len);
        Ok(len)
    }
}

/// What is wrong with a blob as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum BlobFault {
    /// It is not the blob that the manifest names.
    Wrong(String),
    Origin(OriginError),
}

/// The asynchronous end: [`Feed::run`] must be polled until it ends.
pub(super) struct Feed {
    chunks: Chunks,
    reader: Option<mpsc::Sender<io::Result<Bytes>>>,
    source: LayerSource,
    read: Arc<AtomicU64>,
    /// All that comes from registries, also of blobs that never come to their end.
    counted: Counter,
    held: Arc<Held>,
}

/// For how long our own limit has kept a blob from being read.
#[derive(Default)]
pub(super) struct Held(Mutex<Holds>);

#[derive(Default)]
struct Holds {
    before: Duration,
    /// When the one began that lasts still.
    since: Option<Instant>,
}

impl Held {
    fn begin(&self, now: Instant) {
        self.0.lock().since = Some(now);
    }

    fn end(&self, now: Instant) {
        let mut holds = self.0.lock();
        let since = holds.since.take().unwrap_or(now);
        holds.before += now.saturating_duration_since(since);
    }

    /// Until now, in all.
    pub(super) fn total(&self, now: Instant) -> Duration {
        let holds = self.0.lock();
        holds.before + holds.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }
}

/// `read` counts the blob's bytes, `counted` those of all blobs.
pub(super) fn connect(
    chunks: Chunks,
    source: &LayerSource,
    read: Arc<AtomicU64>,
    counted: Counter,
) -> (Feed, ChunkReader) {
    let (sender, receiver) = mpsc::channel(CHUNKS_MAX);
    let reader =
        ChunkReader { chunks: receiver, current: Bytes::new(), pressed: Arc::default(), came: read.clone() };
    let (source, held) = (source.clone(), Arc::default());
    (Feed { chunks, reader: Some(sender), source, read, counted, held }, reader)
}

impl Feed {
    pub(super) fn held(&self) -> Arc<Held> {
        self.held.clone()
    }

    /// Passes the blob on, and says whether all of it came and had its size and digest. It reads to the end even if the
    /// reader has given up: what the reader found wrong matters only if the blob is the right one.
    /// No more comes than `limit` allows.
    pub(super) async fn run(mut self, limit: &Bucket) -> Result<(), BlobFault> {
        let mut hash = Context::new(&SHA256);
        let mut total = 0;
        while let Some(chunk) = self.chunks.next().await {
            let chunk = match chunk {
                Ok(chunk) => chunk,
                Err(error) => return Err(self.fail(BlobFault::Origin(error)).await),
            };
            hash.update(&chunk);
            total += chunk.len() as u64;
            self.read.store(total, Ordering::Relaxed);
            self.counted.inc_by(chunk.len() as u64);
            self.held.begin(Instant::now());
            limit.take(chunk.len() as u64, Urgency::Ahead).await;
            self.held.end(Instant::now());
            if self.source.size > 0 && total > self.source.size {
                return Err(self.fail(self.wrong_size("more")).await);
            }
            self.pass_on(Ok(chunk)).await;
        }
        if self.source.size > 0 && total < self.source.size {
            return Err(self.fail(self.wrong_size("fewer")).await);
        }
        let digest: [u8; 32] = hash.finish().as_ref().try_into().expect("SHA-256 has 32 bytes");
        let digest = BlobDigest::from_bytes(digest);
        if digest != self.source.blob {
            let text =
                format!("blob {} in {} has the digest {digest}", self.source.blob, self.source.repository);
            return Err(self.fail(BlobFault::Wrong(text)).await);
        }
        Ok(())
    }

    fn wrong_size(&self, how: &str) -> BlobFault {
        let LayerSource { repository, blob, size } = &self.source;
        BlobFault::Wrong(format!(
            "blob {blob} in {repository} has {how} than the {size} bytes that its manifest says"
        ))
    }

    async fn fail(&mut self, fault: BlobFault) -> BlobFault {
        self.pass_on(Err(io::Error::other("the blob ended early"))).await;
        fault
    }

    async fn pass_on(&mut self, chunk: io::Result<Bytes>) {
        if let Some(reader) = &self.reader
            && reader.send(chunk).await.is_err()
        {
            self.reader = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use darter_types::Digest;
    use futures_util::FutureExt;

    fn source(content: &[u8], size: u64) -> LayerSource {
        let blob = BlobDigest(Digest::of(content));
        LayerSource { repository: "https://registry.example/a".parse().unwrap(), blob, size }
    }

    async fn run(source: LayerSource, parts: &[&'static str]) -> (Result<(), BlobFault>, io::Result<String>) {
        let parts: Vec<_> = parts.iter().map(|part| Ok(Bytes::from_static(part.as_bytes()))).collect();
        let chunks = Box::pin(futures_util::stream::iter(parts));
        let (feed, mut reader) = connect(chunks, &source, Arc::default(), Counter::default());
        let read = tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).map(|_| text)
        });
        (feed.run(&Bucket::default()).await, read.await.unwrap())
    }

    #[test]
    fn a_hold_counts_while_it_lasts() {
        let (held, begun) = (Held::default(), Instant::now());
        let at = |seconds| begun + Duration::from_secs(seconds);
        let total = |seconds| held.total(at(seconds)).as_secs();
        held.begin(at(1));
        assert_eq!([total(1), total(20)], [0, 19]);
        held.end(at(21));
        assert_eq!([total(21), total(30)], [20, 20]);
        held.begin(at(40));
        assert_eq!(total(45), 25);
    }

    #[tokio::test]
    async fn bytes_are_counted_as_they_come() {
        let counted = Counter::default();
        let came = futures_util::stream::iter([Ok(Bytes::from_static(b"one "))]);
        let chunks = Box::pin(came.chain(futures_util::stream::pending()));
        let (feed, _reader) = connect(chunks, &source(b"one two", 7), Arc::default(), counted.clone());
        assert!(feed.run(&Bucket::default()).now_or_never().is_none(), "more is to come");
        assert_eq!(counted.get(), 4);
    }

    #[tokio::test]
    async fn whole_blob_is_passed_on_and_checked() {
        let (fed, read) = run(source(b"one two", 7), &["one ", "", "two"]).await;
        assert_eq!((fed, read.unwrap().as_str()), (Ok(()), "one two"));
        let (fed, _) = run(source(b"one two", 0), &["one two"]).await;
        assert_eq!(fed, Ok(()));
    }

    #[tokio::test]
    async fn other_bytes_or_another_length_are_the_blobs_fault_and_the_reader_learns_it() {
        for (size, part) in [(7, "one tow"), (6, "one two"), (8, "one two")] {
            let (fed, read) = run(source(b"one two", size), &[part]).await;
            assert!(matches!(fed, Err(BlobFault::Wrong(_))), "{fed:?}");
            assert!(read.is_err());
        }
    }
}
