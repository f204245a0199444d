//! Sending what has ended to a collector, in batches, one at a time.

use std::sync::atomic::Ordering;
use std::time::Duration;

use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::tonic_types::transport::ClientTlsConfig;
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::resource::{EnvResourceDetector, ResourceDetector};
use opentelemetry_sdk::trace::{SpanData, SpanExporter as _};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::step::{Record, Side, Value};
use super::{COUNTS, Protocol, Settings};

/// Steps that are sent together.
const BATCH_MAX: usize = 512;
/// How long they are gathered.
const BATCH_EVERY: Duration = Duration::from_millis(500);
/// A collector that takes longer for a batch doesn't get it.
const SEND_DEADLINE: Duration = Duration::from_secs(10);

/// What Darter's steps are known by in a collector.
const SCOPE: &str = "darter";

/// The exporter that `settings` describe; nothing is connected yet.
pub(super) fn exporter(
    settings: &Settings,
    program: &'static str,
    node: &str,
) -> Result<SpanExporter, String> {
    let endpoint = settings.endpoint.as_str();
    let built = match settings.protocol {
        Protocol::Grpc if endpoint.starts_with("https://") => {
            let tls = ClientTlsConfig::new().with_enabled_roots();
            SpanExporter::builder().with_tonic().with_endpoint(endpoint).with_tls_config(tls).build()
        }
        Protocol::Grpc => SpanExporter::builder().with_tonic().with_endpoint(endpoint).build(),
        Protocol::Http => {
            let protocol = opentelemetry_otlp::Protocol::HttpBinary;
            SpanExporter::builder().with_http().with_protocol(protocol).with_endpoint(endpoint).build()
        }
    };
    let mut exporter = built.map_err(|error| error.to_string())?;
    exporter.set_resource(&resource(program, node));
    Ok(exporter)
}

/// Who sends it. What the environment says goes before what is known here.
fn resource(program: &'static str, node: &str) -> Resource {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
    let node = if node.is_empty() { host.clone() } else { node.to_owned() };
    let environment = EnvResourceDetector::new().detect();
    let named = std::env::var("OTEL_SERVICE_NAME").ok().filter(|name| !name.is_empty());
    let own = [
        KeyValue::new("service.name", program),
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("service.instance.id", node),
        KeyValue::new("host.name", host),
    ];
    let given = environment.iter().map(|(key, value)| KeyValue::new(key.clone(), value.clone()));
    let named = named.map(|name| KeyValue::new("service.name", name));
    // Of two with the same key the later one counts.
    Resource::builder_empty().with_attributes(own.into_iter().chain(given).chain(named)).build()
}

/// Sends what comes, until the program stops; then what is left, as long as there is time.
pub(super) async fn run(
    exporter: SpanExporter,
    mut queue: mpsc::Receiver<Box<Record>>,
    stop: CancellationToken,
) {
    let mut trouble = Trouble::default();
    while let Some(first) = queue.recv().await {
        if queue.len() < BATCH_MAX {
            stop.run_until_cancelled(tokio::time::sleep(BATCH_EVERY)).await;
        }
        let mut batch = vec![first];
        while batch.len() < BATCH_MAX
            && let Ok(record) = queue.try_recv()
        {
            batch.push(record);
        }
        let count = batch.len() as u64;
        let sending = exporter.export(batch.into_iter().map(|record| span(*record)).collect());
        let outcome = match timeout(SEND_DEADLINE, sending).await {
            Ok(sent) => sent.map_err(|error| error.to_string()),
            Err(_) => Err("it doesn't answer".to_owned()),
        };
        let counted = if outcome.is_ok() { &COUNTS.sent } else { &COUNTS.failed };
        counted.fetch_add(count, Ordering::Relaxed);
        trouble.note(outcome);
    }
}

/// Says once that the collector is in trouble, and once that it is well again.
#[derive(Default)]
struct Trouble(bool);

impl Trouble {
    fn note(&mut self, outcome: Result<(), String>) {
        match (self.0, outcome) {
            (false, Err(error)) => tracing::warn!(error, "the collector does not take traces"),
            (true, Ok(())) => tracing::info!("the collector takes traces again"),
            (true, Err(_)) | (false, Ok(())) => return,
        }
        self.0 = !self.0;
    }
}

fn span(record: Record) -> SpanData {
    let Record { name, place, parent, is_parent_elsewhere, side, begun, ended, said, fault, .. } = record;
    let trace = TraceId::from(place.trace.get());
    let step = SpanId::from(place.step.get());
    SpanData {
        span_context: SpanContext::new(trace, step, TraceFlags::SAMPLED, false, TraceState::NONE),
        parent_span_id: parent.map_or(SpanId::INVALID, |parent| SpanId::from(parent.get())),
        parent_span_is_remote: is_parent_elsewhere,
        span_kind: kind(side),
        name: name.into(),
        start_time: begun,
        end_time: ended,
        attributes: said.into_iter().map(|(key, value)| KeyValue::new(key, told(value))).collect(),
        dropped_attributes_count: 0,
        events: Default::default(),
        links: Default::default(),
        status: fault.map_or(Status::Unset, Status::error),
        instrumentation_scope: InstrumentationScope::builder(SCOPE).build(),
    }
}

fn kind(side: Side) -> SpanKind {
    match side {
        Side::Inside => SpanKind::Internal,
        Side::Client => SpanKind::Client,
        Side::Server => SpanKind::Server,
    }
}

fn told(value: Value) -> opentelemetry::Value {
    match value {
        Value::Text(text) => text.into(),
        Value::Number(number) => number.into(),
        Value::Yes(yes) => yes.into(),
    }
}
