//! What one start reads, the next node fetches before it asks.

use std::time::Duration;

use darter_proto::v1::{StartNote, StartOrder};
use darter_types::{LayerSource, PROTOCOL_VERSION, PieceIndex, RootHash};
use prost::Message;
use tonic::Code;

use super::world::{Peer, TestLayer, World, append, contents, eventually, read_all};
use crate::{Layer, Priority};

const FILES: usize = 40;
/// Each file is two pieces.
const LEN: usize = 300_000;
const HOUR: Duration = Duration::from_secs(3600);

/// A container on this peer reads these pieces, and the layer is closed.
async fn start(peer: &Peer, made: &TestLayer, source: &LayerSource, pieces: &[u32]) {
    let layer = peer.open(made, source);
    layer.map().await.unwrap();
    for (at, piece) in pieces.iter().enumerate() {
        layer.touched(PieceIndex(*piece), Duration::from_millis(at as u64));
        layer.read(PieceIndex(*piece), Priority::Demand).await.unwrap();
    }
}

fn noted(peer: &Peer, made: &TestLayer) -> Option<Vec<u32>> {
    let stored = peer.store.start(made.task).unwrap()?;
    Some(StartOrder::decode(stored).ok()?.pieces)
}

/// A node whose background never begins, so that only what earlier starts read comes by itself.
async fn quiet_node(world: &World, name: &str, prefetch: bool) -> Peer {
    let set = |options: &mut crate::Options| {
        (options.background.idle_before, options.prefetch) = (HOUR, prefetch);
    };
    world.peer("node", name, set).await
}

fn here(layer: &Layer) -> Vec<u32> {
    let pieces = layer.map_now().unwrap().piece_count();
    (0..pieces).filter(|piece| layer.read_local(PieceIndex(*piece)).is_some()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn second_node_has_what_the_first_read_before_it_asks_and_nothing_else() {
    let world = World::new();
    let made = TestLayer::new("a", FILES, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let seed = world.seed("seed").await;
    let (one, two) = (world.node("one").await, quiet_node(&world, "two", true).await);
    start(&one, &made, &source, &[31, 4, 17]).await;
    eventually("the seed knows it", || noted(&seed, &made) == Some(vec![31, 4, 17])).await;
    assert_eq!(noted(&one, &made), Some(vec![31, 4, 17]));
    let layer = two.open(&made, &source);
    layer.fill();
    eventually("what was read is here", || layer.status().have == 3).await;
    assert_eq!(here(&layer), [4, 17, 31]);
    assert_eq!(layer.giver(PieceIndex(4)).as_deref(), Some("seed"));
    let without = quiet_node(&world, "three", false).await;
    let other = without.open(&made, &source);
    other.fill();
    other.read(PieceIndex(0), Priority::Demand).await.unwrap();
    assert_eq!(here(&other), [0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_starts_read_survives_the_seed_and_is_merged() {
    let world = World::new();
    let made = TestLayer::new("a", FILES, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let seed = world.seed("seed").await;
    let (one, two) = (world.node("one").await, world.node("two").await);
    start(&one, &made, &source, &[5, 6]).await;
    eventually("the seed knows it", || noted(&seed, &made).is_some()).await;
    let store = std::sync::Arc::downgrade(&seed.store);
    seed.stop().await;
    // The piece that it was packing is packed to the end.
    eventually("the seed's last work is done", || store.strong_count() == 0).await;
    world.members.send_modify(|members| members.seeds.clear());
    let seed = world.seed("seed").await;
    start(&two, &made, &source, &[6, 7]).await;
    eventually("both are known", || noted(&seed, &made) == Some(vec![6, 5, 7])).await;
}

/// Told as a node tells it, by its own connection.
async fn note(from: &Peer, seed: &Peer, made: &TestLayer, repository: &str, order: StartOrder) -> Code {
    let layers = from.mesh.shared().peer_client(&seed.mesh.address().to_string(), true);
    let note = StartNote {
        protocol: PROTOCOL_VERSION,
        diff_id: made.task.diff_id.as_bytes().to_vec(),
        format: made.task.format,
        repository: repository.to_owned(),
        order: Some(order),
    };
    let mut client = layers;
    client.note_start(note).await.map_or_else(|status| status.code(), |_| Code::Ok)
}

fn order(root: RootHash, pieces: Vec<u32>) -> StartOrder {
    let count = pieces.len();
    StartOrder { root: root.as_bytes().to_vec(), pieces, at_ms: vec![0; count], votes: vec![u32::MAX; count] }
}

#[tokio::test(flavor = "multi_thread")]
async fn rubbish_and_strangers_words_are_not_taken() {
    let world = World::new();
    let made = TestLayer::new("a", FILES, LEN);
    let source = world.registry.push("private/a", &made.tar);
    let (seed, node) = (world.seed("seed").await, world.node("one").await);
    let mut request = made.request(&source);
    request.credential = Some(super::world::right());
    let layer = node.mesh.open(request);
    let root = layer.map().await.unwrap().root_hash();
    let (repository, other) = (source.repository.to_string(), "https://registry.example/private/b");
    let other_map = RootHash::from_bytes([1; 32]);
    let cases = [
        (&*repository, order(root, vec![100_000]), Code::NotFound),
        (&*repository, order(root, vec![1, 1]), Code::NotFound),
        (&*repository, order(other_map, vec![1]), Code::NotFound),
        (other, order(root, vec![1]), Code::NotFound),
    ];
    for (repository, order, code) in cases {
        assert_eq!(note(&node, &seed, &made, repository, order).await, code);
    }
    assert_eq!(noted(&seed, &made), None);
    assert_eq!(note(&node, &seed, &made, &repository, order(root, vec![1])).await, Code::Ok);
    assert_eq!(noted(&seed, &made), Some(vec![1]));
    // However often a node votes for it, it is one start's word.
    let stored = StartOrder::decode(seed.store.start(made.task).unwrap().unwrap()).unwrap();
    assert_eq!(stored.votes, [2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_of_everything_moves_no_more_than_its_bound_and_no_wrong_byte() {
    let world = World::new();
    let made = TestLayer::new("large", 280, 262_144);
    let source = world.registry.push("library/large", &made.tar);
    let seed = world.seed("seed").await;
    let (one, two) = (world.node("one").await, quiet_node(&world, "two", true).await);
    let map = one.open(&made, &source).map().await.unwrap();
    let everything = order(map.root_hash(), (0..map.piece_count()).rev().collect());
    assert_eq!(note(&one, &seed, &made, &source.repository.to_string(), everything).await, Code::Ok);
    let layer = two.open(&made, &source);
    layer.fill();
    let starts = &layer.open().shared.starts;
    eventually("all that was allowed has come", || layer.status().have > 0 && !starts.is_busy()).await;
    let bound = (crate::start::BYTES_MAX >> 18) as u32;
    assert_eq!(layer.status().have, bound);
    assert!(map.piece_count() > bound);
    assert!(read_all(&layer).await == contents(&made));
}

#[tokio::test(flavor = "multi_thread")]
async fn seed_packs_smaller_what_a_start_read() {
    let world = World::new();
    let (mut tar, mut text) = (Vec::new(), Vec::new());
    let word = |n: u64| format!("{:x} ", (n * n).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52).into_bytes();
    text.extend((0..60_000).flat_map(word));
    append(&mut tar, "text", &text);
    tar.extend_from_slice(&[0; 1024]);
    let made = TestLayer::of(tar);
    let source = world.registry.push("library/a", &made.tar);
    let (seed, one, two) = (world.seed("seed").await, world.node("one").await, world.node("two").await);
    let map = one.open(&made, &source).map().await.unwrap();
    let hash = map.piece(PieceIndex(0)).hash;
    let stored = || seed.store.read_stored(&hash).unwrap().unwrap().bytes.len();
    let before = stored();
    start(&two, &made, &source, &[0]).await;
    eventually("the piece is smaller", || stored() < before).await;
    let plain = seed.store.read(&hash).unwrap().unwrap();
    assert_eq!(plain, text[..plain.len()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_note_on_disk_is_no_order() {
    let world = World::new();
    let made = TestLayer::new("a", 3, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let seed = world.seed("seed").await;
    let node = world.node("one").await;
    node.open(&made, &source).map().await.unwrap();
    seed.store.set_start(made.task, b"rubbish").unwrap();
    let two = quiet_node(&world, "two", true).await;
    let layer = two.open(&made, &source);
    layer.fill();
    assert!(read_all(&layer).await == contents(&made));
    // The next start takes its place.
    start(&world.node("three").await, &made, &source, &[2]).await;
    eventually("the seed knows it", || noted(&seed, &made) == Some(vec![2])).await;
}
