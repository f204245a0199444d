//! The little of HTTP/1.1 that stand-ins for servers need: a request's head, and a server of a thread for each connection.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::Result;

use crate::world::Host;

/// A request; its body is read and forgotten.
#[derive(Clone, Debug)]
pub struct Head {
    pub method: String,
    /// Path and query.
    pub target: String,
    pub headers: Vec<(String, String)>,
}

impl Head {
    fn read(stream: &TcpStream) -> Option<Self> {
        let mut reader = BufReader::new(stream);
        let mut lines = reader.by_ref().lines();
        let first = lines.next()?.ok()?;
        let mut words = first.split(' ');
        let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
        let mut headers = Vec::new();
        for line in lines {
            let line = line.ok()?;
            let Some((name, value)) = line.split_once(':') else { break };
            headers.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
        let head = Self { method, target, headers };
        // A connection that ends with something unread is reset, and with it the answer.
        let length = head.header("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
        io::copy(&mut reader.take(length), &mut io::sink()).ok()?;
        Some(head)
    }

    /// `name` in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// The value of a parameter in the query, as it stands there.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        let (_, query) = self.target.split_once('?')?;
        query.split('&').find_map(|pair| pair.split_once('=').filter(|(key, _)| *key == name)).map(|(_, v)| v)
    }

    /// The first and the last byte that are asked for, if they are named.
    pub fn range(&self) -> Option<(u64, Option<u64>)> {
        let (first, last) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().ok()?, last.parse().ok()))
    }
}

/// Writes an answer with this body.
pub fn answer(stream: &mut TcpStream, status: u16, more: &[String], body: &str) -> io::Result<()> {
    let more: String = more.iter().map(|line| format!("{line}\r\n")).collect();
    write!(
        stream,
        "HTTP/1.1 {status} {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\
         {more}\r\n{body}",
        reason(status),
        body.len()
    )
}

/// Clients repeat these words to their users.
fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        401 => "Unauthorized",
        429 => "Too Many Requests",
        503 => "Service Unavailable",
        _ => "Stub",
    }
}

/// A server on a host; it ends when it is dropped.
pub struct Server {
    host: Host,
    port: u16,
    stop: Arc<AtomicBool>,
}

impl Server {
    /// `handle` answers one request, and the connection ends with it.
    pub fn start(
        host: &Host,
        port: u16,
        handle: impl Fn(Head, TcpStream) + Send + Sync + 'static,
    ) -> Result<Self> {
        let address = (host.address(), port);
        let listener = host.inside(|| Ok(TcpListener::bind(address)?))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, handle) = (stop.clone(), Arc::new(handle));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let handle = handle.clone();
                thread::spawn(move || Head::read(&stream).map(|head| handle(head, stream)));
            }
        });
        Ok(Self { host: host.clone(), port, stop })
    }

    pub fn authority(&self) -> String {
        format!("{}:{}", self.host.address(), self.port)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // The accepting thread sees the flag when somebody connects.
        let _ = self.host.inside(|| Ok(TcpStream::connect((self.host.address(), self.port))?));
    }
}
