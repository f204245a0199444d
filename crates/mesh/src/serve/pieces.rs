//! The parent's side of the piece protocol.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use darter_daemon::traces::{Step, Trail};
use darter_identity::{Member, TlsStream};
use darter_store::StoredPiece;
use darter_types::{LayerTask, RateKind, Role};
use futures_util::{StreamExt, stream};
use tokio::io::{AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_stream::wrappers::ReceiverStream;

use super::LIMITED_PART;
use super::patience::Patience;
use super::share::Shares;
use super::slots::{Slot, Slots};
use crate::bits::Bits;
use crate::frames::{Answer, Ask, Refusal, Request, read_request};
use crate::limits::{Bucket, Urgency};
use crate::shared::Shared;

/// Children connected at the same time. One more is turned away, and asks another parent.
const CHILDREN_MAX: usize = 2048;
/// Of these, connections of one member, which needs one.
const CONNECTIONS_MAX: usize = 4;
/// A connection over which nothing is asked for so long is closed. A child that is still there makes another.
const IDLE_DEADLINE: Duration = if cfg!(test) { Duration::from_secs(2) } else { Duration::from_secs(300) };
/// Requests of one child that wait; beyond, its stream is not read.
const WAITING_MAX: usize = 256;
/// Pieces that are read from disk for one connection at the same time, ahead of what it is sent, if its member's share has room.
const READ_AHEAD: usize = 3;
/// A child that keeps one answer waiting for so long, all together, is let go.
const SEND_DEADLINE: Duration = Duration::from_secs(30);
/// How long a piece waits for an upload slot, or for room to be read, before the child is told to ask elsewhere.
const SLOT_PATIENCE: Duration = Duration::from_secs(1);

struct Uploads {
    shared: Arc<Shared>,
    /// For pieces that are in memory, sent or to be sent: as many as there are upload slots at most.
    room: Arc<Slots>,
    slots: Arc<Slots>,
}

/// One thing that a child wants.
struct Job {
    id: u32,
    task: LayerTask,
    repository: Arc<str>,
    /// `None`: which pieces there are.
    piece: Option<u32>,
    trail: Trail,
}

/// An answer that can be sent.
struct Ready {
    answer: Answer,
    since: Instant,
    /// Held until it is sent.
    _room: Option<Slot>,
    /// It ends when the answer is sent.
    step: Step,
}

impl Ready {
    fn new(answer: Answer, room: Option<Slot>, step: Step) -> Self {
        Self { answer, since: Instant::now(), _room: room, step }
    }
}

/// Serves the streams of both versions alike: what is new comes only in requests.
pub(super) async fn serve(shared: Arc<Shared>, streams: [mpsc::Receiver<(TlsStream, Member)>; 2]) {
    let mut streams = stream::select_all(streams.map(ReceiverStream::new));
    let children = Shares::new(CHILDREN_MAX, CONNECTIONS_MAX);
    let uploads = Uploads::new(&shared, shared.options.upload_slots.max(1) as usize);
    while let Some((stream, member)) = streams.next().await {
        let is_peer = matches!(member.role, Role::Node | Role::Seed);
        let Some(place) = children.try_take(&member).filter(|_| is_peer) else {
            tracing::debug!(child = %member, "a child is turned away");
            continue;
        };
        let uploads = uploads.clone();
        shared.tasks.spawn_alone("child", async move {
            let _place = place;
            if let Err(error) = uploads.attend(stream, &member).await {
                tracing::debug!(child = %member, %error, "a child's stream ended");
            }
        });
    }
}

impl Uploads {
    fn new(shared: &Arc<Shared>, slots_max: usize) -> Arc<Self> {
        let (room, slots) = (Slots::fixed(slots_max), Slots::of_uploads(shared, slots_max));
        Arc::new(Self { shared: shared.clone(), room, slots })
    }

    async fn attend(self: Arc<Self>, stream: TlsStream, member: &Member) -> io::Result<()> {
        let (reading, writing) = tokio::io::split(stream);
        let (jobs, queue) = mpsc::channel(WAITING_MAX);
        tokio::select! {
            ended = read(reading, jobs) => ended,
            ended = self.write(writing, queue, member) => ended,
        }
    }

    async fn write(
        self: &Arc<Self>,
        mut stream: WriteHalf<TlsStream>,
        queue: mpsc::Receiver<Job>,
        member: &Member,
    ) -> io::Result<()> {
        // A connection that reads ahead no more than its member's share doesn't wait for room that it has itself.
        let ahead = READ_AHEAD.min(self.room.share());
        let answer = |job| self.clone().answer(job, member);
        let answers = ReceiverStream::new(queue).map(answer).buffered(ahead);
        let mut answers = std::pin::pin!(answers);
        let mut last_sent = Instant::now();
        while let Some(mut ready) = answers.next().await {
            let _slot = self.slot(&mut ready, member, last_sent).await;
            let (head, rest) = ready.answer.encode();
            send(&mut stream, &head, &rest, self.shared.limits.of(RateKind::Upload)).await?;
            if matches!(ready.answer, Answer::Piece { piece: Ok(_), .. }) {
                self.shared.metrics.sent_pieces.inc();
                self.shared.metrics.sent_bytes.inc_by(rest.len() as u64);
                ready.step.say("darter.bytes", || rest.len());
                last_sent = Instant::now();
            }
        }
        Ok(())
    }

    /// An upload slot for a piece, which else becomes the word that there is none. While the child was sent another piece it didn't
    /// wait for one.
    async fn slot(&self, ready: &mut Ready, member: &Member, last_sent: Instant) -> Option<Slot> {
        let Answer::Piece { id, index, piece: Ok(_) } = ready.answer else { return None };
        let until = ready.since.max(last_sent) + SLOT_PATIENCE;
        let slot = timeout_at(until, self.slots.wait(member)).await.ok();
        if slot.is_none() {
            ready.answer = self.busy(id, index, &mut ready.step);
        }
        slot
    }

    fn busy(&self, id: u32, index: u32, step: &mut Step) -> Answer {
        self.shared.metrics.busy.inc();
        step.fail("no upload slot is free");
        Answer::Piece { id, index, piece: Err(Refusal::Busy) }
    }

    async fn answer(self: Arc<Self>, job: Job, member: &Member) -> Ready {
        let Job { id, task, repository, piece, trail } = job;
        let Some(index) = piece else {
            let pieces = self.have(task, repository).await;
            return Ready::new(Answer::Have { id, pieces }, None, Step::none());
        };
        let mut step = Step::for_member(trail, "upload").with("darter.piece", || index);
        step.say("darter.layer", || task.diff_id.to_string());
        let Ok(room) = timeout(SLOT_PATIENCE, self.room.wait(member)).await else {
            return Ready::new(self.busy(id, index, &mut step), None, step);
        };
        let piece = self.piece(task, repository, index).await;
        if let Err(refusal) = &piece {
            step.fail(format_args!("{refusal:?}"));
        }
        Ready::new(Answer::Piece { id, index, piece }, Some(room), step)
    }

    async fn have(&self, task: LayerTask, repository: Arc<str>) -> Result<Bits, Refusal> {
        let shared = self.shared.clone();
        let work = move || {
            let shelved = shared.shelf.get(&shared.store, task).ok_or(Refusal::Missing)?;
            if shelved.allows(&repository) { Ok(shelved.held(&shared.store)) } else { Err(Refusal::Refused) }
        };
        self.shared.work.run(work).await
    }

    async fn piece(&self, task: LayerTask, repository: Arc<str>, index: u32) -> Result<StoredPiece, Refusal> {
        let shared = self.shared.clone();
        shared.upkeep.touch(task);
        let work = move || {
            let shelved = shared.shelf.get(&shared.store, task).ok_or(Refusal::Missing)?;
            if !shelved.allows(&repository) {
                return Err(Refusal::Refused);
            }
            let hash = shelved.hashes.get(index as usize).ok_or(Refusal::Missing)?;
            let piece = shared.store.read_stored(hash).unwrap_or_else(|error| {
                tracing::warn!(%task, index, %error, "a piece can't be read for a child");
                None
            });
            piece.ok_or(Refusal::Missing)
        };
        self.shared.work.run(work).await
    }
}

async fn read(mut stream: ReadHalf<TlsStream>, jobs: mpsc::Sender<Job>) -> io::Result<()> {
    while let Some(body) = timeout(IDLE_DEADLINE, read_request(&mut stream)).await?? {
        let Request { id, task, repository, ask, trail } = Request::decode(body)?;
        let repository: Arc<str> = repository.into();
        let wanted = match ask {
            Ask::Have => vec![None],
            Ask::Pieces(pieces) => pieces.into_iter().map(Some).collect(),
        };
        for piece in wanted {
            let job = Job { id, task, repository: repository.clone(), piece, trail };
            if jobs.send(job).await.is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}

async fn send(
    stream: &mut WriteHalf<TlsStream>,
    head: &Bytes,
    rest: &Bytes,
    limit: &Bucket,
) -> io::Result<()> {
    let mut patience = Patience::new(SEND_DEADLINE);
    let part = if limit.is_limited() { LIMITED_PART } else { usize::MAX };
    limit.take(head.len() as u64, Urgency::Ahead).await;
    patience.with(stream.write_all(head)).await??;
    for part in rest.chunks(part) {
        limit.take(part.len() as u64, Urgency::Ahead).await;
        patience.with(stream.write_all(part)).await??;
    }
    patience.with(stream.flush()).await?
}

/// For the tests of those who have peers.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// Whether each of these nodes, one after the other, is given the layer's first piece by a peer that has so many slots, while
    /// none of them reads what it is given.
    pub(crate) async fn are_given(
        shared: &Arc<Shared>,
        slots: usize,
        (task, repository): (LayerTask, &str),
        nodes: &[&str],
    ) -> Vec<bool> {
        let uploads = Uploads::new(shared, slots);
        let mut all = Vec::new();
        for node in nodes {
            let member: Member = format!("spiffe://darter/here/node/{node}").parse().unwrap();
            let (repository, trail) = (repository.into(), Trail::NONE);
            let job = Job { id: 1, task, repository, piece: Some(0), trail };
            all.push(uploads.clone().answer(job, &member).await);
        }
        all.iter().map(|ready| matches!(ready.answer, Answer::Piece { piece: Ok(_), .. })).collect()
    }
}
