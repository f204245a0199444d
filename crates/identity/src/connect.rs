//! Connecting to other members: raw TLS streams and gRPC channels.

use std::sync::Arc;
use std::time::Duration;

use darter_types::Role;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

use crate::{Identity, IdentityError, Member, tls};

/// A TLS stream of either end; both certificates are verified.
pub type TlsStream = tokio_rustls::TlsStream<TcpStream>;

/// TCP and TLS together.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// TCP alone: time for one packet to be lost. Where all are dropped it is the whole of what is waited.
const TCP_DEADLINE: Duration = Duration::from_secs(2);

/// A peer that vanished without a word is noticed after these two together, also by a channel without calls.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_DEADLINE: Duration = Duration::from_secs(10);

pub(crate) async fn connect(
    address: &str,
    config: Arc<ClientConfig>,
) -> Result<(TlsStream, Member), IdentityError> {
    timeout(CONNECT_DEADLINE, handshake(address, config))
        .await
        .unwrap_or_else(|_| Err(IdentityError::Deadline(address.to_owned())))
}

async fn handshake(address: &str, config: Arc<ClientConfig>) -> Result<(TlsStream, Member), IdentityError> {
    let unreachable = |source| IdentityError::Unreachable { address: address.to_owned(), source };
    let late = |_| unreachable(std::io::ErrorKind::TimedOut.into());
    let tcp = timeout(TCP_DEADLINE, TcpStream::connect(address)).await.map_err(late)?.map_err(unreachable)?;
    tcp.set_nodelay(true).map_err(unreachable)?;
    let connected = TlsConnector::from(config).connect(tls::server_name(), tcp).await;
    let stream = connected.map_err(|source| IdentityError::Tls { address: address.to_owned(), source })?;
    let leaf = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let member = Member::from_certificate(leaf.expect("a TLS server always shows a certificate"))?;
    Ok((TlsStream::Client(stream), member))
}

/// The channel's URI: connections go to `address`, which need not look like a URI's host.
const ORIGIN: &str = "http://darter";

fn endpoint() -> Endpoint {
    Endpoint::from_static(ORIGIN)
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_DEADLINE)
        .keep_alive_while_idle(true)
}

pub(crate) fn channel(identity: &Identity, address: &str, expected: &[Role]) -> Channel {
    let (identity, address, expected) = (identity.clone(), address.to_owned(), expected.to_vec());
    lazy(address, move || identity.client_config(&expected, &[b"h2"]))
}

/// A channel whose connections are configured by `config`, each anew.
pub(crate) fn lazy(
    address: String,
    config: impl Fn() -> Result<Arc<ClientConfig>, IdentityError> + Send + Sync + 'static,
) -> Channel {
    let config = Arc::new(config);
    let connector = tower::service_fn(move |_: http::Uri| {
        let (config, address) = (config.clone(), address.clone());
        async move {
            let (stream, _) = connect(&address, config()?).await?;
            Ok::<_, IdentityError>(TokioIo::new(stream))
        }
    });
    endpoint().connect_with_connector_lazy(connector)
}
