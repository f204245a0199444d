//! A peer with a true certificate that sends wrong bytes.
//!
//! It takes over the port of a real node, which goes on telling the scheduler what it has, so that others ask the liar.

use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result};
use darter_daemon::tasks::Tasks;
use darter_identity::{ClientAuth, Identity, JoinToken, TlsStream};
use darter_integration::cluster::Node;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const ALPN: &[u8] = b"darter-piece/1";
const KIND_PIECES: u8 = 1;
const KIND_HAVE: u8 = 2;
const PORT: u16 = 7420;
const LIAR_PORT: u16 = 7421;
/// Pieces that it says it has, more than any test's layer.
const PIECES: u32 = 4096;

pub struct Liar {
    asked: Arc<AtomicUsize>,
    tasks: Tasks,
}

impl Liar {
    /// From now on whoever connects to the peer of `node` gets the liar.
    pub fn in_place_of(node: &Node) -> Result<Self> {
        let root = node.snapshotter.folder().join("root");
        let token = std::fs::read_to_string(node.snapshotter.folder().join("token"))?;
        let address = (node.host.address(), LIAR_PORT);
        let tcp = node.host.inside(|| Ok(TcpListener::bind(address)?))?;
        tcp.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let entered = runtime.enter();
        let (asked, tasks) = (Arc::new(AtomicUsize::new(0)), Tasks::new());
        drop(entered);
        let identity = runtime.block_on(identity(node.host.role(), token.trim(), &root.join("identity")))?;
        let (counter, running) = (asked.clone(), tasks.clone());
        thread::spawn(move || runtime.block_on(serve(tcp, identity, counter, running)));
        let (from, to) = (PORT.to_string(), LIAR_PORT.to_string());
        let rule = ["-w", "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", &from, "-j", "REDIRECT"];
        node.host.run("iptables").args(rule).args(["--to-ports", &to]).check()?;
        Ok(Self { asked, tasks })
    }

    /// Pieces that it was asked for, and lied about.
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.tasks.token().cancel();
    }
}

/// The node's own: its certificate is on the disk.
async fn identity(name: &str, token: &str, folder: &Path) -> Result<Identity> {
    darter_daemon::run::install_tls_provider();
    let token: JoinToken = token.parse().ok().context("the token is one")?;
    let name = name.parse().ok().context("the role names the node")?;
    Ok(Identity::join("127.0.0.1:9", &token, &name, folder).await?)
}

async fn serve(tcp: TcpListener, identity: Identity, asked: Arc<AtomicUsize>, tasks: Tasks) -> Result<()> {
    let tcp = tokio::net::TcpListener::from_std(tcp)?;
    let mut listener = identity.listener(tcp, &[ALPN], ClientAuth::Required, &tasks)?;
    let mut streams = listener.raw(ALPN);
    while let Some((stream, _)) = streams.recv().await {
        tokio::spawn(lie(stream, asked.clone()));
    }
    Ok(())
}

async fn lie(mut stream: TlsStream, asked: Arc<AtomicUsize>) -> Result<()> {
    loop {
        let mut body = vec![0; stream.read_u32_le().await? as usize];
        stream.read_exact(&mut body).await?;
        for answer in answers(&body, &asked).context("a request")? {
            stream.write_u32_le(answer.len() as u32).await?;
            stream.write_all(&answer).await?;
        }
        stream.flush().await?;
    }
}

/// `docs/formats.md` draws the frames: kind (1), request (4), and for a request diff ID (32), format (4), repository (2 and it).
fn answers(body: &[u8], asked: &AtomicUsize) -> Option<Vec<Vec<u8>>> {
    let (kind, id) = (*body.first()?, body.get(1..5)?);
    let repository = usize::from(u16::from_le_bytes(body.get(41..43)?.try_into().ok()?));
    if kind == KIND_HAVE {
        let bits = vec![0xff; PIECES as usize / 8];
        return Some(vec![[&[KIND_HAVE], id, &[0], &PIECES.to_le_bytes(), &bits].concat()]);
    }
    let wanted = body.get(43 + repository + 2..)?.chunks_exact(4);
    let lies = wanted.map(|index| {
        asked.fetch_add(1, Ordering::SeqCst);
        let plain = b"these are not the bytes of that file";
        // Found, not compressed, its length, its bytes.
        [&[KIND_PIECES], id, index, &[0, 0], &(plain.len() as u32).to_le_bytes(), plain].concat()
    });
    Some(lies.collect())
}
