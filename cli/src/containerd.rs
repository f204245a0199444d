//! The calls to containerd that `darter pull` needs, in one namespace and under one lease.
//!
//! Translates only: what to write and in which order is `pull`'s matter.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::diff_client::DiffClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::introspection_client::IntrospectionClient;
use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
};
use containerd_client::services::v1::{
    ApplyRequest, CreateImageRequest, CreateRequest, DeleteRequest, Image, Info, InfoRequest, PluginsRequest,
    UpdateImageRequest, UpdateRequest, WriteAction, WriteContentRequest,
};
use containerd_client::types::{Descriptor, Mount};
use darter_types::{BlobDigest, ChainId, DiffId};
use futures_util::{Stream, StreamExt};
use tokio::sync::mpsc::error::SendTimeoutError;
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

use crate::deadline::{overdue, within};
use crate::reach;

/// A content write carries at most this much; containerd refuses messages above 16 MiB.
const WRITE_CHUNK: usize = 1 << 20;
/// How long containerd may take to accept a connection.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// How long it may take for a call that reads or writes a few records. A garbage collection holds such calls up.
const CALL_MAX: Duration = Duration::from_secs(60);
/// How long it may take to unpack a layer, and so much more for each megabyte of its blob.
const APPLY_MAX: Duration = Duration::from_secs(120);
const APPLY_MAX_PER_MB: Duration = Duration::from_secs(1);
/// How long a pull that ends waits for what it leaves to be cleared away.
const RELEASE_MAX: Duration = Duration::from_secs(15);
/// A pull that was killed holds its content for this long at most; one that ends gives its lease back itself.
const LEASE_HOURS: i64 = 24;

pub type Labels = HashMap<String, String>;

/// One containerd, one namespace, one lease.
#[derive(Clone)]
pub struct Containerd {
    channel: Channel,
    namespace: String,
    lease: Option<String>,
    /// What [`CALL_MAX`] says, but in tests.
    patience: Duration,
}

/// What containerd said to `Prepare`.
pub enum Prepared {
    /// The snapshotter has the layer: nothing to download.
    Exists,
    /// Unpack the layer here and commit it.
    Mounts(Vec<Mount>),
    /// The layer below was collected as garbage since it was found: containerd 1.6 puts what it finds under no lease.
    NoParent(anyhow::Error),
}

impl Containerd {
    pub async fn connect(socket: &Path, namespace: &str) -> Result<Self> {
        let silent = || {
            format!(
                "no containerd answers at {}: start it, or name its socket with --containerd-address",
                socket.display()
            )
        };
        let channel = timeout(CONNECT_MAX, containerd_client::connect(socket)).await;
        if !matches!(channel, Ok(Ok(_))) {
            reach::allowed(socket).await?;
        }
        let channel = channel.with_context(silent)?.with_context(silent)?;
        Ok(Self { channel, namespace: namespace.to_owned(), lease: None, patience: CALL_MAX })
    }

    /// What containerd says to a short call, `what`.
    async fn answer<T>(
        &self,
        what: &str,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Status> {
        within(self.patience, what, call).await.map(Response::into_inner)
    }

    fn request<T>(&self, message: T) -> Result<Request<T>> {
        let mut request = Request::new(message);
        let namespace =
            self.namespace.parse().context("the namespace has characters that containerd does not allow")?;
        request.metadata_mut().insert("containerd-namespace", namespace);
        if let Some(lease) = &self.lease {
            request
                .metadata_mut()
                .insert("containerd-lease", lease.parse().expect("a lease id is plain ASCII"));
        }
        Ok(request)
    }

    /// What is written from now on is under this lease; [`Self::take_lease`] makes it.
    pub fn with_lease(self, id: String) -> Self {
        Self { lease: Some(id), ..self }
    }

    /// Makes the lease, so that a garbage collection leaves what is written under it alone.
    pub async fn take_lease(&self) -> Result<()> {
        let Some(id) = &self.lease else { return Ok(()) };
        let expire = std::time::SystemTime::now() + std::time::Duration::from_secs(LEASE_HOURS as u64 * 3600);
        let expire = prost_types::Timestamp::from(expire).to_string();
        let labels = Labels::from([("containerd.io/gc.expire".to_owned(), expire)]);
        let request = self.request(CreateRequest { id: id.clone(), labels })?;
        let mut client = LeasesClient::new(self.channel.clone());
        let made = self.answer("the creation of a lease", client.create(request)).await;
        made.map_err(words).context("containerd gave no lease")?;
        Ok(())
    }

    /// The socket of the snapshotter that containerd knows by this name.
    pub async fn snapshotter_socket(&self, snapshotter: &str) -> Result<PathBuf> {
        let filter = format!("type==io.containerd.snapshotter.v1,id=={snapshotter}");
        let request = self.request(PluginsRequest { filters: vec![filter] })?;
        let mut client = IntrospectionClient::new(self.channel.clone());
        let answer = self.answer("the question for its plugins", client.plugins(request)).await;
        let plugins =
            answer.map_err(words).context("containerd did not say which snapshotters it has")?.plugins;
        let plugin = plugins.into_iter().next().with_context(|| {
            format!(
                "containerd knows no snapshotter {snapshotter:?}: add [proxy_plugins.{snapshotter}] to its configuration and \
                 restart it (`darter standalone` prints the lines)"
            )
        })?;
        let socket = plugin.exports.get("address").map(PathBuf::from);
        socket.with_context(|| format!("{snapshotter:?} is one of containerd's own snapshotters, not Darter"))
    }

    /// Gives the lease back. With `clear`, what was only under it is gone when this returns.
    pub async fn drop_lease(&mut self, clear: bool) -> Result<()> {
        let Some(id) = self.lease.take() else { return Ok(()) };
        let request = self.request(DeleteRequest { id, sync: clear })?;
        let mut client = LeasesClient::new(self.channel.clone());
        match within(RELEASE_MAX, "the deletion of the pull's lease", client.delete(request)).await {
            Ok(_) => Ok(()),
            // The pull ended before it was made.
            Err(status) if status.code() == Code::NotFound => Ok(()),
            Err(status) => {
                Err(words(status)).context(format!("containerd keeps the lease for {LEASE_HOURS} hours"))
            }
        }
    }

    pub async fn has_blob(&self, digest: &str) -> Result<bool> {
        let request = self.request(InfoRequest { digest: digest.to_owned() })?;
        let mut client = ContentClient::new(self.channel.clone());
        match self.answer("the look-up of a blob", client.info(request)).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(words(status)).context("containerd did not look a blob up"),
        }
    }

    /// Writes a blob of `size` bytes that must have this digest, with `labels`.
    pub async fn write_blob(
        &self,
        digest: &str,
        size: u64,
        labels: Labels,
        data: impl Stream<Item = Result<Bytes>> + Send + Unpin + 'static,
    ) -> Result<()> {
        let reference = format!("{}-{digest}", self.lease.as_deref().unwrap_or("darter"));
        let first = WriteContentRequest {
            action: WriteAction::Stat as i32,
            r#ref: reference.clone(),
            total: size as i64,
            expected: digest.to_owned(),
            ..Default::default()
        };
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        let feeding = feed(sender, first, digest.to_owned(), labels.clone(), data, self.patience);
        let request = self.request(tokio_stream::wrappers::ReceiverStream::new(receiver))?;
        let mut client = ContentClient::new(self.channel.clone());
        let writing = async {
            let answers = self.answer("the write of a blob", client.write(request)).await?;
            drain(answers).await
        };
        let (fed, written) = self.fed_and_written(feeding, writing).await;
        match written {
            Ok(()) => fed,
            Err(status) if status.code() == Code::AlreadyExists => self.label_blob(digest, labels).await,
            // The feeder's own words (the registry's) say more than containerd's about a stream that broke off.
            Err(status) => {
                fed.and(Err(words(status)).with_context(|| format!("containerd did not take {digest}")))
            }
        }
    }

    /// Both ends of a write. When all was given, containerd has to say soon that it has it.
    async fn fed_and_written(
        &self,
        feeding: impl Future<Output = Result<()>>,
        writing: impl Future<Output = Result<(), Status>>,
    ) -> (Result<()>, Result<(), Status>) {
        let (mut feeding, mut writing) = (pin!(feeding), pin!(writing));
        tokio::select! {
            fed = &mut feeding => (fed, within(self.patience, "the commit of a blob", writing).await),
            // The feeder sees that the stream has ended; what it still reads nobody needs.
            written = &mut writing => match written {
                Ok(()) => (feeding.await, Ok(())),
                Err(status) => (Ok(()), Err(status)),
            },
        }
    }

    /// Adds labels to a blob that is there, as from a pull by another snapshotter: without them a collection would take what
    /// this pull's image needs.
    async fn label_blob(&self, digest: &str, labels: Labels) -> Result<()> {
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let info = Info { digest: digest.to_owned(), labels, ..Default::default() };
        let update_mask = Some(prost_types::FieldMask { paths });
        let request = self.request(UpdateRequest { info: Some(info), update_mask })?;
        let mut client = ContentClient::new(self.channel.clone());
        let updated = self.answer("the labels of a blob", client.update(request)).await.map_err(words);
        updated.with_context(|| format!("containerd did not take the labels of {digest}"))?;
        Ok(())
    }

    /// Whether the chain is there for this snapshotter.
    pub async fn has_snapshot(&self, snapshotter: &str, chain: &ChainId) -> Result<bool> {
        let request = self
            .request(StatSnapshotRequest { snapshotter: snapshotter.to_owned(), key: chain.to_string() })?;
        let mut client = SnapshotsClient::new(self.channel.clone());
        match self.answer("the look-up of a snapshot", client.stat(request)).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(explain(status, snapshotter)),
        }
    }

    pub async fn prepare(
        &self,
        snapshotter: &str,
        key: &str,
        parent: Option<ChainId>,
        labels: Labels,
    ) -> Result<Prepared> {
        let request = self.request(PrepareSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: key.to_owned(),
            parent: parent.map(|chain| chain.to_string()).unwrap_or_default(),
            labels,
        })?;
        let mut client = SnapshotsClient::new(self.channel.clone());
        let is_above = parent.is_some();
        match self.answer("the preparation of a snapshot", client.prepare(request)).await {
            Ok(answer) => Ok(Prepared::Mounts(answer.mounts)),
            Err(status) if status.code() == Code::AlreadyExists => Ok(Prepared::Exists),
            Err(status) if status.code() == Code::NotFound && is_above => {
                Ok(Prepared::NoParent(explain(status, snapshotter)))
            }
            Err(status) => Err(explain(status, snapshotter)),
        }
    }

    pub async fn commit(&self, snapshotter: &str, key: &str, chain: &ChainId, labels: Labels) -> Result<()> {
        let request = self.request(CommitSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            name: chain.to_string(),
            key: key.to_owned(),
            labels,
        })?;
        let mut client = SnapshotsClient::new(self.channel.clone());
        match self.answer("the commit of a snapshot", client.commit(request)).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => Ok(()),
            Err(status) => Err(explain(status, snapshotter)),
        }
    }

    pub async fn remove(&self, snapshotter: &str, key: &str) -> Result<()> {
        let request =
            self.request(RemoveSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() })?;
        let mut client = SnapshotsClient::new(self.channel.clone());
        let removed = self.answer("the removal of a snapshot", client.remove(request)).await;
        removed.map_err(|status| explain(status, snapshotter))
    }

    /// Has containerd unpack a blob of its content store into `mounts`; fails if that gives another diff ID.
    pub async fn apply(
        &self,
        blob: &BlobDigest,
        size: u64,
        media: &str,
        mounts: Vec<Mount>,
        expected: &DiffId,
    ) -> Result<()> {
        let diff = Descriptor {
            media_type: media.to_owned(),
            digest: blob.to_string(),
            size: size as i64,
            annotations: Labels::new(),
        };
        let request = self.request(ApplyRequest { diff: Some(diff), mounts, ..Default::default() })?;
        let bound = APPLY_MAX + APPLY_MAX_PER_MB * u32::try_from(size / 1_000_000).unwrap_or(u32::MAX);
        let mut client = DiffClient::new(self.channel.clone());
        let answer = within(bound, "the unpacking of a layer", client.apply(request))
            .await
            .map_err(|status| anyhow::anyhow!("failed to extract layer {expected}: {}", status.message()))?;
        let applied = answer.into_inner().applied.unwrap_or_default().digest;
        if applied != expected.to_string() {
            bail!("wrong diff id calculated on extraction {applied:?}, the image's config says {expected}");
        }
        Ok(())
    }

    /// Makes the image record, or lets it point at `target` from now on.
    pub async fn put_image(&self, name: &str, target: Descriptor) -> Result<()> {
        let image = Image { name: name.to_owned(), target: Some(target), ..Default::default() };
        let mut client = ImagesClient::new(self.channel.clone());
        let create =
            self.request(CreateImageRequest { image: Some(image.clone()), source_date_epoch: None })?;
        match self.answer("the creation of an image", client.create(create)).await {
            Ok(_) => return Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => {}
            Err(status) => return Err(words(status)).context("containerd did not take the image's name"),
        }
        let update = self.request(UpdateImageRequest {
            image: Some(image),
            update_mask: None,
            source_date_epoch: None,
        })?;
        let updated = self.answer("the update of an image", client.update(update)).await;
        updated.map_err(words).context("containerd did not update the image's name")?;
        Ok(())
    }
}

/// containerd's own words.
fn words(status: Status) -> anyhow::Error {
    anyhow::anyhow!("{}", status.message())
}

/// Sends the blob in chunks that containerd takes, each within `patience`, then the commit.
async fn feed(
    sender: tokio::sync::mpsc::Sender<WriteContentRequest>,
    first: WriteContentRequest,
    digest: String,
    labels: Labels,
    mut data: impl Stream<Item = Result<Bytes>> + Send + Unpin,
    patience: Duration,
) -> Result<()> {
    let (reference, total) = (first.r#ref.clone(), first.total);
    // A receiver that is gone means that containerd has ended the call; it says why itself.
    if sender.send(first).await.is_err() {
        return Ok(());
    }
    let mut offset = 0;
    while let Some(chunk) = data.next().await {
        let mut chunk = chunk?;
        while !chunk.is_empty() {
            let part = chunk.split_to(chunk.len().min(WRITE_CHUNK));
            let length = part.len() as i64;
            let message = WriteContentRequest {
                action: WriteAction::Write as i32,
                r#ref: reference.clone(),
                offset,
                data: part.to_vec(),
                ..Default::default()
            };
            match sender.send_timeout(message, patience).await {
                Ok(()) => offset += length,
                Err(SendTimeoutError::Closed(_)) => return Ok(()),
                Err(SendTimeoutError::Timeout(_)) => {
                    return Err(words(overdue(patience, "the next part of a blob")));
                }
            }
        }
    }
    let commit = WriteContentRequest {
        action: WriteAction::Commit as i32,
        r#ref: reference,
        total,
        expected: digest,
        offset,
        labels,
        ..Default::default()
    };
    let _ = sender.send(commit).await;
    Ok(())
}

async fn drain<T>(mut answers: tonic::Streaming<T>) -> Result<(), Status> {
    while answers.message().await?.is_some() {}
    Ok(())
}

fn explain(status: Status, snapshotter: &str) -> anyhow::Error {
    let hint = match status.code() {
        Code::Unavailable => format!(
            "; is Darter running, and does containerd's configuration have [proxy_plugins.{snapshotter}]? \
             `darter standalone` prints the lines to add"
        ),
        Code::InvalidArgument | Code::NotFound if status.message().contains("snapshotter") => {
            format!(
                "; containerd knows no snapshotter {snapshotter:?}: add [proxy_plugins.{snapshotter}] and restart it"
            )
        }
        _ => String::new(),
    };
    anyhow::anyhow!("{}{hint}", status.message())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    /// A containerd that takes connections and never says anything.
    async fn mute(dir: &tempfile::TempDir) -> (UnixListener, Containerd) {
        let socket = dir.path().join("c.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let channel = containerd_client::connect(&socket).await.unwrap();
        let patience = Duration::from_millis(200);
        let containerd = Containerd { channel, namespace: "n".to_owned(), lease: None, patience };
        (listener, containerd.with_lease("l".to_owned()))
    }

    #[tokio::test]
    async fn a_containerd_that_says_nothing_is_given_up_in_words() {
        let dir = tempfile::tempdir().unwrap();
        let (_listener, containerd) = mute(&dir).await;
        let error = format!("{:#}", containerd.take_lease().await.unwrap_err());
        for part in ["the creation of a lease", "0.2 s", "restart it", "try again"] {
            assert!(error.contains(part), "{error}");
        }
        let stat = containerd.has_snapshot("darter", &ChainId(darter_types::Digest::of(b"x"))).await;
        assert!(format!("{:#}", stat.unwrap_err()).contains("the look-up of a snapshot"));
    }

    #[tokio::test]
    async fn a_write_that_nobody_takes_ends_too() {
        let dir = tempfile::tempdir().unwrap();
        let (_listener, containerd) = mute(&dir).await;
        let data = futures_util::stream::iter((0..64).map(|_| Ok(Bytes::from(vec![0; WRITE_CHUNK]))));
        let written = containerd.write_blob("sha256:00", 64 << 20, Labels::new(), data).await;
        assert!(format!("{:#}", written.unwrap_err()).contains("containerd has not answered"));
    }
}
