//! Too little room: what goes, what stays, and that nobody misses it.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use darter_types::{DiffId, PieceIndex};
use parking_lot::Mutex;

use super::world::{Peer, TestLayer, World, contents, eventually, member, read_all};
use crate::{LayerError, Priority};

const FILES: usize = 20;
const LEN: usize = 100_000;
/// Room for one of these layers and a half.
const QUOTA: u64 = (FILES * LEN * 3 / 2) as u64;

/// What snapshots reach, as a test has it.
type Reached = Arc<Mutex<HashSet<DiffId>>>;

fn keep(peer: &Peer) -> Reached {
    let reached = Reached::default();
    let now = reached.clone();
    peer.mesh.keep(Arc::new(move || Some(now.lock().clone())));
    reached
}

async fn small(world: &World, role: &str, name: &str) -> (Peer, Reached) {
    let peer = world.limited(role, name, Some(QUOTA), |options| options.spared_for = Duration::ZERO).await;
    let reached = keep(&peer);
    if role == "seed" {
        let info = member(name, &peer.mesh.address().to_string());
        world.members.send_modify(|members| members.seeds.push(info));
    }
    (peer, reached)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_makes_room_for_what_is_in_use_and_fetches_again_what_went() {
    let world = World::new();
    let (old, new) = (TestLayer::new("old", FILES, LEN), TestLayer::new("new", FILES, LEN));
    let sources = [world.registry.push("library/a", &old.tar), world.registry.push("library/b", &new.tar)];
    let _seed = world.seed("seed").await;
    let (node, reached) = small(&world, "node", "one").await;
    let first = node.open(&old, &sources[0]);
    assert!(read_all(&first).await == contents(&old));
    eventually("all is stored", || first.status().have == first.status().pieces).await;
    reached.lock().insert(new.task.diff_id);
    let second = node.open(&new, &sources[1]);
    assert!(read_all(&second).await == contents(&new));
    second.fill();
    eventually("the layer in use is complete", || second.status().have == second.status().pieces).await;
    assert!(first.status().have < first.status().pieces / 2, "{:?}", first.status());
    assert!(node.store.stats().evicted > 0 && node.store.stats().bytes <= QUOTA);
    assert!(node.store.has_map(old.task), "a node keeps the map");
    assert!(read_all(&first).await == contents(&old), "what went comes again");
    let map = second.map_now().unwrap();
    let is_here = |index| second.read_local(PieceIndex(index)).is_some();
    assert!((0..map.piece_count()).all(is_here), "what is in use stays");
    assert_eq!(world.registry.blobs_read.load(Ordering::Relaxed), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_no_room_is_read_through_memory_and_nothing_in_use_goes() {
    let world = World::new();
    let (kept, other) = (TestLayer::new("kept", FILES, LEN), TestLayer::new("other", FILES, LEN));
    let sources = [world.registry.push("library/a", &kept.tar), world.registry.push("library/b", &other.tar)];
    let _seed = world.seed("seed").await;
    let (node, reached) = small(&world, "node", "one").await;
    reached.lock().extend([kept.task.diff_id, other.task.diff_id]);
    let (first, second) = (node.open(&kept, &sources[0]), node.open(&other, &sources[1]));
    assert!(read_all(&first).await == contents(&kept));
    eventually("all is stored", || first.status().have == first.status().pieces).await;
    for _ in 0..2 {
        assert!(read_all(&second).await == contents(&other));
    }
    second.fill();
    eventually("the background stands still", || node.mesh.store_status().is_tight).await;
    let stats = node.store.stats();
    assert!(stats.bytes <= QUOTA && stats.evicted == 0, "{stats:?} of {QUOTA}");
    assert_eq!(first.status().have, first.status().pieces);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_lets_the_layer_go_that_was_used_longest_ago() {
    let world = World::new();
    let made: Vec<_> = ["a", "b", "c"].map(|name| TestLayer::new(name, FILES, LEN / 2)).into();
    let sources: Vec<_> = made.iter().map(|made| world.registry.push("library/a", &made.tar)).collect();
    let (seed, _) = small(&world, "seed", "seed").await;
    let node = world.node("one").await;
    for (turn, number) in [0, 1, 0].into_iter().enumerate() {
        let reader = world.node(&format!("reader-{turn}")).await;
        let layer = reader.open(&made[number], &sources[number]);
        assert!(read_all(&layer).await == contents(&made[number]));
        reader.stop().await;
    }
    let layer = node.open(&made[2], &sources[2]);
    assert!(read_all(&layer).await == contents(&made[2]));
    let held: Vec<_> = made.iter().map(|made| seed.store.has_map(made.task)).collect();
    assert_eq!(held, [true, false, true]);
    let again = node.open(&made[1], &sources[1]);
    assert!(read_all(&again).await == contents(&made[1]), "it is made anew");
    assert_eq!(world.registry.blobs_read.load(Ordering::Relaxed), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_without_room_says_how_much_is_missing_and_throws_nothing_away() {
    let world = World::new();
    let (small_one, large) = (TestLayer::new("a", 3, LEN), TestLayer::new("b", 2 * FILES, LEN));
    let sources =
        [world.registry.push("library/a", &small_one.tar), world.registry.push("library/b", &large.tar)];
    let (seed, _) = small(&world, "seed", "seed").await;
    let layer = seed.open(&small_one, &sources[0]);
    layer.map().await.unwrap();
    let refused = seed.open(&large, &sources[1]);
    let Err(LayerError::Unavailable { reason }) = refused.map().await else { panic!("there is no room") };
    let dir = world.root("seed").display().to_string();
    assert!(
        reason.contains(&format!("no space is left in {dir}")) && reason.contains("MB missing"),
        "{reason}"
    );
    assert_eq!(world.registry.blobs_read.load(Ordering::Relaxed), 1, "nothing was read for nothing");
    assert!(seed.store.has_map(small_one.task));
    assert!(layer.read(PieceIndex(0), Priority::Demand).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn pieces_that_another_layer_needs_stay() {
    let world = World::new();
    let old = TestLayer::new("same", FILES, LEN);
    // The same files and some more: its pieces are the other's, but for one file.
    let mut tar = old.tar[..old.tar.len() - 1024].to_vec();
    tar.extend_from_slice(&TestLayer::new("more", 2, LEN).tar);
    let new = TestLayer::of(tar);
    let sources = [world.registry.push("library/a", &old.tar), world.registry.push("library/b", &new.tar)];
    let node = world.limited("node", "one", None, |options| options.spared_for = Duration::ZERO).await;
    let reached = keep(&node);
    reached.lock().insert(new.task.diff_id);
    let (first, second) = (node.open(&old, &sources[0]), node.open(&new, &sources[1]));
    assert!(read_all(&first).await == contents(&old) && read_all(&second).await == contents(&new));
    drop(first);
    let all = node.store.stats().pieces;
    crate::upkeep::evict_all(&node.mesh).await;
    assert_eq!(node.store.stats().pieces, all);
    reached.lock().clear();
    crate::upkeep::evict_all(&node.mesh).await;
    assert_eq!(node.store.stats().pieces, 0);
    assert!(read_all(&second).await == contents(&new));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_goes_before_it_is_known_what_is_in_use() {
    let world = World::new();
    let made = TestLayer::new("a", FILES, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let node = world.limited("node", "one", None, |options| options.spared_for = Duration::ZERO).await;
    read_all(&node.open(&made, &source)).await;
    crate::upkeep::evict_all(&node.mesh).await;
    node.mesh.keep(Arc::new(|| None));
    crate::upkeep::evict_all(&node.mesh).await;
    assert_eq!(node.store.stats().evicted, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_that_lost_pieces_makes_the_layer_again_for_whoever_has_its_map() {
    let world = World::new();
    let made = TestLayer::new("a", FILES, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let seed = world.seed("seed").await;
    let (early, late) = (world.node("early").await, world.node("late").await);
    let layer = early.open(&made, &source);
    layer.map().await.unwrap();
    // Nothing says that it needs them.
    assert!(seed.store.sweep().end().pieces > 0);
    assert!(read_all(&layer).await == contents(&made));
    assert_eq!(
        world.registry.blobs_read.load(Ordering::Relaxed),
        2,
        "the seed read it again, the node didn't"
    );
    assert!(!layer.status().from.contains_key("origin") && !layer.status().stuck);
    assert!(seed.store.sweep().end().pieces > 0);
    assert!(read_all(&late.open(&made, &source)).await == contents(&made));
    assert_eq!(world.registry.blobs_read.load(Ordering::Relaxed), 3);
}
