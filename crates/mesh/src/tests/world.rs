//! What the stories happen in: a cluster with its own CA, peers, a registry in memory, layers.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use darter_daemon::tasks::Tasks;
use darter_identity::attend::{ClusterMembers, MemberInfo, SetRates};
use darter_identity::{Authority, Identity, Member};
use darter_registry::{Client, Credential};
use darter_store::Store;
use darter_types::{BlobDigest, DiffId, Digest, LayerSource, LayerTask, PieceIndex, Repository};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::layer::{Peers, open_peer};
use crate::origin::{Origin, OriginBlob, OriginError};
use crate::{BackgroundOptions, Deps, Layer, LayerRequest, Mesh, Options, Priority};

const LIFE: Duration = Duration::from_secs(3600);

/// A registry: repositories starting with `private/` ask for [`right`], and to others it has none starting with `hidden/`.
#[derive(Default)]
pub(super) struct Registry {
    blobs: Mutex<HashMap<(String, BlobDigest), Bytes>>,
    pub blobs_read: AtomicU64,
    pub is_down: AtomicBool,
    seen: Mutex<Vec<(String, Option<Credential>)>>,
}

pub(super) fn right() -> Credential {
    Credential::Basic { username: "somebody".to_owned(), password: "secret".to_owned() }
}

impl Registry {
    pub(super) fn push(&self, repository: &str, content: &[u8]) -> LayerSource {
        let repository: Repository = format!("https://registry.example/{repository}").parse().unwrap();
        let blob = BlobDigest(Digest::of(content));
        let key = (repository.to_string(), blob);
        self.blobs.lock().insert(key, Bytes::copy_from_slice(content));
        LayerSource { repository, blob, size: content.len() as u64 }
    }

    /// The same blob in the registry that drips.
    pub(super) fn push_dripping(&self, content: &[u8]) -> LayerSource {
        let mut source = self.push("evil/x", content);
        source.repository = format!("https://{DRIPPING}/evil/x").parse().unwrap();
        let key = (source.repository.to_string(), source.blob);
        self.blobs.lock().insert(key, Bytes::copy_from_slice(content));
        source
    }

    /// What the registry holds from now on under the name of that blob.
    pub(super) fn replace(&self, source: &LayerSource, content: &[u8]) {
        let key = (source.repository.to_string(), source.blob);
        self.blobs.lock().insert(key, Bytes::copy_from_slice(content));
    }

    /// The credentials that this host was shown.
    pub(super) fn seen_at(&self, authority: &str) -> Vec<Option<Credential>> {
        let seen = self.seen.lock();
        seen.iter().filter(|(host, _)| host == authority).map(|(_, credential)| credential.clone()).collect()
    }

    fn find(&self, source: &LayerSource, credential: Option<&Credential>) -> Result<Bytes, OriginError> {
        let asked = (source.repository.registry.authority.clone(), credential.cloned());
        self.seen.lock().push(asked);
        let is_away = [NOWHERE, AWAY].contains(&source.repository.registry.authority.as_str());
        if self.is_down.load(Ordering::Relaxed) || is_away {
            return Err(OriginError::Unavailable("connection refused".to_owned()));
        }
        if credential != Some(&right()) {
            match source.repository.name.split_once('/') {
                Some(("private", _)) => return Err(OriginError::Denied("pull access denied".to_owned())),
                Some(("hidden", _)) => return Err(OriginError::Absent("name unknown".to_owned())),
                _ => {}
            }
        }
        let key = (source.repository.to_string(), source.blob);
        self.blobs.lock().get(&key).cloned().ok_or_else(|| OriginError::Absent("blob: not found".to_owned()))
    }
}

#[async_trait]
impl Origin for Registry {
    async fn size(
        &self,
        source: &LayerSource,
        credential: Option<&Credential>,
    ) -> Result<Option<u64>, OriginError> {
        if source.repository.registry.authority == NOWHERE {
            std::future::pending::<()>().await;
        }
        self.find(source, credential).map(|blob| Some(blob.len() as u64))
    }

    async fn blob(
        &self,
        source: &LayerSource,
        credential: Option<&Credential>,
    ) -> Result<OriginBlob, OriginError> {
        let blob = self.find(source, credential)?;
        self.blobs_read.fetch_add(1, Ordering::Relaxed);
        if source.repository.registry.authority == DRIPPING {
            return Ok(OriginBlob { size: None, chunks: Box::pin(futures_util::stream::unfold(blob, drip)) });
        }
        let chunks: Vec<_> = blob.chunks(100_000).map(|chunk| Ok(Bytes::copy_from_slice(chunk))).collect();
        Ok(OriginBlob { size: None, chunks: Box::pin(futures_util::stream::iter(chunks)) })
    }

    async fn token(
        &self,
        repository: &Repository,
        credential: &Credential,
    ) -> Result<Option<Credential>, OriginError> {
        Ok(Some(credential.clone()).filter(|_| repository.registry.authority != MIRRORED))
    }

    fn opens_mirrors(&self, repository: &Repository, _: &Credential) -> bool {
        repository.registry.authority == MIRRORED
    }

    fn asks_as_anybody(&self, repository: &Repository) -> bool {
        repository.registry.authority != LETS_US_IN
    }

    fn has_answered(&self, registry: &darter_types::Registry) -> bool {
        registry.authority != NOWHERE
    }

    async fn listens(&self, repository: &Repository) -> bool {
        if repository.registry.authority == NOWHERE {
            std::future::pending::<()>().await;
        }
        true
    }
}

/// A registry that packets to are lost.
pub(super) const NOWHERE: &str = "nowhere.example";

/// A mirror that has answered once, and is away.
pub(super) const AWAY: &str = "away.example";

/// A registry that our configuration has headers for.
pub(super) const LETS_US_IN: &str = "inside.example";

/// A registry that has nothing but a mirror, which nodes show what a pull brought and seeds nothing.
pub(super) const MIRRORED: &str = "mirrored.example";

/// A registry that sends a few bytes of a blob in a second.
pub(super) const DRIPPING: &str = "dripping.example";

async fn drip(mut blob: Bytes) -> Option<(Result<Bytes, OriginError>, Bytes)> {
    tokio::time::sleep(Duration::from_millis(200)).await;
    (!blob.is_empty()).then(|| (Ok(blob.split_to(1)), blob))
}

/// A cluster.
pub(super) struct World {
    authority: Authority,
    pub registry: Arc<Registry>,
    pub members: watch::Sender<ClusterMembers>,
    /// What the manager sets for all.
    pub limits: watch::Sender<SetRates>,
    dir: tempfile::TempDir,
}

pub(super) struct Peer {
    pub mesh: Mesh,
    pub store: Arc<Store>,
    pub tasks: Tasks,
    pub name: String,
}

impl World {
    pub(super) fn new() -> Self {
        darter_daemon::run::install_tls_provider();
        Self {
            authority: Authority::create("here".parse().unwrap()).unwrap(),
            registry: Arc::default(),
            members: watch::Sender::new(ClusterMembers::default()),
            limits: watch::Sender::new(SetRates::default()),
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub(super) fn identity(&self, role: &str, name: &str) -> Identity {
        let member: Member = format!("spiffe://darter/here/{role}/{name}").parse().unwrap();
        Identity::issued_by(&self.authority, &member, LIFE).unwrap()
    }

    pub(super) fn root(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) async fn seed(&self, name: &str) -> Peer {
        let seed = self.peer("seed", name, |_| {}).await;
        let info = member(name, &seed.mesh.address().to_string());
        self.members.send_modify(|members| members.seeds.push(info));
        seed
    }

    pub(super) async fn node(&self, name: &str) -> Peer {
        self.peer("node", name, |_| {}).await
    }

    pub(super) async fn peer(&self, role: &str, name: &str, set: impl FnOnce(&mut Options)) -> Peer {
        self.limited(role, name, None, set).await
    }

    /// A peer whose store has a quota.
    pub(super) async fn limited(
        &self,
        role: &str,
        name: &str,
        quota: Option<u64>,
        set: impl FnOnce(&mut Options),
    ) -> Peer {
        let tasks = Tasks::new();
        // The disk of whoever runs this may be as full as it likes.
        let limits = darter_store::Limits { quota, high_percent: 100, low_percent: 100 };
        let options = darter_store::Options { limits, ..Default::default() };
        let store = Arc::new(Store::open(&self.root(name), options).unwrap());
        let mut options = Options { seed: role == "seed", ..Options::default() };
        // So may its disk and link be as busy.
        let idle_before = Duration::from_millis(50);
        options.background = BackgroundOptions { idle_before, yields: false, link_rate: None };
        set(&mut options);
        let deps = Deps {
            identity: self.identity(role, name),
            store: store.clone(),
            registry: Arc::new(Client::new(darter_registry::Options::default()).unwrap()),
            members: self.members.subscribe(),
            limits: self.limits.subscribe(),
            tasks: tasks.clone(),
        };
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mesh = Mesh::start_with(tcp, options, deps, self.registry.clone()).await.unwrap();
        Peer { mesh, store, tasks, name: name.to_owned() }
    }
}

pub(super) fn member(name: &str, address: &str) -> MemberInfo {
    MemberInfo { node: name.parse().unwrap(), address: address.to_owned(), zone: String::new() }
}

impl Peer {
    pub(super) fn open(&self, made: &TestLayer, source: &LayerSource) -> Layer {
        self.mesh.open(made.request(source))
    }

    pub(super) async fn stop(self) {
        self.tasks.stop(Duration::from_secs(5)).await;
    }

    /// How a scheduler would name it.
    pub(super) fn as_parent(&self, is_seed: bool) -> crate::layer::OpenPeer {
        open_peer(&self.name, &self.mesh.address().to_string(), is_seed)
    }
}

/// What a scheduler might have said.
pub(super) fn told(layer: &Layer, parents: Vec<crate::layer::OpenPeer>) {
    layer.open().hear(Peers { parents, seed: None });
}

/// A layer's blob (its tar as it is), and what is in its files.
pub(super) struct TestLayer {
    pub tar: Vec<u8>,
    pub task: LayerTask,
}

impl TestLayer {
    /// `files` files of `len` bytes each, which do not compress.
    pub(super) fn new(name: &str, files: usize, len: usize) -> Self {
        let mut tar = Vec::new();
        for number in 0..files {
            let mut content = vec![0; len];
            blake3::Hasher::new()
                .update(format!("{name} {number}").as_bytes())
                .finalize_xof()
                .fill(&mut content);
            append(&mut tar, &format!("file-{number}"), &content);
        }
        tar.extend_from_slice(&[0; 1024]);
        Self::of(tar)
    }

    pub(super) fn of(tar: Vec<u8>) -> Self {
        let task = LayerTask::current(DiffId(Digest::of(&tar)));
        Self { tar, task }
    }

    pub(super) fn request(&self, source: &LayerSource) -> LayerRequest {
        LayerRequest { task: self.task, sources: vec![source.clone()], credential: None }
    }
}

pub(super) fn append(tar: &mut Vec<u8>, name: &str, content: &[u8]) {
    let mut header = [0u8; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..108].copy_from_slice(b"0000644\0");
    header[108..116].copy_from_slice(b"0000000\0");
    header[116..124].copy_from_slice(b"0000000\0");
    header[124..136].copy_from_slice(format!("{:011o}\0", content.len()).as_bytes());
    header[136..148].copy_from_slice(b"00000000000\0");
    header[148..156].fill(b' ');
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    tar.extend_from_slice(&header);
    tar.extend_from_slice(content);
    tar.resize(tar.len().next_multiple_of(512), 0);
}

/// Reads every piece, sixteen at a time, and returns the content stream.
pub(super) async fn read_all(layer: &Layer) -> Vec<u8> {
    use futures_util::StreamExt;
    let map = layer.map().await.unwrap();
    let reads = (0..map.piece_count()).map(|index| layer.read(PieceIndex(index), Priority::Demand));
    let pieces: Vec<_> = futures_util::stream::iter(reads).buffered(16).collect().await;
    pieces.into_iter().flat_map(|piece| piece.unwrap().to_vec()).collect()
}

/// The contents of the tar's files, one after the other.
pub(super) fn contents(made: &TestLayer) -> Vec<u8> {
    let (mut out, mut at) = (Vec::new(), 0);
    while made.tar[at] != 0 {
        let size = std::str::from_utf8(&made.tar[at + 124..at + 135]).unwrap();
        let size = usize::from_str_radix(size, 8).unwrap();
        out.extend_from_slice(&made.tar[at + 512..at + 512 + size]);
        at += 512 + size.next_multiple_of(512);
    }
    out
}

/// Waits until `holds`, looking every few milliseconds; fails after twenty seconds.
pub(super) async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let waited = tokio::time::timeout(Duration::from_secs(20), async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "never: {what}");
}
