//! A log of events as text, one a line, from which a run can be replayed.
//!
//! The first line names the format and the options: `darter-scheduler-log 1 at=0 grace=2000`. Each other line is a time
//! in milliseconds, the kind of event, and its fields as `name=value`. Values hold no white space: every byte outside
//! `A-Z a-z 0-9 - . _ : / + [ ]` is written as `%` and two hexadecimal digits. Sets of spans are hexadecimal.

use std::fmt::Write as _;
use std::str::FromStr;

use darter_types::{DiffId, LayerSource, Repository};

use crate::{Event, Fault, Holding, MakeState, Millis, Options, PeerId, Spans};

const NAME: &str = "darter-scheduler-log";
const VERSION: u32 = 1;

/// Why a line is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordError(String);

impl std::fmt::Display for RecordError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "not a line of a scheduler's log: {}", self.0)
    }
}

impl std::error::Error for RecordError {}

/// The first line of a log, for a core that started at `at`.
pub fn encode_head(at: Millis, options: Options) -> String {
    format!("{NAME} {VERSION} at={} grace={}", at.0, options.grace_ms)
}

/// What the core of a log was made of.
pub fn parse_head(line: &str) -> Result<(Millis, Options), RecordError> {
    let fields = Fields(line);
    let mut words = line.split_whitespace();
    let version: Option<u32> = words.by_ref().nth(1).and_then(|version| version.parse().ok());
    if !line.starts_with(NAME) || version != Some(VERSION) {
        return Err(RecordError(format!("it must start with {NAME} {VERSION}")));
    }
    Ok((Millis(fields.parse("at")?), Options { grace_ms: fields.parse("grace")? }))
}

/// One line, without its end.
pub fn encode(now: Millis, event: &Event) -> String {
    let mut line = format!("{} ", now.0);
    encode_event(&mut line, event).expect("writing to a string works");
    line
}

fn encode_event(line: &mut String, event: &Event) -> std::fmt::Result {
    match event {
        Event::PeerConnected { peer, node, role, address, zone, slots } => {
            let (address, zone) = (escape(address), escape(zone));
            let peer = peer.0;
            write!(
                line,
                "connect peer={peer} node={node} role={role} address={address} zone={zone} slots={slots}"
            )
        }
        Event::PeerGone { peer } => write!(line, "gone peer={}", peer.0),
        Event::Holdings { peer, held, dropped } => {
            write!(line, "hold peer={}", peer.0)?;
            dropped.iter().try_for_each(|diff_id| write!(line, " drop={diff_id}"))?;
            held.iter().try_for_each(|holding| write!(line, " has={}", encode_holding(holding)))
        }
        Event::InventoryComplete { peer } => write!(line, "inventory peer={}", peer.0),
        Event::OpenTask { peer, task, sources, wanted } => {
            write!(line, "open peer={} task={task} wanted={}", peer.0, encode_spans(wanted))?;
            sources.iter().try_for_each(|source| {
                write!(
                    line,
                    " source={},{},{}",
                    escape(&source.repository.to_string()),
                    source.blob,
                    source.size
                )
            })
        }
        Event::CloseTask { peer, task } => write!(line, "close peer={} task={task}", peer.0),
        Event::ParentReport { peer, task, parent, fault } => {
            write!(line, "report peer={} task={task} parent={parent} fault={}", peer.0, fault_name(*fault))
        }
        Event::MakeUpdate { peer, task, state } => {
            let (name, reason) = make_name(state);
            write!(line, "make peer={} task={task} state={name} reason={}", peer.0, escape(reason))
        }
        Event::Tick => write!(line, "tick"),
    }
}

/// The time and the event of one line.
pub fn parse(line: &str) -> Result<(Millis, Event), RecordError> {
    let mut words = line.split_whitespace();
    let at = words.next().and_then(|word| word.parse().ok());
    let at = at.ok_or_else(|| RecordError("it must start with milliseconds".to_owned()))?;
    let kind = words.next().unwrap_or_default();
    Ok((Millis(at), parse_event(kind, Fields(line))?))
}

fn parse_event(kind: &str, fields: Fields<'_>) -> Result<Event, RecordError> {
    if kind == "tick" {
        return Ok(Event::Tick);
    }
    let peer = PeerId(fields.parse("peer")?);
    Ok(match kind {
        "connect" => Event::PeerConnected {
            peer,
            node: fields.parse("node")?,
            role: fields.parse("role")?,
            address: unescape(fields.get("address")?)?,
            zone: unescape(fields.get("zone")?)?,
            slots: fields.parse("slots")?,
        },
        "gone" => Event::PeerGone { peer },
        "hold" => Event::Holdings {
            peer,
            held: fields.all("has").map(parse_holding).collect::<Result<_, _>>()?,
            dropped: fields.all("drop").map(value::<DiffId>).collect::<Result<_, _>>()?,
        },
        "inventory" => Event::InventoryComplete { peer },
        "open" => Event::OpenTask {
            peer,
            task: fields.parse("task")?,
            sources: fields.all("source").map(parse_source).collect::<Result<_, _>>()?,
            wanted: parse_spans(fields.get("wanted")?)?,
        },
        "close" => Event::CloseTask { peer, task: fields.parse("task")? },
        "report" => Event::ParentReport {
            peer,
            task: fields.parse("task")?,
            parent: fields.parse("parent")?,
            fault: parse_fault(fields.get("fault")?)?,
        },
        "make" => {
            let state = parse_make(fields.get("state")?, unescape(fields.get("reason")?)?)?;
            Event::MakeUpdate { peer, task: fields.parse("task")?, state }
        }
        _ => return Err(RecordError(format!("there is no event {kind:?}"))),
    })
}

fn fault_name(fault: Fault) -> &'static str {
    match fault {
        Fault::Unreachable => "unreachable",
        Fault::Slow => "slow",
        Fault::WrongBytes => "wrong-bytes",
        Fault::Refused => "refused",
    }
}

fn parse_fault(name: &str) -> Result<Fault, RecordError> {
    let all = [Fault::Unreachable, Fault::Slow, Fault::WrongBytes, Fault::Refused];
    all.into_iter().find(|fault| fault_name(*fault) == name).ok_or_else(|| bad(name))
}

fn make_name(state: &MakeState) -> (&'static str, &str) {
    match state {
        MakeState::Started => ("started", ""),
        MakeState::Done => ("done", ""),
        MakeState::Impossible(reason) => ("impossible", reason),
        MakeState::Failed(reason) => ("failed", reason),
    }
}

fn parse_make(name: &str, reason: String) -> Result<MakeState, RecordError> {
    match name {
        "started" => Ok(MakeState::Started),
        "done" => Ok(MakeState::Done),
        "impossible" => Ok(MakeState::Impossible(reason)),
        "failed" => Ok(MakeState::Failed(reason)),
        _ => Err(bad(name)),
    }
}

fn encode_holding(holding: &Holding) -> String {
    let Holding { task, map, spans_total, spans } = holding;
    format!("{task},{},{spans_total},{}", u8::from(*map), encode_spans(spans))
}

fn parse_holding(text: &str) -> Result<Holding, RecordError> {
    let parts: Vec<&str> = text.split(',').collect();
    let [task, map, total, spans] = parts[..] else { return Err(bad(text)) };
    Ok(Holding {
        task: value(task)?,
        map: map == "1",
        spans_total: value(total)?,
        spans: parse_spans(spans)?,
    })
}

fn parse_source(text: &str) -> Result<LayerSource, RecordError> {
    let parts: Vec<&str> = text.split(',').collect();
    let [repository, blob, size] = parts[..] else { return Err(bad(text)) };
    let repository: Repository = value(&unescape(repository)?)?;
    Ok(LayerSource { repository, blob: value(blob)?, size: value(size)? })
}

fn encode_spans(spans: &Spans) -> String {
    spans.as_bytes().iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

fn parse_spans(text: &str) -> Result<Spans, RecordError> {
    let bytes: Option<Vec<u8>> = (0..text.len()).step_by(2).map(|at| hex_byte(text, at)).collect();
    bytes.and_then(|bytes| Spans::from_bytes(&bytes)).ok_or_else(|| bad(text))
}

fn hex_byte(text: &str, at: usize) -> Option<u8> {
    text.get(at..at + 2).and_then(|digits| u8::from_str_radix(digits, 16).ok())
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._:/+[]".contains(&byte) {
            out.push(char::from(byte));
        } else {
            write!(out, "%{byte:02x}").expect("writing to a string works");
        }
    }
    out
}

fn unescape(text: &str) -> Result<String, RecordError> {
    let mut parts = text.split('%');
    let mut out = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        out.push(hex_byte(part, 0).ok_or_else(|| bad(text))?);
        out.extend_from_slice(&part.as_bytes()[2..]);
    }
    String::from_utf8(out).map_err(|_| bad(text))
}

fn bad(text: &str) -> RecordError {
    RecordError(format!("{:?} is not valid there", text.chars().take(100).collect::<String>()))
}

fn value<T: FromStr>(text: &str) -> Result<T, RecordError> {
    text.parse().map_err(|_| bad(text))
}

/// The `name=value` words of a line.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a str);

impl<'a> Fields<'a> {
    fn all(self, name: &str) -> impl Iterator<Item = &'a str> {
        let words = self.0.split_whitespace().filter_map(|word| word.split_once('='));
        words.filter(move |(key, _)| *key == name).map(|(_, value)| value)
    }

    fn get(self, name: &str) -> Result<&'a str, RecordError> {
        self.all(name).next().ok_or_else(|| RecordError(format!("it has no {name}=")))
    }

    fn parse<T: FromStr>(self, name: &str) -> Result<T, RecordError> {
        value(self.get(name)?)
    }
}
