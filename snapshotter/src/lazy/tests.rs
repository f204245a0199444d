//! The lazy half against a mesh, registries and a containerd in memory: what is decided, waited for and demoted.

mod pulled;
mod undecided;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use darter_layer::{LayerMap, PieceSink};
use darter_types::{BlobDigest, PieceHash, PieceIndex, Repository};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::ports::*;
use super::*;
use crate::fs::{ContentError, LayerContent, Limits};
use crate::snapshot::{Kind, Mount, NewSnapshot, Overlay, REF_LABEL};

/// Short, since some tests wait it out; the work itself takes milliseconds.
const PREPARE_WAIT: Duration = Duration::from_millis(500);
const MOUNT_WAIT: Duration = Duration::from_secs(3);

/// How a layer behaves in the mesh.
#[derive(Clone, PartialEq)]
enum Mood {
    Fine,
    /// Its map comes when the mood turns.
    Slow,
    Impossible,
    /// A probe says so.
    Refused,
    /// A probe is answered when the mood turns.
    Mute,
}

struct MemoryLayer {
    map: Arc<LayerMap>,
    mood: watch::Sender<Mood>,
}

#[async_trait]
impl LayerContent for MemoryLayer {
    fn map_now(&self) -> Option<Arc<LayerMap>> {
        (*self.mood.borrow() == Mood::Fine).then(|| self.map.clone())
    }
    async fn map(&self) -> std::result::Result<Arc<LayerMap>, ContentError> {
        let mut mood = self.mood.subscribe();
        let mood = mood.wait_for(|mood| *mood != Mood::Slow).await.expect("the world is there").clone();
        match mood {
            Mood::Impossible => Err(ContentError::Impossible("it is a test".into())),
            _ => Ok(self.map.clone()),
        }
    }
    fn read_local(&self, _: PieceIndex) -> Option<Bytes> {
        None
    }
    async fn read(&self, _: PieceIndex) -> std::result::Result<Bytes, ContentError> {
        Err(ContentError::Impossible("nobody reads here".into()))
    }
    fn want(&self, _: PieceIndex, _: u32) {}
}

impl OpenLayer for MemoryLayer {
    fn status(&self) -> LayerStatus {
        LayerStatus { state: "made by seed-1: 1 of 2 MB read".into(), ..Default::default() }
    }
    fn fill(&self) {}
}

/// One image of three layers, and everything around it.
struct World {
    image: Mutex<FoundImage>,
    layers: HashMap<DiffId, Arc<MemoryLayer>>,
    /// The names of what containerd was asked to unpack, and what it says to it.
    unpacked: Mutex<Vec<DiffId>>,
    refuses: Option<String>,
    /// The namespace for which containerd never gets the blob.
    hangs: Option<String>,
    content_store: AtomicBool,
    in_use: Mutex<Option<InUse>>,
}

struct NoPieces;

impl PieceSink for NoPieces {
    fn piece(&mut self, _: PieceIndex, _: PieceHash, _: &[u8]) -> std::io::Result<()> {
        Ok(())
    }
}

/// A tar stream with one empty file.
fn tar(name: &str) -> Vec<u8> {
    let mut header = vec![0u8; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..107].copy_from_slice(b"0000644");
    for field in [108, 116] {
        header[field..field + 7].copy_from_slice(b"0000000");
    }
    for field in [124, 136] {
        header[field..field + 11].copy_from_slice(b"00000000000");
    }
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    header[148..156].copy_from_slice(b"        ");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    header.resize(512 + 1024, 0);
    header
}

impl World {
    fn new(moods: [Mood; 3]) -> World {
        let mut layers = HashMap::new();
        let mut found = Vec::new();
        for (position, mood) in moods.into_iter().enumerate() {
            let tar = tar(&format!("file-{position}"));
            let made = darter_layer::make(&tar[..], &mut NoPieces).unwrap();
            let blob = BlobDigest(Digest::of(&tar));
            let place = Place { host: "r.example".into(), name: "app".into(), blob, size: 1 };
            layers.insert(
                made.diff_id,
                Arc::new(MemoryLayer { map: Arc::new(made.map), mood: watch::Sender::new(mood) }),
            );
            found.push(FoundLayer {
                diff_id: made.diff_id,
                blob,
                size: 1,
                media_type: "application/vnd.oci.image.layer.v1.tar".into(),
                places: vec![place],
            });
        }
        let image = FoundImage {
            manifest: Digest::of(b"manifest"),
            config: Digest::of(b"config"),
            names: vec!["r.example/app".into()],
            layers: found,
        };
        World {
            image: Mutex::new(image),
            layers,
            unpacked: Mutex::default(),
            refuses: None,
            hangs: None,
            content_store: AtomicBool::new(true),
            in_use: Mutex::default(),
        }
    }

    fn diff_id(&self, position: usize) -> DiffId {
        self.image.lock().layers[position].diff_id
    }

    fn turn(&self, position: usize, mood: Mood) {
        self.layers[&self.diff_id(position)].mood.send_replace(mood);
    }

    fn chain_ids(&self) -> Vec<ChainId> {
        ChainId::chain(&self.image.lock().layers.iter().map(|layer| layer.diff_id).collect::<Vec<_>>())
    }
}

#[async_trait]
impl LayerMesh for World {
    fn open(&self, request: LayerRequest) -> Arc<dyn OpenLayer> {
        self.layers[&request.task.diff_id].clone()
    }
    fn keep(&self, in_use: InUse) {
        *self.in_use.lock() = Some(in_use);
    }
    fn store(&self) -> StoreHealth {
        StoreHealth::default()
    }

    fn traffic(&self) -> TrafficHealth {
        TrafficHealth::default()
    }

    fn layers(&self) -> Vec<(DiffId, LayerStatus)> {
        Vec::new()
    }
    fn schedulers(&self) -> Vec<SchedulerHealth> {
        Vec::new()
    }
    async fn probe(&self, layer: &LayerRequest) -> Probe {
        let mut mood = self.layers[&layer.task.diff_id].mood.subscribe();
        let mood = mood.wait_for(|mood| *mood != Mood::Mute).await.expect("the world is there").clone();
        if mood == Mood::Refused { Probe::Refused("401 Unauthorized".into()) } else { Probe::Known }
    }
}

impl Registries for World {
    fn repositories(&self, host: &str, name: &str, _: Option<&str>) -> Vec<Repository> {
        vec![format!("https://{host}/{name}").parse().unwrap()]
    }
}

#[async_trait]
impl Containerd for World {
    async fn find_image(&self, _: &str, target: ChainId) -> std::result::Result<Option<FoundImage>, String> {
        if !self.content_store.load(Ordering::Relaxed) {
            return Err("connection refused".into());
        }
        Ok(self.chain_ids().contains(&target).then(|| self.image.lock().clone()))
    }
    async fn unpack(
        &self,
        namespace: &str,
        layer: &PlainLayer,
        _: Vec<Mount>,
    ) -> std::result::Result<(), UnpackError> {
        if self.hangs.as_deref() == Some(namespace) {
            std::future::pending::<()>().await;
        }
        self.unpacked.lock().push(layer.diff_id);
        self.refuses.clone().map_or(Ok(()), |words| Err(UnpackError::Refused(words)))
    }
}

struct Node {
    world: Arc<World>,
    snapshots: Arc<Snapshots>,
    lazy: Arc<Lazy>,
    _tasks: Tasks,
}

fn node(root: &tempfile::TempDir, world: World) -> Node {
    let world = Arc::new(world);
    let tasks = Tasks::new();
    let snapshots = Arc::new(Snapshots::open(root.path(), Overlay::NEITHER).unwrap());
    let runtime = tokio::runtime::Handle::current();
    let deps = Deps {
        snapshots: snapshots.clone(),
        fs: FileSystem::new(snapshots.records().clone(), runtime, Limits::default()),
        mesh: world.clone(),
        registries: world.clone(),
        containerd: world.clone(),
        tasks: tasks.clone(),
        metrics: Arc::default(),
    };
    let options = Options { prepare_wait: PREPARE_WAIT, mount_wait: MOUNT_WAIT };
    Node { world, lazy: Lazy::start(options, deps).unwrap(), snapshots, _tasks: tasks }
}

impl Node {
    async fn prepare(&self, position: usize, parent: &str) -> Answer {
        self.prepare_in("test", position, parent).await
    }

    async fn prepare_in(&self, namespace: &str, position: usize, parent: &str) -> Answer {
        self.lazy.prepare(self.wanted_in(namespace, position, parent)).await.unwrap()
    }

    fn wanted_in(&self, namespace: &str, position: usize, parent: &str) -> Wanted {
        let target = self.world.chain_ids()[position];
        let labels = [(REF_LABEL.to_owned(), target.to_string())].into();
        Wanted { namespace: namespace.into(), target, parent: parent.to_owned(), labels }
    }

    /// Pulls the image as containerd does, as far as it is lazy; returns the name of the topmost lazy snapshot.
    async fn pull(&self) -> (usize, String) {
        self.pull_in("test").await
    }

    async fn pull_in(&self, namespace: &str) -> (usize, String) {
        let mut parent = String::new();
        for (position, chain_id) in self.world.chain_ids().iter().enumerate() {
            if self.prepare_in(namespace, position, &parent).await == Answer::Plain {
                return (position, parent);
            }
            let name = lazy_name(namespace, &parent, &chain_id.to_string());
            let infos = self.snapshots.list(&[]).unwrap();
            let found = infos.iter().find(|info| info.name == name && info.parent == parent);
            parent = found.expect("containerd looks for this snapshot").name.clone();
        }
        (3, parent)
    }

    /// What `darter why` says of the image, once that is decided.
    async fn decided(&self) -> ImageReport {
        let decided = async {
            loop {
                let images = self.lazy.images(|_| true).unwrap();
                if let Some(image) = images.into_iter().find(|image| image.decided.is_some()) {
                    return image;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), decided).await.unwrap()
    }

    fn container(&self, parent: &str) {
        self.container_named("container", parent);
    }

    fn container_named(&self, key: &str, parent: &str) {
        let new = NewSnapshot {
            kind: Kind::Active,
            key: key.to_owned(),
            parent: parent.into(),
            labels: Labels::new(),
        };
        self.snapshots.create(&new).unwrap();
    }
}

#[tokio::test]
async fn an_image_that_the_mesh_knows_is_lazy_and_can_be_mounted() {
    let root = tempfile::tempdir().unwrap();
    let node = node(&root, World::new([Mood::Fine, Mood::Fine, Mood::Fine]));
    let (lazy, top) = node.pull().await;
    assert_eq!(lazy, 3);
    node.container(&top);
    node.lazy.settle("container").await.unwrap();
    assert!(node.world.unpacked.lock().is_empty());
    let chain = node.snapshots.mounts("container").unwrap().chain.unwrap();
    assert_eq!(node.lazy.usage(chain).unwrap().inodes, 1);
}

#[tokio::test]
async fn the_mesh_may_let_go_what_no_container_uses() {
    let root = tempfile::tempdir().unwrap();
    let node = node(&root, World::new([Mood::Fine, Mood::Fine, Mood::Fine]));
    let in_use = node.world.in_use.lock().clone().unwrap();
    let (_, top) = node.pull().await;
    assert_eq!(in_use().unwrap().len(), 0);
    node.container(&top);
    let used = in_use().unwrap();
    assert!(used.len() == 3 && (0..3).all(|position| used.contains(&node.world.diff_id(position))));
    node.snapshots.remove("container").unwrap();
    assert_eq!(in_use().unwrap().len(), 0);
}

#[tokio::test]
async fn a_tree_has_attributes_until_it_is_known_to_have_none() {
    let root = tempfile::tempdir().unwrap();
    let node = node(&root, World::new([Mood::Fine, Mood::Fine, Mood::Fine]));
    let (_, top) = node.pull().await;
    node.container(&top);
    let chain = node.snapshots.mounts("container").unwrap().chain.unwrap();
    assert_eq!(node.lazy.via(chain), Via::Full);
    node.lazy.settle("container").await.unwrap();
    assert_eq!(node.lazy.via(chain), Via::Bare);
}

#[tokio::test]
async fn a_refused_layer_and_all_above_it_are_plain_and_the_reason_is_known() {
    let root = tempfile::tempdir().unwrap();
    let node = node(&root, World::new([Mood::Fine, Mood::Refused, Mood::Fine]));
    let (lazy, _) = node.pull().await;
    assert_eq!(lazy, 1);
    let image = node.decided().await;
    assert_eq!(image.layers[1].reason, "401 Unauthorized");
    assert_eq!(lazy_layers(&image), [Some(true), Some(false), Some(false)]);
}

fn lazy_layers(image: &ImageReport) -> Vec<Option<bool>> {
    image.layers.iter().map(|layer| layer.lazy).collect()
}

#[tokio::test]
async fn what_is_undecided_in_time_is_lazy_for_the_whole_image_at_once() {
    let root = tempfile::tempdir().unwrap();
    let node = node(&root, World::new([Mood::Mute, Mood::Fine, Mood::Fine]));
    let started = tokio::time::Instant::now();
    let (lazy, _) = node.pull().await;
    assert_eq!(lazy, 3);
    assert!(started.elapsed() < 2 * PREPARE_WAIT, "{:?}", started.elapsed());
}

#[tokio::test]
async fn without_containerds_content_store_everything_is_plain() {
    let root = tempfile::tempdir().unwrap();
    let world = World::new([Mood::Fine, Mood::Fine, Mood::Fine]);
    world.content_store.store(false, Ordering::Relaxed);
    assert_eq!(node(&root, world).pull().await.0, 0);
}

/// The pull before was cancelled, for example, and what it had brought was collected before anybody looked.
#[tokio::test]
async fn an_image_that_was_not_there_is_looked_for_again_by_the_next_pull() {
    let root = tempfile::tempdir().unwrap();
    let node = node(&root, World::new([Mood::Fine, Mood::Fine, Mood::Fine]));
    node.world.content_store.store(false, Ordering::Relaxed);
    assert_eq!(node.pull().await.0, 0);
    node.world.content_store.store(true, Ordering::Relaxed);
    assert_eq!(node.pull().await.0, 3);
}

#[tokio::test]
async fn a_parent_that_is_not_the_images_is_not_covered() {
    let root = tempfile::tempdir().unwrap();
    let node = node(&root, World::new([Mood::Fine, Mood::Fine, Mood::Fine]));
    assert_eq!(node.prepare(1, "test/7/sha256:something-else").await, Answer::Plain);
}

#[tokio::test]
async fn mounts_gives_up_in_time_and_says_who_makes_the_layer() {
    let root = tempfile::tempdir().unwrap();
    let node = node(&root, World::new([Mood::Fine, Mood::Slow, Mood::Fine]));
    let (_, top) = node.pull().await;
    node.container(&top);
    let started = tokio::time::Instant::now();
    let error = node.lazy.settle("container").await.unwrap_err();
    assert!(started.elapsed() < 2 * MOUNT_WAIT);
    let words = error.to_string();
    assert!(matches!(error, SnapshotError::Unavailable(_)), "{words}");
    assert!(words.contains(&node.world.diff_id(1).to_string()) && words.contains("seed-1"), "{words}");
    assert!(matches!(node.lazy.usage(2), Err(SnapshotError::Unavailable(_))));
}

#[tokio::test]
async fn an_impossible_layer_and_those_above_are_unpacked_by_containerd() {
    let root = tempfile::tempdir().unwrap();
    let node = node(&root, World::new([Mood::Fine, Mood::Slow, Mood::Fine]));
    let (lazy, top) = node.pull().await;
    assert_eq!(lazy, 3);
    node.world.turn(1, Mood::Impossible);
    node.container(&top);
    node.lazy.settle("container").await.unwrap();
    assert_eq!(*node.world.unpacked.lock(), [node.world.diff_id(1), node.world.diff_id(2)]);
    let plan = node.snapshots.mounts("container").unwrap();
    let mounts = plan.mounts(Via::Full);
    let lower = mounts[0].options.last().unwrap();
    assert_eq!(lower.matches("/fs").count(), 2, "{lower}");
    assert!(plan.chain.is_some(), "the lowest layer is still lazy");
    let told = tokio::time::timeout(Duration::from_secs(5), async {
        while node.decided().await.layers[2].lazy == Some(true) {
            tokio::task::yield_now().await;
        }
        node.decided().await
    });
    let image = told.await.unwrap();
    assert!(image.layers[0].lazy == Some(true), "{image:?}");
    assert!(image.layers[1].reason.starts_with("demoted"), "{image:?}");
}

#[tokio::test]
async fn what_containerd_refuses_is_refused_with_its_words() {
    let root = tempfile::tempdir().unwrap();
    let mut world = World::new([Mood::Fine, Mood::Fine, Mood::Slow]);
    world.refuses = Some("unhandled tar header type 83".into());
    let node = node(&root, world);
    let (_, top) = node.pull().await;
    node.world.turn(2, Mood::Impossible);
    node.container(&top);
    for _ in 0..2 {
        let error = node.lazy.settle("container").await.unwrap_err();
        assert!(
            matches!(&error, SnapshotError::Refused(words) if words == "unhandled tar header type 83"),
            "{error}"
        );
    }
    assert_eq!(node.world.unpacked.lock().len(), 1);
}

#[tokio::test]
async fn after_a_restart_all_is_shown_without_containerd() {
    let root = tempfile::tempdir().unwrap();
    {
        let node = node(&root, World::new([Mood::Fine, Mood::Fine, Mood::Fine]));
        let (_, top) = node.pull().await;
        node.container(&top);
    }
    let mut world = World::new([Mood::Fine, Mood::Fine, Mood::Fine]);
    world.content_store = false.into();
    let node = node(&root, world);
    node.lazy.settle("container").await.unwrap();
    assert_eq!(node.pull().await.0, 3);
}

#[tokio::test]
async fn a_layer_known_to_be_impossible_is_left_to_containerd() {
    let root = tempfile::tempdir().unwrap();
    let node = node(&root, World::new([Mood::Fine, Mood::Impossible, Mood::Fine]));
    assert_eq!(node.prepare(0, "").await, Answer::Lazy);
    let layers = node.lazy.chains.pulled(&Digest::of(b"config").to_string()).unwrap().layers.clone();
    let known = tokio::time::timeout(Duration::from_secs(5), async {
        while node.lazy.chains.impossible(&layers).is_none() {
            tokio::task::yield_now().await;
        }
    });
    known.await.unwrap();
    let (lazy, _) = node.pull().await;
    assert_eq!(lazy, 1);
}

#[tokio::test]
async fn the_real_image_works_after_a_strangers_lie_about_the_same_layer() {
    let root = tempfile::tempdir().unwrap();
    let mut world = World::new([Mood::Fine, Mood::Slow, Mood::Fine]);
    world.refuses = Some("wrong diff id".into());
    let node = node(&root, world);
    let (lazy, top) = node.pull().await;
    assert_eq!(lazy, 3);
    node.world.turn(1, Mood::Impossible);
    node.container(&top);
    assert!(matches!(node.lazy.settle("container").await, Err(SnapshotError::Refused(_))));
    let real = Place {
        host: "real.example".into(),
        name: "app".into(),
        blob: BlobDigest(Digest::of(b"real")),
        size: 2,
    };
    node.world.image.lock().layers[1].places.insert(0, real);
    node.world.turn(1, Mood::Fine);
    assert_eq!(node.pull().await, (3, top));
    node.lazy.settle("container").await.unwrap();
}

#[tokio::test]
async fn what_one_namespace_has_is_decided_anew_for_another() {
    let root = tempfile::tempdir().unwrap();
    let node = node(&root, World::new([Mood::Fine, Mood::Fine, Mood::Fine]));
    let (_, top) = node.pull().await;
    node.container(&top);
    node.lazy.settle("container").await.unwrap();
    node.world.turn(0, Mood::Refused);
    assert_eq!(node.prepare_in("thief", 0, "").await, Answer::Plain);
    assert_eq!(node.prepare(0, "").await, Answer::Lazy, "in its own namespace it is there");
    node.world.turn(0, Mood::Fine);
    assert_eq!(node.prepare_in("friend", 0, "").await, Answer::Lazy);
    let chains = node.snapshots.records().read(|tx| tx.chains()).unwrap();
    let lowest = node.world.chain_ids()[0];
    assert_eq!(chains.iter().filter(|chain| chain.chain_id == lowest).count(), 2);
}

impl Node {
    /// A demotion of the whole image's chain, to its end.
    async fn demote(&self, top: &str) -> Option<demote::Outcome> {
        self.container(top);
        let dir = self.snapshots.mounts("container").unwrap().chain.unwrap();
        let mut progress = self.lazy.demoter.start(dir);
        progress.wait_for(Option::is_some).await.unwrap().clone()
    }
}

#[tokio::test]
async fn an_image_whose_layers_are_all_there_is_never_demoted() {
    let root = tempfile::tempdir().unwrap();
    let node = node(&root, World::new([Mood::Fine, Mood::Fine, Mood::Fine]));
    let (_, top) = node.pull().await;
    assert_eq!(node.demote(&top).await, Some(Ok(())));
    assert!(node.world.unpacked.lock().is_empty(), "containerd unpacked a good image");
    node.lazy.settle("container").await.unwrap();
}

#[tokio::test]
async fn a_slow_layer_is_no_reason_to_demote() {
    let root = tempfile::tempdir().unwrap();
    let node = node(&root, World::new([Mood::Fine, Mood::Slow, Mood::Fine]));
    let (_, top) = node.pull().await;
    assert_eq!(node.demote(&top).await, Some(Ok(())));
    assert!(node.world.unpacked.lock().is_empty(), "containerd unpacked a layer that only takes its time");
    node.world.turn(1, Mood::Fine);
    node.lazy.settle("container").await.unwrap();
}

#[tokio::test]
async fn a_demotion_whose_blob_never_comes_holds_up_no_other_image() {
    let root = tempfile::tempdir().unwrap();
    let mut world = World::new([Mood::Fine, Mood::Fine, Mood::Slow]);
    world.hangs = Some("test".into());
    let node = node(&root, world);
    let (_, hanging) = node.pull().await;
    let (_, other) = node.pull_in("other").await;
    assert_ne!(hanging, other);
    node.container_named("hanging", &hanging);
    node.container_named("other", &other);
    node.world.turn(2, Mood::Impossible);
    assert!(matches!(node.lazy.settle("hanging").await, Err(SnapshotError::Unavailable(_))));
    node.lazy.settle("other").await.unwrap();
    assert_eq!(*node.world.unpacked.lock(), [node.world.diff_id(2)]);
}
