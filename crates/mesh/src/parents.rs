//! Connections to parents: one for each address, shared by all layers, closed when no layer needs it any more.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use darter_daemon::traces::Trail;
use darter_identity::TlsStream;
use darter_store::StoredPiece;
use darter_types::{LayerTask, Role};
use parking_lot::Mutex;
use tokio::io::{AsyncWrite, AsyncWriteExt, ReadHalf};
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::bits::Bits;
use crate::frames::{ALPN, ALPNS, Answer, Ask, Refusal, Request, read_answer};
use crate::shared::Shared;

/// Pieces that are asked of one parent at the same time, 4 MiB at most: enough to keep a link of 10 Gbit/s and 3 ms busy.
const IN_FLIGHT_MAX: usize = 16;

/// Requests that wait to be written.
const REQUESTS_MAX: usize = 64;

/// A parent that takes no request for so long is left: those who wait ask another at once.
const WRITE_DEADLINE: Duration = if cfg!(test) { Duration::from_secs(1) } else { Duration::from_secs(10) };

/// Weights of a new measurement in the mean time of an answer: one part in this many.
const SMOOTHING: u64 = 8;

/// How long a measurement says something about the next answer.
const MEASURE_FOR: Duration = Duration::from_secs(5);

/// A parent that sends something may take longer than its child's patience; but no more than twice that, and this for each of
/// the pieces that were asked for: a link of 512 kbit/s needs so long for 256 KiB.
const PIECE_TIME_MAX: Duration = Duration::from_secs(4);

/// Why a parent gave no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("the parent has closed the connection")]
    Closed,
    #[error("the parent is too slow")]
    Slow,
    #[error("the parent sends too little")]
    Trickle,
    #[error("the parent refused: {0:?}")]
    Refused(Refusal),
    #[error("the parent's answer was not what was asked for")]
    Protocol,
}

/// A connection to a parent.
pub(crate) struct Link {
    /// Its name in the cluster.
    pub node: String,
    /// It knows what to do with a trail.
    takes_trails: bool,
    /// It has an upload slot of ours for each piece that was asked for.
    slots: Arc<Semaphore>,
    requests: mpsc::Sender<Bytes>,
    waiting: Arc<Mutex<HashMap<u32, oneshot::Sender<Answer>>>>,
    next: AtomicU32,
    start: Instant,
    /// When a byte last came, in milliseconds since `start`.
    heard_ms: Arc<AtomicU64>,
    /// How long an answer takes, on average, in microseconds; 0 before the first.
    answer_us: AtomicU64,
    measured_ms: AtomicU64,
    closed: CancellationToken,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.closed.cancel();
    }
}

/// Whoever waits for an answer; what comes after it was dropped is thrown away.
struct Expectation<'a> {
    link: &'a Link,
    id: u32,
}

impl Drop for Expectation<'_> {
    fn drop(&mut self) {
        self.link.waiting.lock().remove(&self.id);
    }
}

impl Link {
    async fn connect(shared: &Arc<Shared>, address: &str) -> io::Result<Arc<Self>> {
        let roles = [Role::Node, Role::Seed];
        let (stream, member) =
            shared.identity.connect_any(address, &roles, &ALPNS).await.map_err(io::Error::other)?;
        let takes_trails = stream.get_ref().1.alpn_protocol() == Some(ALPN);
        let (requests, queue) = mpsc::channel(REQUESTS_MAX);
        let (waiting, heard_ms) = (Arc::<Mutex<HashMap<_, _>>>::default(), Arc::<AtomicU64>::default());
        let (start, closed) = (Instant::now(), CancellationToken::new());
        let run = run(stream, queue, waiting.clone(), heard_ms.clone(), start, closed.clone());
        let guard = closed.clone().drop_guard();
        shared.tasks.spawn_alone("link", async move {
            let _closed = guard;
            run.await;
        });
        Ok(Arc::new(Self {
            node: member.node.to_string(),
            takes_trails,
            slots: Arc::new(Semaphore::new(IN_FLIGHT_MAX)),
            requests,
            waiting,
            next: AtomicU32::new(0),
            start,
            heard_ms,
            answer_us: AtomicU64::new(0),
            measured_ms: AtomicU64::new(0),
            closed,
        }))
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }

    /// Pieces that were asked for and did not come yet.
    pub(crate) fn in_flight(&self) -> usize {
        IN_FLIGHT_MAX - self.slots.available_permits()
    }

    /// A place for one more request; `None` if the parent has enough to do.
    pub(crate) fn try_slot(&self) -> Option<OwnedSemaphorePermit> {
        self.slots.clone().try_acquire_owned().ok()
    }

    /// How long an answer takes on average; zero if none has come for a while, so that a parent that was slow once gets
    /// another chance.
    pub(crate) fn answer_time(&self) -> Duration {
        let age = self
            .start
            .elapsed()
            .saturating_sub(Duration::from_millis(self.measured_ms.load(Ordering::Relaxed)));
        if age > MEASURE_FOR {
            Duration::ZERO
        } else {
            Duration::from_micros(self.answer_us.load(Ordering::Relaxed))
        }
    }

    fn silence(&self) -> Duration {
        let heard = Duration::from_millis(self.heard_ms.load(Ordering::Relaxed));
        self.start.elapsed().saturating_sub(heard)
    }

    /// Asks for one piece. The bytes are not checked. `patience`: how long not a single byte may come over the connection;
    /// one that drips is given some times as long.
    pub(crate) async fn piece(
        &self,
        task: LayerTask,
        repository: &str,
        index: u32,
        patience: Duration,
    ) -> Result<StoredPiece, LinkError> {
        let begun = Instant::now();
        match self.ask(task, repository, Ask::Pieces(vec![index]), patience).await? {
            Answer::Piece { index: answered, piece, .. } if answered == index => {
                self.measured(begun.elapsed());
                piece.map_err(LinkError::Refused)
            }
            _ => Err(LinkError::Protocol),
        }
    }

    /// Which pieces the parent has.
    pub(crate) async fn have(
        &self,
        task: LayerTask,
        repository: &str,
        patience: Duration,
    ) -> Result<Bits, LinkError> {
        match self.ask(task, repository, Ask::Have, patience).await? {
            Answer::Have { pieces, .. } => pieces.map_err(LinkError::Refused),
            Answer::Piece { .. } => Err(LinkError::Protocol),
        }
    }

    fn measured(&self, took: Duration) {
        let took = took.as_micros() as u64;
        let before = self.answer_us.load(Ordering::Relaxed);
        let after = if before == 0 { took } else { before - before / SMOOTHING + took / SMOOTHING };
        self.answer_us.store(after.max(1), Ordering::Relaxed);
        self.measured_ms.store(self.start.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    async fn ask(
        &self,
        task: LayerTask,
        repository: &str,
        ask: Ask,
        patience: Duration,
    ) -> Result<Answer, LinkError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, mut answer) = oneshot::channel();
        self.waiting.lock().insert(id, sender);
        let _expectation = Expectation { link: self, id };
        let trail = if self.takes_trails { Trail::current() } else { Trail::NONE };
        let request = Request { id, task, repository: repository.to_owned(), ask, trail };
        let asked = Instant::now();
        let sent = timeout(patience, self.requests.send(request.encode())).await;
        sent.map_err(|_| LinkError::Slow)?.map_err(|_| LinkError::Closed)?;
        let pieces = self.in_flight().max(1) as u32;
        let longest = 2 * patience + PIECE_TIME_MAX * pieces;
        loop {
            let quiet = self.silence().min(asked.elapsed());
            let (left, left_in_all) =
                (patience.saturating_sub(quiet), longest.saturating_sub(asked.elapsed()));
            if left.is_zero() {
                return Err(LinkError::Slow);
            }
            if left_in_all.is_zero() {
                return Err(LinkError::Trickle);
            }
            tokio::select! {
                answer = &mut answer => return answer.map_err(|_| LinkError::Closed),
                () = self.closed.cancelled() => return Err(LinkError::Closed),
                () = tokio::time::sleep(left.min(left_in_all)) => {}
            }
        }
    }
}

type Expected = Arc<Mutex<HashMap<u32, oneshot::Sender<Answer>>>>;

async fn run(
    stream: TlsStream,
    requests: mpsc::Receiver<Bytes>,
    waiting: Expected,
    heard_ms: Arc<AtomicU64>,
    start: Instant,
    closed: CancellationToken,
) {
    let (reading, writing) = tokio::io::split(stream);
    let ended = tokio::select! {
        () = closed.cancelled() => Ok(()),
        ended = write(writing, requests) => ended,
        ended = read(reading, &waiting, &heard_ms, start) => ended,
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection to a parent ended");
    }
    closed.cancel();
    waiting.lock().clear();
}

async fn write(mut stream: impl AsyncWrite + Unpin, mut requests: mpsc::Receiver<Bytes>) -> io::Result<()> {
    while let Some(request) = requests.recv().await {
        timeout(WRITE_DEADLINE, stream.write_all(&request)).await??;
        timeout(WRITE_DEADLINE, stream.flush()).await??;
    }
    Ok(())
}

async fn read(
    mut stream: ReadHalf<TlsStream>,
    waiting: &Expected,
    heard_ms: &AtomicU64,
    start: Instant,
) -> io::Result<()> {
    let heard = || heard_ms.store(start.elapsed().as_millis() as u64, Ordering::Relaxed);
    while let Some(answer) = read_answer(&mut stream, heard).await? {
        let (Answer::Piece { id, .. } | Answer::Have { id, .. }) = answer;
        if let Some(waiter) = waiting.lock().remove(&id) {
            // Whoever asked may have found it elsewhere.
            let _ = waiter.send(answer);
        }
    }
    Ok(())
}

/// All connections of this peer to its parents.
#[derive(Default)]
pub(crate) struct Links {
    links: Mutex<HashMap<String, Place>>,
    /// Parents that sent wrong bytes, and until when nothing is asked of them.
    liars: Mutex<HashMap<String, Instant>>,
}

/// One connection at most is being made to an address at a time.
type Place = Arc<OnceCell<Weak<Link>>>;

/// How long a parent that sent wrong bytes is not asked again, by any layer.
const LIAR_FOR: Duration = Duration::from_secs(600);

/// Liars remembered; at more all are forgotten.
const LIARS_MAX: usize = 1024;

impl Links {
    fn place(&self, address: &str) -> Place {
        let mut links = self.links.lock();
        let usable = |place: &Place| {
            let ready = place.get();
            ready.is_none_or(|link| link.upgrade().is_some_and(|link| !link.is_closed()))
        };
        if let Some(place) = links.get(address).filter(|place| usable(place)) {
            return place.clone();
        }
        links.retain(|_, place| usable(place));
        links.entry(address.to_owned()).insert_entry(Place::default()).get().clone()
    }

    /// The connection to `address`, made if there is none.
    pub(crate) async fn get(&self, shared: &Arc<Shared>, address: &str) -> io::Result<Arc<Link>> {
        let place = self.place(address);
        let mut made = None;
        let link = place.get_or_try_init(|| async {
            let link = Link::connect(shared, address).await?;
            made = Some(link.clone());
            Ok::<_, io::Error>(Arc::downgrade(&link))
        });
        let link = link.await?.upgrade();
        link.or(made).ok_or_else(|| io::Error::other("the connection was closed again"))
    }

    pub(crate) fn accuse(&self, address: &str) {
        let mut liars = self.liars.lock();
        if liars.len() >= LIARS_MAX {
            liars.clear();
        }
        liars.insert(address.to_owned(), Instant::now() + LIAR_FOR);
    }

    pub(crate) fn is_liar(&self, address: &str) -> bool {
        self.liars.lock().get(address).is_some_and(|until| Instant::now() < *until)
    }
}

#[cfg(test)]
mod tests {
    use darter_types::{DiffId, Digest};

    use super::*;

    fn link(requests: mpsc::Sender<Bytes>) -> Link {
        Link {
            node: "parent".to_owned(),
            takes_trails: false,
            slots: Arc::new(Semaphore::new(IN_FLIGHT_MAX)),
            requests,
            waiting: Arc::default(),
            next: AtomicU32::new(0),
            start: Instant::now(),
            heard_ms: Arc::default(),
            answer_us: AtomicU64::new(0),
            measured_ms: AtomicU64::new(0),
            closed: CancellationToken::new(),
        }
    }

    #[tokio::test]
    async fn parent_that_reads_no_requests_is_too_slow() {
        let (requests, _queue) = mpsc::channel(1);
        requests.try_send(Bytes::new()).unwrap();
        let (link, task) = (link(requests), LayerTask::current(DiffId(Digest::of(b"layer"))));
        let asked = timeout(Duration::from_secs(10), link.have(task, "", Duration::from_millis(10))).await;
        assert_eq!(asked.unwrap().unwrap_err(), LinkError::Slow);
    }

    #[tokio::test]
    async fn connection_that_takes_no_request_ends() {
        let (requests, queue) = mpsc::channel(1);
        requests.try_send(Bytes::from_static(b"a request")).unwrap();
        let (stream, _parent) = tokio::io::duplex(1);
        let written = timeout(Duration::from_secs(10), write(stream, queue)).await;
        assert_eq!(written.unwrap().unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
