//! How large a blob is, which also tells whether a repository has it: the question on which it hangs whether a layer is lazy. Who
//! asks waits for the answer, so it is asked again only where that costs little.

use std::time::{Duration, Instant};

use darter_types::{Digest, Repository};
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, RANGE};
use http::{Method, StatusCode};

use crate::client::{Ask, Client, Need};
use crate::credential::Credential;
use crate::error::RegistryError;

/// How often it is asked again after a failure that a registry, its token server or what lies between may have for a moment.
const HICCUPS_MAX: u32 = 1;
/// One that took longer to fail leaves no time for another try.
const HICCUP_WITHIN: Duration = Duration::from_secs(1);

impl Client {
    /// The size of a blob. The caller wants a quick answer, so it is asked again only where the registry is too busy to say
    /// anything, and once where the first try fails at once. `None` if it has the blob but doesn't say how large it is.
    pub async fn head_blob(
        &self,
        repository: &Repository,
        digest: Digest,
        credential: Option<&Credential>,
    ) -> Result<Option<u64>, RegistryError> {
        let (mut retry, mut hiccups) = (self.tries(repository), 0);
        loop {
            let asked = Instant::now();
            let error = match self.ask_size(repository, digest, credential).await {
                Ok(size) => return Ok(size),
                Err(error) => error,
            };
            match &error {
                RegistryError::TooManyRequests { .. } => {}
                RegistryError::Server { .. } | RegistryError::Broken { .. }
                    if hiccups < HICCUPS_MAX && asked.elapsed() < HICCUP_WITHIN =>
                {
                    hiccups += 1;
                }
                _ => return Err(error),
            }
            retry.pause(error).await?;
        }
    }

    async fn ask_size(
        &self,
        repository: &Repository,
        digest: Digest,
        credential: Option<&Credential>,
    ) -> Result<Option<u64>, RegistryError> {
        let ask = Ask::new(Method::HEAD, Need::Pull, format!("blobs/{digest}"));
        match self.try_each(repository, &ask, credential).await {
            Ok(incoming) => Ok(incoming.header(CONTENT_LENGTH.as_str()).and_then(|text| text.parse().ok())),
            Err(error) if is_of_head_alone(&error) => {
                let ask = Ask::new(Method::GET, ask.need, ask.rest).with_header(RANGE, "bytes=0-0");
                let incoming = self.try_each(repository, &ask, credential).await?;
                let total = |range: &str| range.rsplit_once('/')?.1.parse().ok();
                let partial = incoming.response.status() == StatusCode::PARTIAL_CONTENT;
                let whole = || incoming.header(CONTENT_LENGTH.as_str())?.parse().ok();
                Ok(if partial { incoming.header(CONTENT_RANGE.as_str()).and_then(total) } else { whole() })
            }
            Err(error) => Err(error),
        }
    }
}

/// Whether GET may be answered otherwise: some know no HEAD, an address signed for GET refuses it, and why somebody is not let
/// in stands in a body, which an answer to HEAD has not.
fn is_of_head_alone(error: &RegistryError) -> bool {
    match error {
        RegistryError::Status { status, .. } => *status == StatusCode::METHOD_NOT_ALLOWED,
        RegistryError::Redirect { .. } => true,
        RegistryError::Unauthorized { words, .. } | RegistryError::Forbidden { words, .. } => {
            words.is_empty()
        }
        _ => false,
    }
}
