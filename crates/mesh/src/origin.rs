//! The seam to registries: what the mesh needs of them, and how their client gives it.

use std::pin::Pin;

use async_trait::async_trait;
use bytes::Bytes;
use darter_proto::v1;
use darter_registry::{Client, Credential, RegistryError};
use darter_types::{LayerSource, Registry, Repository};
use futures_util::{Stream, StreamExt};

/// Why a registry did not give a blob.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OriginError {
    /// These credentials, or none, are not enough.
    #[error("{0}")]
    Denied(String),
    #[error("{0}")]
    Absent(String),
    /// It may answer later, or answer somebody else.
    #[error("{0}")]
    Unavailable(String),
}

pub(crate) type Chunks = Pin<Box<dyn Stream<Item = Result<Bytes, OriginError>> + Send>>;

/// A blob as the registry sends it, not checked.
pub(crate) struct OriginBlob {
    pub size: Option<u64>,
    pub chunks: Chunks,
}

/// Where blobs come from. `None` as credential means to ask as anybody.
#[async_trait]
pub(crate) trait Origin: Send + Sync {
    /// The blob's size, without reading it; `None` if the registry does not tell.
    async fn size(
        &self,
        source: &LayerSource,
        credential: Option<&Credential>,
    ) -> Result<Option<u64>, OriginError>;
    async fn blob(
        &self,
        source: &LayerSource,
        credential: Option<&Credential>,
    ) -> Result<OriginBlob, OriginError>;
    /// What a seed needs to read from the repository: a token of short life where the registry has such. `None` if the
    /// registry asks for nothing.
    async fn token(
        &self,
        repository: &Repository,
        credential: &Credential,
    ) -> Result<Option<Credential>, OriginError>;
    /// Whether a mirror of the repository is shown the credential here, as it is by no seed: that may be refused what is given here.
    fn opens_mirrors(&self, repository: &Repository, credential: &Credential) -> bool;
    /// Whether a read without a credential is one that anybody could make: no header or certificate of our own
    /// configuration goes along.
    fn asks_as_anybody(&self, repository: &Repository) -> bool;
    /// Whether this registry has ever said anything. One that has not may be a wrong guess.
    fn has_answered(&self, registry: &Registry) -> bool;
    /// Whether something listens where the repository is read. It may take long: the caller bounds it.
    async fn listens(&self, repository: &Repository) -> bool;
}

impl From<RegistryError> for OriginError {
    fn from(error: RegistryError) -> Self {
        let text = error.to_string();
        match error.root() {
            RegistryError::Unauthorized { .. } | RegistryError::Forbidden { .. } => OriginError::Denied(text),
            RegistryError::NotFound { .. } => OriginError::Absent(text),
            RegistryError::TooManyRequests { .. }
            | RegistryError::Server { .. }
            | RegistryError::Status { .. }
            | RegistryError::Redirect { .. }
            | RegistryError::Tls { .. }
            | RegistryError::Unreachable { .. }
            | RegistryError::Broken { .. }
            | RegistryError::Protocol { .. }
            | RegistryError::Digest { .. }
            | RegistryError::TooLarge { .. }
            | RegistryError::Platform
            | RegistryError::NoEndpoint(_)
            | RegistryError::Resolve { .. }
            | RegistryError::Setup(_) => OriginError::Unavailable(text),
        }
    }
}

#[async_trait]
impl Origin for Client {
    async fn size(
        &self,
        source: &LayerSource,
        credential: Option<&Credential>,
    ) -> Result<Option<u64>, OriginError> {
        Ok(self.head_blob(&source.repository, source.blob.0, credential).await?)
    }

    async fn blob(
        &self,
        source: &LayerSource,
        credential: Option<&Credential>,
    ) -> Result<OriginBlob, OriginError> {
        let blob = Client::blob(self, &source.repository, source.blob.0, credential, 0).await?;
        let chunks = blob.stream.map(|chunk| chunk.map_err(OriginError::from));
        Ok(OriginBlob { size: blob.size, chunks: Box::pin(chunks) })
    }

    async fn token(
        &self,
        repository: &Repository,
        credential: &Credential,
    ) -> Result<Option<Credential>, OriginError> {
        Ok(self.pull_token(repository, Some(credential)).await?)
    }

    fn opens_mirrors(&self, repository: &Repository, credential: &Credential) -> bool {
        Client::opens_mirrors(self, repository, credential)
    }

    fn asks_as_anybody(&self, repository: &Repository) -> bool {
        Client::asks_as_anybody(self, repository)
    }

    fn has_answered(&self, registry: &Registry) -> bool {
        Client::has_answered(self, registry)
    }

    async fn listens(&self, repository: &Repository) -> bool {
        Client::listens(self, repository).await
    }
}

/// A credential as a seed is sent it.
pub fn credential_to_wire(credential: &Credential) -> v1::Credential {
    use v1::credential::Kind;
    let kind = match credential.clone() {
        Credential::Basic { username, password } => Kind::Basic(v1::Basic { username, password }),
        Credential::Bearer(token) => Kind::Bearer(token),
        Credential::IdentityToken(token) => Kind::IdentityToken(token),
    };
    v1::Credential { kind: Some(kind) }
}

/// The credential of a message, if it has one.
pub fn credential_from_wire(credential: Option<v1::Credential>) -> Option<Credential> {
    use v1::credential::Kind;
    Some(match credential?.kind? {
        Kind::Basic(basic) => Credential::Basic { username: basic.username, password: basic.password },
        Kind::Bearer(token) => Credential::Bearer(token),
        Kind::IdentityToken(token) => Credential::IdentityToken(token),
    })
}
