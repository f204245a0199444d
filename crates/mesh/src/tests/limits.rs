//! What a peer may move, while it moves.

use std::time::{Duration, Instant};

use darter_identity::attend::SetRates;
use darter_types::{PieceIndex, RateKind, Rates};

use super::world::{TestLayer, World, contents, eventually, read_all};
use crate::{Priority, background};

const PIECE: u64 = 256 << 10;

fn limited(kind: RateKind, rate: u64) -> SetRates {
    SetRates { cluster: Rates::default().with(kind, Some(rate)), ..SetRates::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_read_takes_as_long_as_the_limits_want() {
    for kind in [RateKind::Download, RateKind::Upload, RateKind::Registry] {
        let world = World::new();
        let made = TestLayer::new("a", 8, PIECE as usize);
        let source = world.registry.push("library/a", &made.tar);
        let (_seed, node) = (world.seed("seed").await, world.node("one").await);
        world.limits.send_replace(limited(kind, 2 * PIECE));
        eventually("the node knows", || {
            node.mesh.rates().iter().any(|limit| limit.kind == kind && limit.rate == 2 * PIECE)
        })
        .await;
        let since = Instant::now();
        assert!(read_all(&node.open(&made, &source)).await == contents(&made));
        assert!(since.elapsed() > Duration::from_secs(3), "{kind}: {:?}", since.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_that_is_lifted_lets_go_who_waits() {
    let world = World::new();
    let made = TestLayer::new("a", 8, PIECE as usize);
    let source = world.registry.push("library/a", &made.tar);
    let (_seed, node) = (world.seed("seed").await, world.node("one").await);
    world.limits.send_replace(limited(RateKind::Download, 1));
    eventually("the node knows", || node.mesh.rates().iter().any(|limit| limit.rate == 1)).await;
    let layer = node.open(&made, &source);
    let reading = tokio::spawn(async move { read_all(&layer).await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!reading.is_finished());
    world.limits.send_replace(SetRates::default());
    let read = tokio::time::timeout(Duration::from_secs(20), reading).await.unwrap().unwrap();
    assert!(read == contents(&made));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_two_bring_in_the_background_is_paid_for_once() {
    let world = World::new();
    let made = TestLayer::new("a", 8, PIECE as usize);
    let source = world.registry.push("library/a", &made.tar);
    let (_seed, node) = (world.seed("seed").await, world.node("one").await);
    let layer = node.open(&made, &source);
    layer.map().await.unwrap();
    world.limits.send_replace(limited(RateKind::Background, 2 * PIECE));
    eventually("the node knows", || node.mesh.rates().iter().any(|limit| limit.rate == 2 * PIECE)).await;
    let since = Instant::now();
    let bring = || background::bring(node.mesh.shared(), layer.open());
    assert_eq!(tokio::join!(bring(), bring()), (true, true));
    let took = since.elapsed();
    assert!(Duration::from_secs(3) < took && took < Duration::from_millis(6500), "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_does_not_wait_behind_the_background() {
    let world = World::new();
    let made = TestLayer::new("a", 40, PIECE as usize);
    let source = world.registry.push("library/a", &made.tar);
    let (_seed, node) = (world.seed("seed").await, world.node("one").await);
    let layer = node.open(&made, &source);
    layer.map().await.unwrap();
    world.limits.send_replace(limited(RateKind::Download, PIECE));
    eventually("the node knows", || node.mesh.rates().iter().any(|limit| limit.rate == PIECE)).await;
    let background: Vec<_> = (0..20)
        .map(|index| {
            let layer = layer.clone();
            tokio::spawn(async move { layer.read(PieceIndex(index), Priority::Background).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let since = Instant::now();
    layer.read(PieceIndex(30), Priority::Demand).await.unwrap();
    // One that waits in the background is wanted now.
    layer.read(PieceIndex(19), Priority::Demand).await.unwrap();
    assert!(since.elapsed() < Duration::from_secs(8), "{:?}", since.elapsed());
    background.iter().for_each(|reading| reading.abort());
}
