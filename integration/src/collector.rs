//! A collector of traces: it takes OTLP over gRPC, in the real format, as Jaeger and Tempo do, and keeps what comes.

use std::collections::HashMap;
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use anyhow::Result;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, Span as Wire};
use tokio::sync::oneshot;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::world::Host;

const PORT: u16 = 4317;

/// A span as it came, with who sent it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Span {
    pub service: String,
    pub name: String,
    pub trace: String,
    pub id: String,
    /// Empty for the first of a trace.
    pub parent: String,
    pub begun_ns: u64,
    pub ended_ns: u64,
    /// Numbers in decimal.
    pub said: HashMap<String, String>,
    /// Why it failed; empty if it did not.
    pub fault: String,
}

impl Span {
    pub fn says(&self, key: &str) -> &str {
        self.said.get(key).map_or("", String::as_str)
    }
}

type Spans = Arc<Mutex<Vec<Span>>>;

/// The collector; it ends when it is dropped.
pub struct Collector {
    host: Host,
    spans: Spans,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Collector {
    pub fn start(host: &Host) -> Result<Self> {
        let listener = listen(host)?;
        let (spans, (stop, stopped)) = (Spans::default(), oneshot::channel());
        let service = Keeper(spans.clone());
        let thread = std::thread::spawn(move || serve(listener, service, stopped));
        Ok(Self { host: host.clone(), spans, stop: Some(stop), thread: Some(thread) })
    }

    /// As `OTEL_EXPORTER_OTLP_ENDPOINT` has it.
    pub fn endpoint(&self) -> String {
        endpoint(&self.host)
    }

    /// All that has come so far.
    pub fn spans(&self) -> Vec<Span> {
        self.spans.lock().expect("no panic while keeping").clone()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        // It ends with its sender.
        self.stop = None;
        self.thread.take().into_iter().for_each(|thread| drop(thread.join()));
    }
}

pub fn endpoint(host: &Host) -> String {
    format!("http://{}:{PORT}", host.address())
}

/// One that is connected to and never says anything, as long as this is held.
pub fn deaf(host: &Host) -> Result<TcpListener> {
    listen(host)
}

fn listen(host: &Host) -> Result<TcpListener> {
    let address = (host.address(), PORT);
    host.inside(|| Ok(TcpListener::bind(address)?))
}

fn serve(listener: TcpListener, service: Keeper, stopped: oneshot::Receiver<()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime with one thread can be made").block_on(async {
        listener.set_nonblocking(true).expect("a socket can be made to wait for nobody");
        let listener = tokio::net::TcpListener::from_std(listener).expect("it listens");
        let server = Server::builder().add_service(TraceServiceServer::new(service));
        // Who sends holds its connection open, and isn't waited for.
        tokio::select! {
            served = server.serve_with_incoming(TcpListenerStream::new(listener)) => {
                served.expect("the collector goes on");
            }
            _ = stopped => {}
        }
    });
}

struct Keeper(Spans);

#[tonic::async_trait]
impl TraceService for Keeper {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let spans = request.into_inner().resource_spans.into_iter().flat_map(spans);
        self.0.lock().expect("no panic while keeping").extend(spans);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn spans(of: ResourceSpans) -> Vec<Span> {
    let resource = of.resource.map(|resource| said(resource.attributes)).unwrap_or_default();
    let service = resource.get("service.name").cloned().unwrap_or_default();
    let all = of.scope_spans.into_iter().flat_map(|scope| scope.spans);
    all.map(|span| Span { service: service.clone(), ..kept(span) }).collect()
}

fn kept(span: Wire) -> Span {
    Span {
        service: String::new(),
        name: span.name,
        trace: hex::encode(span.trace_id),
        id: hex::encode(span.span_id),
        parent: hex::encode(span.parent_span_id),
        begun_ns: span.start_time_unix_nano,
        ended_ns: span.end_time_unix_nano,
        said: said(span.attributes),
        fault: span.status.map(|status| status.message).unwrap_or_default(),
    }
}

fn said(attributes: Vec<KeyValue>) -> HashMap<String, String> {
    let text = |value: Option<AnyValue>| match value.and_then(|value| value.value) {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::BoolValue(yes)) => yes.to_string(),
        other => format!("{other:?}"),
    };
    attributes.into_iter().map(|attribute| (attribute.key, text(attribute.value))).collect()
}
