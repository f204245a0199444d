//! Peers that lie, break or say nothing: passed over, never believed.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use darter_daemon::tasks::Tasks;
use darter_identity::{ClientAuth, TlsStream};
use darter_layer::{PieceSink, make};
use darter_store::{Encoding, StoredMap, StoredPiece};
use darter_types::{BlobDigest, Digest, LayerSource, PieceHash, PieceIndex, RootHash};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::world::{Peer, TestLayer, World, contents, eventually, read_all, told};
use crate::bits::Bits;
use crate::frames::{ALPN, Answer, Ask, Request, read_request};
use crate::layer::{OpenPeer, open_peer};
use crate::serve::testing::are_given;
use crate::{LayerError, Priority};

const LEN: usize = 60_000;

/// A node that says it has every piece. `answer` makes its answers to requests for pieces; `None`: it says nothing.
async fn false_parent(world: &World, name: &str, answer: fn() -> Option<StoredPiece>) -> OpenPeer {
    parent_that(world, name, move |stream| lie(stream, answer)).await
}

async fn parent_that<F: Future<Output = ()> + Send + 'static>(
    world: &World,
    name: &str,
    attend: impl Fn(TlsStream) -> F + Send + 'static,
) -> OpenPeer {
    parent_of_version(world, name, ALPN, attend).await
}

/// One that speaks this version of the piece protocol, and no other.
pub(super) async fn parent_of_version<F: Future<Output = ()> + Send + 'static>(
    world: &World,
    name: &str,
    alpn: &'static [u8],
    attend: impl Fn(TlsStream) -> F + Send + 'static,
) -> OpenPeer {
    let tasks = Tasks::new();
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let identity = world.identity("node", name);
    let mut listener = identity.listener(tcp, &[b"h2", alpn], ClientAuth::Required, &tasks).unwrap();
    let address = listener.address().to_string();
    let mut streams = listener.raw(alpn);
    tasks.spawn("false parent", async move {
        while let Some((stream, _)) = streams.recv().await {
            tokio::spawn(attend(stream));
        }
    });
    open_peer(name, &address, false)
}

async fn lie(mut stream: TlsStream, answer: fn() -> Option<StoredPiece>) {
    while let Ok(Some(body)) = read_request(&mut stream).await {
        let Request { id, ask, .. } = Request::decode(body).unwrap();
        let answer = match ask {
            Ask::Have => Some(Answer::Have { id, pieces: Ok(Bits::from_fn(1000, |_| true)) }),
            Ask::Pieces(pieces) => {
                answer().map(|piece| Answer::Piece { id, index: pieces[0], piece: Ok(piece) })
            }
        };
        if let Some(answer) = answer {
            let (head, rest) = answer.encode();
            stream.write_all(&head).await.unwrap();
            stream.write_all(&rest).await.unwrap();
            stream.flush().await.unwrap();
        }
    }
}

/// Says that it has every piece, and sends one byte of an answer in a tenth of a second.
async fn drip(mut stream: TlsStream) {
    let body = read_request(&mut stream).await.unwrap().unwrap();
    let id = Request::decode(body).unwrap().id;
    let (head, rest) = Answer::Have { id, pieces: Ok(Bits::from_fn(1000, |_| true)) }.encode();
    stream.write_all(&[head, rest].concat()).await.unwrap();
    stream.write_all(&100_000u32.to_le_bytes()).await.unwrap();
    while stream.write_all(&[1]).await.is_ok() && stream.flush().await.is_ok() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Kept as they came, ahead of a start.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_pieces_that_nobody_had_read_are_fetched_again_and_their_giver_is_known() {
    let world = World::new();
    let made = TestLayer::new("a", 20, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let _seed = world.seed("seed").await;
    let node = world.node("one").await;
    let layer = node.open(&made, &source);
    let map = layer.map().await.unwrap();
    let wrong = StoredPiece::encode(b"something else", 3);
    for index in 0..map.piece_count() {
        let hash = map.piece(PieceIndex(index)).hash;
        node.store.put_unchecked(&hash, &wrong).unwrap();
        // A child may look at a piece before its giver is noted.
        let is_found_first = index % 2 == 0;
        assert!(!is_found_first || node.store.read(&hash).unwrap().is_none());
        layer.open().kept_unread(index, &hash, open_peer("liar", "127.0.0.1:1", false));
    }
    assert!(read_all(&layer).await == contents(&made));
    assert_eq!(node.mesh.shared().metrics.wrong.get(), u64::from(map.piece_count()));
    assert!(layer.open().unproven.lock().is_empty());
}

/// A child may look at a piece before it is noted, and find it wrong.
#[tokio::test(flavor = "multi_thread")]
async fn a_piece_that_was_found_wrong_before_it_was_noted_counts_as_missing() {
    let world = World::new();
    let made = TestLayer::new("a", 3, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let _seed = world.seed("seed").await;
    let node = world.node("one").await;
    let layer = node.open(&made, &source);
    let hash = layer.map().await.unwrap().piece(PieceIndex(0)).hash;
    let wrong = StoredPiece::encode(b"something else", 3);
    assert!(node.store.put_unchecked(&hash, &wrong).unwrap());
    assert!(node.store.read(&hash).unwrap().is_none());
    let open = layer.open();
    open.kept_unread(0, &hash, open_peer("liar", "127.0.0.1:1", false));
    open.arrived(0, &hash);
    assert!(open.missing().contains(&0));
    layer.read(PieceIndex(0), Priority::Demand).await.unwrap();
    eventually("the true one is stored and noted", || !open.missing().contains(&0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_parents_that_drip_are_left_for_a_third() {
    let world = World::new();
    let made = TestLayer::new("a", 3, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let seed = world.seed("seed").await;
    let drips = [parent_that(&world, "first", drip).await, parent_that(&world, "second", drip).await];
    let node = world.node("one").await;
    let layer = node.open(&made, &source);
    told(&layer, drips.into_iter().chain([seed.as_parent(true)]).collect());
    layer.map().await.unwrap();
    eventually("all have said what they have", || layer.open().standings.names().len() == 3).await;
    let begun = Instant::now();
    layer.read(PieceIndex(0), Priority::Demand).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_over_which_nothing_is_asked_are_few_and_end() {
    let world = World::new();
    let seed = world.seed("seed").await;
    let (evil, address) = (world.identity("node", "evil"), seed.mesh.address().to_string());
    let roles = [darter_types::Role::Seed];
    let mut idle = Vec::new();
    for _ in 0..5 {
        idle.push(evil.connect(&address, &roles, ALPN).await.unwrap().0);
    }
    let begun = Instant::now();
    // The fifth is turned away at once.
    for (stream, patience) in idle.iter_mut().rev().zip([1, 10, 10, 10, 10]) {
        let ended = tokio::time::timeout(Duration::from_secs(patience), stream.read(&mut [0])).await;
        assert!(matches!(ended.unwrap(), Ok(0) | Err(_)), "after {:?}", begun.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_that_does_not_read_has_no_more_pieces_in_memory_than_its_share() {
    let world = World::new();
    let made = TestLayer::new("a", 3, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let (seed, node) = (world.seed("seed").await, world.node("one").await);
    assert!(read_all(&node.open(&made, &source)).await == contents(&made));
    let repository = source.repository.to_string();
    let children = ["deaf", "deaf", "deaf", "one", "two"];
    let given = are_given(seed.mesh.shared(), 8, (made.task, &repository), &children).await;
    assert_eq!(given, [true, true, false, true, true]);
}

#[tokio::test(flavor = "multi_thread")]
async fn parent_that_sends_wrong_bytes_is_passed_over() {
    let world = World::new();
    let made = TestLayer::new("a", 20, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let seed = world.seed("seed").await;
    let wrong = || Some(StoredPiece { encoding: Encoding::Raw, plain_len: 5, bytes: b"wrong"[..].into() });
    let liar = false_parent(&world, "liar", wrong).await;
    let node = world.node("one").await;
    let layer = node.open(&made, &source);
    told(&layer, vec![liar, seed.as_parent(true)]);
    assert!(read_all(&layer).await == contents(&made));
    assert_eq!(layer.status().from.keys().collect::<Vec<_>>(), ["seed"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn parent_that_says_nothing_delays_a_container_by_a_moment_only() {
    let world = World::new();
    let made = TestLayer::new("a", 6, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let seed = world.seed("seed").await;
    let mute = false_parent(&world, "mute", || None).await;
    let node = world.node("one").await;
    let layer = node.open(&made, &source);
    told(&layer, vec![mute, seed.as_parent(true)]);
    layer.map().await.unwrap();
    eventually("both have said what they have", || layer.open().standings.names().len() == 2).await;
    let begun = Instant::now();
    layer.read(PieceIndex(0), Priority::Demand).await.unwrap();
    assert!(begun.elapsed() < Duration::from_millis(1500), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_for_one_piece_can_be_given_up_and_the_next_reader_gets_it() {
    let world = World::new();
    let made = TestLayer::new("a", 6, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let seed = world.seed("seed").await;
    let mute = false_parent(&world, "mute", || None).await;
    let node = world.node("one").await;
    let layer = node.open(&made, &source);
    layer.map().await.unwrap();
    told(&layer, vec![mute]);
    eventually("the mute one is the only parent", || layer.open().standings.names() == ["mute"]).await;
    let short = Duration::from_millis(300);
    assert!(tokio::time::timeout(short, layer.read(PieceIndex(0), Priority::Background)).await.is_err());
    told(&layer, vec![seed.as_parent(true)]);
    layer.read(PieceIndex(0), Priority::Demand).await.unwrap();
}

/// Where the test's layers are, as those say who sign them.
fn vouched(made: &TestLayer) -> LayerSource {
    let (repository, blob) = ("https://registry.example/private/a", BlobDigest(Digest::of(&made.tar)));
    LayerSource { repository: repository.parse().unwrap(), blob, size: made.tar.len() as u64 }
}

/// Makes the layer and keeps its pieces and map in the peer's store, as `sign` vouches for it.
fn plant(peer: &Peer, made: &TestLayer, named: &TestLayer, sign: &darter_identity::Identity) {
    struct Keep<'a>(&'a Peer);
    impl PieceSink for Keep<'_> {
        fn piece(&mut self, _: PieceIndex, hash: PieceHash, plain: &[u8]) -> std::io::Result<()> {
            self.0.store.put_plain(&hash, plain).map(|_| ()).map_err(std::io::Error::other)
        }
    }
    let mut map = make(&made.tar[..], &mut Keep(peer)).unwrap().map;
    let encoded = map.encode();
    let (core, tar) = (encoded.core, encoded.tar);
    keep_map(peer, named, (core, tar, map.root_hash()), sign);
}

/// Keeps a map in the peer's store: core, tar section, root hash.
fn keep_map(
    peer: &Peer,
    named: &TestLayer,
    (core, tar, root): (Vec<u8>, Vec<u8>, RootHash),
    sign: &darter_identity::Identity,
) {
    let mut note = crate::note::Note::default();
    note.prove(&"https://registry.example/library/a".parse().unwrap(), true);
    let stored = StoredMap {
        task: named.task,
        root,
        core: core.into(),
        tar: Some(tar.into()),
        proof: crate::proof::sign(sign, named.task, root, &vouched(named), false).encode_to_vec(),
        access: note.encode(),
    };
    peer.store.put_map(&stored).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn node_that_relays_a_map_makes_it_public_to_nobody() {
    let world = World::new();
    let made = TestLayer::new("a", 3, LEN);
    let evil = world.node("evil").await;
    // By its note the layer is public, by its signature it is not.
    plant(&evil, &made, &made, &world.identity("seed", "honest"));
    let node = world.node("one").await;
    let mine = LayerSource { repository: "https://registry.example/mine".parse().unwrap(), ..vouched(&made) };
    let layer = node.open(&made, &mine);
    told(&layer, vec![evil.as_parent(false)]);
    assert!(read_all(&layer).await == contents(&made));
    assert!(layer.is_open_to(std::slice::from_ref(&mine)) && layer.is_open_to(&[vouched(&made)]));
    let mut other = mine;
    other.repository = "https://registry.example/stranger/b".parse().unwrap();
    assert!(!layer.is_open_to(&[other]), "a node's word made it public");
}

#[tokio::test(flavor = "multi_thread")]
async fn rubbish_instead_of_a_tar_section_is_neither_kept_nor_the_end_of_verification() {
    let world = World::new();
    let made = TestLayer::new("a", 3, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let seed = world.seed("seed").await;
    let good = world.node("good").await;
    let layer = good.open(&made, &source);
    layer.fill();
    eventually("the first node has verified it", || layer.status().verified).await;
    seed.stop().await;
    world.members.send_modify(|members| members.seeds.clear());
    let evil = world.seed("evil").await;
    plant(&evil, &made, &made, &world.identity("seed", "seed"));
    evil.store.set_tar(made.task, b"rubbish").unwrap();
    let node = world.node("one").await;
    let layer = node.open(&made, &source);
    told(&layer, vec![good.as_parent(false)]);
    layer.map().await.unwrap();
    // As an older version kept it.
    node.store.set_tar(made.task, b"rubbish").unwrap();
    layer.fill();
    eventually("it is verified all the same", || layer.status().verified).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn map_signed_with_a_recipe_for_nothing_is_a_lie() {
    let world = World::new();
    let made = TestLayer::new("a", 3, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let evil = world.seed("evil").await;
    plant(&evil, &made, &made, &world.identity("seed", "evil"));
    let mut core = evil.store.map(made.task).unwrap().unwrap().core.to_vec();
    // The row of the recipe is the fifth and last: its length, and the hash of its bytes.
    let (row, rubbish) = (16 + 4 * 48, vec![0xff; 1000]);
    core[row + 8..row + 16].copy_from_slice(&1000u64.to_le_bytes());
    core[row + 16..row + 48].copy_from_slice(blake3::hash(&rubbish).as_bytes());
    let root = darter_layer::LayerMap::decode(&core).unwrap().root_hash();
    let tar = StoredPiece::encode(&rubbish, 1).bytes.to_vec();
    keep_map(&evil, &made, (core, tar, root), &world.identity("seed", "evil"));
    let node = world.node("one").await;
    let layer = node.open(&made, &source);
    layer.fill();
    eventually("the map is in quarantine", || node.store.quarantined(made.task, root).is_some()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn node_that_signs_maps_is_not_believed() {
    let world = World::new();
    let (made, named) = (TestLayer::new("evil", 3, LEN), TestLayer::new("a", 3, LEN));
    let source = world.registry.push("library/a", &named.tar);
    let evil = world.node("evil").await;
    plant(&evil, &made, &named, &world.identity("node", "evil"));
    let node = world.node("one").await;
    let layer = node.open(&named, &source);
    told(&layer, vec![evil.as_parent(false)]);
    assert!(read_all(&layer).await == contents(&named));
    assert_eq!(world.registry.blobs_read.load(Ordering::Relaxed), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn lie_of_a_seed_is_found_when_all_pieces_are_here_and_not_taken_again() {
    let world = World::new();
    let (made, named) = (TestLayer::new("evil", 3, LEN), TestLayer::new("a", 3, LEN));
    let source = world.registry.push("library/a", &named.tar);
    let evil = world.seed("evil").await;
    plant(&evil, &made, &named, &world.identity("seed", "evil"));
    let node = world.node("one").await;
    let layer = node.open(&named, &source);
    assert!(read_all(&layer).await == contents(&made), "until then nobody can know");
    let root = layer.map_now().unwrap().root_hash();
    layer.fill();
    let store: Arc<_> = node.store.clone();
    eventually("the map is in quarantine", || store.quarantined(named.task, root).is_some()).await;
    eventually("the layer is impossible", || layer.status().progress.stage == crate::Stage::Impossible).await;
    assert!(matches!(layer.read(PieceIndex(0), Priority::Demand).await, Err(LayerError::Impossible { .. })));
    drop(layer);
    evil.stop().await;
    world.members.send_modify(|members| members.seeds.clear());
    let layer = node.open(&named, &source);
    assert!(read_all(&layer).await == contents(&named));
}

#[tokio::test(flavor = "multi_thread")]
async fn blob_with_another_digest_makes_the_layer_impossible() {
    let world = World::new();
    let (made, other) = (TestLayer::new("a", 3, LEN), TestLayer::new("b", 3, LEN));
    let source = world.registry.push("library/a", &made.tar);
    world.registry.replace(&source, &other.tar);
    let _seed = world.seed("seed").await;
    let node = world.node("one").await;
    let layer = node.open(&made, &source);
    let error = layer.map().await.unwrap_err();
    assert!(
        matches!(&error, LayerError::Impossible { reason } if reason.contains("has the digest")),
        "{error}"
    );
    assert!(node.store.maps().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn blob_that_is_no_tar_is_impossible_on_a_node_alone_too() {
    let world = World::new();
    let made = TestLayer::new("a", 3, LEN);
    let rubbish = vec![0x55; 4096];
    let source = world.registry.push("library/a", &rubbish);
    let node = world.node("one").await;
    assert!(matches!(node.open(&made, &source).map().await, Err(LayerError::Impossible { .. })));
}
