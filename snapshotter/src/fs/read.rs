//! Reads: which pieces hold the bytes, what of them is on this machine, and waiting for the rest.
//!
//! A read is answered at once when its pieces are in memory; else a worker looks on the disk; else the missing pieces are
//! awaited, all at the same time, by a task that holds no thread. What was decoded is kept for the reads that follow, and
//! pieces that will probably be read next are asked for ([`super::ahead`]).

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use darter_daemon::traces::Step;
use darter_layer::LayerMap;
use darter_types::PieceIndex;
use futures_util::future::try_join_all;
use tokio::time::{Instant, sleep, timeout_at};

use super::ahead::Touched;
use super::cache::Held;
use super::extents::{Extent, content, extents};
use super::shown::Node;
use super::trace::Noted;
use super::{Answer, ContentError, FileSystem, FsError, LayerContent};

/// How long a piece that was not available is left alone, at first and at most.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LAST: Duration = Duration::from_secs(5);

static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

type Result<T> = std::result::Result<T, FsError>;

/// The bytes that were read, in pieces so that nothing is copied.
#[derive(Debug, Clone, Default)]
pub struct Data(Vec<Bytes>);

impl Data {
    pub fn into_parts(self) -> Vec<Bytes> {
        self.0
    }

    fn push_zeros(&mut self, mut count: u64) {
        while count > 0 {
            let part = count.min(ZEROS.len() as u64);
            self.0.push(Bytes::from_static(&ZEROS[..part as usize]));
            count -= part;
        }
    }
}

/// A piece that a read needs.
struct Needed {
    index: PieceIndex,
    length: usize,
    cell: Held,
}

enum Part {
    Zeros(u64),
    /// A range of the piece at that position of the plan.
    Piece(usize, Range<usize>),
}

/// A read, taken apart.
struct Plan {
    node: Node,
    layer: usize,
    parts: Vec<Part>,
    pieces: Vec<Needed>,
    touched: Touched,
    deadline: Duration,
}

impl FileSystem {
    /// Up to `size` bytes of a regular file from `offset` on; fewer only at the end of the file.
    pub fn read(&self, ino: u64, offset: u64, size: u32) -> Answer<Result<Data>> {
        match self.node(ino).and_then(|node| self.plan(node, offset, size)) {
            Err(error) => Answer::Ready(Err(error)),
            Ok(plan) if plan.is_in_memory() => {
                plan.look_ahead(false);
                Answer::Ready(Ok(plan.data()))
            }
            // Followed or not is decided here: what memory answers costs nothing for it.
            Ok(plan) => {
                let mut step = Step::of_read("read").answering();
                step.say("darter.inode", || ino);
                step.say("darter.offset", || offset);
                step.say("darter.size", || size);
                Answer::work(move || plan.read_disk(step))
            }
        }
    }

    fn plan(&self, node: Node, offset: u64, size: u32) -> Result<Plan> {
        let wrong_kind = if node.is_directory() { FsError::IsDirectory } else { FsError::WrongKind };
        let file = node.tree().file(node.index).ok_or(wrong_kind)?;
        let map = node.shown.map(file.layer).clone();
        let (mut parts, mut pieces) = (Vec::new(), Vec::new());
        for extent in extents(&file, offset, u64::from(size)) {
            match extent {
                Extent::Hole { len } => parts.push(Part::Zeros(len)),
                Extent::Data { content, len } => self.add_data(&map, content, len, &mut parts, &mut pieces),
            }
        }
        let touched = touched(&map, &content(&file), offset == 0, &pieces);
        let (layer, deadline) = (file.layer, self.limits.read_wait);
        Ok(Plan { node, layer, parts, pieces, touched, deadline })
    }

    /// Cuts a range of the content stream at the pieces' borders.
    fn add_data(&self, map: &LayerMap, from: u64, len: u64, parts: &mut Vec<Part>, pieces: &mut Vec<Needed>) {
        let (mut from, end) = (from, from + len);
        let mut index = map.piece_at(from);
        while from < end && index.0 < map.piece_count() {
            let piece = map.piece(index);
            if pieces.last().is_none_or(|last: &Needed| last.index != index) {
                let cell = self.cache.cell(piece.hash);
                pieces.push(Needed { index, length: piece.plain_len as usize, cell });
            }
            let to = end.min(piece.start + u64::from(piece.plain_len));
            let range = (from - piece.start) as usize..(to - piece.start) as usize;
            parts.push(Part::Piece(pieces.len() - 1, range));
            (from, index) = (to, PieceIndex(index.0 + 1));
        }
    }
}

fn touched(map: &LayerMap, content: &Range<u64>, from_start: bool, pieces: &[Needed]) -> Touched {
    let first = pieces.first().map_or(0, |piece| piece.index.0);
    let end = pieces.last().map_or(0, |piece| piece.index.0 + 1);
    let file_end = if content.is_empty() { end } else { map.piece_at(content.end - 1).0 + 1 };
    Touched { pieces: first..end, from_start, file_end, layer_end: map.piece_count(), missed: false }
}

impl Plan {
    fn missing(&self) -> impl Iterator<Item = &Needed> {
        self.pieces.iter().filter(|piece| !piece.cell.bytes.initialized())
    }

    /// Whether nothing is missing, once what was decoded ahead is taken. Never blocks.
    fn is_in_memory(&self) -> bool {
        self.missing().all(|piece| {
            let begun = Instant::now();
            let decoded = self.content().in_memory(piece.index).filter(|bytes| bytes.len() == piece.length);
            let Some(bytes) = decoded else { return false };
            self.content().touched(piece.index, self.node.shown.since_first_read());
            // Another read may have been faster, or wait for it this moment: then this one waits as well.
            let _other = piece.cell.bytes.set(bytes);
            let is_there = piece.cell.bytes.initialized();
            if is_there {
                self.note(piece, begun, true);
            }
            is_there
        })
    }

    fn content(&self) -> &Arc<dyn LayerContent> {
        self.node.shown.content(self.layer)
    }

    /// Asks for what will be read next.
    fn look_ahead(&self, missed: bool) {
        if self.pieces.is_empty() {
            return;
        }
        let touched = Touched { missed, ..self.touched.clone() };
        let want = self.node.shown.ahead(self.layer).lock().touched(&touched);
        if let Some(pieces) = want {
            self.content().want(PieceIndex(pieces.start), pieces.end - pieces.start);
        }
    }

    /// Takes from the disk what is there; on a thread that may block.
    fn read_disk(self, mut step: Step) -> Answer<Result<Data>> {
        let missed = if step.is_followed() { self.missing().count() } else { 0 };
        let since_first = self.node.shown.since_first_read();
        for piece in self.missing() {
            self.content().touched(piece.index, since_first);
            let begun = Instant::now();
            let _decoding = piece.cell.decoding.lock();
            if !piece.cell.bytes.initialized()
                && let Some(bytes) = self.content().read_local(piece.index)
                && bytes.len() == piece.length
            {
                // Another read may have been faster, or wait for it this moment: then this one waits as well, below.
                let _other = piece.cell.bytes.set(bytes);
                self.note(piece, begun, true);
            }
        }
        step.say("darter.path", || self.node.path());
        step.say("darter.layer_position", || self.layer);
        step.say("darter.pieces", || self.pieces.len());
        step.say("darter.pieces_from_disk", || missed - self.missing().count());
        if self.missing().next().is_some() {
            return Answer::wait(self.read_followed(step));
        }
        self.look_ahead(false);
        Answer::Ready(Ok(self.data()))
    }

    async fn read_followed(self, mut step: Step) -> Result<Data> {
        let read = step.trail().over(self.read_elsewhere()).await;
        if let Err(error) = &read {
            step.fail(error);
        }
        read
    }

    /// Waits for what isn't on this machine.
    async fn read_elsewhere(self) -> Result<Data> {
        let deadline = Instant::now() + self.deadline;
        let content = self.content();
        let begun = Instant::now();
        let pieces = try_join_all(self.missing().map(|piece| async {
            fetch(content.as_ref(), piece).await?;
            self.note(piece, begun, false);
            Ok(())
        }));
        // What is waited for comes first, what may be needed next after it.
        let ahead = async {
            self.look_ahead(true);
            Ok(())
        };
        let both = futures_util::future::try_join(pieces, ahead);
        match timeout_at(deadline, both).await {
            Ok(result) => result.map(drop)?,
            Err(_) => {
                tracing::warn!(piece = self.touched.pieces.start, "a read has waited too long for a piece");
                return Err(FsError::Io);
            }
        }
        Ok(self.data())
    }

    /// Notes that the piece is there, for which a container has waited since `begun`.
    fn note(&self, piece: &Needed, begun: Instant, is_local: bool) {
        let (shown, waited) = (&self.node.shown, begun.elapsed());
        let at = shown.since_first_read().saturating_sub(waited);
        let (node, layer, piece) = (self.node.index, self.layer, piece.index);
        shown.trace().note(Noted { at, waited, node, layer, piece, is_local });
    }

    /// Puts the answer together, once no piece is missing.
    fn data(&self) -> Data {
        let mut data = Data::default();
        for part in &self.parts {
            match part {
                Part::Zeros(count) => data.push_zeros(*count),
                Part::Piece(piece, range) => {
                    let bytes = self.pieces[*piece].cell.bytes.get().expect("no piece is missing");
                    data.0.push(bytes.slice(range.clone()));
                }
            }
        }
        data
    }
}

/// Waits for a piece; all who want it wait for the same one.
async fn fetch(content: &dyn LayerContent, piece: &Needed) -> Result<()> {
    piece.cell.bytes.get_or_try_init(|| patient_read(content, piece)).await.map(drop)
}

async fn patient_read(content: &dyn LayerContent, piece: &Needed) -> Result<Bytes> {
    let mut pause = RETRY_FIRST;
    loop {
        match content.read(piece.index).await {
            Ok(bytes) if bytes.len() == piece.length => return Ok(bytes),
            Ok(bytes) => {
                tracing::error!(piece = piece.index.0, length = bytes.len(), "a piece has the wrong length");
                return Err(FsError::Io);
            }
            Err(ContentError::Impossible(reason)) => {
                tracing::warn!(piece = piece.index.0, reason, "a read fails");
                return Err(FsError::Io);
            }
            Err(ContentError::Unavailable(reason)) => {
                tracing::debug!(piece = piece.index.0, reason, "a piece is not available, asking again");
                sleep(pause).await;
                pause = (pause * 2).min(RETRY_LAST);
            }
        }
    }
}
