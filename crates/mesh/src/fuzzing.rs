//! What `fuzz/` feeds with hostile bytes: both ends of the piece protocol. It panics where something does not hold that must
//! hold for all bytes. The tests below run it over every seed, cut and damaged, so that it doesn't rot.

use bytes::{Bytes, BytesMut};
use darter_daemon::traces::Trail;
use darter_store::{Encoding, MAX_PIECE_LEN, StoredPiece};
use darter_types::{DiffId, Digest, LayerTask, PieceHash};
use futures_util::FutureExt;

use crate::bits::Bits;
use crate::frames::{Answer, Ask, Refusal, Request, read_answer, read_request};

/// Bytes from a child, and the same as from a parent. What is taken of them says the same when it is written again.
pub fn frames(bytes: &[u8]) {
    let mut stream = bytes;
    while let Ok(Some(body)) = now(read_request(&mut stream)) {
        if let Ok(request) = Request::decode(body) {
            assert_eq!(Request::decode(request.encode().slice(4..)), Ok(request));
        }
    }
    let mut stream = bytes;
    while let Ok(Some(answer)) = now(read_answer(&mut stream, || ())) {
        let (head, rest) = answer.encode();
        let mut body = BytesMut::from(&head[4..]);
        body.extend_from_slice(&rest);
        assert_eq!(Answer::decode(body.freeze()).as_ref(), Ok(&answer));
        if let Answer::Piece { piece: Ok(piece), .. } = answer {
            decode(&piece);
        }
    }
}

/// Hostile pieces are refused, and never inflated beyond their limit.
fn decode(piece: &StoredPiece) {
    // Raw bytes are given the hash that they have, so that they are taken.
    let hash = PieceHash::from_bytes(*blake3::hash(&piece.bytes).as_bytes());
    if let Ok(plain) = piece.decode(&hash) {
        assert!(plain.len() == piece.plain_len as usize && plain.len() <= MAX_PIECE_LEN);
    }
}

/// Bytes in memory are never waited for.
fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("a slice has its bytes at hand")
}

/// Streams of frames.
pub fn seeds() -> Vec<Vec<u8>> {
    let task = LayerTask::current(DiffId(Digest::of(b"layer")));
    let request = |ask, trail| {
        Request { id: 7, task, repository: "https://registry.example/a".to_owned(), ask, trail }.encode()
    };
    let trail = Trail::from_bytes(std::array::from_fn(|at| at as u8 + 1));
    let requests = [request(Ask::Have, Trail::NONE), request(Ask::Pieces(vec![0, 5]), trail)];
    let raw = StoredPiece { encoding: Encoding::Raw, plain_len: 4, bytes: Bytes::from_static(b"text") };
    let answers = [
        Answer::Piece { id: 1, index: 2, piece: Ok(StoredPiece::encode(&[0; 5000], 3)) },
        Answer::Piece { id: 1, index: 2, piece: Ok(raw) },
        Answer::Piece { id: 1, index: 3, piece: Err(Refusal::Busy) },
        Answer::Have { id: 4, pieces: Ok(Bits::from_fn(11, |at| at % 3 == 0)) },
        Answer::Have { id: 4, pieces: Err(Refusal::Refused) },
    ];
    let answers = answers.iter().map(|answer| {
        let (head, rest) = answer.encode();
        [head, rest].concat()
    });
    requests.iter().map(|request| request.to_vec()).chain([requests.concat()]).chain(answers).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_hold_cut_and_damaged() {
        for seed in seeds() {
            frames(&seed);
            for at in 0..seed.len() {
                frames(&seed[..at]);
                for flip in [1, 0x80, 0xff] {
                    let mut damaged = seed.clone();
                    damaged[at] ^= flip;
                    frames(&damaged);
                }
            }
        }
    }
}
