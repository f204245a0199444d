//! The ordinary course of things: who makes, who gives, what stays.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use darter_types::PieceIndex;

use super::world::{NOWHERE, TestLayer, World, contents, eventually, member, read_all, right, told};
use crate::{LayerError, Probe, Stage};

const FILES: usize = 40;
const LEN: usize = 100_000;

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_at_once_get_map_and_pieces_and_the_registry_is_read_once() {
    let world = World::new();
    let made = TestLayer::new("a", FILES, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let _seed = world.seed("seed").await;
    let (one, two) = (world.node("one").await, world.node("two").await);
    let (first, second) = (one.open(&made, &source), two.open(&made, &source));
    let (first, second) = tokio::join!(read_all(&first), read_all(&second));
    assert!(first == contents(&made) && second == contents(&made));
    assert_eq!(world.registry.blobs_read.load(Ordering::Relaxed), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn third_node_takes_a_good_part_from_each_of_two_parents() {
    let world = World::new();
    let made = TestLayer::new("a", FILES, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let seed = world.seed("seed").await;
    let (one, two, three) = (world.node("one").await, world.node("two").await, world.node("three").await);
    for node in [&one, &two] {
        read_all(&node.open(&made, &source)).await;
    }
    let layer = three.open(&made, &source);
    told(&layer, vec![one.as_parent(false), two.as_parent(false), seed.as_parent(true)]);
    layer.map().await.unwrap();
    eventually("all three have said what they have", || layer.open().standings.names().len() == 3).await;
    assert!(read_all(&layer).await == contents(&made));
    let from = layer.status().from;
    let total: u64 = from.values().sum();
    for parent in ["one", "two"] {
        assert!(from[parent] * 4 >= total, "{from:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn map_comes_from_a_parent_when_the_seed_is_gone() {
    let world = World::new();
    let made = TestLayer::new("a", 3, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let seed = world.seed("seed").await;
    let (one, two) = (world.node("one").await, world.node("two").await);
    read_all(&one.open(&made, &source)).await;
    seed.stop().await;
    let layer = two.open(&made, &source);
    told(&layer, vec![one.as_parent(false)]);
    assert!(read_all(&layer).await == contents(&made));
    assert_eq!(world.registry.blobs_read.load(Ordering::Relaxed), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn node_without_any_mesh_makes_the_layer_itself() {
    let world = World::new();
    let made = TestLayer::new("a", 3, LEN);
    let source = world.registry.push("private/a", &made.tar);
    let node = world.node("one").await;
    let mut request = made.request(&source);
    request.credential = Some(right());
    let layer = node.mesh.open(request);
    assert!(read_all(&layer).await == contents(&made));
    assert!(layer.status().verified);
    assert_eq!(layer.status().from.keys().collect::<Vec<_>>(), ["origin"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_node_has_survives_its_process() {
    let world = World::new();
    let made = TestLayer::new("a", 5, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let seed = world.seed("seed").await;
    let node = world.node("one").await;
    let layer = node.open(&made, &source);
    read_all(&layer).await;
    eventually("all is stored", || layer.status().have == layer.status().pieces).await;
    drop(layer);
    seed.stop().await;
    node.stop().await;
    world.registry.is_down.store(true, Ordering::Relaxed);
    let node = world.node("one").await;
    let layer = node.open(&made, &source);
    let map = layer.map().await.unwrap();
    assert!((0..map.piece_count()).all(|index| layer.read_local(PieceIndex(index)).is_some()));
    assert!(layer.status().from.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn background_brings_the_rest_and_verifies_it() {
    let world = World::new();
    let made = TestLayer::new("a", 20, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let _seed = world.seed("seed").await;
    let node = world.node("one").await;
    let layer = node.open(&made, &source);
    layer.fill();
    eventually("the layer is verified", || layer.status().verified).await;
    let status = layer.status();
    assert_eq!((status.have, status.progress.stage), (status.pieces, Stage::Ready));
    drop(layer);
    // It is remembered: the next process need not do it again.
    node.stop().await;
    let node = world.node("one").await;
    let layer = node.open(&made, &source);
    layer.map().await.unwrap();
    assert!(layer.status().verified);
}

#[tokio::test(flavor = "multi_thread")]
async fn background_rests_while_a_container_has_read_a_moment_ago() {
    let world = World::new();
    let made = TestLayer::new("a", 20, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let _seed = world.seed("seed").await;
    let hour = Duration::from_secs(3600);
    let node = world.peer("node", "one", |options| options.background.idle_before = hour).await;
    let layer = node.open(&made, &source);
    layer.fill();
    for index in 1..3 {
        layer.read(PieceIndex(index), crate::Priority::Demand).await.unwrap();
        eventually("what was read is kept, and nothing else", || layer.status().have == index).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn piece_that_nobody_gives_holds_up_the_background_for_a_while_only() {
    let world = World::new();
    let made = TestLayer::new("a", 3, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let seed = world.seed("seed").await;
    let node = world.node("one").await;
    let layer = node.open(&made, &source);
    layer.map().await.unwrap();
    seed.stop().await;
    world.members.send_modify(|members| members.seeds.clear());
    world.registry.is_down.store(true, Ordering::Relaxed);
    let shared = &layer.open().shared;
    let reader = layer.clone();
    let reading = tokio::spawn(async move { reader.read(PieceIndex(0), crate::Priority::Demand).await });
    eventually("a container waits", || shared.starts.strangers.idle().is_zero()).await;
    let rested = || shared.demand.idle().min(shared.starts.strangers.idle());
    eventually("the others go on", || rested() > Duration::from_millis(100)).await;
    assert!(!reading.is_finished(), "it waits as before");
    reading.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn piece_that_spoiled_on_disk_is_fetched_again() {
    let world = World::new();
    let made = TestLayer::new("a", 8, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let _seed = world.seed("seed").await;
    let node = world.peer("node", "one", |options| options.cache_bytes = 0).await;
    let layer = node.open(&made, &source);
    read_all(&layer).await;
    eventually("all is stored", || layer.status().have == layer.status().pieces).await;
    spoil(&world, "one");
    assert!(read_all(&layer).await == contents(&made));
    assert_eq!(node.store.stats().damaged, 1);
}

/// Flips a bit of a piece on that peer's disk.
fn spoil(world: &World, peer: &str) {
    let pack = world.root(peer).join("packs/000000.pack");
    let mut bytes = std::fs::read(&pack).unwrap();
    let middle = bytes.len() / 2 + 100;
    bytes[middle] ^= 4;
    std::fs::write(&pack, bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn piece_that_a_child_found_spoilt_is_fetched_again_from_the_mesh() {
    for looks_first in [false, true] {
        let world = World::new();
        let made = TestLayer::new("a", 8, LEN);
        let source = world.registry.push("library/a", &made.tar);
        let _seed = world.seed("seed").await;
        let node = world.peer("node", "one", |options| options.cache_bytes = 0).await;
        let layer = node.open(&made, &source);
        read_all(&layer).await;
        eventually("all is stored", || layer.status().have == layer.status().pieces).await;
        spoil(&world, "one");
        let map = layer.map_now().unwrap();
        // As a child's request reads them: it tells no layer what it finds.
        let is_spoilt =
            |index: &u32| node.store.read_stored(&map.piece(PieceIndex(*index)).hash).unwrap().is_none();
        let spoilt: Vec<u32> = (0..map.piece_count()).filter(is_spoilt).collect();
        assert_eq!((spoilt.len(), layer.status().have), (1, layer.status().pieces));
        if looks_first {
            assert!(layer.read_local(PieceIndex(spoilt[0])).is_none());
            assert_eq!(layer.status().have, layer.status().pieces - 1);
        }
        assert!(read_all(&layer).await == contents(&made));
        assert_eq!(world.registry.blobs_read.load(Ordering::Relaxed), 1, "no parent was asked");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn layer_whose_every_peer_vanished_is_read_from_the_origin() {
    let world = World::new();
    let made = TestLayer::new("a", 8, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let seed = world.seed("seed").await;
    let node = world.node("one").await;
    let layer = node.open(&made, &source);
    layer.map().await.unwrap();
    seed.stop().await;
    world.members.send_modify(|members| members.seeds.clear());
    assert!(read_all(&layer).await == contents(&made));
    assert!(layer.status().from.contains_key("origin"));
}

#[tokio::test(flavor = "multi_thread")]
async fn registry_that_is_down_is_no_verdict() {
    let world = World::new();
    let made = TestLayer::new("a", 2, LEN);
    let source = world.registry.push("library/a", &made.tar);
    world.registry.is_down.store(true, Ordering::Relaxed);
    let node = world.node("one").await;
    let layer = node.open(&made, &source);
    assert!(matches!(layer.map().await, Err(LayerError::Unavailable { .. })));
    world.registry.is_down.store(false, Ordering::Relaxed);
    let mut tries = 0;
    while layer.map().await.is_err() {
        tries += 1;
        assert!(tries < 10);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn probe_tells_known_answering_and_refused_apart() {
    let world = World::new();
    let made = [TestLayer::new("a", 2, LEN), TestLayer::new("b", 2, LEN), TestLayer::new("c", 2, LEN)];
    let sources = [
        world.registry.push("a", &made[0].tar),
        world.registry.push("b", &made[1].tar),
        world.registry.push("private/c", &made[2].tar),
    ];
    let node = world.node("one").await;
    node.open(&made[0], &sources[0]).map().await.unwrap();
    let requests: Vec<_> = made.iter().zip(&sources).map(|(made, source)| made.request(source)).collect();
    let found = node.mesh.probe(&requests).await;
    assert_eq!(found, [Probe::Known, Probe::Answering, Probe::Refused("pull access denied".to_owned())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_route_a_probe_refuses_unless_a_seed_may_have_one() {
    let world = World::new();
    let made = TestLayer::new("a", 2, LEN);
    let mut source = world.registry.push("library/a", &made.tar);
    source.repository = format!("https://{NOWHERE}/library/a").parse().unwrap();
    let node = world.node("one").await;
    let probe = async || node.mesh.probe(&[made.request(&source)]).await.pop();
    let refused = tokio::time::timeout(Duration::from_millis(650), probe()).await;
    assert!(matches!(refused, Ok(Some(Probe::Refused(_)))), "{refused:?}");
    let _seed = world.seed("seed").await;
    let undecided = tokio::time::timeout(Duration::from_millis(650), probe()).await;
    assert!(undecided.is_err(), "{undecided:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn layer_of_no_files_needs_no_pieces() {
    let world = World::new();
    let made = TestLayer::new("empty", 0, 0);
    let source = world.registry.push("library/empty", &made.tar);
    let _seed = world.seed("seed").await;
    let node = world.node("one").await;
    let layer = node.open(&made, &source);
    assert_eq!(layer.map().await.unwrap().piece_count(), 0);
    layer.fill();
    eventually("the layer is verified", || layer.status().verified).await;
}

/// An address where connections are neither taken nor refused, as behind a firewall that drops packets; it is so as long as
/// what comes with it lives.
async fn black_hole() -> (String, impl Sized) {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let mut queued = Vec::new();
    // Nobody accepts: when the queue is full, the kernel drops what comes.
    while let Ok(stream) =
        tokio::time::timeout(Duration::from_millis(300), tokio::net::TcpStream::connect(address)).await
    {
        queued.push(stream.unwrap());
    }
    (address.to_string(), (listener, queued))
}

#[tokio::test(flavor = "multi_thread")]
async fn seed_to_which_packets_are_lost_is_waited_for_once() {
    let world = World::new();
    let (address, _hole) = black_hole().await;
    world.members.send_modify(|members| members.seeds.push(member("gone", &address)));
    let node = world.node("one").await;
    let (first, second) = (TestLayer::new("a", 1, 1000), TestLayer::new("b", 1, 1000));
    let sources = [&first, &second].map(|made| world.registry.push("library/x", &made.tar));
    let begun = Instant::now();
    let layer = node.open(&first, &sources[0]);
    let reach = &layer.open().shared.reach;
    eventually("the seed is known to be out of reach", || reach.is_away(&address)).await;
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    // The next layer's search has nobody to ask, and turns to the origin when its delay is over.
    let begun = Instant::now();
    assert!(read_all(&node.open(&second, &sources[1])).await == contents(&second));
    assert!(begun.elapsed() < Duration::from_secs(11), "{:?}", begun.elapsed());
    // It counts as gone only as long as it is a member.
    world.members.send_modify(|members| members.seeds.clear());
    eventually("it is forgotten", || !reach.is_away(&address)).await;
}
