//! Traces: one read, or one pull, followed through this program and on to other members, and told to a collector that speaks
//! OpenTelemetry's protocol (OTLP).
//!
//! A [`Step`] is what OpenTelemetry calls a span: it begins when it is made, and ends when it is dropped. A [`Trail`] is the
//! place in a trace that further steps belong to; it goes along with a future ([`Trail::over`]), and to other members.
//!
//! What holds: where nobody follows anything a step is a null pointer, and asking for one reads one flag. What is sampled is
//! decided once, where a trace begins; what other members want followed is followed up to a limit. Steps that have ended go
//! into a bounded queue ([`QUEUE_MAX`]); whatever the collector does, nobody waits for it, and what it doesn't take in time is
//! counted and forgotten.

#[cfg(feature = "otlp")]
mod otlp;
mod settings;
mod step;
mod trail;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::mpsc;

pub use settings::{Protocol, Settings, Share};
pub use step::{Said, Step, Value};
pub use trail::{HEADER, Trail};

use crate::numbers::{Registry, Sample, counter, single};
use crate::tasks::Tasks;
use step::Record;

/// Steps that have ended and were not sent yet. What comes when there are so many is dropped.
pub const QUEUE_MAX: usize = 4096;

/// Traces that other members began and that are followed here, in a second: what they say costs no more than this.
const ACCEPTED_PER_SECOND: f64 = 100.0;
/// And so many at once, after a pause.
const ACCEPTED_AT_ONCE: f64 = 200.0;

/// Whether anything is followed; read wherever a step may begin.
static ON: AtomicBool = AtomicBool::new(false);
static TRACES: OnceLock<Traces> = OnceLock::new();
static COUNTS: Counts = Counts {
    sent: AtomicU64::new(0),
    dropped: AtomicU64::new(0),
    failed: AtomicU64::new(0),
    refused: AtomicU64::new(0),
};

/// How steps are made and where they go, for the whole process: as its log, so its traces.
struct Traces {
    queue: mpsc::Sender<Box<Record>>,
    share_of_reads: Share,
    share_of_pulls: Share,
    accepted: Allowance,
}

struct Counts {
    sent: AtomicU64,
    dropped: AtomicU64,
    failed: AtomicU64,
    refused: AtomicU64,
}

/// So many a second, and no more than some at once.
struct Allowance(Mutex<(f64, Instant)>);

impl Allowance {
    fn new(now: Instant) -> Self {
        Self(Mutex::new((ACCEPTED_AT_ONCE, now)))
    }

    fn take(&self, now: Instant) -> bool {
        let mut state = self.0.lock();
        let (left, since) = *state;
        let earned = now.saturating_duration_since(since).as_secs_f64() * ACCEPTED_PER_SECOND;
        let left = (left + earned).min(ACCEPTED_AT_ONCE);
        let is_allowed = left >= 1.0;
        *state = (if is_allowed { left - 1.0 } else { left }, now);
        is_allowed
    }
}

/// Begins to follow what `settings` and the environment say; the environment takes precedence. Without an endpoint nothing is.
/// `program` names the service, unless the environment does; `node` is this member's name, if it has one yet. Call it once, in
/// the runtime, before the parts of the program start.
pub fn start(settings: &Settings, program: &'static str, node: &str, tasks: &Tasks) {
    let settings = settings.clone().with_environment(|name| std::env::var(name).ok());
    if settings.endpoint.is_empty() {
        return;
    }
    match begin(&settings, program, node, tasks) {
        Ok(()) => tracing::info!(endpoint = shown(&settings.endpoint), "reads and pulls are followed"),
        // A program that can't tell its traces does its work all the same.
        Err(error) => tracing::warn!(endpoint = shown(&settings.endpoint), error, "no traces are sent"),
    }
}

/// The address without a name and password before its host, nor what follows its path: either may be secret.
fn shown(endpoint: &str) -> String {
    let whole = endpoint.split(['?', '#']).next().unwrap_or_default();
    let (scheme, rest) = whole.split_once("://").unwrap_or(("", whole));
    let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    format!("{scheme}{}{host}{path}", if scheme.is_empty() { "" } else { "://" })
}

#[cfg(feature = "otlp")]
fn begin(settings: &Settings, program: &'static str, node: &str, tasks: &Tasks) -> Result<(), String> {
    let exporter = otlp::exporter(settings, program, node)?;
    let queue = follow(settings);
    let stop = tasks.token();
    // Not one of the tasks that a stop waits for: a collector that doesn't answer must not hold it up.
    tokio::spawn(crate::tasks::alone("traces", otlp::run(exporter, queue, stop)));
    Ok(())
}

#[cfg(not(feature = "otlp"))]
fn begin(_: &Settings, _: &'static str, _: &str, _: &Tasks) -> Result<(), String> {
    Err("this program was built without the feature otlp".to_owned())
}

/// From now on steps are made, and come out here. A second call finds that they go elsewhere already.
#[cfg_attr(not(feature = "otlp"), allow(dead_code))]
fn follow(settings: &Settings) -> mpsc::Receiver<Box<Record>> {
    let (queue, ended) = mpsc::channel(QUEUE_MAX);
    let accepted = Allowance::new(Instant::now());
    let Settings { share, share_of_pulls, .. } = *settings;
    let traces = Traces { queue, share_of_reads: share, share_of_pulls, accepted };
    if TRACES.set(traces).is_ok() {
        ON.store(true, Ordering::Release);
    }
    ended
}

fn now() -> Option<&'static Traces> {
    if ON.load(Ordering::Relaxed) { TRACES.get() } else { None }
}

/// Whether one more trace that another member began may be followed.
fn may_accept() -> bool {
    let is_allowed = now().is_some_and(|traces| traces.accepted.take(Instant::now()));
    if !is_allowed {
        COUNTS.refused.fetch_add(1, Ordering::Relaxed);
    }
    is_allowed
}

fn tell(record: Box<Record>) {
    let told = now().is_some_and(|traces| traces.queue.try_send(record).is_ok());
    if !told {
        COUNTS.dropped.fetch_add(1, Ordering::Relaxed);
    }
}

/// Adds what became of the steps to the numbers of the program.
pub fn register(registry: &mut Registry) {
    counter(registry, "darter_traces_spans", "Spans of traces, by what became of them", || {
        let labelled = |result: &str, count: &AtomicU64| -> Sample {
            (vec![("result", result.to_owned())], count.load(Ordering::Relaxed) as f64)
        };
        let Counts { sent, dropped, failed, .. } = &COUNTS;
        vec![labelled("sent", sent), labelled("dropped", dropped), labelled("failed", failed)]
    });
    counter(
        registry,
        "darter_traces_refused",
        "Requests of other members that wanted to be followed and were not: there were too many",
        || single(COUNTS.refused.load(Ordering::Relaxed) as f64),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn an_endpoint_is_shown_without_what_may_be_secret_in_it() {
        for (endpoint, expected) in [
            ("https://user:to@ken@collector:4318/v1/traces?key=x#y", "https://collector:4318/v1/traces"),
            ("http://collector:4317", "http://collector:4317"),
            ("user:token@collector", "collector"),
            ("https://collector/a@b", "https://collector/a@b"),
        ] {
            assert_eq!(shown(endpoint), expected);
        }
    }

    #[test]
    fn others_have_so_many_traces_followed_a_second_and_no_more() {
        let begun = Instant::now();
        let allowance = Allowance::new(begun);
        let taken = |now| (0..1000).filter(|_| allowance.take(now)).count();
        assert_eq!(taken(begun) as f64, ACCEPTED_AT_ONCE);
        assert_eq!(taken(begun + Duration::from_secs(1)) as f64, ACCEPTED_PER_SECOND);
        assert_eq!(taken(begun + Duration::from_secs(3600)) as f64, ACCEPTED_AT_ONCE);
    }
}
