//! A registry for tests, which says what it is told to.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use darter_registry::{Client, Options};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What every blob is, where somebody is let in.
pub const BLOB: &str = "layer";

pub struct TestRegistry {
    /// `host:port`, plain HTTP.
    pub address: String,
    /// Requests until now.
    pub asked: Arc<AtomicUsize>,
}

impl TestRegistry {
    /// One that answers with this status to `user:password`; `None`: to who shows nothing.
    pub async fn start(status: fn(Option<&str>) -> &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, asked) = (listener.local_addr().unwrap().to_string(), Arc::<AtomicUsize>::default());
        let counted = asked.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::Relaxed);
                answer(stream, status).await;
            }
        });
        Self { address, asked }
    }

    /// A client whose Docker's configuration, in `folder`, has `docker:word` for this registry.
    pub fn client(&self, folder: &Path) -> Arc<Client> {
        darter_daemon::run::install_tls_provider();
        let docker = folder.join("config.json");
        let config = serde_json::json!({"auths": {&self.address: {"auth": STANDARD.encode("docker:word")}}});
        std::fs::write(&docker, config.to_string()).unwrap();
        Arc::new(Client::new(Options { docker_config: Some(docker), ..Options::default() }).unwrap())
    }
}

async fn answer(mut stream: TcpStream, status: fn(Option<&str>) -> &'static str) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let Ok(byte) = stream.read_u8().await else { return };
        head.push(byte);
    }
    let head = String::from_utf8(head).unwrap();
    let basic = head.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        value.strip_prefix("Basic ").filter(|_| name.eq_ignore_ascii_case("authorization"))
    });
    let user = basic.map(|text| String::from_utf8(STANDARD.decode(text).unwrap()).unwrap());
    let status = status(user.as_deref());
    let body = if status.starts_with("200") { BLOB } else { "" };
    let shown = if head.starts_with("HEAD ") { "" } else { body };
    let length = body.len();
    let answer = format!(
        "HTTP/1.1 {status}\r\nwww-authenticate: Basic realm=\"r\"\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{shown}"
    );
    let _ = stream.write_all(answer.as_bytes()).await;
}
