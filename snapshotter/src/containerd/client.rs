//! containerd as we call it: read its content store, and have it unpack a layer.

mod content;
mod image;
mod unpack;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use darter_types::{ChainId, Digest};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tower::service_fn;

use crate::lazy::ports::{Blobs, Containerd, FoundImage, PlainLayer, UnpackError};
use crate::snapshot::Mount;
use image::ParsedImage;

/// How long a call that only reads may take. containerd answers in milliseconds, unless it is in trouble.
const READ_DEADLINE: Duration = Duration::from_secs(5);

/// Manifests that are remembered once read; a digest never means anything else later.
const IMAGES_MAX: usize = 512;

/// Layers that containerd unpacks for us at the same time: it has images of its own to unpack.
const UNPACKING_MAX: usize = 1;

/// Where a message of containerd may be longer than gRPC's default.
const MESSAGE_MAX: usize = 16 << 20;

/// A channel to the socket at `path` that connects when it is first used, and again whenever containerd was restarted.
pub fn channel(path: PathBuf) -> Channel {
    let connect = move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    };
    // The address is never looked up: the connector knows where to go.
    Endpoint::from_static("http://containerd").connect_with_connector_lazy(service_fn(connect))
}

/// A client of one containerd.
pub struct ContainerdClient {
    channel: Channel,
    blobs: Arc<dyn Blobs>,
    images: Mutex<HashMap<Digest, Arc<ParsedImage>>>,
    unpacking: Semaphore,
}

impl ContainerdClient {
    pub fn new(channel: Channel, blobs: Arc<dyn Blobs>) -> Self {
        Self { channel, blobs, images: Mutex::default(), unpacking: Semaphore::new(UNPACKING_MAX) }
    }

    /// The image with this manifest, all but its layers; `None` if containerd doesn't have it in the namespace.
    pub async fn image_of(&self, namespace: &str, manifest: Digest) -> Result<Option<FoundImage>, String> {
        match tokio::time::timeout(READ_DEADLINE, self.find_manifest(namespace, manifest)).await {
            Ok(found) => found.map_err(|status| words(&status)),
            Err(_) => Err("containerd doesn't answer in time".to_owned()),
        }
    }

    /// Brings the blob of `layer` into the content store of the namespace and leaves it there. Whatever names it there keeps
    /// it from the next garbage collection on.
    pub async fn bring(&self, namespace: &str, layer: &PlainLayer) -> Result<(), UnpackError> {
        unpack::bring(&self.channel, &*self.blobs, namespace, layer).await
    }

    /// The manifests that `reference` stands for in any namespace: its target, and what that lists if it is an index.
    pub async fn manifests_of(&self, reference: &str) -> Vec<Digest> {
        match tokio::time::timeout(READ_DEADLINE, content::manifests_of(&self.channel, reference)).await {
            Ok(Ok(digests)) => digests,
            Ok(Err(error)) => {
                tracing::debug!(%error, reference, "containerd doesn't know the image");
                Vec::new()
            }
            Err(_) => Vec::new(),
        }
    }
}

#[async_trait]
impl Containerd for ContainerdClient {
    async fn find_image(&self, namespace: &str, target: ChainId) -> Result<Option<FoundImage>, String> {
        match tokio::time::timeout(READ_DEADLINE, self.find(namespace, target)).await {
            Ok(found) => found.map_err(|status| words(&status)),
            Err(_) => Err("no answer in time".to_owned()),
        }
    }

    async fn unpack(
        &self,
        namespace: &str,
        layer: &PlainLayer,
        mounts: Vec<Mount>,
    ) -> Result<(), UnpackError> {
        unpack::unpack(&self.channel, &*self.blobs, &self.unpacking, namespace, layer, mounts).await
    }
}

/// A request in this namespace.
fn in_namespace<T>(namespace: &str, message: T) -> Result<Request<T>, Status> {
    let mut request = Request::new(message);
    let value =
        namespace.parse().map_err(|_| Status::invalid_argument("the namespace is no header value"))?;
    request.metadata_mut().insert("containerd-namespace", value);
    Ok(request)
}

fn words(status: &Status) -> String {
    if status.message().is_empty() { status.code().to_string() } else { status.message().to_owned() }
}
