//! What containerd has of a snapshotter's: namespaces, images, their manifests, containers, snapshots. Every call has a
//! deadline: a containerd that hangs must not hang the command.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::namespaces_client::NamespacesClient;
use containerd_client::services::v1::snapshots::ListSnapshotsRequest;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::{
    Container, CreateRequest, DeleteImageRequest, DeleteRequest, Image, Info, InfoRequest,
    ListContainersRequest, ListImagesRequest, ListNamespacesRequest, ReadContentRequest, UpdateRequest,
};
use darter_registry::manifest::{Descriptor, Document, ImageManifest, parse};
use darter_types::Digest;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

use crate::deadline::within;

const ANSWER_MAX: Duration = Duration::from_secs(30);
/// A garbage collection that has much to take away.
const COLLECTION_MAX: Duration = Duration::from_secs(300);
/// A manifest that is larger is none.
const DOCUMENT_MAX: usize = 8 << 20;
const MESSAGE_MAX: usize = 16 << 20;

/// An image of one platform, as containerd has it.
#[derive(Debug, Clone)]
pub struct Platform {
    pub manifest: Digest,
    pub config: Digest,
    pub layers: Vec<Descriptor>,
}

/// One containerd, all of its namespaces.
#[derive(Clone)]
pub struct Inventory {
    channel: Channel,
}

/// Waits for an answer, in words if there is none: `what` says what was asked for.
async fn answer<T>(
    what: &str,
    bound: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T> {
    let answered = within(bound, what, call).await.map(Response::into_inner);
    answered.with_context(|| format!("containerd failed at {what}"))
}

fn in_namespace<T>(namespace: &str, message: T) -> Result<Request<T>> {
    let mut request = Request::new(message);
    let namespace =
        namespace.parse().context("the namespace has characters that containerd does not allow")?;
    request.metadata_mut().insert("containerd-namespace", namespace);
    Ok(request)
}

fn not_found(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Status>().is_some_and(|status| status.code() == Code::NotFound)
}

impl Inventory {
    pub async fn connect(socket: &Path) -> Result<Self> {
        let connecting = tokio::time::timeout(ANSWER_MAX, containerd_client::connect(socket)).await;
        let channel = connecting.ok().and_then(Result::ok).with_context(|| {
            format!(
                "no containerd answers at {}: start it, or name its socket with --containerd-address",
                socket.display()
            )
        })?;
        Ok(Self { channel })
    }

    pub async fn namespaces(&self) -> Result<Vec<String>> {
        let call = async {
            NamespacesClient::new(self.channel.clone()).list(ListNamespacesRequest::default()).await
        };
        let listed = answer("the list of its namespaces", ANSWER_MAX, call).await?;
        Ok(listed.namespaces.into_iter().map(|namespace| namespace.name).collect())
    }

    pub async fn images(&self, namespace: &str) -> Result<Vec<Image>> {
        let request = in_namespace(namespace, ListImagesRequest::default())?;
        let mut client = ImagesClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_MAX);
        Ok(answer("the list of its images", ANSWER_MAX, client.list(request)).await?.images)
    }

    pub async fn remove_image(&self, namespace: &str, name: &str) -> Result<()> {
        let request =
            in_namespace(namespace, DeleteImageRequest { name: name.to_owned(), ..Default::default() })?;
        let mut client = ImagesClient::new(self.channel.clone());
        answer("the removal of an image", ANSWER_MAX, client.delete(request)).await.map(drop)
    }

    /// The containers that run, or could be started, from this snapshotter.
    pub async fn containers(&self, namespace: &str, snapshotter: &str) -> Result<Vec<Container>> {
        let filters = vec![format!("snapshotter=={snapshotter}")];
        let request = in_namespace(namespace, ListContainersRequest { filters })?;
        let mut client = ContainersClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_MAX);
        let listed = answer("the list of its containers", ANSWER_MAX, client.list(request)).await?.containers;
        // Not every version filters by this field.
        Ok(listed.into_iter().filter(|container| container.snapshotter == snapshotter).collect())
    }

    /// The names of the snapshotter's snapshots in the namespace.
    pub async fn snapshots(&self, namespace: &str, snapshotter: &str) -> Result<Vec<String>> {
        let request = ListSnapshotsRequest { snapshotter: snapshotter.to_owned(), filters: Vec::new() };
        let request = in_namespace(namespace, request)?;
        let mut client = SnapshotsClient::new(self.channel.clone());
        let read = async {
            let mut answers = client.list(request).await?.into_inner();
            let mut names = Vec::new();
            while let Some(batch) = answers.message().await? {
                names.extend(batch.info.into_iter().map(|info| info.name));
            }
            Ok(Response::new(names))
        };
        match answer("the list of snapshots", ANSWER_MAX, read).await {
            // containerd no longer knows the snapshotter.
            Err(error) if not_found(&error) => Ok(Vec::new()),
            other => other,
        }
    }

    pub async fn has(&self, namespace: &str, digest: &Digest) -> Result<bool> {
        Ok(self.labels(namespace, digest).await?.is_some())
    }

    /// A blob's labels; `None` if it is not in the content store.
    pub async fn labels(&self, namespace: &str, digest: &Digest) -> Result<Option<HashMap<String, String>>> {
        let request = in_namespace(namespace, InfoRequest { digest: digest.to_string() })?;
        let mut client = ContentClient::new(self.channel.clone());
        match answer("the look-up of a blob", ANSWER_MAX, client.info(request)).await {
            Ok(found) => Ok(Some(found.info.unwrap_or_default().labels)),
            Err(error) if not_found(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sets these labels of a blob and leaves its others; an empty value takes a label away.
    pub async fn set_labels(
        &self,
        namespace: &str,
        digest: &Digest,
        labels: HashMap<String, String>,
    ) -> Result<()> {
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let info = Info { digest: digest.to_string(), labels, ..Default::default() };
        let update_mask = Some(prost_types::FieldMask { paths });
        let request = in_namespace(namespace, UpdateRequest { info: Some(info), update_mask })?;
        let mut client = ContentClient::new(self.channel.clone());
        answer("the labels of a blob", ANSWER_MAX, client.update(request)).await.map(drop)
    }

    /// The images behind `target`, one for each platform whose manifest is there.
    pub async fn platforms(&self, namespace: &str, target: &str) -> Result<Vec<Platform>> {
        let mut found = Vec::new();
        let mut todo: Vec<Digest> = vec![target.parse().context("containerd's image has no SHA-256 digest")?];
        while let Some(digest) = todo.pop() {
            let Some(bytes) = self.read(namespace, &digest).await? else { continue };
            // What is neither an index nor an image has no layers of ours.
            match parse(&bytes) {
                Ok(Document::Index(index)) => {
                    todo.extend(index.manifests.iter().rev().map(|child| child.digest))
                }
                Ok(Document::Image(ImageManifest { config, layers })) => {
                    found.push(Platform { manifest: digest, config: config.digest, layers });
                }
                Err(_) => {}
            }
        }
        Ok(found)
    }

    async fn read(&self, namespace: &str, digest: &Digest) -> Result<Option<Vec<u8>>> {
        let request = ReadContentRequest { digest: digest.to_string(), offset: 0, size: 0 };
        let request = in_namespace(namespace, request)?;
        let mut client = ContentClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_MAX);
        let read = async {
            let mut parts = client.read(request).await?.into_inner();
            let mut bytes = Vec::new();
            while let Some(part) = parts.message().await? {
                bytes.extend_from_slice(&part.data);
                if bytes.len() > DOCUMENT_MAX {
                    return Err(Status::out_of_range("a manifest over 8 MiB"));
                }
            }
            Ok(Response::new(bytes))
        };
        match answer("the read of a manifest", ANSWER_MAX, read).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if not_found(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Has containerd collect its garbage, and waits for it.
    pub async fn collect_garbage(&self, namespace: &str) -> Result<()> {
        let id = format!("darter-drain-{}", std::process::id());
        let mut client = LeasesClient::new(self.channel.clone());
        let create = in_namespace(namespace, CreateRequest { id: id.clone(), labels: HashMap::new() })?;
        answer("the creation of a lease", ANSWER_MAX, client.create(create)).await?;
        let delete = in_namespace(namespace, DeleteRequest { id, sync: true })?;
        answer("the collection of its garbage", COLLECTION_MAX, client.delete(delete)).await.map(drop)
    }
}
