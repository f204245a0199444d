//! One pass over a layer's tar stream: map, pieces and diff ID.
//!
//! The stream's SHA-256 is computed on a thread of its own; reading, cutting and hashing pieces happen on the caller's.
//! Compressing pieces is the sink's affair.

use std::io::{self, BufRead, Read};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender};

use darter_types::{DiffId, Digest, PieceHash, PieceIndex};
use sha2::{Digest as _, Sha256};

use crate::cut::Cutter;
use crate::map::{LayerMap, MapBuilder};
use crate::recipe::Recipe;
use crate::tar::{EntryKind, ReadError, TarError, TarReader};

/// What is read at once.
const CHUNK: usize = 64 * 1024;
/// Chunks that wait for the digest's thread at most; the reader waits then.
const HASH_QUEUE: usize = 32;

/// Takes pieces as they are cut.
pub trait PieceSink {
    /// `plain` are the piece's bytes, not yet compressed, valid during the call. Indices come in order, each once.
    fn piece(&mut self, index: PieceIndex, hash: PieceHash, plain: &[u8]) -> io::Result<()>;
}

/// A layer's map, and what the stream that it was made of turned out to be.
#[derive(Debug)]
pub struct Made {
    pub map: LayerMap,
    pub diff_id: DiffId,
    pub tar_size: u64,
}

/// Why no map was made.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// The stream could not be read (or not be decompressed); another try may succeed.
    #[error("reading the layer: {0}")]
    Read(#[source] io::Error),
    /// The stream is one that containerd would refuse, or that no map can describe.
    #[error(transparent)]
    Tar(#[from] TarError),
    #[error("keeping a piece: {0}")]
    Sink(#[source] io::Error),
}

impl From<ReadError> for MakeError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Read(error) => MakeError::Read(error),
            ReadError::Tar(error) => MakeError::Tar(error),
        }
    }
}

/// Reads the uncompressed tar stream to its end. The map is a pure function of the stream and the format's version.
pub fn make(tar: impl Read, sink: &mut dyn PieceSink) -> Result<Made, MakeError> {
    let (chunks, hashed) = mpsc::sync_channel(HASH_QUEUE);
    std::thread::scope(|scope| {
        let hasher = scope.spawn(move || digest(&hashed));
        // The input owns the sending end; the thread ends when it is dropped, also on an error.
        let (map, tar_size) = map(Input::new(tar, chunks), sink)?;
        let digest = hasher.join().expect("hashing does not panic");
        Ok(Made { map, diff_id: DiffId(digest), tar_size })
    })
}

fn digest(chunks: &Receiver<Arc<Vec<u8>>>) -> Digest {
    let mut hasher = Sha256::new();
    for chunk in chunks {
        hasher.update(chunk.as_slice());
    }
    Digest::from_bytes(hasher.finalize().into())
}

fn map(input: Input<impl Read>, sink: &mut dyn PieceSink) -> Result<(LayerMap, u64), MakeError> {
    let mut tar = TarReader::new(input, Recipe::new().map_err(MakeError::Read)?);
    let mut cutter = Cutter::new(sink);
    let mut builder = MapBuilder::default();
    while let Some(header) = tar.next()? {
        if header.kind == EntryKind::File {
            cutter.begin(header.data_len)?;
            loop {
                let bytes = tar.data()?;
                if bytes.is_empty() {
                    break;
                }
                cutter.feed(bytes)?;
                let len = bytes.len();
                tar.consume(len);
            }
            cutter.end()?;
        }
        builder.push(&header)?;
    }
    let recipe = tar.finish()?.finish().map_err(MakeError::Read)?;
    let tar_size = recipe.tar_size;
    Ok((builder.finish(&cutter.finish()?, recipe), tar_size))
}

/// The stream, read in chunks that the digest's thread gets too.
struct Input<R> {
    reader: R,
    chunk: Arc<Vec<u8>>,
    position: usize,
    hasher: SyncSender<Arc<Vec<u8>>>,
}

impl<R: Read> Input<R> {
    fn new(reader: R, hasher: SyncSender<Arc<Vec<u8>>>) -> Self {
        Self { reader, chunk: Arc::default(), position: 0, hasher }
    }
}

impl<R: Read> BufRead for Input<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.position == self.chunk.len() {
            let mut chunk = Vec::with_capacity(CHUNK);
            self.reader.by_ref().take(CHUNK as u64).read_to_end(&mut chunk)?;
            self.chunk = Arc::new(chunk);
            self.position = 0;
            if !self.chunk.is_empty() && self.hasher.send(self.chunk.clone()).is_err() {
                return Err(io::Error::other("the digest's thread has ended"));
            }
        }
        Ok(&self.chunk[self.position..])
    }

    fn consume(&mut self, len: usize) {
        self.position += len;
    }
}

impl<R: Read> Read for Input<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let buf = self.fill_buf()?;
        let len = buf.len().min(out.len());
        out[..len].copy_from_slice(&buf[..len]);
        self.consume(len);
        Ok(len)
    }
}
