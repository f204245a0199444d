//! Orders to a node: all of a layer before anybody asks, within the room that there is, for whoever may have it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use darter_identity::attend::{FetchLayer, FetchOrder, PreheatCommand, PreheatUpdate};
use darter_types::LayerSource;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::world::{Peer, TestLayer, World, contents, eventually, read_all, right};
use crate::{LayerRequest, orders, upkeep};

const FILES: usize = 20;
const LEN: usize = 100_000;
/// Room for one of these layers and a half.
const QUOTA: u64 = (FILES * LEN * 3 / 2) as u64;
const SOON: Duration = Duration::from_secs(30);

/// The manager, as a node sees it.
struct Manager {
    commands: mpsc::Sender<PreheatCommand>,
    updates: mpsc::Receiver<PreheatUpdate>,
}

impl Manager {
    fn of(node: &Peer) -> Self {
        let ((commands, received), (reports, updates)) = (mpsc::channel(8), mpsc::channel(64));
        orders::fetch(node.mesh.clone(), received, reports, &node.tasks);
        Self { commands, updates }
    }

    async fn order(&self, id: &str, made: &TestLayer, source: &LayerSource, life: Duration) {
        let layers = vec![FetchLayer { diff_id: made.task.diff_id, source: source.clone() }];
        let order = FetchOrder { id: id.to_owned(), image: "r.example/a:1".to_owned(), layers, life };
        self.commands.send(PreheatCommand::Fetch(order)).await.unwrap();
    }

    async fn last(&mut self, id: &str) -> PreheatUpdate {
        let last = async {
            loop {
                let update = self.updates.recv().await.unwrap();
                if update.done && update.id == id {
                    return update;
                }
            }
        };
        timeout(SOON, last).await.expect("the order ends")
    }

    /// Has the layer preheated.
    async fn has(&mut self, made: &TestLayer, source: &LayerSource) -> PreheatUpdate {
        self.order("an order", made, source, SOON).await;
        self.last("an order").await
    }
}

/// A seed has read the layer with a credential that the node doesn't have.
async fn made_at(seed: &Peer, made: &TestLayer, source: &LayerSource) {
    let request = LayerRequest { credential: Some(right()), ..made.request(source) };
    seed.mesh.open(request).map().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ordered_layer_needs_nobody_any_more_and_opens_to_its_repository_alone() {
    let world = World::new();
    let made = TestLayer::new("ordered", FILES, LEN);
    let source = world.registry.push("private/app", &made.tar);
    let (seed, node) = (world.seed("seed").await, world.node("one").await);
    made_at(&seed, &made, &source).await;
    let last = Manager::of(&node).has(&made, &source).await;
    assert_eq!((last.error.as_deref(), last.layers[0].done, last.layers[0].read), (None, true, source.size));
    assert!(node.mesh.opened(made.task).is_none(), "the order holds it open");
    seed.stop().await;
    world.registry.is_down.store(true, Ordering::Relaxed);
    let layer = node.open(&made, &source);
    assert!(read_all(&layer).await == contents(&made));
    let status = layer.status();
    assert!(status.verified && status.have == status.pieces && status.from.is_empty(), "{status:?}");
    assert!(layer.is_open_to(std::slice::from_ref(&source)));
    let other = LayerSource { repository: "https://registry.example/evil/app".parse().unwrap(), ..source };
    assert!(!layer.is_open_to(&[other]));
    assert_eq!(world.registry.blobs_read.load(Ordering::Relaxed), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_ends_well_only_when_pieces_that_its_verification_found_spoilt_are_here_again() {
    let world = World::new();
    let made = TestLayer::new("spoilt", FILES, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let (_seed, node) = (world.seed("seed").await, world.node("one").await);
    let layer = node.open(&made, &source);
    read_all(&layer).await;
    eventually("all is stored", || layer.status().have == layer.status().pieces).await;
    drop(layer);
    let pack = world.root("one").join("packs/000000.pack");
    let mut bytes = std::fs::read(&pack).unwrap();
    let middle = bytes.len() / 2 + 100;
    bytes[middle] ^= 4;
    std::fs::write(&pack, bytes).unwrap();
    assert_eq!(Manager::of(&node).has(&made, &source).await.error, None);
    assert_eq!(node.store.stats().damaged, 1);
    let layer = node.open(&made, &source);
    layer.map().await.unwrap();
    let status = layer.status();
    assert!(status.verified && status.have == status.pieces, "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_and_late_orders_let_go_at_once() {
    let world = World::new();
    let made = TestLayer::new("held up", FILES, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let (_seed, node) = (world.seed("seed").await, world.node("one").await);
    let mut manager = Manager::of(&node);
    // A container that waits for ever holds up all that nobody waits for.
    let waiting = node.mesh.shared().demand.wait();
    manager.order("cancelled", &made, &source, SOON).await;
    eventually("the layer is open", || node.mesh.opened(made.task).is_some()).await;
    manager.commands.send(PreheatCommand::Cancel { id: "cancelled".to_owned() }).await.unwrap();
    eventually("the layer is let go", || node.mesh.opened(made.task).is_none()).await;
    manager.order("late", &made, &source, Duration::from_secs(1)).await;
    assert_eq!(manager.last("late").await.error.as_deref(), Some("not done within 1 s"));
    drop(waiting);
    assert_eq!(manager.has(&made, &source).await.error, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_waits_for_its_turn_grows_older_meanwhile() {
    let world = World::new();
    let layers = ["one", "two", "three"].map(|name| TestLayer::new(name, 2, LEN));
    let sources = layers.each_ref().map(|made| world.registry.push("library/a", &made.tar));
    let (_seed, node) = (world.seed("seed").await, world.node("one").await);
    let mut manager = Manager::of(&node);
    let _waiting = node.mesh.shared().demand.wait();
    for at in 0..2 {
        let id = format!("long {at}");
        manager.order(&id, &layers[at], &sources[at], 100 * SOON).await;
        eventually("it has its turn", || node.mesh.opened(layers[at].task).is_some()).await;
    }
    manager.order("short", &layers[2], &sources[2], Duration::from_secs(1)).await;
    assert_eq!(manager.last("short").await.error.as_deref(), Some("not done within 1 s"));
    assert!(node.mesh.opened(layers[2].task).is_none(), "it had no turn");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_without_room_says_where_and_how_much_is_missing() {
    let world = World::new();
    let made = TestLayer::new("large", 2 * FILES, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let _seed = world.seed("seed").await;
    let node = world.limited("node", "one", Some(QUOTA), |_| {}).await;
    let error = Manager::of(&node).has(&made, &source).await.error.unwrap();
    let dir = world.root("one").display().to_string();
    assert!(error.contains(&format!("no space is left in {dir}")) && error.contains("missing"), "{error}");
    assert!(node.store.stats().bytes <= QUOTA);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seeds_order_is_none_for_a_node() {
    let world = World::new();
    let node = world.node("one").await;
    let mut manager = Manager::of(&node);
    let (id, image) = ("wrong".to_owned(), "r.example/a:1".to_owned());
    let start = PreheatCommand::Start { id, image, platform: None, credential: None };
    manager.commands.send(start).await.unwrap();
    assert!(manager.last("wrong").await.error.unwrap().contains("a node"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_ordered_goes_last_and_never_for_what_nobody_waits_for() {
    let world = World::new();
    let layers = ["ordered", "read", "new"].map(|name| TestLayer::new(name, FILES, LEN));
    let [ordered, read, new] = &layers;
    let sources = layers.each_ref().map(|layer| world.registry.push("library/a", &layer.tar));
    let _seed = world.seed("seed").await;
    let no_time = |options: &mut crate::Options| options.spared_for = Duration::ZERO;
    let roomy = world.limited("node", "roomy", None, no_time).await;
    roomy.mesh.keep(Arc::new(|| Some([].into())));
    assert_eq!(Manager::of(&roomy).has(ordered, &sources[0]).await.error, None);
    drop(read_all(&roomy.open(read, &sources[1])).await);
    eventually("all is stored", || roomy.store.stats().bytes > 2 * (FILES * LEN) as u64 * 9 / 10).await;
    // What was read was used later, and goes before.
    upkeep::evict_some(&roomy.mesh, 1).await;
    let kept = roomy.open(ordered, &sources[0]);
    let status = kept.map().await.map(|_| kept.status()).unwrap();
    assert_eq!(status.have, status.pieces);
    assert!(roomy.store.stats().evicted > 0);
    upkeep::evict_some(&roomy.mesh, u64::MAX).await;
    assert_eq!(roomy.store.stats().pieces, 0);

    let node = world.limited("node", "small", Some(QUOTA), no_time).await;
    let reached = new.task.diff_id;
    node.mesh.keep(Arc::new(move || Some([reached].into())));
    assert_eq!(Manager::of(&node).has(ordered, &sources[0]).await.error, None);
    let before = node.store.stats().bytes;
    let layer = node.open(new, &sources[2]);
    layer.fill();
    eventually("the background stands still", || node.mesh.store_status().is_tight).await;
    assert_eq!((node.store.stats().evicted, node.store.stats().bytes), (0, before));
    // What somebody waits for is read all the same, and as there is nothing else to go for it, what was ordered does.
    assert!(read_all(&layer).await == contents(new));
    upkeep::evict_some(&node.mesh, 1).await;
    assert!(node.store.stats().evicted >= before);
}
