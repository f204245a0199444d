//! The piece protocol: what travels over a stream that was opened with one of [`ALPNS`].
//!
//! The child sends requests, the parent answers them in any order, a frame a piece. Little-endian throughout; a frame is its
//! length (4, not counting itself) and a body. `docs/formats.md` draws the fields. A body that is not exactly what is
//! expected ends the stream.

use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use darter_daemon::traces::Trail;
use darter_store::{Encoding, MAX_PIECE_LEN, Room, StoredPiece};
use darter_types::{DiffId, LayerTask};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::bits::Bits;

/// How TLS names the protocol and its version.
pub(crate) const ALPN: &[u8] = b"darter-piece/2";
/// The version before: its requests can't say what they are a part of. All else is the same.
pub(crate) const ALPN_BEFORE: &[u8] = b"darter-piece/1";
pub(crate) const ALPNS: [&[u8]; 2] = [ALPN, ALPN_BEFORE];

/// Pieces that one request may name.
pub(crate) const PIECES_MAX: usize = 256;

const REPOSITORY_LEN_MAX: usize = 1024;
const REQUEST_LEN_MAX: usize = 64 + REPOSITORY_LEN_MAX + 4 * PIECES_MAX + Trail::LEN;
/// Pieces in one layer, as far as a bitmap of them may be answered.
const LAYER_PIECES_MAX: u32 = 1 << 22;
const ANSWER_LEN_MAX: usize = MAX_PIECE_LEN + 64;

const KIND_PIECES: u8 = 1;
const KIND_HAVE: u8 = 2;
/// Added to the kind of a request that ends with a trail.
const FOLLOWED: u8 = 0x80;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the frame's {0} is not valid")]
pub(crate) struct FrameError(&'static str);

impl From<FrameError> for io::Error {
    fn from(error: FrameError) -> Self {
        io::Error::new(io::ErrorKind::InvalidData, error)
    }
}

/// What a child wants to know of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ask {
    Pieces(Vec<u32>),
    /// Which pieces the parent has.
    Have,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub id: u32,
    pub task: LayerTask,
    /// Where the child's containerd read the manifest: its word on why it may read this layer.
    pub repository: String,
    pub ask: Ask,
    /// What it is a part of, if the child wants that followed.
    pub trail: Trail,
}

/// Why there is no piece, or no bitmap, in an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The parent doesn't have it.
    Missing,
    /// This child may not read this layer.
    Refused,
    /// The parent has too much to do.
    Busy,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Piece { id: u32, index: u32, piece: Result<StoredPiece, Refusal> },
    Have { id: u32, pieces: Result<Bits, Refusal> },
}

impl Refusal {
    fn code(self) -> u8 {
        match self {
            Refusal::Missing => 1,
            Refusal::Refused => 2,
            Refusal::Busy => 3,
        }
    }
}

/// `Ok(Ok)` for "here it is".
fn status(code: u8) -> Result<Result<(), Refusal>, FrameError> {
    match code {
        0 => Ok(Ok(())),
        1 => Ok(Err(Refusal::Missing)),
        2 => Ok(Err(Refusal::Refused)),
        3 => Ok(Err(Refusal::Busy)),
        _ => Err(FrameError("status")),
    }
}

fn with_length(body: &[u8], more: usize) -> BytesMut {
    let mut out = BytesMut::with_capacity(4 + body.len());
    out.put_u32_le(u32::try_from(body.len() + more).expect("frames are short"));
    out.put_slice(body);
    out
}

impl Request {
    pub(crate) fn encode(&self) -> Bytes {
        let mut body = BytesMut::new();
        let kind = if self.ask == Ask::Have { KIND_HAVE } else { KIND_PIECES };
        let trail = self.trail.to_bytes();
        body.put_u8(kind | trail.map_or(0, |_| FOLLOWED));
        body.put_u32_le(self.id);
        body.put_slice(self.task.diff_id.as_bytes());
        body.put_u32_le(self.task.format);
        body.put_u16_le(u16::try_from(self.repository.len()).expect("a repository's name is short"));
        body.put_slice(self.repository.as_bytes());
        if let Ask::Pieces(pieces) = &self.ask {
            body.put_u16_le(u16::try_from(pieces.len()).expect("at most PIECES_MAX"));
            pieces.iter().for_each(|piece| body.put_u32_le(*piece));
        }
        trail.iter().for_each(|trail| body.put_slice(trail));
        with_length(&body, 0).freeze()
    }

    pub(crate) fn decode(mut body: Bytes) -> Result<Self, FrameError> {
        let kind = body.try_get_u8().map_err(|_| FrameError("kind"))?;
        let id = body.try_get_u32_le().map_err(|_| FrameError("request"))?;
        let diff_id = DiffId::from_slice(&take(&mut body, 32)?).expect("32 bytes");
        let format = body.try_get_u32_le().map_err(|_| FrameError("format"))?;
        let len = usize::from(body.try_get_u16_le().map_err(|_| FrameError("repository"))?);
        if len > REPOSITORY_LEN_MAX {
            return Err(FrameError("repository"));
        }
        let repository = take(&mut body, len)?;
        let repository = String::from_utf8(repository.to_vec()).map_err(|_| FrameError("repository"))?;
        let trail = if kind & FOLLOWED == 0 { Trail::NONE } else { take_trail(&mut body)? };
        let ask = match kind & !FOLLOWED {
            KIND_PIECES => Ask::Pieces(pieces(&mut body)?),
            KIND_HAVE => Ask::Have,
            _ => return Err(FrameError("kind")),
        };
        if body.has_remaining() {
            return Err(FrameError("length"));
        }
        Ok(Self { id, task: LayerTask { diff_id, format }, repository, ask, trail })
    }
}

fn take(body: &mut Bytes, len: usize) -> Result<Bytes, FrameError> {
    if body.len() < len { Err(FrameError("length")) } else { Ok(body.split_to(len)) }
}

/// From the end of the body.
fn take_trail(body: &mut Bytes) -> Result<Trail, FrameError> {
    let rest = body.len().checked_sub(Trail::LEN).ok_or(FrameError("trail"))?;
    let trail = body.split_off(rest);
    Ok(Trail::from_bytes(trail[..].try_into().expect("it was split off there")))
}

fn pieces(body: &mut Bytes) -> Result<Vec<u32>, FrameError> {
    let count = usize::from(body.try_get_u16_le().map_err(|_| FrameError("count"))?);
    if count > PIECES_MAX || body.len() != 4 * count {
        return Err(FrameError("count"));
    }
    Ok((0..count).map(|_| body.get_u32_le()).collect())
}

impl Answer {
    /// The frame in two parts, so that the piece's bytes need not be copied.
    pub(crate) fn encode(&self) -> (Bytes, Bytes) {
        let mut body = BytesMut::with_capacity(32);
        let rest = match self {
            Answer::Piece { id, index, piece } => {
                body.put_u8(KIND_PIECES);
                body.put_u32_le(*id);
                body.put_u32_le(*index);
                body.put_u8(piece.as_ref().map_or_else(|refusal| refusal.code(), |_| 0));
                body.put_u8(piece.as_ref().map_or(0, |piece| piece.encoding.code()));
                body.put_u32_le(piece.as_ref().map_or(0, |piece| piece.plain_len));
                piece.as_ref().map_or(Bytes::new(), |piece| piece.bytes.clone())
            }
            Answer::Have { id, pieces } => {
                body.put_u8(KIND_HAVE);
                body.put_u32_le(*id);
                body.put_u8(pieces.as_ref().map_or_else(|refusal| refusal.code(), |_| 0));
                body.put_u32_le(pieces.as_ref().map_or(0, Bits::len));
                pieces.as_ref().map_or(Bytes::new(), |bits| Bytes::copy_from_slice(bits.as_bytes()))
            }
        };
        (with_length(&body, rest.len()).freeze(), rest)
    }

    pub(crate) fn decode(mut body: Bytes) -> Result<Self, FrameError> {
        let kind = body.try_get_u8().map_err(|_| FrameError("kind"))?;
        let id = body.try_get_u32_le().map_err(|_| FrameError("request"))?;
        match kind {
            KIND_PIECES => Self::decode_piece(id, body),
            KIND_HAVE => Self::decode_have(id, body),
            _ => Err(FrameError("kind")),
        }
    }

    fn decode_piece(id: u32, mut body: Bytes) -> Result<Self, FrameError> {
        let mut head = take(&mut body, 10)?;
        let index = head.get_u32_le();
        let found = status(head.get_u8())?;
        let encoding = Encoding::from_code(head.get_u8()).ok_or(FrameError("encoding"))?;
        let plain_len = head.get_u32_le();
        let piece = found.map(|()| StoredPiece { encoding, plain_len, bytes: body });
        Ok(Answer::Piece { id, index, piece })
    }

    fn decode_have(id: u32, mut body: Bytes) -> Result<Self, FrameError> {
        let mut head = take(&mut body, 5)?;
        let found = status(head.get_u8())?;
        let len = head.get_u32_le();
        let bits = Bits::from_bytes(len, &body).filter(|_| len <= LAYER_PIECES_MAX);
        let pieces = match found {
            Ok(()) => Ok(bits.ok_or(FrameError("bitmap"))?),
            Err(refusal) => Err(refusal),
        };
        Ok(Answer::Have { id, pieces })
    }
}

/// The body of the next request; `None` when the child has closed the stream.
pub(crate) async fn read_request(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Bytes>> {
    let mut length = [0; 4];
    match stream.read_exact(&mut length).await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    };
    let length = u32::from_le_bytes(length) as usize;
    if length > REQUEST_LEN_MAX {
        return Err(FrameError("length").into());
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    Ok(Some(body.into()))
}

/// The next answer, read into a buffer of its own, so that its bytes need not be copied; `None` when the parent has closed
/// the stream. `heard` is called whenever bytes have come.
pub(crate) async fn read_answer(
    stream: &mut (impl AsyncRead + Unpin),
    heard: impl Fn(),
) -> io::Result<Option<Answer>> {
    let mut length = [0; 4];
    match stream.read_exact(&mut length).await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    };
    heard();
    let length = u32::from_le_bytes(length) as usize;
    if length > ANSWER_LEN_MAX {
        return Err(FrameError("length").into());
    }
    let mut body = Room::for_len(length);
    let mut rest = stream.take(length as u64);
    while body.len() < length {
        if rest.read_buf(&mut *body).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        heard();
    }
    Ok(Some(Answer::decode(body.freeze())?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use darter_types::Digest;

    fn request(ask: Ask) -> Request {
        let task = LayerTask::current(DiffId(Digest::of(b"layer")));
        Request { id: 7, task, repository: "https://registry.example/a".to_owned(), ask, trail: Trail::NONE }
    }

    fn followed(ask: Ask) -> Request {
        let trail = Trail::from_bytes(std::array::from_fn(|at| at as u8));
        assert!(trail.is_followed());
        Request { trail, ..request(ask) }
    }

    fn body(frame: &Bytes) -> Bytes {
        frame.slice(4..)
    }

    #[test]
    fn requests_round_trip() {
        for ask in [Ask::Have, Ask::Pieces(vec![]), Ask::Pieces(vec![1, u32::MAX])] {
            for request in [request(ask.clone()), followed(ask.clone())] {
                assert_eq!(Request::decode(body(&request.encode())), Ok(request));
            }
        }
    }

    /// Gives a byte at a time.
    fn slow(bytes: Vec<u8>) -> impl AsyncRead + Unpin {
        let parts = bytes.into_iter().map(|byte| Ok::<_, io::Error>(Bytes::from(vec![byte])));
        tokio_util::io::StreamReader::new(futures_util::stream::iter(parts))
    }

    #[tokio::test]
    async fn answers_round_trip_and_are_taken_from_a_stream_in_parts() {
        let piece = StoredPiece { encoding: Encoding::Zstd, plain_len: 9, bytes: Bytes::from_static(b"zz") };
        let answers = [
            Answer::Piece { id: 1, index: 2, piece: Ok(piece) },
            Answer::Piece { id: 1, index: 3, piece: Err(Refusal::Busy) },
            Answer::Have { id: 4, pieces: Ok(Bits::from_fn(11, |at| at % 3 == 0)) },
            Answer::Have { id: 4, pieces: Err(Refusal::Refused) },
        ];
        let mut wire = Vec::new();
        for answer in &answers {
            let (head, rest) = answer.encode();
            wire.extend_from_slice(&head);
            wire.extend_from_slice(&rest);
        }
        let (mut stream, mut taken) = (slow(wire.clone()), Vec::new());
        while let Some(answer) = read_answer(&mut stream, || ()).await.unwrap() {
            taken.push(answer);
        }
        assert_eq!(taken, answers);
        wire.pop();
        let mut stream = slow(wire);
        for _ in 1..answers.len() {
            read_answer(&mut stream, || ()).await.unwrap();
        }
        assert!(read_answer(&mut stream, || ()).await.is_err(), "the last answer is cut");
    }

    #[test]
    fn every_cut_of_a_request_is_refused() {
        for request in
            [request(Ask::Pieces(vec![5, 6])), followed(Ask::Pieces(vec![5, 6])), followed(Ask::Have)]
        {
            let whole = body(&request.encode());
            for cut in 0..whole.len() {
                assert!(Request::decode(whole.slice(..cut)).is_err(), "cut at {cut}");
            }
            let longer = [&whole[..], &[0]].concat();
            assert!(Request::decode(longer.into()).is_err());
        }
    }

    #[tokio::test]
    async fn absurd_lengths_are_refused_before_memory_is_taken() {
        let mut length = &u32::MAX.to_le_bytes()[..];
        let refused = read_answer(&mut length, || ()).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
        let mut have = BytesMut::new();
        have.put_slice(&[KIND_HAVE, 0, 0, 0, 0, 0]);
        have.put_u32_le(u32::MAX);
        assert_eq!(Answer::decode(have.freeze()), Err(FrameError("bitmap")));
    }
}
