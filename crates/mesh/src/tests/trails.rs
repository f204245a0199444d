//! What members tell each other of the trace that a request is a part of.

use darter_daemon::tasks::Tasks;
use darter_daemon::traces::{self, Settings, Trail};
use darter_identity::TlsStream;
use darter_types::PieceIndex;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

use super::lies::parent_of_version;
use super::world::{TestLayer, World, contents, read_all, told};
use crate::Priority;
use crate::bits::Bits;
use crate::frames::{ALPN, ALPN_BEFORE, Answer, Ask, Refusal, Request, read_request};

/// Says that it has every piece, and gives none.
async fn listen(mut stream: TlsStream, heard: mpsc::UnboundedSender<Trail>) {
    while let Ok(Some(body)) = read_request(&mut stream).await {
        let Request { id, ask, trail, .. } = Request::decode(body).unwrap();
        let answer = match ask {
            Ask::Have => Answer::Have { id, pieces: Ok(Bits::from_fn(1000, |_| true)) },
            Ask::Pieces(pieces) => {
                heard.send(trail).unwrap();
                Answer::Piece { id, index: pieces[0], piece: Err(Refusal::Missing) }
            }
        };
        let (head, rest) = answer.encode();
        stream.write_all(&[head, rest].concat()).await.unwrap();
        stream.flush().await.unwrap();
    }
}

/// What a parent of this version hears when a read that belongs to `trail` asks it for a piece, before a seed gives it.
async fn heard_of(trail: Trail, alpn: &'static [u8]) -> Trail {
    let world = World::new();
    let made = TestLayer::new("a", 3, 60_000);
    let source = world.registry.push("library/a", &made.tar);
    let seed = world.seed("seed").await;
    let (sender, mut heard) = mpsc::unbounded_channel();
    let parent =
        parent_of_version(&world, "listener", alpn, move |stream| listen(stream, sender.clone())).await;
    let node = world.node("one").await;
    let layer = node.open(&made, &source);
    told(&layer, vec![parent.clone()]);
    let reader = layer.clone();
    let read = tokio::spawn(async move {
        trail.over(reader.read(PieceIndex(0), Priority::Demand)).await.unwrap();
    });
    let first = heard.recv().await.unwrap();
    told(&layer, vec![parent, seed.as_parent(true)]);
    read.await.unwrap();
    assert!(read_all(&layer).await == contents(&made));
    first
}

#[tokio::test(flavor = "multi_thread")]
async fn parent_hears_what_a_request_is_a_part_of_if_it_knows_what_that_is() {
    // Nothing listens there: what is followed is dropped.
    let settings = Settings { endpoint: "http://127.0.0.1:1".to_owned(), ..Settings::default() };
    traces::start(&settings, "test", "", &Tasks::new());
    let trail = Trail::from_header("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
    let heard = heard_of(trail, ALPN).await.to_bytes().unwrap();
    let sent = trail.to_bytes().unwrap();
    assert_eq!(heard[..16], sent[..16], "another trace");
    assert_ne!(heard[16..], sent[16..], "the request is a step of its own");
    assert_eq!(heard_of(trail, ALPN_BEFORE).await, Trail::NONE);
    assert_eq!(heard_of(Trail::NONE, ALPN).await, Trail::NONE);
}
