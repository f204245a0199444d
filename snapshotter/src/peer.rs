//! The mesh and the registries, as the lazy half wants them.

mod kept;
mod keyring;
mod names;
#[cfg(test)]
mod testing;
mod verdicts;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use darter_daemon::tasks::Tasks;
use darter_layer::LayerMap;
use darter_mesh::{Layer, LayerError, Mesh, Priority, RateStatus, Renew, Stage};
use darter_registry::{Blob, Client, Credential, ImageRef, RegistryError};
use darter_types::{DiffId, LayerSource, PieceIndex, Repository};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::OnceCell;
use tokio::time::{sleep, timeout};

use crate::fs::{ContentError, LayerContent};
use crate::lazy::ports::{
    BlobBytes, Blobs, InUse, LayerMesh, LayerRequest, LayerStatus, LimitHealth, OpenLayer, Probe, Registries,
    SchedulerHealth, StoreHealth, TrafficHealth, UnpackError,
};
use crate::start::Peer;
use kept::Kept;
use keyring::Keyring;

pub use kept::Sealed;

impl Peer {
    /// Of a mesh that runs, and the registries as it knows them. Credentials of pulls are kept where `sealed` says; `None`: in
    /// memory only.
    pub fn new(mesh: Mesh, registry: Arc<Client>, sealed: Option<Sealed>, tasks: &Tasks) -> Peer {
        registry.ask_helpers();
        let kept = sealed.and_then(|sealed| Kept::open(sealed, tasks.clone()));
        let keyring = Arc::new(Keyring::new(registry.clone(), kept));
        mesh.renew_with(keyring.clone());
        Peer {
            mesh: Arc::new(MeshLayers { mesh, keyring: keyring.clone(), tasks: tasks.clone() }),
            registries: Arc::new(KnownRegistries { registry: registry.clone(), keyring: keyring.clone() }),
            blobs: Arc::new(RegistryBlobs { registry, keyring: keyring.clone() }),
            credentials: keyring,
        }
    }
}

#[derive(Clone)]
struct MeshLayers {
    mesh: Mesh,
    keyring: Arc<Keyring>,
    tasks: Tasks,
}

/// How long a probe waits for a credential helper, so that the registry can still answer within Prepare's bound.
const HELPER_WAIT: Duration = Duration::from_millis(300);

/// One request for each registry, without a credential; one in all if there is none.
fn by_registry(request: &LayerRequest) -> Vec<darter_mesh::LayerRequest> {
    let new = |sources| darter_mesh::LayerRequest { task: request.task, sources, credential: None };
    let mut requests: Vec<darter_mesh::LayerRequest> = Vec::new();
    for source in &request.sources {
        let registry = &source.repository.registry;
        let same = |known: &&mut darter_mesh::LayerRequest| known.sources[0].repository.registry == *registry;
        match requests.iter_mut().find(same) {
            Some(known) => known.sources.push(source.clone()),
            None => requests.push(new(vec![source.clone()])),
        }
    }
    if requests.is_empty() {
        requests.push(new(Vec::new()));
    }
    requests
}

impl MeshLayers {
    /// One request for each registry, since a request has one credential. It waits only for a credential helper.
    async fn requests(&self, request: &LayerRequest) -> Vec<darter_mesh::LayerRequest> {
        let mut requests = by_registry(request);
        for request in &mut requests {
            if let Some(source) = request.sources.first() {
                request.credential = self.keyring.credential(&source.repository).await;
            }
        }
        requests
    }

    /// A credential that was refused may have aged. That is found out beside, for the next one who asks.
    fn look_into(&self, refused: &darter_mesh::LayerRequest) {
        let (source, credential) = (refused.sources.first().cloned(), refused.credential.clone());
        if let (Some(source), Some(credential)) = (source, credential) {
            let keyring = self.keyring.clone();
            self.tasks.spawn_alone("look into a refusal", async move {
                keyring.renew(&source, Some(credential)).await;
            });
        }
    }

    async fn probe_each(&self, requests: Vec<darter_mesh::LayerRequest>) -> Probe {
        // At the same time: one that never answers must not keep the others from being asked.
        let requests = requests.into_iter();
        let mut asked: FuturesUnordered<_> = requests
            .map(|request| async move {
                let registry = request.sources.first().map(|source| source.repository.registry.clone());
                let answer = self.mesh.probe(std::slice::from_ref(&request)).await.pop();
                if matches!(answer, Some(darter_mesh::Probe::Refused(_))) {
                    self.look_into(&request);
                }
                (registry, answer)
            })
            .collect();
        let mut refused = None;
        while let Some((registry, answer)) = asked.next().await {
            match answer {
                Some(darter_mesh::Probe::Known) => return Probe::Known,
                Some(darter_mesh::Probe::Answering) => return Probe::Answering,
                // The words of a registry that is there say more than that a guessed one is not.
                Some(darter_mesh::Probe::Refused(reason))
                    if refused.is_none()
                        || registry.is_some_and(|registry| self.keyring.has_answered(&registry)) =>
                {
                    refused = Some(reason);
                }
                Some(darter_mesh::Probe::Refused(_)) | None => {}
            }
        }
        Probe::Refused(refused.unwrap_or_else(|| "nobody was asked".to_owned()))
    }
}

#[async_trait]
impl LayerMesh for MeshLayers {
    /// Where a credential helper has to be asked first, only what is on this node is looked for until it has answered.
    fn open(&self, request: LayerRequest) -> Arc<dyn OpenLayer> {
        let known = self.requests(&request).now_or_never();
        let opened: Vec<_> = known.iter().flatten().map(|request| self.mesh.open(request.clone())).collect();
        let layer = Arc::new(MeshLayer {
            layer: opened.into_iter().next().unwrap_or_else(|| self.mesh.open_here(request.task)),
            mesh: self.clone(),
            requests: OnceCell::new_with(known),
            request,
            admitted: AtomicBool::new(false),
            asked: OnceCell::new(),
        });
        if !layer.requests.initialized() {
            let layer = layer.clone();
            self.tasks.spawn_alone("ask a credential helper", async move {
                layer.requests().await;
            });
        }
        layer
    }

    fn keep(&self, in_use: InUse) {
        self.mesh.keep(in_use);
    }

    fn store(&self) -> StoreHealth {
        let status = self.mesh.store_status();
        StoreHealth {
            dir: status.dir,
            used: status.used,
            quota: status.quota,
            evicted: status.evicted,
            total: status.total,
            available: status.available,
            high_percent: status.high_percent,
            beyond_mark: status.is_beyond_mark,
            tight: status.is_tight,
        }
    }

    fn traffic(&self) -> TrafficHealth {
        let limited = self.mesh.rates().into_iter().filter(|limit| limit.rate > 0);
        let health = |RateStatus { kind, rate, set_by }| LimitHealth {
            kind: kind.as_str(),
            rate,
            set_by: set_by.as_str(),
        };
        TrafficHealth { limits: limited.map(health).collect(), yields_to: self.mesh.yields_to() }
    }

    fn layers(&self) -> Vec<(DiffId, LayerStatus)> {
        self.mesh.statuses().into_iter().map(|status| (status.task.diff_id, told(status))).collect()
    }

    fn schedulers(&self) -> Vec<SchedulerHealth> {
        let health = |status: darter_mesh::SchedulerStatus| SchedulerHealth {
            node: status.node,
            address: status.address,
            connected: status.connected,
            trouble: status.trouble,
            clock_ahead_seconds: status.clock_ahead_seconds,
        };
        self.mesh.schedulers().into_iter().map(health).collect()
    }

    /// Where a helper is too slow, by what anybody may read: a pull that may be lazy without a right to it would fail later.
    async fn probe(&self, request: &LayerRequest) -> Probe {
        match timeout(HELPER_WAIT, self.requests(request)).await {
            Ok(requests) => self.probe_each(requests).await,
            Err(_) => match self.probe_each(by_registry(request)).await {
                Probe::Refused(reason) => Probe::Refused(format!(
                    "the credential helper has not answered yet, and without a credential: {reason}"
                )),
                known => known,
            },
        }
    }
}

/// Before a repository that couldn't say whether it holds a layer is asked again.
const ADMIT_RETRY: Duration = Duration::from_secs(3);

/// A layer as one image may have it: others that have it open don't lend it their right.
struct MeshLayer {
    layer: Layer,
    mesh: MeshLayers,
    request: LayerRequest,
    /// The same by registry, each with its credential, once that is known and the mesh was told.
    requests: OnceCell<Vec<darter_mesh::LayerRequest>>,
    /// The image is known to have the right; it keeps it.
    admitted: AtomicBool,
    /// What its repositories said. A refusal stays: it is said of these sources.
    asked: OnceCell<Result<(), String>>,
}

impl MeshLayer {
    /// By what is known: nobody is asked.
    fn is_admitted(&self) -> bool {
        if !self.admitted.load(Ordering::Relaxed) {
            self.admitted.store(self.layer.is_open_to(&self.request.sources), Ordering::Relaxed);
        }
        self.admitted.load(Ordering::Relaxed)
    }

    /// What the mesh is asked, and from when on it is: where a helper knows the credential, it was opened without a source.
    async fn requests(&self) -> &[darter_mesh::LayerRequest] {
        let ask = || async {
            let requests = self.mesh.requests(&self.request).await;
            for request in &requests {
                self.mesh.mesh.open(request.clone());
            }
            self.layer.name_repository().await;
            requests
        };
        self.requests.get_or_init(ask).await
    }

    /// The image's repository shows, if it hasn't yet, that it holds the layer; once, however many wait.
    async fn admit(&self) -> Result<(), ContentError> {
        if self.is_admitted() {
            return Ok(());
        }
        let ask = || async {
            match self.layer.admit(self.requests().await).await.map_err(content_error) {
                Ok(()) => Ok(Ok(())),
                Err(ContentError::Impossible(reason)) => Ok(Err(reason)),
                Err(later) => {
                    sleep(ADMIT_RETRY).await;
                    Err(later)
                }
            }
        };
        self.asked.get_or_try_init(ask).await?.clone().map_err(ContentError::Impossible)
    }
}

fn content_error(error: LayerError) -> ContentError {
    match error {
        LayerError::Impossible { reason } => ContentError::Impossible(reason),
        LayerError::Unavailable { reason } => ContentError::Unavailable(reason),
    }
}

#[async_trait]
impl LayerContent for MeshLayer {
    fn map_now(&self) -> Option<Arc<LayerMap>> {
        self.layer.map_now().filter(|_| self.is_admitted())
    }

    async fn map(&self) -> Result<Arc<LayerMap>, ContentError> {
        let map = tokio::select! {
            // Nothing but this node's own disk can give it before the mesh knows a source.
            Ok(map) = self.layer.map() => map,
            _ = self.requests() => self.layer.map().await.map_err(content_error)?,
        };
        self.admit().await?;
        Ok(map)
    }

    fn read_local(&self, piece: PieceIndex) -> Option<Bytes> {
        self.layer.read_local(piece)
    }

    fn in_memory(&self, piece: PieceIndex) -> Option<Bytes> {
        self.layer.in_memory(piece)
    }

    async fn read(&self, piece: PieceIndex) -> Result<Bytes, ContentError> {
        self.layer.read(piece, Priority::Demand).await.map_err(content_error)
    }

    fn touched(&self, piece: PieceIndex, since_first: Duration) {
        self.layer.touched(piece, since_first);
    }

    fn giver(&self, piece: PieceIndex) -> Option<String> {
        self.layer.giver(piece)
    }

    fn want(&self, first: PieceIndex, count: u32) {
        self.layer.want(first, count);
    }
}

impl OpenLayer for MeshLayer {
    fn status(&self) -> LayerStatus {
        told(self.layer.status())
    }

    fn fill(&self) {
        self.layer.fill();
    }
}

fn told(status: darter_mesh::LayerStatus) -> LayerStatus {
    LayerStatus {
        state: words(&status),
        pieces: u64::from(status.pieces),
        have: u64::from(status.have),
        from: status.from,
    }
}

/// What a layer is about, for people.
fn words(status: &darter_mesh::LayerStatus) -> String {
    const MB: u64 = 1_000_000;
    let (progress, missing) = (&status.progress, status.pieces - status.have);
    let read = match progress.size {
        0 => format!("{} MB read", progress.read / MB),
        size => format!("{} of {} MB read", progress.read / MB, size / MB),
    };
    match progress.stage {
        Stage::Searching => "looking for somebody who has it".to_owned(),
        Stage::Making => format!("made by {}: {read}", progress.by),
        Stage::MakingHere => format!("made on this node: {read}"),
        Stage::Waiting => format!("nobody has it yet: {}", progress.by),
        Stage::Ready if status.verified && missing == 0 => "complete and verified".to_owned(),
        Stage::Ready if missing == 0 => "complete".to_owned(),
        Stage::Ready if status.stuck => {
            format!("{missing} of {} pieces are missing, and nobody in reach has them", status.pieces)
        }
        Stage::Ready => "ready, arriving as it is needed".to_owned(),
        Stage::Impossible => format!("impossible: {}", progress.by),
    }
}

struct KnownRegistries {
    registry: Arc<Client>,
    keyring: Arc<Keyring>,
}

impl Registries for KnownRegistries {
    fn repositories(&self, host: &str, name: &str, reference: Option<&str>) -> Vec<Repository> {
        let authority = reference.and_then(|reference| authority_of(reference, host, name));
        let authority = authority.as_deref().unwrap_or(host);
        let told = self.keyring.place(authority, name);
        let found = self.registry.resolve_repository(authority, name, false);
        let other = found.into_iter().filter(|repository| Some(repository) != told.as_ref());
        told.iter().cloned().chain(other).collect()
    }
}

/// The reference has the port that containerd's label lacks, if it names the same repository.
fn authority_of(reference: &str, host: &str, name: &str) -> Option<String> {
    let image: ImageRef = reference.parse().ok()?;
    let without_port = match image.registry_authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => &image.registry_authority,
    };
    let brackets: &[char] = &['[', ']'];
    let same = without_port.trim_matches(brackets) == host.trim_matches(brackets) && image.name == name;
    same.then(|| image.registry_authority.clone())
}

struct RegistryBlobs {
    registry: Arc<Client>,
    keyring: Arc<Keyring>,
}

/// How long a registry may take to begin its answer.
const ANSWER_WAIT: Duration = Duration::from_secs(60);

impl RegistryBlobs {
    /// What the registry answers, if it does so in time.
    async fn open(
        &self,
        source: &LayerSource,
        credential: Option<&Credential>,
    ) -> Result<Result<Blob, RegistryError>, UnpackError> {
        let opening = self.registry.blob(&source.repository, source.blob.0, credential, 0);
        let late = |_| UnpackError::Unavailable(format!("{} doesn't answer", source.repository.registry));
        timeout(ANSWER_WAIT, opening).await.map_err(late)
    }

    /// What else the source may be read with, if the registry has refused this; `None` if nothing is known.
    async fn other(
        &self,
        source: &LayerSource,
        credential: Option<&Credential>,
        error: &RegistryError,
    ) -> Option<Option<Credential>> {
        let repository = &source.repository;
        match (error.root(), credential) {
            (RegistryError::Unauthorized { .. }, _) => {
                let other = self.keyring.instead_of(repository, credential).await;
                (other.as_ref() != credential).then_some(other)
            }
            (RegistryError::Forbidden { .. }, Some(forbidden)) => {
                self.keyring.beside(repository, forbidden).await.map(Some)
            }
            _ => None,
        }
    }
}

#[async_trait]
impl Blobs for RegistryBlobs {
    fn has_answered(&self, source: &LayerSource) -> bool {
        self.registry.has_answered(&source.repository.registry)
    }

    async fn blob(&self, source: &LayerSource) -> Result<BlobBytes, UnpackError> {
        let credential = self.keyring.credential(&source.repository).await;
        let blob = match self.open(source, credential.as_ref()).await? {
            Err(refused) => match self.other(source, credential.as_ref(), &refused).await {
                Some(other) => self.open(source, other.as_ref()).await?,
                None => Err(refused),
            },
            opened => opened,
        };
        let blob = blob.map_err(unpack_error)?;
        Ok(blob.stream.map(|part| part.map_err(unpack_error)).boxed())
    }
}

fn unpack_error(error: RegistryError) -> UnpackError {
    let words = error.to_string();
    if error.retryable() { UnpackError::Unavailable(words) } else { UnpackError::Refused(words) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cri::Credentials;
    use darter_mesh::Progress;

    #[tokio::test]
    async fn a_blob_that_a_pulls_credential_gets_403_for_is_read_by_the_nodes_own() {
        let folder = tempfile::tempdir().unwrap();
        let registry = testing::TestRegistry::start(|user| match user {
            None => "401 Unauthorized",
            Some("docker:word") => "200 OK",
            Some(_) => "403 Forbidden",
        });
        let registry = registry.await;
        let client = registry.client(folder.path());
        let keyring = Arc::new(Keyring::new(client.clone(), None));
        let repository: Repository = format!("http://{}/team/app", registry.address).parse().unwrap();
        let image = format!("{}/team/app:1", registry.address).parse().unwrap();
        keyring.grant(image, repository.clone(), Credential::from_user("me:old"));
        let blob = darter_types::BlobDigest(darter_types::Digest::of(testing::BLOB.as_bytes()));
        let source = LayerSource { repository, blob, size: testing::BLOB.len() as u64 };
        let read = RegistryBlobs { registry: client, keyring }.blob(&source).await.unwrap();
        let parts: Vec<Bytes> = read.map(Result::unwrap).collect().await;
        assert_eq!(parts.concat(), testing::BLOB.as_bytes());
    }

    #[test]
    fn the_reference_gives_the_port_that_the_label_lacks() {
        let authority = |reference| authority_of(reference, "r.example", "team/app");
        assert_eq!(authority("r.example:5000/team/app:1"), Some("r.example:5000".to_owned()));
        assert_eq!(authority("r.example/team/app"), Some("r.example".to_owned()));
        assert_eq!(authority("r.example:5000/team/other"), None);
        assert_eq!(authority("other.example:5000/team/app"), None);
    }

    #[test]
    fn progress_is_told_in_words() {
        let progress =
            Progress { read: 12_000_000, size: 80_000_000, stage: Stage::Making, by: "seed-1".into() };
        let mut status = darter_mesh::LayerStatus {
            task: darter_types::LayerTask::current(darter_types::DiffId(darter_types::Digest::of(b""))),
            pieces: 0,
            have: 0,
            from: Default::default(),
            progress,
            verified: false,
            stuck: false,
        };
        assert_eq!(words(&status), "made by seed-1: 12 of 80 MB read");
        (status.progress.stage, status.pieces, status.have, status.stuck) = (Stage::Ready, 9, 7, true);
        assert_eq!(words(&status), "2 of 9 pieces are missing, and nobody in reach has them");
        (status.have, status.verified) = (9, true);
        assert_eq!(words(&status), "complete and verified");
    }
}
