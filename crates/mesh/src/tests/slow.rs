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
async fn what_nobody_orders_any_more_is_not_read_on_and_keeps_no_turn() {
    let world = World::new();
    let seed = world.seed("seed").await;
    let drips: Vec<_> = (0..4).map(|number| TestLayer::new(&format!("drip {number}"), 3, LEN)).collect();
    let open =
        |made: &TestLayer| seed.mesh.open_ordered(made.request(&world.registry.push_dripping(&made.tar)));
    let layers: Vec<_> = drips.iter().map(open).collect();
    // A scheduler orders what the seed wants from itself.
    for made in &drips {
        crate::serve::obey(&seed.mesh.shared, made.task, vec![world.registry.push_dripping(&made.tar)]);
    }
    let read = || world.registry.blobs_read.load(Ordering::Relaxed);
    eventually("all turns are taken", || read() >= 3).await;
    let counted = || seed.mesh.shared.metrics.from_registries.get();
    eventually("what comes is counted before it is all here", || counted() > 0).await;
    drop(layers);
    eventually("nothing is read any more", || seed.mesh.shared.makes.under_way().is_empty()).await;
    let made = TestLayer::new("a", 3, LEN);
    let layer = seed.open(&made, &world.registry.push("library/a", &made.tar));
    assert!(read_all(&layer).await == contents(&made));
    assert_eq!(seed.mesh.shared.metrics.not_made.get(), 0, "it was given up, it didn't fail");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_a_pull_wanted_is_read_on_for_a_while() {
    let world = World::new();
    let node = world.node("one").await;
    let (pulled, ordered) = (TestLayer::new("pulled", 3, LEN), TestLayer::new("ordered", 3, LEN));
    let sources = [&pulled, &ordered].map(|made| world.registry.push_dripping(&made.tar));
    let pull = node.open(&pulled, &sources[0]);
    let order = node.mesh.open_ordered(ordered.request(&sources[1]));
    let under_way = || node.mesh.shared.makes.under_way();
    eventually("both are read", || world.registry.blobs_read.load(Ordering::Relaxed) == 2).await;
    drop((pull, order));
    eventually("the order's is given up", || !under_way().contains(&ordered.task)).await;
    assert!(under_way().contains(&pulled.task));
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
