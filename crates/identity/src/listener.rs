//! Accepting other members: TLS handshakes, bounded in time and number, and streams sorted by protocol.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use darter_daemon::tasks::Tasks;
use futures_util::Stream;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tonic::transport::server::Connected;

use crate::door::{Door, Place};
use crate::{Identity, IdentityError, Member, TlsStream};

/// Handshakes at once, and of one source. A member's takes some milliseconds, and it tries again.
const HANDSHAKES_MAX: usize = 256;
const HANDSHAKES_SHARE: usize = 32;

/// For the handshake, and for the program to take the stream.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// For the first byte, which a client sends without being asked.
const FIRST_BYTE_DEADLINE: Duration = Duration::from_secs(2);

/// Connections without certificate at once, and of one source: those who join. They never take a member's place.
const STRANGERS_MAX: usize = 64;
const STRANGERS_SHARE: usize = 16;

/// How long one of them may stay; a join takes a second.
const STRANGER_DEADLINE: Duration = Duration::from_secs(30);

/// Streams that passed the handshake and were not taken yet. When it is full, handshakes wait for their deadline.
const ACCEPTED_MAX: usize = 64;

/// After a failed `accept`, as a rule for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The ALPN name of gRPC's transport.
pub(crate) const H2: &[u8] = b"h2";

/// Whether a client must show a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientAuth {
    Required,
    /// Only for the manager, whose `Join` is called by those who have none yet. It holds for `h2` alone.
    Optional,
}

/// What gRPC handlers learn of a connection.
#[derive(Debug, Clone)]
pub struct PeerInfo {
    /// `None` for a client without certificate, which only [`ClientAuth::Optional`] admits.
    pub member: Option<Member>,
    pub address: SocketAddr,
}

/// A gRPC connection of a verified client.
pub struct Accepted {
    stream: TlsStream,
    peer: PeerInfo,
    stay: Option<Stay>,
}

/// A client without certificate has a place, and some time.
struct Stay {
    _place: Place,
    end: Pin<Box<Sleep>>,
}

/// The accepting side of a port.
pub struct Listener {
    address: SocketAddr,
    grpc: Option<mpsc::Receiver<Accepted>>,
    raw: HashMap<&'static [u8], mpsc::Receiver<(TlsStream, Member)>>,
}

impl Listener {
    /// Where it listens, with the port that the kernel chose.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The gRPC connections, for tonic's `serve_with_incoming`. It ends when the tasks stop.
    ///
    /// Panics when taken twice, or if `h2` was not among the listener's protocols.
    pub fn grpc(&mut self) -> Incoming {
        Incoming(self.grpc.take().expect("the listener speaks h2, and its stream is taken once"))
    }

    /// The streams of another protocol, with who is at the other end. It ends when the tasks stop.
    ///
    /// Panics when taken twice, or if `alpn` was not among the listener's protocols.
    pub fn raw(&mut self, alpn: &'static [u8]) -> mpsc::Receiver<(TlsStream, Member)> {
        self.raw.remove(alpn).expect("the listener speaks this protocol, and its stream is taken once")
    }
}

/// The gRPC connections of a [`Listener`]; it never yields an error.
pub struct Incoming(mpsc::Receiver<Accepted>);

impl Stream for Incoming {
    type Item = io::Result<Accepted>;
    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context).map(|accepted| accepted.map(Ok))
    }
}

impl Connected for Accepted {
    type ConnectInfo = PeerInfo;
    fn connect_info(&self) -> PeerInfo {
        self.peer.clone()
    }
}

impl AsyncRead for Accepted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(stay) = &mut self.stay
            && stay.end.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }
    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Where finished handshakes go.
struct Outlets {
    identity: Identity,
    acceptor: TlsAcceptor,
    grpc: mpsc::Sender<Accepted>,
    strangers: Arc<Door>,
    raw: HashMap<&'static [u8], mpsc::Sender<(TlsStream, Member)>>,
}

pub(crate) fn start(
    identity: Identity,
    tcp: TcpListener,
    config: Arc<ServerConfig>,
    alpns: &[&'static [u8]],
    tasks: &Tasks,
) -> Result<Listener, IdentityError> {
    let address = tcp.local_addr().map_err(|source| IdentityError::Unreachable {
        address: "the listening socket".to_owned(),
        source,
    })?;
    let (grpc, grpc_accepted) = mpsc::channel(ACCEPTED_MAX);
    let strangers = Door::new(STRANGERS_MAX, STRANGERS_SHARE);
    let mut outlets = Outlets { identity, acceptor: config.into(), grpc, strangers, raw: HashMap::new() };
    let mut raw = HashMap::new();
    for alpn in alpns.iter().copied().filter(|alpn| *alpn != H2) {
        let (sender, receiver) = mpsc::channel(ACCEPTED_MAX);
        outlets.raw.insert(alpn, sender);
        raw.insert(alpn, receiver);
    }
    tasks.spawn_until_stop("accept", accept(tcp, Arc::new(outlets), tasks.clone()));
    Ok(Listener { address, grpc: alpns.contains(&H2).then_some(grpc_accepted), raw })
}

async fn accept(tcp: TcpListener, outlets: Arc<Outlets>, tasks: Tasks) {
    let door = Door::new(HANDSHAKES_MAX, HANDSHAKES_SHARE);
    loop {
        match tcp.accept().await {
            Ok((stream, address)) => match door.enter(address.ip()) {
                Some(place) => {
                    tasks.spawn_alone("handshake", receive(outlets.clone(), stream, address, place));
                }
                None => tracing::debug!(%address, "too many connections that are not ready yet"),
            },
            Err(error) => {
                tracing::warn!(%error, "can't accept a connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn receive(outlets: Arc<Outlets>, tcp: TcpStream, address: SocketAddr, place: Place) {
    let work = async {
        first_byte(&tcp).await?;
        place.spoke();
        outlets.hand_over(tcp, address).await
    };
    match timeout(HANDSHAKE_DEADLINE, place.leave.run_until_cancelled(work)).await {
        Ok(Some(Ok(()))) => {}
        Ok(Some(Err(error))) => tracing::debug!(%address, %error, "a connection was refused"),
        Ok(None) => tracing::debug!(%address, "a connection that said nothing gave way to another"),
        Err(_) => tracing::debug!(%address, "a connection did not get ready in time"),
    }
}

async fn first_byte(tcp: &TcpStream) -> io::Result<()> {
    match timeout(FIRST_BYTE_DEADLINE, tcp.peek(&mut [0])).await?? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

impl Outlets {
    async fn hand_over(&self, tcp: TcpStream, address: SocketAddr) -> io::Result<()> {
        tcp.set_nodelay(true)?;
        let stream = self.acceptor.accept(tcp).await?;
        let session = stream.get_ref().1;
        let shown = session.peer_certificates().and_then(<[_]>::first);
        let member = shown.map(Member::from_certificate).transpose().map_err(io::Error::other)?;
        if let Some(member) = &member {
            self.identity.same_cluster(member).map_err(io::Error::other)?;
        }
        let alpn = session.alpn_protocol().unwrap_or_default().to_vec();
        let stream = TlsStream::Server(stream);
        if alpn == H2 {
            let stay = if member.is_none() { Some(self.stay(address)?) } else { None };
            let accepted = Accepted { stream, peer: PeerInfo { member, address }, stay };
            return self.grpc.send(accepted).await.map_err(io::Error::other);
        }
        let outlet =
            self.raw.get(alpn.as_slice()).ok_or_else(|| io::Error::other("no protocol was agreed on"))?;
        let member = member.ok_or_else(|| io::Error::other("this protocol asks for a certificate"))?;
        outlet.send((stream, member)).await.map_err(|_| io::Error::other("the program is stopping"))
    }

    fn stay(&self, address: SocketAddr) -> io::Result<Stay> {
        let full = || io::Error::other("too many connections without certificate");
        let place = self.strangers.enter(address.ip()).ok_or_else(full)?;
        // It has spoken already: it stays until its time is over.
        place.spoke();
        Ok(Stay { _place: place, end: Box::pin(sleep(STRANGER_DEADLINE)) })
    }
}
