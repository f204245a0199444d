//! The calls to containerd that `darter pull` needs, in one namespace and under one lease.
//!
//! Translates only: what to write and in which order is `pull`'s matter.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

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
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

/// A content write carries at most this much; containerd refuses messages above 16 MiB.
const WRITE_CHUNK: usize = 1 << 20;
/// A pull that was killed holds its content for this long at most; one that ends gives its lease back itself.
const LEASE_HOURS: i64 = 24;

pub type Labels = HashMap<String, String>;

/// One containerd, one namespace, one lease.
#[derive(Clone)]
pub struct Containerd {
    channel: Channel,
    namespace: String,
    lease: Option<String>,
}

/// What containerd said to `Prepare`.
pub enum Prepared {
    /// The snapshotter has the layer: nothing to download.
    Exists,
    /// Unpack the layer here and commit it.
    Mounts(Vec<Mount>),
}

impl Containerd {
    pub async fn connect(socket: &Path, namespace: &str) -> Result<Self> {
        let channel = containerd_client::connect(socket).await.with_context(|| {
            format!(
                "no containerd answers at {}: start it, or name its socket with --containerd-address",
                socket.display()
            )
        })?;
        Ok(Self { channel, namespace: namespace.to_owned(), lease: None })
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

    /// Takes a lease, so that a garbage collection leaves what is written under it alone.
    pub async fn take_lease(&mut self, id: String) -> Result<()> {
        let expire = std::time::SystemTime::now() + std::time::Duration::from_secs(LEASE_HOURS as u64 * 3600);
        let expire = prost_types::Timestamp::from(expire).to_string();
        let labels = Labels::from([("containerd.io/gc.expire".to_owned(), expire)]);
        let request = self.request(CreateRequest { id: id.clone(), labels })?;
        LeasesClient::new(self.channel.clone()).create(request).await.context("containerd gave no lease")?;
        self.lease = Some(id);
        Ok(())
    }

    /// The socket of the snapshotter that containerd knows by this name.
    pub async fn snapshotter_socket(&self, snapshotter: &str) -> Result<PathBuf> {
        let filter = format!("type==io.containerd.snapshotter.v1,id=={snapshotter}");
        let request = self.request(PluginsRequest { filters: vec![filter] })?;
        let answer = IntrospectionClient::new(self.channel.clone()).plugins(request).await;
        let plugins =
            answer.context("containerd did not say which snapshotters it has")?.into_inner().plugins;
        let plugin = plugins.into_iter().next().with_context(|| {
            format!(
                "containerd knows no snapshotter {snapshotter:?}: add [proxy_plugins.{snapshotter}] to its configuration and \
                 restart it (`darter standalone` prints the lines)"
            )
        })?;
        let socket = plugin.exports.get("address").map(PathBuf::from);
        socket.with_context(|| format!("{snapshotter:?} is one of containerd's own snapshotters, not Darter"))
    }

    pub async fn drop_lease(&mut self) -> Result<()> {
        if let Some(id) = self.lease.take() {
            let request = self.request(DeleteRequest { id, sync: false })?;
            LeasesClient::new(self.channel.clone())
                .delete(request)
                .await
                .context("containerd kept the lease")?;
        }
        Ok(())
    }

    pub async fn has_blob(&self, digest: &str) -> Result<bool> {
        let request = self.request(InfoRequest { digest: digest.to_owned() })?;
        match ContentClient::new(self.channel.clone()).info(request).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(status).context("containerd did not look a blob up"),
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
        let feed = tokio::spawn(feed(sender, first, digest.to_owned(), labels.clone(), data));
        let request = self.request(tokio_stream::wrappers::ReceiverStream::new(receiver))?;
        let written = match ContentClient::new(self.channel.clone()).write(request).await {
            Ok(answers) => drain(answers.into_inner()).await,
            Err(status) => Err(status),
        };
        let fed = feed.await.context("the writer ended early")?;
        match written {
            Ok(()) => fed,
            Err(status) if status.code() == Code::AlreadyExists => self.label_blob(digest, labels).await,
            // The feeder's own words (the registry's) say more than containerd's about a stream that broke off.
            Err(status) => fed.and(Err(status).with_context(|| format!("containerd did not take {digest}"))),
        }
    }

    /// Adds labels to a blob that is there, as from a pull by another snapshotter: without them a collection would take what
    /// this pull's image needs.
    async fn label_blob(&self, digest: &str, labels: Labels) -> Result<()> {
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let info = Info { digest: digest.to_owned(), labels, ..Default::default() };
        let update_mask = Some(prost_types::FieldMask { paths });
        let request = self.request(UpdateRequest { info: Some(info), update_mask })?;
        let updated = ContentClient::new(self.channel.clone()).update(request).await;
        updated.with_context(|| format!("containerd did not take the labels of {digest}"))?;
        Ok(())
    }

    /// Whether the chain is there for this snapshotter.
    pub async fn has_snapshot(&self, snapshotter: &str, chain: &ChainId) -> Result<bool> {
        let request = self
            .request(StatSnapshotRequest { snapshotter: snapshotter.to_owned(), key: chain.to_string() })?;
        match SnapshotsClient::new(self.channel.clone()).stat(request).await {
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
        match SnapshotsClient::new(self.channel.clone()).prepare(request).await {
            Ok(answer) => Ok(Prepared::Mounts(answer.into_inner().mounts)),
            Err(status) if status.code() == Code::AlreadyExists => Ok(Prepared::Exists),
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
        match SnapshotsClient::new(self.channel.clone()).commit(request).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => Ok(()),
            Err(status) => Err(explain(status, snapshotter)),
        }
    }

    pub async fn remove(&self, snapshotter: &str, key: &str) -> Result<()> {
        let request =
            self.request(RemoveSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() })?;
        SnapshotsClient::new(self.channel.clone())
            .remove(request)
            .await
            .map_err(|status| explain(status, snapshotter))?;
        Ok(())
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
        let answer = DiffClient::new(self.channel.clone())
            .apply(request)
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
        match client.create(create).await {
            Ok(_) => return Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => {}
            Err(status) => return Err(status).context("containerd did not take the image's name"),
        }
        let update = self.request(UpdateImageRequest {
            image: Some(image),
            update_mask: None,
            source_date_epoch: None,
        })?;
        client.update(update).await.context("containerd did not update the image's name")?;
        Ok(())
    }
}

/// Sends the blob in chunks that containerd takes, then the commit.
async fn feed(
    sender: tokio::sync::mpsc::Sender<WriteContentRequest>,
    first: WriteContentRequest,
    digest: String,
    labels: Labels,
    mut data: impl Stream<Item = Result<Bytes>> + Send + Unpin,
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
            if sender.send(message).await.is_err() {
                return Ok(());
            }
            offset += length;
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
