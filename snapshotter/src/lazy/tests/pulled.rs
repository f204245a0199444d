//! What a pull waits for before it is said to be done.

use super::*;

fn config() -> String {
    Digest::of(b"config").to_string()
}

#[tokio::test]
async fn a_pull_is_held_until_the_maps_are_there() {
    let root = tempfile::tempdir().unwrap();
    let node = node(&root, World::new([Mood::Fine, Mood::Slow, Mood::Fine]));
    let (_, top) = node.pull().await;
    node.container(&top);
    let (bound, started) = (Duration::from_millis(100), tokio::time::Instant::now());
    node.lazy.settle_image(&config(), bound).await;
    assert!(started.elapsed() >= bound, "it was said to be done after {:?}", started.elapsed());
    let config = config();
    let held = node.lazy.settle_image(&config, Duration::from_secs(600));
    let comes = async {
        tokio::task::yield_now().await;
        node.world.turn(1, Mood::Fine);
    };
    tokio::time::timeout(MOUNT_WAIT, async { tokio::join!(held, comes) }).await.unwrap();
    let dir = node.snapshots.mounts("container").unwrap().chain.unwrap();
    assert!(node.lazy.chains.fs().tree_now(dir).is_some(), "it is done, and can't be read");
}

#[tokio::test]
async fn a_pull_is_held_until_what_is_impossible_is_unpacked() {
    let root = tempfile::tempdir().unwrap();
    let node = node(&root, World::new([Mood::Fine, Mood::Slow, Mood::Fine]));
    node.pull().await;
    node.world.turn(1, Mood::Impossible);
    let config = config();
    let held = node.lazy.settle_image(&config, Duration::from_secs(600));
    tokio::time::timeout(MOUNT_WAIT, held).await.unwrap();
    assert_eq!(*node.world.unpacked.lock(), [node.world.diff_id(1), node.world.diff_id(2)]);
}
