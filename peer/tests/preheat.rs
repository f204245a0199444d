//! A seed that is ordered to preheat an image, with a registry on loopback.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use darter_daemon::{run::install_tls_provider, tasks::Tasks};
use darter_identity::attend::{ClusterMembers, PreheatCommand, PreheatUpdate};
use darter_identity::{Authority, Identity, Member};
use darter_mesh::assemble::{Parts, assemble_with};
use darter_peer::{Config, preheat};
use darter_types::{DiffId, Digest, LayerTask, Role};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(30);

/// A tar stream with one regular file.
fn tar(name: &str, content: &[u8]) -> Vec<u8> {
    let mut header = [0u8; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..107].copy_from_slice(b"0000644");
    header[108..115].copy_from_slice(b"0000000");
    header[116..123].copy_from_slice(b"0000000");
    header[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
    header[136..147].copy_from_slice(b"00000000000");
    header[148..156].copy_from_slice(b"        ");
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut stream = header.to_vec();
    stream.extend(content);
    stream.resize(stream.len().next_multiple_of(512) + 1024, 0);
    stream
}

/// An image of one plain layer, and how often its blob was read.
struct Registry {
    manifest: Bytes,
    config: Bytes,
    layer: Bytes,
    /// The blob never comes to its end.
    stalls: bool,
    reads: AtomicUsize,
}

impl Registry {
    fn new(content: &[u8], stalls: bool) -> Arc<Self> {
        let layer = tar("file", content);
        let diff_id = Digest::of(&layer);
        let config = format!(
            r#"{{"os":"linux","architecture":"amd64","rootfs":{{"type":"layers","diff_ids":["{diff_id}"]}}}}"#
        );
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",
            "config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{}","size":{}}},
            "layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{diff_id}","size":{}}}]}}"#,
            Digest::of(config.as_bytes()),
            config.len(),
            layer.len()
        );
        let (manifest, config, layer) = (manifest.into(), config.into(), layer.into());
        Arc::new(Self { manifest, config, layer, stalls, reads: AtomicUsize::new(0) })
    }

    fn task(&self) -> LayerTask {
        LayerTask::current(DiffId(Digest::of(&self.layer)))
    }

    async fn serve(self: &Arc<Self>) -> SocketAddr {
        let router = Router::new()
            .route("/v2/", get(|| async { "{}" }))
            .route("/v2/app/manifests/{reference}", get(manifest))
            .route("/v2/app/blobs/{digest}", get(blob))
            .with_state(self.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        address
    }
}

async fn manifest(State(registry): State<Arc<Registry>>, Path(reference): Path<String>) -> Response {
    if reference != "1" && reference != Digest::of(&registry.manifest).to_string() {
        return StatusCode::NOT_FOUND.into_response();
    }
    let media_type = [("content-type", "application/vnd.oci.image.manifest.v1+json")];
    (media_type, registry.manifest.clone()).into_response()
}

async fn blob(State(registry): State<Arc<Registry>>, Path(digest): Path<String>) -> Response {
    if digest == Digest::of(&registry.config).to_string() {
        return registry.config.clone().into_response();
    }
    if digest != Digest::of(&registry.layer).to_string() {
        return StatusCode::NOT_FOUND.into_response();
    }
    registry.reads.fetch_add(1, Ordering::SeqCst);
    if registry.stalls {
        return Body::from_stream(futures_util::stream::pending::<Result<Bytes, std::io::Error>>())
            .into_response();
    }
    registry.layer.clone().into_response()
}

struct Seed {
    parts: Parts,
    commands: mpsc::Sender<PreheatCommand>,
    updates: mpsc::Receiver<PreheatUpdate>,
    tasks: Tasks,
    _members: watch::Sender<ClusterMembers>,
    _root: tempfile::TempDir,
}

impl Seed {
    async fn start() -> Self {
        install_tls_provider();
        let authority = Authority::create("test".parse().unwrap()).unwrap();
        let member =
            Member { cluster: "test".parse().unwrap(), role: Role::Seed, node: "seed".parse().unwrap() };
        let identity = Identity::issued_by(&authority, &member, Duration::from_secs(600)).unwrap();
        let (tasks, root) = (Tasks::new(), tempfile::tempdir().unwrap());
        let config = Config {
            root: root.path().to_owned(),
            listen: "127.0.0.1:0".parse().unwrap(),
            hosts_dir: Default::default(),
            ..Config::default()
        };
        let (members_sender, members) = watch::channel(ClusterMembers::default());
        let parts = assemble_with(&config, identity, members, &tasks).await.unwrap();
        let (commands, received) = mpsc::channel(8);
        let (reports, updates) = mpsc::channel(8);
        let seed = preheat::Seed { mesh: parts.mesh.clone(), registry: parts.registry.clone() };
        preheat::serve(seed, received, reports, &tasks);
        Self { parts, commands, updates, tasks, _members: members_sender, _root: root }
    }

    async fn order(&self, id: &str, image: String) {
        let platform = Some("linux/amd64".to_owned());
        let start = PreheatCommand::Start { id: id.to_owned(), image, platform, credential: None };
        self.commands.send(start).await.unwrap();
    }

    async fn update(&mut self) -> PreheatUpdate {
        timeout(SOON, self.updates.recv()).await.expect("the seed reports").unwrap()
    }

    async fn last(&mut self, id: &str) -> PreheatUpdate {
        loop {
            let update = self.update().await;
            if update.done && update.id == id {
                return update;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn preheated_layer_is_here_and_was_read_once() {
    let registry = Registry::new(&[7; 600_000], false);
    let address = registry.serve().await;
    let mut seed = Seed::start().await;
    seed.order("first", format!("{address}/app:1")).await;
    let last = seed.last("first").await;
    assert_eq!(last.error, None);
    assert_eq!((last.layers.len(), last.layers[0].done), (1, true));
    assert_eq!(last.layers[0].read, registry.layer.len() as u64);
    assert!(seed.parts.store.map(registry.task()).unwrap().is_some());
    seed.order("again", format!("{address}/app:1")).await;
    assert_eq!(seed.last("again").await.error, None);
    assert_eq!(registry.reads.load(Ordering::SeqCst), 1);
    seed.tasks.stop(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn image_that_is_not_there_fails_with_words() {
    let registry = Registry::new(b"x", false);
    let address = registry.serve().await;
    let mut seed = Seed::start().await;
    seed.order("missing", format!("{address}/app:2")).await;
    let error = seed.last("missing").await.error.unwrap();
    assert!(error.contains("app:2") && error.contains("not found"), "{error}");
    seed.order("nonsense", "no image at all".to_owned()).await;
    assert!(seed.last("nonsense").await.error.unwrap().contains("invalid reference"));
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_order_ends_and_others_go_on() {
    let (stalling, good) = (Registry::new(b"never", true), Registry::new(b"soon", false));
    let (stalling_address, good_address) = (stalling.serve().await, good.serve().await);
    let mut seed = Seed::start().await;
    seed.order("stuck", format!("{stalling_address}/app:1")).await;
    while seed.update().await.layers.is_empty() {}
    seed.commands.send(PreheatCommand::Cancel { id: "stuck".to_owned() }).await.unwrap();
    seed.order("good", format!("{good_address}/app:1")).await;
    assert_eq!(seed.last("good").await.error, None);
    assert!(seed.parts.store.map(stalling.task()).unwrap().is_none());
}
