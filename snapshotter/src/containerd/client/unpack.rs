//! What containerd does with a layer that is not lazy: its blob goes into the content store, its diff service unpacks it.
//! Done under a lease, so that no garbage collection takes the blob in between. The words of a refusal are its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::diff_client::DiffClient;
use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::{
    AbortRequest, ApplyRequest, CreateRequest, DeleteRequest, WriteAction, WriteContentRequest,
};
use containerd_client::types::Descriptor;
use darter_types::LayerSource;
use futures_util::{Stream, StreamExt, stream};
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::{in_namespace, words};
use crate::containerd::service::to_mount;
use crate::lazy::ports::{BlobBytes, Blobs, PlainLayer, UnpackError};
use crate::snapshot::Mount;

/// A layer that takes longer has something wrong with it, or with the machine; the next attempt starts anew.
const UNPACK_DEADLINE: Duration = Duration::from_secs(30 * 60);

/// After this containerd itself drops the lease of a program that died.
const LEASE_LIFE: Duration = Duration::from_secs(60 * 60);

/// Distinguishes the writes of several attempts.
static ATTEMPT: AtomicU64 = AtomicU64::new(0);

struct Session<'a> {
    channel: &'a Channel,
    namespace: &'a str,
    lease: String,
}

pub(super) async fn unpack(
    channel: &Channel,
    blobs: &dyn Blobs,
    unpacking: &Semaphore,
    namespace: &str,
    layer: &PlainLayer,
    mounts: Vec<Mount>,
) -> Result<(), UnpackError> {
    let session = Session::open(channel, namespace).await?;
    let work = async {
        let source = session.fetch_any(blobs, layer).await?;
        // Not before: a registry that gives its blobs drop by drop must not keep other images waiting.
        let _turn = unpacking.acquire().await.expect("the semaphore is never closed");
        session.apply(layer, source, mounts).await
    };
    session.end_after(work).await
}

/// The first half of it: the blob into the content store.
pub(super) async fn bring(
    channel: &Channel,
    blobs: &dyn Blobs,
    namespace: &str,
    layer: &PlainLayer,
) -> Result<(), UnpackError> {
    let session = Session::open(channel, namespace).await?;
    session.end_after(async { session.fetch_any(blobs, layer).await.map(drop) }).await
}

impl<'a> Session<'a> {
    async fn open(channel: &'a Channel, namespace: &'a str) -> Result<Self, UnpackError> {
        let number = ATTEMPT.fetch_add(1, Ordering::Relaxed);
        let lease = format!("darter-{}-{number}", std::process::id());
        let session = Session { channel, namespace, lease };
        session.create_lease().await.map_err(refused)?;
        Ok(session)
    }

    async fn end_after(
        &self,
        work: impl Future<Output = Result<(), UnpackError>>,
    ) -> Result<(), UnpackError> {
        let done = tokio::time::timeout(UNPACK_DEADLINE, work).await;
        self.delete_lease().await;
        let late = || UnpackError::Unavailable(format!("unpacking took over {UNPACK_DEADLINE:?}"));
        done.unwrap_or_else(|_| Err(late()))
    }
}

impl Session<'_> {
    fn request<T>(&self, message: T) -> Result<Request<T>, Status> {
        let mut request = in_namespace(self.namespace, message)?;
        let lease = self.lease.parse().map_err(|_| Status::internal("the lease is no header value"))?;
        request.metadata_mut().insert("containerd-lease", lease);
        Ok(request)
    }

    async fn create_lease(&self) -> Result<(), Status> {
        let expire = rfc3339(SystemTime::now() + LEASE_LIFE);
        let labels = [("containerd.io/gc.expire".to_owned(), expire)].into();
        let request = in_namespace(self.namespace, CreateRequest { id: self.lease.clone(), labels })?;
        LeasesClient::new(self.channel.clone()).create(request).await.map(|_| ())
    }

    async fn delete_lease(&self) {
        let request = in_namespace(self.namespace, DeleteRequest { id: self.lease.clone(), sync: false });
        let Ok(request) = request else { return };
        if let Err(status) = LeasesClient::new(self.channel.clone()).delete(request).await {
            tracing::debug!(%status, lease = self.lease, "the lease stays until it expires");
        }
    }

    /// From the first source that works. If none does, another attempt may help if one of the registries that are known to
    /// be there may still give the blob; registries that have never answered come last, and count where there is no other.
    async fn fetch_any<'l>(
        &self,
        blobs: &dyn Blobs,
        layer: &'l PlainLayer,
    ) -> Result<&'l LayerSource, UnpackError> {
        let mut sources: Vec<&LayerSource> = layer.sources.iter().collect();
        sources.sort_by_key(|source| !blobs.has_answered(source));
        let mut errors = Vec::new();
        for source in sources {
            match self.fetch(blobs, source).await {
                Ok(()) => return Ok(source),
                Err(error) => {
                    tracing::info!(repository = %source.repository, blob = %source.blob, %error, "no blob from here");
                    errors.push((blobs.has_answered(source), error));
                }
            }
        }
        Err(weightiest(errors))
    }

    async fn fetch(&self, blobs: &dyn Blobs, source: &LayerSource) -> Result<(), UnpackError> {
        let number = ATTEMPT.fetch_add(1, Ordering::Relaxed);
        let reference = format!("darter-{}-{number}-{}", std::process::id(), source.blob);
        if self.has(&reference, source).await? {
            return Ok(());
        }
        let bytes = blobs.blob(source).await?;
        let broken = Arc::new(Mutex::new(None));
        let messages = write_messages(reference.clone(), source, bytes, broken.clone());
        let written = self.write(messages).await;
        let failed = broken.lock().take();
        let outcome = match (failed, written) {
            (Some(error), _) => Err(error),
            (None, Err(status)) if status.code() != Code::AlreadyExists => Err(refused(status)),
            _ => Ok(()),
        };
        if outcome.is_err() {
            self.abort(reference).await;
        }
        outcome
    }

    /// Whether the blob is in the content store; if so, the lease holds it from now on.
    async fn has(&self, reference: &str, source: &LayerSource) -> Result<bool, UnpackError> {
        let stat = WriteContentRequest {
            action: WriteAction::Stat.into(),
            r#ref: reference.to_owned(),
            total: source.size as i64,
            expected: source.blob.to_string(),
            ..Default::default()
        };
        match self.write(stream::iter([stat])).await {
            Ok(()) => Ok(false),
            Err(status) if status.code() == Code::AlreadyExists => Ok(true),
            Err(status) => Err(refused(status)),
        }
    }

    async fn write(
        &self,
        messages: impl Stream<Item = WriteContentRequest> + Send + 'static,
    ) -> Result<(), Status> {
        let mut client = ContentClient::new(self.channel.clone());
        let mut answers = client.write(self.request(messages)?).await?.into_inner();
        while answers.message().await?.is_some() {}
        Ok(())
    }

    async fn abort(&self, reference: String) {
        let Ok(request) = self.request(AbortRequest { r#ref: reference }) else { return };
        if let Err(status) = ContentClient::new(self.channel.clone()).abort(request).await {
            tracing::debug!(%status, "a write that failed stays until containerd clears it");
        }
    }

    async fn apply(
        &self,
        layer: &PlainLayer,
        source: &LayerSource,
        mounts: Vec<Mount>,
    ) -> Result<(), UnpackError> {
        let request = ApplyRequest {
            diff: Some(Descriptor {
                media_type: layer.media_type.clone(),
                digest: source.blob.to_string(),
                size: source.size as i64,
                ..Default::default()
            }),
            mounts: mounts.into_iter().map(to_mount).collect(),
            ..Default::default()
        };
        let request = self.request(request).map_err(refused)?;
        let applied = DiffClient::new(self.channel.clone()).apply(request).await.map_err(|status| {
            match refused(status) {
                UnpackError::Refused(words) => {
                    UnpackError::Refused(format!("failed to extract layer {}: {words}", layer.diff_id))
                }
                other => other,
            }
        })?;
        let digest = applied.into_inner().applied.map(|applied| applied.digest).unwrap_or_default();
        if digest == layer.diff_id.to_string() {
            return Ok(());
        }
        Err(UnpackError::Refused(format!("wrong diff id calculated on extraction {digest:?}")))
    }
}

/// Writes of the blob's parts, then the commit; the stream ends early, with the error in `broken`, if the blob breaks off.
fn write_messages(
    reference: String,
    source: &LayerSource,
    bytes: BlobBytes,
    broken: Arc<Mutex<Option<UnpackError>>>,
) -> impl Stream<Item = WriteContentRequest> + Send + 'static {
    let (expected, total) = (source.blob.to_string(), source.size as i64);
    let message = move |action: WriteAction, offset: i64, data: Vec<u8>| WriteContentRequest {
        action: action.into(),
        r#ref: reference.clone(),
        total,
        expected: expected.clone(),
        offset,
        data,
        ..Default::default()
    };
    let state = (bytes, 0i64, false);
    stream::unfold(state, move |(mut bytes, offset, done)| {
        let (message, broken) = (message.clone(), broken.clone());
        async move {
            if done {
                return None;
            }
            match bytes.next().await {
                Some(Ok(data)) => {
                    let next = offset + data.len() as i64;
                    Some((message(WriteAction::Write, offset, data.to_vec()), (bytes, next, false)))
                }
                Some(Err(error)) => {
                    *broken.lock() = Some(error);
                    None
                }
                None => Some((message(WriteAction::Commit, offset, Vec::new()), (bytes, offset, true))),
            }
        }
    })
}

/// Of the errors of all sources, each with whether its registry has ever answered.
fn weightiest(errors: Vec<(bool, UnpackError)>) -> UnpackError {
    let hopeful =
        |(known, error): &&(bool, UnpackError)| *known && matches!(error, UnpackError::Unavailable(_));
    let chosen = errors.iter().find(hopeful).or(errors.iter().find(|(known, _)| *known)).or(errors.first());
    let none = || UnpackError::Refused("no registry is known for the layer".to_owned());
    chosen.map_or_else(none, |(_, error)| error.clone())
}

/// Whether another attempt may help is decided here alone.
fn refused(status: Status) -> UnpackError {
    let text = words(&status);
    let transient = matches!(
        status.code(),
        Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Cancelled
            | Code::Aborted
            | Code::ResourceExhausted
    );
    if transient || text.contains("no space left") {
        UnpackError::Unavailable(text)
    } else {
        UnpackError::Refused(text)
    }
}

/// RFC 3339, as containerd's labels want it.
fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |age| age.as_secs());
    jiff::Timestamp::from_second(seconds as i64).map(|time| time.to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> LayerSource {
        LayerSource {
            repository: "https://r.example/app".parse().unwrap(),
            blob: darter_types::BlobDigest(darter_types::Digest::of(b"abcd")),
            size: 4,
        }
    }

    async fn actions(
        bytes: Vec<Result<bytes::Bytes, UnpackError>>,
    ) -> (Vec<(i32, i64)>, Option<UnpackError>) {
        let broken = Arc::new(Mutex::new(None));
        let messages = write_messages("ref".into(), &source(), stream::iter(bytes).boxed(), broken.clone());
        let actions = messages.map(|message| (message.action, message.offset)).collect().await;
        let error = broken.lock().take();
        (actions, error)
    }

    #[tokio::test]
    async fn a_whole_blob_is_committed_at_its_end() {
        let (actions, error) = actions(vec![Ok("ab".into()), Ok("cd".into())]).await;
        let (write, commit) = (WriteAction::Write as i32, WriteAction::Commit as i32);
        assert_eq!(actions, [(write, 0), (write, 2), (commit, 4)]);
        assert_eq!(error, None);
    }

    #[tokio::test]
    async fn a_blob_that_breaks_off_is_never_committed() {
        let gone = UnpackError::Unavailable("gone".into());
        let (actions, error) = actions(vec![Ok("ab".into()), Err(gone.clone())]).await;
        assert_eq!(actions.len(), 1);
        assert_eq!(error, Some(gone));
    }

    #[test]
    fn a_guessed_registry_does_not_outweigh_the_word_of_one_that_answers() {
        let gone = || UnpackError::Refused("not found".into());
        let unreachable = || UnpackError::Unavailable("connection refused".into());
        assert_eq!(weightiest(vec![(true, gone()), (false, unreachable())]), gone());
        assert_eq!(weightiest(vec![(true, gone()), (true, unreachable())]), unreachable());
        assert_eq!(weightiest(vec![(false, unreachable())]), unreachable());
        assert!(matches!(weightiest(vec![]), UnpackError::Refused(_)));
    }

    #[test]
    fn a_full_disk_is_no_refusal() {
        assert!(matches!(
            refused(Status::unknown("write: no space left on device")),
            UnpackError::Unavailable(_)
        ));
        assert!(matches!(refused(Status::unknown("unhandled tar header type")), UnpackError::Refused(_)));
    }

    #[test]
    fn leases_expire_in_rfc_3339() {
        assert_eq!(rfc3339(SystemTime::UNIX_EPOCH), "1970-01-01T00:00:00Z");
    }
}
