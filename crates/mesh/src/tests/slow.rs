//! Registries that send next to nothing: they hold up nobody who doesn't need them.

use std::sync::atomic::Ordering;

use super::world::{TestLayer, World, contents, eventually, read_all, right};
use crate::LayerError;

const LEN: usize = 60_000;

#[tokio::test(flavor = "multi_thread")]
async fn dripping_blobs_keep_no_turn_from_those_who_wait() {
    let world = World::new();
    let _seed = world.seed("seed").await;
    let (victim, evil) = (world.node("one").await, world.node("evil").await);
    let drips: Vec<_> = (0..4).map(|number| TestLayer::new(&format!("drip {number}"), 3, LEN)).collect();
    let open = |made: &TestLayer| evil.open(made, &world.registry.push_dripping(&made.tar));
    let _layers: Vec<_> = drips.iter().map(open).collect();
    let read = || world.registry.blobs_read.load(Ordering::Relaxed);
    eventually("all turns are taken", || read() == 3).await;
    let made = TestLayer::new("a", 3, LEN);
    let layer = victim.open(&made, &world.registry.push("library/a", &made.tar));
    assert!(read_all(&layer).await == contents(&made));
    eventually("the fourth has its turn too", || read() == 5).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dripping_blob_keeps_its_layer_from_nobody_who_knows_another_source() {
    let world = World::new();
    let _seed = world.seed("seed").await;
    let (victim, evil) = (world.node("one").await, world.node("evil").await);
    let made = TestLayer::new("a", 3, LEN);
    let dripping = world.registry.push_dripping(&made.tar);
    let layer = evil.open(&made, &dripping);
    eventually("it is being read", || world.registry.blobs_read.load(Ordering::Relaxed) == 1).await;
    let mut request = made.request(&world.registry.push("private/a", &made.tar));
    request.credential = Some(right());
    let other = victim.mesh.open(request);
    assert!(read_all(&other).await == contents(&made));
    assert!(layer.map_now().is_none(), "the other repository has not shown that it holds the layer");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_credentials_for_a_source_waits_for_no_other_that_drips() {
    let world = World::new();
    let seed = world.seed("seed").await;
    let made = TestLayer::new("a", 3, LEN);
    let (private, dripping) =
        (world.registry.push("private/a", &made.tar), world.registry.push_dripping(&made.tar));
    // A scheduler's order names the sources of all who want the layer, and has no credentials.
    let order = vec![private.clone(), dripping];
    crate::serve::obey(&seed.mesh.shared, made.task, order);
    eventually("the second is being read", || world.registry.blobs_read.load(Ordering::Relaxed) == 1).await;
    let mut request = made.request(&private);
    request.credential = Some(right());
    let layer = world.node("one").await.mesh.open(request);
    assert!(read_all(&layer).await == contents(&made));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_source_is_read_beside_the_first_that_drips() {
    let world = World::new();
    let node = world.node("one").await;
    let made = TestLayer::new("a", 3, LEN);
    let mut request = made.request(&world.registry.push_dripping(&made.tar));
    request.sources.push(world.registry.push("library/a", &made.tar));
    let layer = node.mesh.open(request);
    assert!(read_all(&layer).await == contents(&made));
    assert_eq!(world.registry.blobs_read.load(Ordering::Relaxed), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn blob_of_which_nobody_says_how_long_it_is_is_not_read() {
    let world = World::new();
    let node = world.node("one").await;
    let made = TestLayer::new("a", 3, LEN);
    let mut source = world.registry.push("library/a", &made.tar);
    source.size = 0;
    let error = node.open(&made, &source).map().await.unwrap_err();
    assert!(matches!(&error, LayerError::Impossible { reason } if reason.contains("how long")), "{error}");
}
