//! Who may read, and what is said to those who may not.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use darter_registry::Credential;
use darter_types::{LayerSource, PieceIndex};

use super::world::{
    AWAY, LETS_US_IN, MIRRORED, NOWHERE, Peer, TestLayer, World, contents, eventually, read_all, right, told,
};
use crate::{LayerError, LayerRequest, Priority, Probe, Renew};

const LEN: usize = 50_000;

fn wrong() -> Credential {
    Credential::Bearer("a token that has expired".to_owned())
}

/// Whoever knows credentials; counts how often it is asked.
struct Known(Credential, AtomicU64);

impl Known {
    fn of(node: &Peer, credential: Credential) -> Arc<Self> {
        let known = Arc::new(Self(credential, AtomicU64::new(0)));
        node.mesh.renew_with(known.clone());
        known
    }

    fn asked(&self) -> u64 {
        self.1.load(Ordering::Relaxed)
    }
}

#[async_trait]
impl Renew for Known {
    async fn renew(&self, _: &LayerSource, _: Option<Credential>) -> Option<Credential> {
        self.1.fetch_add(1, Ordering::Relaxed);
        Some(self.0.clone())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_map_is_asked_for_with_another_credential_when_the_first_is_refused() {
    for has_seed in [false, true] {
        let world = World::new();
        let made = TestLayer::new("a", 3, LEN);
        let source = world.registry.push("private/a", &made.tar);
        if has_seed {
            world.seed("seed").await;
        }
        let node = world.node("one").await;
        let known = Known::of(&node, right());
        let request = LayerRequest { credential: Some(wrong()), ..made.request(&source) };
        assert!(read_all(&node.mesh.open(request)).await == contents(&made), "has a seed: {has_seed}");
        assert_eq!(known.asked(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_is_away_keeps_no_other_credential_from_being_asked_for() {
    let world = World::new();
    let made = TestLayer::new("a", 3, LEN);
    let source = world.registry.push("private/a", &made.tar);
    let repository = format!("https://{AWAY}/private/a").parse().unwrap();
    let mirror = LayerSource { repository, ..source.clone() };
    let node = world.node("one").await;
    Known::of(&node, right());
    let request = LayerRequest { sources: vec![mirror, source.clone()], ..made.request(&source) };
    assert!(read_all(&node.mesh.open(request)).await == contents(&made));
}

/// Never answers about one registry, and knows the others' credentials.
struct Hanging;

#[async_trait]
impl Renew for Hanging {
    async fn renew(&self, source: &LayerSource, _: Option<Credential>) -> Option<Credential> {
        match source.repository.registry.authority.as_str() {
            AWAY => std::future::pending().await,
            _ => Some(right()),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_about_which_nobody_answers_keeps_no_other_from_being_asked_about() {
    let world = World::new();
    let made = TestLayer::new("a", 3, LEN);
    let source = world.registry.push("private/a", &made.tar);
    let repository = format!("https://{AWAY}/private/a").parse().unwrap();
    let mirror = LayerSource { repository, ..source.clone() };
    let node = world.node("one").await;
    node.mesh.renew_with(Arc::new(Hanging));
    let request = LayerRequest { sources: vec![mirror, source.clone()], ..made.request(&source) };
    assert!(read_all(&node.mesh.open(request)).await == contents(&made));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_layer_outlives_the_token_that_it_was_opened_with() {
    let world = World::new();
    let made = TestLayer::new("a", 3, LEN);
    let source = world.registry.push("private/a", &made.tar);
    let (seed, one) = (world.seed("seed").await, world.node("one").await);
    let opened = one.mesh.open(LayerRequest { credential: Some(right()), ..made.request(&source) });
    opened.map().await.unwrap();
    // The repository has been let in: the map comes with a token that has expired, too.
    let (helped, alone) = (world.node("helped").await, world.node("alone").await);
    let (known, stale) = (Known::of(&helped, right()), Known::of(&alone, wrong()));
    let open =
        |node: &Peer| node.mesh.open(LayerRequest { credential: Some(wrong()), ..made.request(&source) });
    let (layer, lost) = (open(&helped), open(&alone));
    layer.map().await.unwrap();
    lost.map().await.unwrap();
    world.members.send_modify(|members| members.seeds.clear());
    seed.stop().await;
    drop(opened);
    one.stop().await;
    assert!(read_all(&layer).await == contents(&made));
    assert_eq!(known.asked(), 1);
    // Where nothing better is known that is not asked all the time.
    let reading = tokio::spawn(async move { lost.read(PieceIndex(0), Priority::Demand).await });
    let before = world.registry.seen_at("registry.example").len();
    eventually("the registry is asked again", || {
        world.registry.seen_at("registry.example").len() > before + 3
    })
    .await;
    assert_eq!(stale.asked(), 1);
    reading.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_shows_its_right_with_another_credential_of_its_own() {
    let world = World::new();
    let made = TestLayer::new("a", 3, LEN);
    let source = world.registry.push("private/a", &made.tar);
    let other = world.registry.push("private/b", &made.tar);
    let node = world.node("one").await;
    let layer = node.mesh.open(LayerRequest { credential: Some(right()), ..made.request(&source) });
    layer.map().await.unwrap();
    let request = LayerRequest { credential: Some(wrong()), ..made.request(&other) };
    // The layer's own credential is right, but not this image's.
    let refused = layer.admit(std::slice::from_ref(&request)).await.unwrap_err();
    assert_eq!(reason(refused), "pull access denied");
    Known::of(&node, right());
    layer.admit(&[request]).await.unwrap();
    assert!(layer.is_open_to(&[other]));
}

fn reason(error: LayerError) -> String {
    match error {
        LayerError::Impossible { reason } => reason,
        LayerError::Unavailable { reason } => panic!("only unavailable: {reason}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_credentials_a_private_layer_is_impossible_in_the_registrys_words() {
    let world = World::new();
    let made = TestLayer::new("a", 2, LEN);
    let source = world.registry.push("private/a", &made.tar);
    let _seed = world.seed("seed").await;
    let node = world.node("one").await;
    assert_eq!(reason(node.open(&made, &source).map().await.unwrap_err()), "pull access denied");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_registry_hides_from_one_reader_a_seed_makes_for_another() {
    let world = World::new();
    let made = TestLayer::new("a", 2, LEN);
    let source = world.registry.push("hidden/a", &made.tar);
    let _seed = world.seed("seed").await;
    let (one, two) = (world.node("one").await, world.node("two").await);
    assert_eq!(reason(one.open(&made, &source).map().await.unwrap_err()), "name unknown");
    let request = LayerRequest { credential: Some(right()), ..made.request(&source) };
    assert!(read_all(&two.mesh.open(request)).await == contents(&made));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_mirror_gives_for_the_credential_of_a_pull_a_node_reads_itself_where_seeds_are_refused() {
    let world = World::new();
    let _seed = world.seed("seed").await;
    let node = world.node("one").await;
    let layers = ["private/a", "hidden/b"].map(|name| {
        let made = TestLayer::new(name, 2, LEN);
        let mut source = world.registry.push(name, &made.tar);
        source.repository = format!("https://{MIRRORED}/{name}").parse().unwrap();
        world.registry.replace(&source, &made.tar);
        let request = LayerRequest { credential: Some(right()), ..made.request(&source) };
        (node.mesh.open(request), made)
    });
    // Both wait before they turn to the origin.
    let reading = layers.iter().map(|(layer, made)| async move { read_all(layer).await == contents(made) });
    assert_eq!(futures_util::future::join_all(reading).await, [true, true]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_is_believed_that_the_blob_of_a_mirrored_registry_gives_another_layer() {
    let world = World::new();
    let made = TestLayer::new("a", 2, LEN);
    let mut source = world.registry.push("library/a", b"no layer at all");
    source.repository = format!("https://{MIRRORED}/library/a").parse().unwrap();
    world.registry.replace(&source, b"no layer at all");
    let _seed = world.seed("seed").await;
    let node = world.node("one").await;
    let request = LayerRequest { credential: Some(right()), ..made.request(&source) };
    reason(node.mesh.open(request).map().await.unwrap_err());
    assert_eq!(world.registry.blobs_read.load(Ordering::Relaxed), 1, "the node has read it, too");
}

#[tokio::test(flavor = "multi_thread")]
async fn second_node_reads_a_private_layer_by_naming_the_repository_that_was_proven() {
    let world = World::new();
    let made = TestLayer::new("a", 4, LEN);
    let source = world.registry.push("private/a", &made.tar);
    let _seed = world.seed("seed").await;
    let (one, two) = (world.node("one").await, world.node("two").await);
    let mut request = made.request(&source);
    request.credential = Some(right());
    read_all(&one.mesh.open(request)).await;
    assert!(read_all(&two.open(&made, &source)).await == contents(&made));
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_manifest_with_somebody_elses_diff_id_opens_nothing() {
    let world = World::new();
    let made = TestLayer::new("a", 4, LEN);
    let other = TestLayer::new("b", 1, LEN);
    let source = world.registry.push("private/a", &made.tar);
    let stranger = world.registry.push("stranger/b", &other.tar);
    let _seed = world.seed("seed").await;
    let (one, two) = (world.node("one").await, world.node("two").await);
    let mut request = made.request(&source);
    request.credential = Some(right());
    read_all(&one.mesh.open(request.clone())).await;
    let layer = two.open(&made, &stranger);
    told(&layer, vec![one.as_parent(false)]);
    let said = reason(layer.map().await.unwrap_err());
    assert!(said.contains("wrong diff id"), "{said}");
    // The failure is that source's: whoever has the right one gets the layer, on the same node too.
    drop(layer);
    assert!(read_all(&two.mesh.open(request)).await == contents(&made));
}

#[tokio::test(flavor = "multi_thread")]
async fn impossible_layer_is_tried_again_when_another_source_is_named() {
    let world = World::new();
    let made = TestLayer::new("a", 3, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let wrong = world.registry.push("library/b", b"no layer at all");
    let _seed = world.seed("seed").await;
    let node = world.node("one").await;
    let layer = node.open(&made, &wrong);
    reason(layer.map().await.unwrap_err());
    let again = node.open(&made, &source);
    assert!(read_all(&again).await == contents(&made));
    assert!(layer.map_now().is_some(), "it is the same layer");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_strangers_many_sources_keep_nobody_elses_out() {
    let world = World::new();
    let made = TestLayer::new("a", 3, LEN);
    let source = world.registry.push("library/a", &made.tar);
    let node = world.node("one").await;
    let strangers = |number: u32| LayerSource {
        repository: format!("https://evil.example/x{number}").parse().unwrap(),
        ..source.clone()
    };
    let mut request = made.request(&source);
    request.sources = (0..20).map(strangers).collect();
    let layer = node.mesh.open(request);
    reason(layer.map().await.unwrap_err());
    let again = node.open(&made, &source);
    assert!(read_all(&again).await == contents(&made));
}

#[tokio::test(flavor = "multi_thread")]
async fn layer_of_a_registry_that_our_configuration_opens_is_not_public() {
    let world = World::new();
    let made = TestLayer::new("a", 3, LEN);
    let mut source = world.registry.push("library/a", &made.tar);
    for (host, is_public) in [(LETS_US_IN, false), ("registry.example", true)] {
        let _seed = world.seed(&format!("seed-{is_public}")).await;
        let node = world.node(&format!("node-{is_public}")).await;
        source.repository = format!("https://{host}/library/a").parse().unwrap();
        world.registry.replace(&source, &made.tar);
        let layer = node.open(&made, &source);
        layer.map().await.unwrap();
        let mut other = source.clone();
        other.repository = "https://registry.example/stranger/b".parse().unwrap();
        assert_eq!(layer.is_open_to(&[other]), is_public, "{host}");
        world.members.send_modify(|members| members.seeds.clear());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_never_answered_does_not_keep_a_layer_from_being_impossible() {
    let world = World::new();
    let made = TestLayer::new("a", 3, LEN);
    let wrong = world.registry.push("library/b", b"no layer at all");
    let mut guess = wrong.clone();
    guess.repository = format!("https://{NOWHERE}/library/b").parse().unwrap();
    for has_seed in [false, true] {
        if has_seed {
            world.seed("seed").await;
        }
        let node = world.node(&format!("node-{has_seed}")).await;
        let mut request = made.request(&guess);
        request.sources.push(wrong.clone());
        reason(node.mesh.open(request).map().await.unwrap_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_registry_is_asked_with_its_own_credential_and_no_other() {
    let world = World::new();
    let made = TestLayer::new("a", 3, LEN);
    let source = world.registry.push("private/a", &made.tar);
    let mut mirror = source.clone();
    mirror.repository = "https://mirror.example/private/a".parse().unwrap();
    let _seed = world.seed("seed").await;
    let node = world.node("one").await;
    // The mirror wants another credential than it is given; it must not be tried with the registry's.
    let layer = node.open(&made, &mirror);
    let mut request = made.request(&source);
    request.credential = Some(right());
    let same = node.mesh.open(request);
    assert!(read_all(&same).await == contents(&made));
    assert!(world.registry.seen_at("mirror.example").iter().all(Option::is_none));
    drop(layer);
}

#[tokio::test(flavor = "multi_thread")]
async fn repository_that_shows_it_holds_the_blob_is_let_in_without_another_read() {
    let world = World::new();
    let made = TestLayer::new("a", 4, LEN);
    let source = world.registry.push("private/a", &made.tar);
    let copy = world.registry.push("private/copy", &made.tar);
    let _seed = world.seed("seed").await;
    let (one, two) = (world.node("one").await, world.node("two").await);
    let mut request = made.request(&source);
    request.credential = Some(right());
    read_all(&one.mesh.open(request)).await;
    let mut request = made.request(&copy);
    request.credential = Some(right());
    let layer = two.mesh.open(request);
    told(&layer, vec![one.as_parent(false)]);
    assert!(read_all(&layer).await == contents(&made));
    assert_eq!(world.registry.blobs_read.load(Ordering::Relaxed), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_registry_is_not_believed_that_it_has_the_blob() {
    let world = World::new();
    let made = TestLayer::new("a", 4, LEN);
    let source = world.registry.push("private/a", &made.tar);
    let _seed = world.seed("seed").await;
    let (one, two) = (world.node("one").await, world.node("two").await);
    let mut request = made.request(&source);
    request.credential = Some(right());
    read_all(&one.mesh.open(request)).await;
    // Another registry says that it has the blob, of the right length, and has not.
    let mut other = source.clone();
    other.repository = "https://other.example/private/a".parse().unwrap();
    world.registry.replace(&other, &vec![0; made.tar.len()]);
    let mut request = made.request(&other);
    request.credential = Some(right());
    let layer = two.mesh.open(request.clone());
    told(&layer, vec![one.as_parent(false)]);
    assert!(layer.map().await.is_err(), "its word opened the layer");
    drop(layer);
    let layer = one.mesh.open(request.clone());
    assert!(!layer.is_open_to(&request.sources), "the digest alone opens it");
    assert!(layer.admit(&[request]).await.is_err(), "its word opened the layer where it lies");
}

#[tokio::test(flavor = "multi_thread")]
async fn other_compression_of_the_layer_is_read_once_to_be_believed() {
    let world = World::new();
    // Files that are equal compress.
    let half = TestLayer::new("a", 1, LEN).tar;
    let made = TestLayer::of([&half[..half.len() - 1024], &half].concat());
    let compressed = zstd(&made.tar);
    let source = world.registry.push("private/a", &made.tar);
    let copy = world.registry.push("team/copy", &compressed);
    let _seed = world.seed("seed").await;
    let (one, two) = (world.node("one").await, world.node("two").await);
    let mut request = made.request(&source);
    request.credential = Some(right());
    read_all(&one.mesh.open(request)).await;
    assert!(read_all(&two.open(&made, &copy)).await == contents(&made));
    assert_eq!(world.registry.blobs_read.load(Ordering::Relaxed), 2);
}

/// One zstd frame, as the store makes it.
fn zstd(tar: &[u8]) -> Vec<u8> {
    let piece = darter_store::StoredPiece::encode(tar, 1);
    assert_eq!(piece.encoding, darter_store::Encoding::Zstd);
    piece.bytes.to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn layer_that_is_here_is_not_for_whoever_names_its_diff_id() {
    let world = World::new();
    let made = TestLayer::new("a", 3, LEN);
    let other = TestLayer::new("b", 1, LEN);
    let source = world.registry.push("private/a", &made.tar);
    let stranger = world.registry.push("stranger/b", &other.tar);
    let copy = world.registry.push("library/copy", &made.tar);
    let _seed = world.seed("seed").await;
    let node = world.node("one").await;
    let mut request = made.request(&source);
    request.credential = Some(right());
    read_all(&node.mesh.open(request.clone())).await;
    let probes = node.mesh.probe(&[request, made.request(&stranger), made.request(&copy)]).await;
    assert!(matches!(probes[..], [Probe::Known, Probe::Refused(_), Probe::Answering]), "{probes:?}");
}

/// A node that has read a private layer, and a manifest of `name` that names its blob.
async fn borrowed(world: &World, name: &str) -> (super::world::Peer, crate::Layer, crate::LayerRequest) {
    let made = TestLayer::new("a", 3, LEN);
    let source = world.registry.push("private/a", &made.tar);
    let node = world.node("one").await;
    let mut request = made.request(&source);
    request.credential = Some(right());
    let layer = node.mesh.open(request.clone());
    read_all(&layer).await;
    request.sources[0].repository = format!("https://registry.example/{name}").parse().unwrap();
    (node, layer, request)
}

#[tokio::test(flavor = "multi_thread")]
async fn blob_that_a_stranger_names_is_not_open_to_it_until_its_repository_has_shown_it() {
    let world = World::new();
    let _seed = world.seed("seed").await;
    let (_node, layer, request) = borrowed(&world, "stranger/b").await;
    assert!(!layer.is_open_to(&request.sources), "the digest alone opens it");
    let said = reason(layer.admit(std::slice::from_ref(&request)).await.unwrap_err());
    assert!(said.contains("not found"), "{said}");
    world.registry.is_down.store(true, Ordering::Relaxed);
    let error = layer.admit(std::slice::from_ref(&request)).await.unwrap_err();
    assert!(matches!(error, LayerError::Unavailable { .. }), "{error}");
    world.registry.is_down.store(false, Ordering::Relaxed);
    assert!(!layer.is_open_to(&request.sources), "it was open after all");
    world.registry.push("stranger/b", &TestLayer::new("a", 3, LEN).tar);
    layer.admit(std::slice::from_ref(&request)).await.unwrap();
    assert!(layer.is_open_to(&request.sources));
}

#[tokio::test(flavor = "multi_thread")]
async fn repository_that_once_held_the_layer_needs_no_registry() {
    let world = World::new();
    let _seed = world.seed("seed").await;
    let (node, layer, mut request) = borrowed(&world, "private/a").await;
    world.registry.is_down.store(true, Ordering::Relaxed);
    let asked = world.registry.seen_at("registry.example").len();
    assert!(layer.is_open_to(&request.sources));
    request.credential = None;
    assert_eq!(node.mesh.probe(&[request]).await, [Probe::Known]);
    assert_eq!(world.registry.seen_at("registry.example").len(), asked, "the registry was asked");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_registry_only_says_makes_nothing_public() {
    let world = World::new();
    let _seed = world.seed("seed").await;
    let (_node, layer, request) = borrowed(&world, "library/copy").await;
    world.registry.push("library/copy", &TestLayer::new("a", 3, LEN).tar);
    let mut without = request.clone();
    without.credential = None;
    layer.admit(&[without]).await.unwrap();
    let mut other = request;
    other.sources[0].repository = "https://registry.example/stranger/b".parse().unwrap();
    assert!(!layer.is_open_to(&other.sources));
}

#[tokio::test(flavor = "multi_thread")]
async fn map_without_a_note_who_may_read_it_is_asked_for_anew() {
    let world = World::new();
    let made = TestLayer::new("a", 3, LEN);
    let source = world.registry.push("private/a", &made.tar);
    let _seed = world.seed("seed").await;
    let node = world.node("one").await;
    let mut request = made.request(&source);
    request.credential = Some(right());
    read_all(&node.mesh.open(request.clone())).await;
    node.store.set_access(made.task, b"damaged").unwrap();
    node.stop().await;
    let node = world.node("one").await;
    let layer = node.mesh.open(request.clone());
    assert!(read_all(&layer).await == contents(&made));
    eventually("it is noted again", || layer.is_open_to(&request.sources)).await;
}
