//! A registry that misbehaves on demand: slow, silent, lying, refusing. It serves images without a password over plain http.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::image::{Blobs, Descriptor, Image};
use crate::world::Host;

const PORT: u16 = 5001;
const CHUNK: usize = 64 * 1024;

/// What is wrong with one blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// So many bytes a second.
    Slow(u64),
    /// Stops after so many bytes, until the fault is taken back.
    StallAfter(u64),
    /// One byte in the middle is another.
    Flipped,
    /// Answered with this status.
    Status(u16),
    /// HEAD is answered as if nothing were wrong, whoever reads it gets this status.
    ReadStatus(u16),
    /// The connection ends after so many bytes.
    CutAfter(u64),
    /// Said to have so many bytes, of which so many come a second.
    Huge(u64, u64),
    /// Whatever is asked, the answer comes after this time, and is this status.
    Late(Duration, u16),
}

#[derive(Default)]
struct State {
    manifests: Mutex<HashMap<String, Descriptor>>,
    faults: Mutex<HashMap<String, Fault>>,
    changed: Condvar,
    requests: Mutex<Vec<(String, String)>>,
    /// Somebody sent the context of a trace.
    was_followed: AtomicBool,
    stop: AtomicBool,
}

/// The registry; it ends when it is dropped.
pub struct Stub {
    host: Host,
    state: Arc<State>,
    blobs: Blobs,
}

impl Stub {
    pub fn start(host: &Host, blobs: &Blobs) -> Result<Self> {
        let address = (host.address(), PORT);
        let listener = host.inside(|| Ok(TcpListener::bind(address)?))?;
        let state = Arc::new(State::default());
        let (shared, folder) = (state.clone(), blobs.clone());
        thread::spawn(move || accept(&listener, &shared, &folder));
        Ok(Self { host: host.clone(), state, blobs: blobs.clone() })
    }

    pub fn authority(&self) -> String {
        format!("{}:{PORT}", self.host.address())
    }

    /// Serves `image` under this name; its blobs are in the folder already.
    pub fn add(&self, image: &Image, name: &str) -> String {
        let mut manifests = self.state.manifests.lock().expect("no panic while adding");
        manifests.insert(format!("{name}:latest"), image.manifest.clone());
        manifests.insert(format!("{name}:{}", image.manifest.digest), image.manifest.clone());
        format!("{}/{name}:latest", self.authority())
    }

    /// Serves an index of these images, which it serves already, each for a processor.
    pub fn add_index(&self, images: &[(&str, &Image)], name: &str) -> Result<String> {
        let entries: Vec<_> = images
            .iter()
            .map(|(architecture, image)| {
                let mut entry = serde_json::json!(image.manifest);
                entry["platform"] = serde_json::json!({"os": "linux", "architecture": architecture});
                entry
            })
            .collect();
        let media_type = "application/vnd.oci.image.index.v1+json";
        let document = serde_json::json!({"schemaVersion": 2, "mediaType": media_type, "manifests": entries});
        let index = self.blobs.put(media_type, &serde_json::to_vec(&document)?)?;
        let mut manifests = self.state.manifests.lock().expect("no panic while adding");
        manifests.insert(format!("{name}:latest"), index.clone());
        manifests.insert(format!("{name}:{}", index.digest), index);
        Ok(format!("{}/{name}:latest", self.authority()))
    }

    pub fn fault(&self, digest: &str, fault: Fault) {
        self.state.faults.lock().expect("no panic while setting").insert(digest.to_owned(), fault);
    }

    /// From now on this blob is served as it is; who waits goes on.
    pub fn heal(&self, digest: &str) {
        self.state.faults.lock().expect("no panic while setting").remove(digest);
        self.state.changed.notify_all();
    }

    /// How often this blob was asked for with GET.
    pub fn reads_of(&self, digest: &str) -> usize {
        let requests = self.state.requests.lock().expect("no panic while counting");
        requests.iter().filter(|(method, path)| method == "GET" && path.ends_with(digest)).count()
    }

    /// Whether this blob was asked for, be it with HEAD.
    pub fn was_asked_for(&self, digest: &str) -> bool {
        let requests = self.state.requests.lock().expect("no panic while looking");
        requests.iter().any(|(_, path)| path.ends_with(digest))
    }

    /// Whether any request told of a trace that it is a part of.
    pub fn was_followed(&self) -> bool {
        self.state.was_followed.load(Ordering::SeqCst)
    }

    pub fn blobs(&self) -> &Blobs {
        &self.blobs
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        self.state.changed.notify_all();
        // The accepting thread sees the flag when somebody connects.
        let _ = self.host.inside(|| Ok(TcpStream::connect((self.host.address(), PORT))?));
    }
}

fn accept(listener: &TcpListener, state: &Arc<State>, blobs: &Blobs) {
    for stream in listener.incoming().flatten() {
        if state.stop.load(Ordering::SeqCst) {
            return;
        }
        let (state, blobs) = (state.clone(), blobs.clone());
        thread::spawn(move || answer(stream, &state, &blobs));
    }
}

struct Request {
    method: String,
    path: String,
    from: u64,
    is_followed: bool,
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next()?.ok()?;
    let mut words = first.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let (mut from, mut is_followed) = (0, false);
    for line in lines {
        let line = line.ok()?;
        if line.is_empty() {
            break;
        }
        is_followed |= line.to_lowercase().starts_with("traceparent:");
        if let Some(range) = line.to_lowercase().strip_prefix("range: bytes=") {
            from = range.split('-').next()?.parse().ok()?;
        }
    }
    Some(Request { method, path, from, is_followed })
}

fn answer(mut stream: TcpStream, state: &State, blobs: &Blobs) -> Option<()> {
    let request = read_request(&stream)?;
    state.requests.lock().ok()?.push((request.method.clone(), request.path.clone()));
    state.was_followed.fetch_or(request.is_followed, Ordering::SeqCst);
    let path = request.path.split('?').next()?;
    if path == "/v2/" {
        return head(&mut stream, 200, "application/json", 0, &[]).ok();
    }
    let (name, kind, reference) = split(path)?;
    let found = match kind {
        "manifests" => state.manifests.lock().ok()?.get(&format!("{name}:{reference}")).cloned(),
        _ => blob(blobs, reference),
    };
    let Some(mut found) = found else {
        return head(&mut stream, 404, "application/json", 0, &[]).ok();
    };
    let fault = late(state, reference);
    if let Some(Fault::Huge(size, _)) = fault {
        found.size = size;
    }
    let refused = match fault {
        Some(Fault::Status(status) | Fault::Late(_, status)) => Some(status),
        Some(Fault::ReadStatus(status)) if request.method == "GET" => Some(status),
        _ => None,
    };
    if let Some(status) = refused {
        return head(&mut stream, status, "application/json", 0, &[]).ok();
    }
    send(stream, &request, &found, reference, state, blobs).ok()
}

/// What is wrong with the blob, after the time that a late answer takes, or until it is healed.
fn late(state: &State, reference: &str) -> Option<Fault> {
    let begun = Instant::now();
    let mut faults = state.faults.lock().expect("no panic while waiting");
    loop {
        let fault = faults.get(reference).copied();
        let Some(Fault::Late(time, _)) = fault else { return fault };
        let left = time.saturating_sub(begun.elapsed());
        if left.is_zero() || state.stop.load(Ordering::SeqCst) {
            return fault;
        }
        faults = state.changed.wait_timeout(faults, left).expect("no panic while waiting").0;
    }
}

fn split(path: &str) -> Option<(&str, &str, &str)> {
    let rest = path.strip_prefix("/v2/")?;
    let (rest, reference) = rest.rsplit_once('/')?;
    let (name, kind) = rest.rsplit_once('/')?;
    Some((name, kind, reference))
}

fn blob(blobs: &Blobs, digest: &str) -> Option<Descriptor> {
    let size = std::fs::metadata(blobs.path(digest)).ok()?.len();
    Some(Descriptor { media_type: "application/octet-stream".into(), digest: digest.into(), size })
}

fn head(stream: &mut TcpStream, status: u16, kind: &str, length: u64, more: &[String]) -> io::Result<()> {
    let more: String = more.iter().map(|line| format!("{line}\r\n")).collect();
    write!(
        stream,
        "HTTP/1.1 {status} Stub\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\
         Docker-Distribution-Api-Version: registry/2.0\r\n{more}\r\n"
    )
}

fn send(
    mut stream: TcpStream,
    request: &Request,
    found: &Descriptor,
    reference: &str,
    state: &State,
    blobs: &Blobs,
) -> io::Result<()> {
    let (size, from) = (found.size, request.from.min(found.size));
    let mut more = vec![format!("Docker-Content-Digest: {}", found.digest)];
    if from > 0 {
        more.push(format!("Content-Range: bytes {from}-{}/{size}", size - 1));
    }
    head(&mut stream, if from > 0 { 206 } else { 200 }, &found.media_type, size - from, &more)?;
    if request.method == "HEAD" {
        return Ok(());
    }
    let mut file = File::open(blobs.path(&found.digest))?;
    file.seek(SeekFrom::Start(from))?;
    let (mut at, mut buffer, started) = (from, vec![0; CHUNK], Instant::now());
    while at < size {
        let n = file.read(&mut buffer)?;
        if !allowed(state, reference, &mut buffer[..n], at, size, started) {
            return Ok(());
        }
        stream.write_all(&buffer[..n])?;
        at += n as u64;
    }
    Ok(())
}

/// Waits or spoils as the blob's fault wants; false ends the connection.
fn allowed(state: &State, reference: &str, bytes: &mut [u8], at: u64, size: u64, started: Instant) -> bool {
    let mut faults = state.faults.lock().expect("no panic while looking");
    loop {
        if state.stop.load(Ordering::SeqCst) {
            return false;
        }
        let wait = match faults.get(reference) {
            None | Some(Fault::Status(_) | Fault::ReadStatus(_) | Fault::Late(..)) => return true,
            Some(Fault::CutAfter(n)) => return at < *n,
            Some(Fault::Flipped) => {
                let middle = size / 2;
                if (at..at + bytes.len() as u64).contains(&middle) {
                    bytes[(middle - at) as usize] ^= 1;
                }
                return true;
            }
            Some(Fault::StallAfter(n)) if at < *n => return true,
            Some(Fault::StallAfter(_)) => Duration::from_secs(3600),
            Some(Fault::Slow(rate) | Fault::Huge(_, rate)) => {
                let due = Duration::from_secs_f64(at as f64 / *rate as f64);
                match due.checked_sub(started.elapsed()) {
                    None | Some(Duration::ZERO) => return true,
                    Some(left) => left,
                }
            }
        };
        faults = state.changed.wait_timeout(faults, wait).expect("no panic while waiting").0;
    }
}
