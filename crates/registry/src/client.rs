//! The client itself: what may be asked of a registry, and how often it is tried.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use darter_types::{Digest, Registry, Repository};
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};

use crate::auth::{self, Auth, Challenge, Purpose};
use crate::blob::Blob;
use crate::credential::{self, Credential};
use crate::directory::{Directory, Endpoint};
use crate::error::RegistryError;
use crate::helper::Helpers;
use crate::known::Known;
use crate::lent::Lent;
use crate::manifest::{self, Document, ImageConfig, ImageManifest, Manifest};
use crate::platform::{self, Platform};
use crate::reference::{ImageRef, Reference};
use crate::retry::{Patience, Retry};
use crate::transport::{Incoming, Outgoing, Transport, set_authorization};

/// The largest manifest that is read: twice what registries must take, and what containerd allows.
pub const MANIFEST_MAX: usize = 8 * 1024 * 1024;
/// The largest image configuration that [`Client::image`] reads.
pub const CONFIG_MAX: u64 = 8 * 1024 * 1024;
/// An index may name an index; deeper than this is nonsense.
const INDEX_DEPTH_MAX: usize = 4;

const MANIFEST_TYPES: &str = "application/vnd.oci.image.manifest.v1+json, \
    application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, */*";

/// What a client is made with. The default knows no files: every registry is asked itself, over TLS.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// A folder like `/etc/containerd/certs.d`. It is read anew while the program runs.
    pub hosts_dir: Option<PathBuf>,
    /// Docker's `config.json`; see [`credential::default_docker_config`].
    pub docker_config: Option<PathBuf>,
    /// PEM files with CAs to trust besides the system's.
    pub extra_ca: Vec<PathBuf>,
    /// Registries, `host:port`, that a host's name without its port may mean.
    pub registries: Vec<String>,
    pub patience: Patience,
}

/// A cheap handle; clones share connections and tokens.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    directory: Directory,
    docker_config: Option<PathBuf>,
    registries: Vec<String>,
    patience: Patience,
    transport: Transport,
    auth: Auth,
    known: Known,
    lent: Lent,
    helpers: Helpers,
}

/// What an image's name stands for at the moment.
#[derive(Debug, Clone)]
pub struct Resolved {
    pub repository: Repository,
    pub manifest: Manifest,
}

/// An image for one platform with what its manifests name, save the layers.
#[derive(Debug, Clone)]
pub struct Image {
    /// The indexes that were gone through, outermost first.
    pub indexes: Vec<Manifest>,
    pub manifest: Manifest,
    pub document: ImageManifest,
    pub config_bytes: Bytes,
    pub config: ImageConfig,
}

/// A request to any of a repository's endpoints.
pub(crate) struct Ask {
    pub method: Method,
    /// Behind the repository's name, for example `blobs/sha256:…`.
    pub rest: String,
    pub need: Need,
    /// Go wherever a redirect leads.
    pub headers: HeaderMap,
    pub body: Bytes,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    Pull,
    Resolve,
    Push,
}

impl Need {
    fn met_by(self, endpoint: &Endpoint) -> bool {
        match self {
            Self::Pull => endpoint.can.pull,
            Self::Resolve => endpoint.can.resolve,
            Self::Push => endpoint.can.push && endpoint.namespace.is_none(),
        }
    }
}

impl Ask {
    pub fn new(method: Method, need: Need, rest: String) -> Self {
        Self { method, rest, need, headers: HeaderMap::new(), body: Bytes::new() }
    }

    pub fn with_header(mut self, name: http::HeaderName, value: &str) -> Self {
        self.headers.extend(HeaderValue::try_from(value).ok().map(|value| (name, value)));
        self
    }

    fn scope(&self, repository: &Repository) -> String {
        let acts = if self.need == Need::Push { "pull,push" } else { "pull" };
        format!("repository:{}:{acts}", repository.name)
    }
}

impl Client {
    /// Fails if a CA file can't be read.
    pub fn new(options: Options) -> Result<Self, RegistryError> {
        Ok(Self(Arc::new(Inner {
            transport: Transport::new(options.patience.clone(), &options.extra_ca)?,
            directory: Directory::new(options.hosts_dir),
            docker_config: options.docker_config,
            registries: options.registries,
            patience: options.patience,
            auth: Auth::default(),
            known: Known::default(),
            lent: Lent::default(),
            helpers: Helpers::default(),
        })))
    }

    /// Whether anything came back from this registry since the program started, be it a refusal. One that has never
    /// answered may not be what a name without a port means.
    pub fn has_answered(&self, registry: &Registry) -> bool {
        self.0.known.has_answered(registry)
    }

    /// Whether requests for this repository that are given no credential have nothing else that could let them in:
    /// `hosts.toml` may name headers or a client certificate.
    pub fn asks_as_anybody(&self, repository: &Repository) -> bool {
        self.endpoints(repository, Need::Pull).is_ok_and(|endpoints| {
            endpoints.iter().all(|endpoint| endpoint.headers.is_empty() && endpoint.tls.client.is_none())
        })
    }

    /// The tries of a request to this repository.
    pub(crate) fn tries(&self, repository: &Repository) -> Retry {
        let retry = Retry::new(&self.0.patience, self.0.patience.answer);
        if self.has_answered(&repository.registry) { retry } else { retry.first_contact(&self.0.patience) }
    }

    /// Whether something listens where this repository is read, found out by a connection alone: no matter how slow the
    /// registry is. Through a proxy it always does.
    pub async fn listens(&self, repository: &Repository) -> bool {
        const PROXIES: [&str; 4] = ["http_proxy", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"];
        if PROXIES.iter().any(|name| std::env::var_os(name).is_some()) {
            return true;
        }
        let Ok(endpoints) = self.endpoints(repository, Need::Pull) else { return false };
        for url in endpoints.iter().filter_map(|endpoint| endpoint.ping_url().ok()) {
            let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else { continue };
            let host = host.trim_matches(['[', ']']);
            if tokio::net::TcpStream::connect((host, port)).await.is_ok() {
                return true;
            }
        }
        false
    }

    /// Where `name` of the registry `authority` may be found, to be tried in order: mirrors as repositories of their
    /// own, then the registry itself. An authority without a port also stands for the same host with the ports that
    /// `hosts_dir` and `registries` know. Empty if the name can't be a repository's.
    pub fn resolve_repository(&self, authority: &str, name: &str, plain_http: bool) -> Vec<Repository> {
        self.0.directory.read().candidates(authority, name, plain_http, &self.0.registries)
    }

    /// The repository that an image's name means, taken literally: no port is guessed.
    pub fn repository(&self, image: &ImageRef, plain_http: bool) -> Option<Repository> {
        let authority = &image.registry_authority;
        let found = self.0.directory.read().candidates(authority, &image.name, plain_http, &[]);
        let itself = |repository: &Repository| same_registry(&repository.registry, authority);
        found.into_iter().find(itself)
    }

    /// What Docker's configuration has for this repository. It waits only where a credential helper has to be asked, some
    /// seconds at most; several who wait ask it once, and it is asked on when nobody waits any more.
    pub async fn credential_for(&self, authority: &str, name: &str) -> Option<Credential> {
        let file = self.0.docker_config.as_deref()?;
        credential::from_docker_config(file, &self.0.helpers, authority, name).await
    }

    /// Asks the credential helpers that Docker's configuration names for single registries (`credHelpers`), so that what they
    /// say is known when it is needed. To be called on a runtime; it waits for nothing.
    pub fn ask_helpers(&self) {
        if let Some(file) = self.0.docker_config.as_deref() {
            credential::ask_helpers(file, &self.0.helpers);
        }
    }

    /// A client gave this with a pull of an image of that registry: as containerd does, its mirrors are shown it from now on where
    /// they ask for it. They are shown no other.
    pub fn lend(&self, authority: &str, credential: &Credential) {
        self.0.lent.lend(authority, credential);
    }

    /// Whether the mirrors of a registry are shown this.
    pub fn is_lent(&self, authority: &str, credential: &Credential) -> bool {
        self.0.lent.is_lent(authority, credential)
    }

    /// Whether this repository has a mirror that is shown the credential here. Who was lent none may be refused what is given here.
    pub fn opens_mirrors(&self, repository: &Repository, credential: &Credential) -> bool {
        let has_mirror = |endpoints: Vec<Endpoint>| endpoints.iter().any(|endpoint| !endpoint.is_registry);
        self.is_lent(&repository.registry.authority, credential)
            && self.endpoints(repository, Need::Pull).is_ok_and(has_mirror)
    }

    /// Finds the manifest that an image's name stands for; errors say the name, as containerd's do.
    pub async fn resolve(
        &self,
        image: &ImageRef,
        plain_http: bool,
        credential: Option<&Credential>,
    ) -> Result<Resolved, RegistryError> {
        let name = |source: RegistryError| RegistryError::Resolve {
            reference: image.to_string(),
            source: Box::new(match source {
                RegistryError::NotFound { .. } => RegistryError::NotFound { what: image.to_string() },
                other => other,
            }),
        };
        let repository = self.repository(image, plain_http);
        let repository = repository.ok_or_else(|| name(RegistryError::NoEndpoint(image.to_string())))?;
        let manifest = self.manifest(&repository, &image.reference(), credential).await.map_err(name)?;
        Ok(Resolved { repository, manifest })
    }

    /// Reads a manifest or index and checks its digest.
    pub async fn manifest(
        &self,
        repository: &Repository,
        reference: &Reference,
        credential: Option<&Credential>,
    ) -> Result<Manifest, RegistryError> {
        let need = if matches!(reference, Reference::Tag(_)) { Need::Resolve } else { Need::Pull };
        let ask = Ask::new(Method::GET, need, format!("manifests/{reference}"));
        let ask = ask.with_header(ACCEPT, MANIFEST_TYPES);
        let mut retry = Retry::new(&self.0.patience, self.0.patience.answer);
        loop {
            let incoming = self.open(repository, &ask, credential, &mut retry).await?;
            let header = |name: &str| incoming.header(name).map(str::to_owned);
            let (media_type, claimed) = (header(CONTENT_TYPE.as_str()), header("docker-content-digest"));
            match self.0.transport.body(incoming, MANIFEST_MAX).await {
                Ok(bytes) => return checked_manifest(reference, bytes, media_type, claimed),
                Err(error) => retry.pause(error).await?,
            }
        }
    }

    /// Goes from a manifest or index to the image for `platform`, and reads its configuration.
    pub async fn image(
        &self,
        repository: &Repository,
        mut manifest: Manifest,
        platform: &Platform,
        credential: Option<&Credential>,
    ) -> Result<Image, RegistryError> {
        let mut indexes = Vec::new();
        let document = loop {
            match manifest.document()? {
                Document::Image(document) => break document,
                Document::Index(_) if indexes.len() >= INDEX_DEPTH_MAX => {
                    return Err(RegistryError::Platform);
                }
                Document::Index(index) => {
                    let chosen =
                        platform::select(&index.manifests, platform).ok_or(RegistryError::Platform)?;
                    let next = self.manifest(repository, &chosen.digest.into(), credential).await?;
                    indexes.push(std::mem::replace(&mut manifest, next));
                }
            }
        };
        let config_bytes = self.fetch(repository, document.config.digest, CONFIG_MAX, credential).await?;
        let config = ImageConfig::parse(&config_bytes)?;
        Ok(Image { indexes, manifest, document, config_bytes, config })
    }

    /// Streams a blob from `offset` on, and goes on by itself when the connection breaks. The bytes are not checked.
    pub async fn blob(
        &self,
        repository: &Repository,
        digest: Digest,
        credential: Option<&Credential>,
        offset: u64,
    ) -> Result<Blob, RegistryError> {
        Blob::open(self.clone(), repository.clone(), digest, credential.cloned(), offset).await
    }

    /// A whole blob of at most `limit` bytes, checked against its digest.
    pub async fn fetch(
        &self,
        repository: &Repository,
        digest: Digest,
        limit: u64,
        credential: Option<&Credential>,
    ) -> Result<Bytes, RegistryError> {
        let blob = self.blob(repository, digest, credential, 0).await?;
        if blob.size.is_some_and(|size| size > limit) {
            return Err(RegistryError::TooLarge { what: format!("blob {digest}"), limit });
        }
        let bytes = blob.collect(limit).await?;
        let found = Digest::of(&bytes);
        if found == digest { Ok(bytes) } else { Err(RegistryError::Digest { expected: digest, found }) }
    }

    /// What a seed needs to read this repository: a short-lived token if the registry has a token server, else what
    /// was given. `None` for an anonymous reader, where the registry asks for nothing, and where a mirror is all
    /// that there is to ask and isn't shown what was given.
    pub async fn pull_token(
        &self,
        repository: &Repository,
        credential: Option<&Credential>,
    ) -> Result<Option<Credential>, RegistryError> {
        if credential.is_none() {
            return Ok(None);
        }
        let endpoints = self.endpoints(repository, Need::Pull)?;
        let endpoint = endpoints.last().expect("endpoints() fails rather than give none");
        let shown = self.0.lent.shown(endpoint, &repository.registry, credential);
        let Some(credential) = shown else { return Ok(None) };
        let registry = &endpoint.place.registry;
        let http = self.0.transport.client(endpoint)?;
        let challenge = match self.0.auth.known(registry) {
            Some(challenge) => Some(challenge),
            None => self.ping(endpoint, &http).await?,
        };
        let Some(challenge) = challenge else { return Ok(None) };
        if challenge == Challenge::Basic || matches!(credential, Credential::Bearer(_)) {
            return Ok(Some(credential.clone()));
        }
        let scope = format!("repository:{}:pull", repository.name);
        let purpose = Purpose { registry, scope: &scope, credential: Some(credential) };
        self.0.auth.learn(&purpose, challenge.clone(), None).await;
        let token = self.0.auth.token(&self.0.transport, &http, &purpose, &challenge).await?;
        Ok(Some(Credential::Bearer(token)))
    }

    async fn ping(
        &self,
        endpoint: &Endpoint,
        http: &reqwest::Client,
    ) -> Result<Option<Challenge>, RegistryError> {
        let mut request = Outgoing::new(Method::GET, endpoint.ping_url()?);
        request.headers = endpoint.headers.clone();
        let incoming = self.0.transport.send(http, request).await?;
        Ok(match incoming.response.status() {
            StatusCode::UNAUTHORIZED => auth::challenge(incoming.response.headers()),
            _ => None,
        })
    }

    pub(crate) fn patience(&self) -> &Patience {
        &self.0.patience
    }

    pub(crate) fn transport(&self) -> &Transport {
        &self.0.transport
    }

    /// The answer of the first endpoint that has one, tried again while `retry` allows.
    pub(crate) async fn open(
        &self,
        repository: &Repository,
        ask: &Ask,
        credential: Option<&Credential>,
        retry: &mut Retry,
    ) -> Result<Incoming, RegistryError> {
        loop {
            match self.try_each(repository, ask, credential).await {
                Ok(incoming) => return Ok(incoming),
                Err(error) => retry.pause(error).await?,
            }
        }
    }

    /// Asks each endpoint once. The error is that of the last one, the registry itself, whose word counts most.
    pub(crate) async fn try_each(
        &self,
        repository: &Repository,
        ask: &Ask,
        credential: Option<&Credential>,
    ) -> Result<Incoming, RegistryError> {
        let mut last = RegistryError::NoEndpoint(repository.to_string());
        for endpoint in self.endpoints(repository, ask.need)?.iter() {
            let url = endpoint.url(&repository.name, &ask.rest)?;
            let host = &endpoint.place.registry;
            if self.0.known.is_out_of_reach(host) {
                last = RegistryError::out_of_reach(&url);
                continue;
            }
            let asked = Instant::now();
            let answer = self.ask(endpoint, repository, ask, url, credential).await;
            if answer.as_ref().map_or_else(RegistryError::is_answer, |_| true) {
                self.0.known.answered(&repository.registry);
            } else if asked.elapsed() >= self.0.patience.connect && !self.has_answered(&repository.registry) {
                self.0.known.lost(host);
            }
            match answer {
                Ok(incoming) => return Ok(incoming),
                Err(error) => {
                    tracing::debug!(host = %endpoint.place.registry, %error, "an endpoint gave no answer");
                    last = error;
                }
            }
        }
        Err(last)
    }

    fn endpoints(&self, repository: &Repository, need: Need) -> Result<Vec<Endpoint>, RegistryError> {
        let mut endpoints = self.0.directory.read().endpoints(repository);
        endpoints.retain(|endpoint| need.met_by(endpoint));
        if endpoints.is_empty() {
            return Err(RegistryError::NoEndpoint(repository.to_string()));
        }
        Ok(endpoints)
    }

    /// One request to one endpoint, with authorization if it wants one. A mirror is asked as anybody, unless it is lent the
    /// credential.
    pub(crate) async fn ask(
        &self,
        endpoint: &Endpoint,
        repository: &Repository,
        ask: &Ask,
        url: url::Url,
        credential: Option<&Credential>,
    ) -> Result<Incoming, RegistryError> {
        let (transport, auth) = (&self.0.transport, &self.0.auth);
        let http = transport.client(endpoint)?;
        let scope = ask.scope(repository);
        let shown = self.0.lent.shown(endpoint, &repository.registry, credential);
        let purpose = Purpose { registry: &endpoint.place.registry, scope: &scope, credential: shown };
        // What hosts.toml brings goes before a token that anybody would get.
        let has_own = shown.is_none() && endpoint.headers.contains_key(AUTHORIZATION);
        let known = auth.known(purpose.registry).filter(|_| !has_own);
        let first = match &known {
            Some(challenge) => match auth.answer(transport, &http, &purpose, challenge).await {
                Ok(value) => Some(value),
                // Another repository's challenge: this one may be public.
                Err(RegistryError::Unauthorized { .. }) => None,
                Err(error) => return Err(error),
            },
            None => None,
        };
        let incoming = transport.send(&http, request(endpoint, ask, url.clone(), first.clone())).await?;
        let challenge = match incoming.response.status() {
            StatusCode::UNAUTHORIZED if !incoming.foreign => auth::challenge(incoming.response.headers()),
            _ => None,
        };
        let Some(challenge) = challenge else { return transport.checked(incoming, credential).await };
        if credential.is_some() && shown.is_none() {
            let (host, registry) = (purpose.registry, &repository.registry);
            tracing::debug!(%host, %registry, "a mirror asks for a credential; the registry's is not shown to it");
        }
        auth.learn(&purpose, challenge.clone(), first.as_ref()).await;
        // The same password again would be refused again.
        let second = auth.answer(transport, &http, &purpose, &challenge).await?;
        if Some(&second) == first.as_ref() {
            return transport.checked(incoming, credential).await;
        }
        let incoming = transport.send(&http, request(endpoint, ask, url, Some(second))).await?;
        transport.checked(incoming, credential).await
    }

    /// The endpoint that takes uploads.
    pub(crate) fn upload_endpoint(&self, repository: &Repository) -> Result<Endpoint, RegistryError> {
        Ok(self.endpoints(repository, Need::Push)?.remove(0))
    }
}

fn request(endpoint: &Endpoint, ask: &Ask, url: url::Url, authorization: Option<HeaderValue>) -> Outgoing {
    let mut request = Outgoing::new(ask.method.clone(), url);
    request.headers = endpoint.headers.clone();
    request.open_headers = ask.headers.clone();
    request.body = ask.body.clone();
    if let Some(value) = authorization {
        set_authorization(&mut request, value);
    }
    request
}

/// Whether `authority`, as it was written, names this registry.
fn same_registry(registry: &Registry, authority: &str) -> bool {
    Registry::new(registry.scheme, authority).is_ok_and(|written| written == *registry)
}

fn checked_manifest(
    reference: &Reference,
    bytes: Bytes,
    media_type: Option<String>,
    claimed: Option<String>,
) -> Result<Manifest, RegistryError> {
    let digest = Digest::of(&bytes);
    let expected = match reference {
        Reference::Digest(expected) => Some(*expected),
        Reference::Tag(_) => claimed.and_then(|text| text.parse().ok()),
    };
    if let Some(expected) = expected.filter(|expected| *expected != digest) {
        return Err(RegistryError::Digest { expected, found: digest });
    }
    let media_type = media_type.and_then(|text| Some(text.split(';').next()?.trim().to_owned()));
    let vague = |text: &String| text.is_empty() || text == "application/json" || text == "text/plain";
    let media_type = media_type.filter(|text| !vague(text)).unwrap_or_else(|| own_media_type(&bytes));
    Ok(Manifest { bytes, digest, media_type })
}

/// What a manifest says it is, for a server that doesn't know.
fn own_media_type(bytes: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Said {
        media_type: String,
    }
    match serde_json::from_slice::<Said>(bytes) {
        Ok(said) => said.media_type,
        Err(_) => match manifest::parse(bytes) {
            Ok(Document::Index(_)) => manifest::OCI_INDEX.to_owned(),
            _ => manifest::OCI_MANIFEST.to_owned(),
        },
    }
}
