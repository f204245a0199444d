//! Asks the node daemon over its local admin socket: HTTP/1.1, JSON.

use std::path::Path;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

/// An answer larger than this is not ours.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// `GET path` on the daemon whose state is in `root`.
pub async fn get<T: DeserializeOwned>(root: &Path, path: &str) -> Result<T> {
    ask(root, http::Method::GET, path).await
}

/// `POST path`, without a body.
pub async fn post<T: DeserializeOwned>(root: &Path, path: &str) -> Result<T> {
    ask(root, http::Method::POST, path).await
}

async fn ask<T: DeserializeOwned>(root: &Path, method: http::Method, path: &str) -> Result<T> {
    let socket = root.join("admin.sock");
    let stream = UnixStream::connect(&socket).await;
    if stream.is_err() {
        crate::reach::allowed(&socket).await?;
    }
    let stream = stream.with_context(|| {
        format!(
            "no Darter answers at {}: is it running on this node? name its state directory with --root",
            socket.display()
        )
    })?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let request = http::Request::builder().method(method).uri(path).header(http::header::HOST, "darter");
    let request = request.body(Empty::<Bytes>::new())?;
    let answer = sender.send_request(request).await.context("the daemon ended the call")?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
    let body =
        body.map_err(|error| anyhow::anyhow!("the daemon's answer could not be read: {error}"))?.to_bytes();
    connection.abort();
    if !status.is_success() {
        bail!("{}", String::from_utf8_lossy(&body));
    }
    serde_json::from_slice(&body).context("the daemon's answer is not what this version of darter knows")
}

/// For a value in a query.
pub fn url_encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/:@".contains(&byte);
    let encode = |byte: u8| if plain(byte) { (byte as char).to_string() } else { format!("%{byte:02X}") };
    text.bytes().map(encode).collect()
}
