//! A registry that falls ill: a proxy before a [`Registry`], which refuses, breaks off, or sends its readers to another host
//! by addresses that expire. Passwords are the registry's own affair.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::sys::socket::{setsockopt, sockopt};

use crate::http::{Head, Server, answer};
use crate::image::Blobs;
use crate::registry::Registry;
use crate::world::{Host, World};

const PORT: u16 = 5004;
const SIGNED_PORT: u16 = 5005;

/// What is wrong with one blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Illness {
    /// So many requests are answered with 429, which says how many seconds to wait or doesn't.
    Busy { times: u32, retry_after: Option<u64> },
    /// So many GETs are answered with 503, and the first HEAD.
    Faint { times: u32 },
    /// HEAD is answered with this status, which asks to wait for an hour; GET is as it should be.
    HeadStatus(u16),
    /// All is answered with this status.
    Status(u16),
    /// The connection is reset after so many bytes of an answer.
    Resets(u64),
    /// The reader is sent to an address on another host that is good for one GET of so many bytes; every other address has
    /// expired when it is given out.
    Signed(u64),
}

/// A request as it came in.
#[derive(Clone, Debug)]
pub struct Asked {
    pub at: Instant,
    pub method: String,
    pub target: String,
    /// What it was refused with on purpose.
    pub refused: Option<u16>,
    /// The request's headers, in one text.
    pub headers: String,
}

#[derive(Default)]
struct State {
    illnesses: Mutex<HashMap<String, Illness>>,
    /// Blobs whose first HEAD has come.
    heads: Mutex<HashSet<String>>,
    asked: Mutex<Vec<Asked>>,
    /// What came to the other host.
    signed: Mutex<Vec<Asked>>,
    used: Mutex<HashSet<u64>>,
    given: Mutex<u64>,
}

/// The proxy and the other host's server; they end when it is dropped.
pub struct Ill {
    state: Arc<State>,
    proxy: Server,
    _signed: Server,
}

struct Proxy {
    state: Arc<State>,
    host: Host,
    registry: SocketAddr,
    signed: String,
}

impl Ill {
    pub fn start(world: &World, registry: &Registry, blobs: &Blobs) -> Result<Self> {
        let (host, other) = (world.host("ill")?, world.host("signed")?);
        let state = Arc::new(State::default());
        let (shared, folder) = (state.clone(), blobs.clone());
        let signed = Server::start(&other, SIGNED_PORT, move |head, stream| {
            // Who breaks off wants no more.
            let _ = serve_signed(&shared, &folder, &head, stream);
        })?;
        let registry = registry.authority().parse()?;
        let proxy = Proxy { state: state.clone(), host: host.clone(), registry, signed: signed.authority() };
        let proxy = Server::start(&host, PORT, move |head, stream| {
            let _ = proxy.serve(&head, stream);
        })?;
        Ok(Self { state, proxy, _signed: signed })
    }

    pub fn authority(&self) -> String {
        self.proxy.authority()
    }

    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}:latest", self.authority())
    }

    pub fn afflict(&self, digest: &str, illness: Illness) {
        self.state.illnesses.lock().expect("no panic while setting").insert(digest.to_owned(), illness);
    }

    pub fn heal(&self, digest: &str) {
        self.state.illnesses.lock().expect("no panic while setting").remove(digest);
    }

    /// Requests for this blob.
    pub fn asked(&self, digest: &str) -> Vec<Asked> {
        let asked = self.state.asked.lock().expect("no panic while looking");
        asked.iter().filter(|asked| asked.target.ends_with(digest)).cloned().collect()
    }

    /// Requests that came to the other host.
    pub fn asked_elsewhere(&self) -> Vec<Asked> {
        self.state.signed.lock().expect("no panic while looking").clone()
    }
}

impl State {
    /// How the blob of this address is ill now; what is counted is counted down.
    fn illness(&self, head: &Head) -> Option<Illness> {
        let digest = head.path().rsplit('/').next()?;
        let mut all = self.illnesses.lock().expect("no panic while looking");
        let illness = all.get_mut(digest)?;
        let now = *illness;
        match illness {
            Illness::Busy { times: 0, .. } | Illness::Faint { times: 0 } => return None,
            Illness::Faint { .. } if head.method != "GET" => {
                let is_first = self.heads.lock().expect("no panic while noting").insert(digest.to_owned());
                return is_first.then_some(now);
            }
            Illness::HeadStatus(_) if head.method != "HEAD" => return None,
            Illness::Busy { times, .. } | Illness::Faint { times } => *times -= 1,
            _ => {}
        }
        Some(now)
    }
}

fn asked(head: &Head, refused: Option<u16>) -> Asked {
    let headers = head.headers.iter().map(|(name, value)| format!("{name}: {value}\n")).collect();
    let (method, target) = (head.method.clone(), head.target.clone());
    Asked { at: Instant::now(), method, target, refused, headers }
}

impl Proxy {
    fn serve(&self, head: &Head, mut stream: TcpStream) -> Result<()> {
        let illness = self.state.illness(head);
        let status = match illness {
            Some(Illness::Busy { .. }) => Some(429),
            Some(Illness::Faint { .. }) => Some(503),
            Some(Illness::HeadStatus(status) | Illness::Status(status)) => Some(status),
            _ => None,
        };
        self.state.asked.lock().expect("no panic while noting").push(asked(head, status));
        let wait = match illness {
            Some(Illness::Busy { retry_after, .. }) => retry_after,
            Some(Illness::HeadStatus(_)) => Some(3600),
            _ => None,
        };
        let more: Vec<_> = wait.map(|wait| format!("Retry-After: {wait}")).into_iter().collect();
        match (status, illness) {
            (Some(status), _) => Ok(answer(&mut stream, status, &more, "")?),
            (None, Some(Illness::Signed(_))) if head.header("authorization").is_some() => {
                let mut given = self.state.given.lock().expect("no panic while counting");
                *given += 1;
                let blob = head.path().rsplit('/').next().unwrap_or_default();
                let place = format!("Location: http://{}/{blob}?signature={given}", self.signed);
                Ok(answer(&mut stream, 307, &[place], "")?)
            }
            (None, Some(Illness::Resets(after))) => self.pass_on(head, stream, Some(after)),
            _ => self.pass_on(head, stream, None),
        }
    }

    /// What the registry says, to its end or as far as `bytes` of it.
    fn pass_on(&self, head: &Head, mut stream: TcpStream, bytes: Option<u64>) -> Result<()> {
        let mut registry = self.host.inside(|| Ok(TcpStream::connect(self.registry)?))?;
        write!(registry, "{} {} HTTP/1.1\r\n", head.method, head.target)?;
        for (name, value) in head.headers.iter().filter(|(name, _)| name != "connection") {
            write!(registry, "{name}: {value}\r\n")?;
        }
        write!(registry, "connection: close\r\n\r\n")?;
        let Some(bytes) = bytes else {
            io::copy(&mut registry, &mut stream)?;
            return Ok(stream.shutdown(Shutdown::Write)?);
        };
        let sent = io::copy(&mut (&mut registry).take(bytes), &mut stream)?;
        if sent == bytes {
            reset(stream)?;
        }
        Ok(())
    }
}

/// Ends the connection as a machine does that was switched off and on: what has arrived may still be read.
fn reset(stream: TcpStream) -> Result<()> {
    thread::sleep(Duration::from_millis(100));
    setsockopt(&stream, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 })?;
    Ok(())
}

fn serve_signed(state: &State, blobs: &Blobs, head: &Head, mut stream: TcpStream) -> io::Result<()> {
    let digest = head.path().trim_start_matches('/');
    let illness = state.illnesses.lock().expect("no panic while looking").get(digest).copied();
    let signature: u64 = head.parameter("signature").and_then(|text| text.parse().ok()).unwrap_or(0);
    let is_good = signature % 2 == 1 && state.used.lock().expect("no panic while noting").insert(signature);
    let good = match illness {
        Some(Illness::Signed(bytes)) if is_good && head.method == "GET" => Some(bytes),
        _ => None,
    };
    let refused = good.is_none().then_some(403);
    state.signed.lock().expect("no panic while noting").push(asked(head, refused));
    let Some(bytes) = good else {
        return answer(
            &mut stream,
            403,
            &[],
            "<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>",
        );
    };
    let mut file = File::open(blobs.path(digest))?;
    let size = file.metadata()?.len();
    let (from, to) = head.range().unwrap_or((0, None));
    let to = to.unwrap_or(size - 1).min(size - 1);
    write!(
        stream,
        "HTTP/1.1 206 Partial\r\nContent-Range: bytes {from}-{to}/{size}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        to + 1 - from
    )?;
    file.seek(SeekFrom::Start(from))?;
    io::copy(&mut file.take(bytes.min(to + 1 - from)), &mut stream)?;
    stream.shutdown(Shutdown::Write)
}
