//! CRI's image service on our socket: every call goes on to containerd as it came, byte for byte.
//!
//! Two things are added to PullImage. The credentials in it are remembered for the image's repository, in memory only: no
//! other way leads from a kubelet to us. And its answer is held back until the image's maps are there: no lock of
//! containerd's is held here, and the kubelet shows that it is pulling. A pull that containerd completed never fails for it.
//! And whoever has given a call too little time is told so, as containerd does.

mod deadline;
mod frame;
mod message;

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use darter_registry::{Credential, ImageRef};
use darter_types::Repository;
use futures_util::future::BoxFuture;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full, Limited};
use prost::Message;
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::transport::Channel;
use tower::{Service, ServiceExt};

use crate::start::LazySlot;
use message::{PullImageRequest, PullImageResponse};

pub use message::Auth;

const PULL_IMAGE: &str = "/runtime.v1.ImageService/PullImage";

/// Messages of PullImage are far smaller.
const MESSAGE_MAX: usize = 4 << 20;

/// A pull that containerd has completed is answered so long before its caller gives up.
const ANSWER_BEFORE: Duration = Duration::from_millis(500);

/// Where the credentials of pulls go.
pub trait Credentials: Send + Sync + 'static {
    /// A pull with these begins; `image` is the reference as CRI has it. They count for its repository from now on, since the
    /// pull needs them, until [`Self::settle`] is called with the number that this returns.
    fn try_out(&self, image: &str, auth: Auth) -> u64;

    /// The pull of that number has ended. What it came with is kept if it was `pulled`; otherwise what was known before counts
    /// again.
    fn settle(&self, image: &str, number: u64, pulled: bool);

    /// Whoever pulls `image` has named this for it: mirrors of its registry are shown it, too, as containerd shows them.
    fn lend(&self, image: &ImageRef, credential: &Credential);

    /// A pull on this node reads `image` from `repository`, with `credential` if it has one.
    fn grant(&self, image: ImageRef, repository: Repository, credential: Option<Credential>);
}

/// The pass-through service.
#[derive(Clone)]
pub struct ImageService {
    channel: Channel,
    slot: LazySlot,
    /// How long the answer of PullImage may be held back.
    wait: Duration,
}

impl ImageService {
    pub(crate) fn new(channel: Channel, slot: LazySlot, wait: Duration) -> Self {
        Self { channel, slot, wait }
    }

    async fn answer(self, request: Request<Body>) -> Result<Response<Body>, Status> {
        if request.uri().path() == PULL_IMAGE {
            self.pull(request).await
        } else {
            self.forward(request).await
        }
    }

    async fn forward(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let unanswered = |error| deadline::unanswered(&error);
        let mut channel = self.channel.clone();
        channel.ready().await.map_err(unanswered)?.call(request).await.map_err(unanswered)
    }

    async fn pull(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let (head, body) = request.into_parts();
        let (begun, given) = (Instant::now(), deadline::given(&head.headers));
        let bytes = collect(body).await?;
        let trial = self.try_out(&bytes);
        let response = self.forward(Request::from_parts(head, Body::new(Full::new(bytes)))).await?;
        let (head, body) = response.into_parts();
        let whole = body.collect().await.map_err(|status| Status::unavailable(status.to_string()))?;
        let trailers = whole.trailers().cloned();
        let bytes = whole.to_bytes();
        let config = pulled(&bytes);
        trial.into_iter().for_each(|trial| trial.end(config.is_some()));
        if let (Some(parts), Some(config)) = (self.slot.get(), config) {
            let left = given.map(|given| given.saturating_sub(begun.elapsed() + ANSWER_BEFORE));
            parts.lazy.settle_image(&config, left.unwrap_or(self.wait).min(self.wait)).await;
        }
        Ok(Response::from_parts(head, whole_body(bytes, trailers)))
    }

    /// `None` if the pull comes without credentials.
    fn try_out(&self, body: &[u8]) -> Option<Trial> {
        let request = PullImageRequest::decode(frame::message(body)?).ok()?;
        let (image, auth) = (request.image?.image, request.auth?);
        let credentials = self.slot.get()?.credentials.clone();
        let number = credentials.try_out(&image, auth);
        Some(Trial { credentials, image, number, pulled: false })
    }
}

/// Credentials that are being tried; a pull that its caller gives up has failed.
struct Trial {
    credentials: Arc<dyn Credentials>,
    image: String,
    number: u64,
    pulled: bool,
}

impl Trial {
    fn end(mut self, pulled: bool) {
        self.pulled = pulled;
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        self.credentials.settle(&self.image, self.number, self.pulled);
    }
}

/// What containerd calls the image that it pulled. An answer without a message is an error of containerd's.
fn pulled(body: &[u8]) -> Option<String> {
    Some(PullImageResponse::decode(frame::message(body)?).ok()?.image_ref)
}

/// The body as it was. One without a frame must end with the head: gRPC's errors come that way, and clients insist on it.
fn whole_body(bytes: Bytes, trailers: Option<HeaderMap>) -> Body {
    match trailers {
        None if bytes.is_empty() => Body::empty(),
        trailers => Body::new(Full::new(bytes).with_trailers(async move { trailers.map(Ok) })),
    }
}

async fn collect(body: Body) -> Result<Bytes, Status> {
    let whole = Limited::new(body, MESSAGE_MAX).collect().await;
    Ok(whole.map_err(|error| Status::invalid_argument(error.to_string()))?.to_bytes())
}

impl NamedService for ImageService {
    const NAME: &'static str = "runtime.v1.ImageService";
}

impl Service<Request<Body>> for ImageService {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let given = deadline::given(request.headers());
        let answer = deadline::bounded(given, self.clone().answer(request));
        Box::pin(async move { Ok(answer.await.unwrap_or_else(Status::into_http)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body::Body as _;

    #[test]
    fn an_answer_without_a_body_ends_with_its_head() {
        assert!(whole_body(Bytes::new(), None).is_end_stream());
    }

    /// Both where nothing answers at all and where what is asked goes on for too long.
    #[tokio::test]
    async fn a_caller_whose_time_is_over_is_told_so() {
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", silent.local_addr().unwrap());
        let channel = tonic::transport::Endpoint::try_from(address).unwrap().connect_lazy();
        let mut service = ImageService::new(channel, LazySlot::default(), Duration::ZERO);
        for path in [PULL_IMAGE, "/runtime.v1.ImageService/ListImages"] {
            for time in ["1u", "30m"] {
                let request = Request::builder().uri(path).header("grpc-timeout", time);
                let answer = service.call(request.body(Body::empty()).unwrap()).await.unwrap();
                assert_eq!(answer.headers()["grpc-status"], "4", "{path} {time}");
            }
        }
    }

    #[tokio::test]
    async fn trailers_follow_the_message() {
        let trailers: HeaderMap =
            [(http::HeaderName::from_static("grpc-status"), "0".parse().unwrap())].into_iter().collect();
        let whole = whole_body(Bytes::from_static(b"abc"), Some(trailers.clone())).collect().await.unwrap();
        assert_eq!(whole.trailers(), Some(&trailers));
        assert_eq!(whole.to_bytes(), "abc");
    }
}
