//! Uploads, whole blobs at a time: for tests and small tools, not for images of some size.

use bytes::Bytes;
use darter_types::{Digest, Repository};
use http::Method;
use http::header::{CONTENT_TYPE, LOCATION};

use crate::client::{Ask, Client, Need};
use crate::credential::Credential;
use crate::error::RegistryError;
use crate::reference::Reference;

impl Client {
    /// Uploads a blob, unless the registry has it.
    pub async fn push_blob(
        &self,
        repository: &Repository,
        bytes: Bytes,
        credential: Option<&Credential>,
    ) -> Result<Digest, RegistryError> {
        let digest = Digest::of(&bytes);
        match self.head_blob(repository, digest, credential).await {
            Ok(_) => return Ok(digest),
            Err(RegistryError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        let start = Ask::new(Method::POST, Need::Push, "blobs/uploads/".to_owned());
        let started = self.try_each(repository, &start, credential).await?;
        let refuse = |reason: &str| RegistryError::protocol(&started.url, reason);
        let location =
            started.header(LOCATION.as_str()).ok_or_else(|| refuse("an upload without a location"))?;
        let mut url = started.url.join(location).map_err(|_| refuse("a location that is no address"))?;
        if url.origin() != started.url.origin() {
            return Err(refuse("an upload to another host"));
        }
        url.query_pairs_mut().append_pair("digest", &digest.to_string());
        let mut put = Ask::new(Method::PUT, Need::Push, String::new())
            .with_header(CONTENT_TYPE, "application/octet-stream");
        put.body = bytes;
        self.ask(&self.upload_endpoint(repository)?, repository, &put, url, credential).await?;
        Ok(digest)
    }

    /// Uploads a manifest or index whose content is there already.
    pub async fn push_manifest(
        &self,
        repository: &Repository,
        reference: &Reference,
        media_type: &str,
        bytes: Bytes,
        credential: Option<&Credential>,
    ) -> Result<Digest, RegistryError> {
        let digest = Digest::of(&bytes);
        let put = Ask::new(Method::PUT, Need::Push, format!("manifests/{reference}"));
        let mut put = put.with_header(CONTENT_TYPE, media_type);
        put.body = bytes;
        self.try_each(repository, &put, credential).await?;
        Ok(digest)
    }
}
