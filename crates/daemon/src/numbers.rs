//! What a running program tells over HTTP: numbers for Prometheus, whether it lives, whether it can be used.
//!
//! - `GET /metrics`: OpenMetrics text, as Prometheus takes it. `docs/metrics.md` names every number.
//! - `GET /livez`: 200 as long as the program can answer at all.
//! - `GET /readyz`: 200, or 503 with words on what is missing.
//!
//! Nothing is secret in it, and nothing can be changed by it. Most numbers are read when somebody asks ([`Readings`]), so
//! that counting costs nothing otherwise.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use parking_lot::{Mutex, RwLock};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tokio::net::TcpListener;

use crate::http;
use crate::tasks::Tasks;

pub use prometheus_client::metrics::counter::Counter;
pub use prometheus_client::metrics::histogram::Histogram;
pub use prometheus_client::registry::Registry;

/// The form that Prometheus asks for, with the version that it is in.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Few ask: Prometheus, and whoever looks whether the program lives.
const LIMITS: http::Limits =
    http::Limits { connections: 32, head: Duration::from_secs(10), answer: Duration::from_secs(30) };

/// Where a program tells its numbers. Written as `"host:port"`, or `""` for nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Listen(pub Option<SocketAddr>);

impl Listen {
    /// This port on the loopback address.
    pub fn local(port: u16) -> Self {
        Self(Some((std::net::Ipv4Addr::LOCALHOST, port).into()))
    }
}

impl<'de> Deserialize<'de> for Listen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.is_empty() {
            return Ok(Self(None));
        }
        let wrong = |_| serde::de::Error::custom(format!("{text:?} is no address: host:port, or empty"));
        text.parse().map(|address| Self(Some(address))).map_err(wrong)
    }
}

impl Serialize for Listen {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text = self.0.map_or(String::new(), |address| address.to_string());
        serializer.serialize_str(&text)
    }
}

/// One value, and the labels that tell it from its sisters.
pub type Sample = (Vec<(&'static str, String)>, f64);

/// A value without labels.
pub fn single(value: f64) -> Vec<Sample> {
    vec![(Vec::new(), value)]
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It only grows. `_total` is added to its name.
    Counter,
    Gauge,
}

/// A number that is read when somebody asks for it; reading may block.
pub struct Readings<F> {
    name: &'static str,
    help: &'static str,
    kind: Kind,
    read: F,
}

impl<F> fmt::Debug for Readings<F> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name)
    }
}

impl<F: Fn() -> Vec<Sample> + Send + Sync + 'static> Collector for Readings<F> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (kind, form) = match self.kind {
            Kind::Counter => (Kind::Counter, MetricType::Counter),
            Kind::Gauge => (Kind::Gauge, MetricType::Gauge),
        };
        let mut metric = encoder.encode_descriptor(self.name, self.help, None, form)?;
        for (labels, value) in (self.read)() {
            if labels.is_empty() {
                put(&mut metric, kind, value)?;
            } else {
                put(&mut metric.encode_family(&labels)?, kind, value)?;
            }
        }
        Ok(())
    }
}

fn put(metric: &mut MetricEncoder<'_>, kind: Kind, value: f64) -> fmt::Result {
    match kind {
        Kind::Counter => metric.encode_counter::<NoLabelSet, f64, f64>(&value, None),
        Kind::Gauge => metric.encode_gauge(&value),
    }
}

/// Adds a counter that is read when somebody asks.
pub fn counter<F>(registry: &mut Registry, name: &'static str, help: &'static str, read: F)
where
    F: Fn() -> Vec<Sample> + Send + Sync + 'static,
{
    registry.register_collector(Box::new(Readings { name, help, kind: Kind::Counter, read }));
}

/// Adds a gauge that is read when somebody asks.
pub fn gauge<F>(registry: &mut Registry, name: &'static str, help: &'static str, read: F)
where
    F: Fn() -> Vec<Sample> + Send + Sync + 'static,
{
    registry.register_collector(Box::new(Readings { name, help, kind: Kind::Gauge, read }));
}

/// All that a program tells. Clones share it; its parts add to it as they start.
#[derive(Clone)]
pub struct Numbers(Arc<Told>);

struct Told {
    registry: RwLock<Registry>,
    /// Why the program can't be used yet; empty when it can.
    trouble: Mutex<String>,
    /// What is looked at whenever somebody asks whether it can be used.
    check: OnceLock<Check>,
}

/// It may block. Its words say what is wrong.
type Check = Box<dyn Fn() -> Result<(), String> + Send + Sync>;

impl Default for Numbers {
    fn default() -> Self {
        let mut registry = Registry::default();
        crate::process::register(&mut registry);
        Self(Arc::new(Told {
            registry: RwLock::new(registry),
            trouble: Mutex::new("it is starting".to_owned()),
            check: OnceLock::new(),
        }))
    }
}

impl Numbers {
    /// Adds to what is told.
    pub fn add(&self, register: impl FnOnce(&mut Registry)) {
        register(&mut self.0.registry.write());
    }

    /// From now on the program can be used.
    pub fn ready(&self) {
        self.0.trouble.lock().clear();
    }

    /// From now on the program can be used as long as `check` finds nothing wrong, which may block. Only the first is taken.
    pub fn ready_while(&self, check: impl Fn() -> Result<(), String> + Send + Sync + 'static) {
        self.0.check.get_or_init(|| Box::new(check));
        self.ready();
    }

    /// Why the program can't be used just now; it may block.
    fn trouble(&self) -> Option<String> {
        let told = self.0.trouble.lock().clone();
        if told.is_empty() { self.0.check.get()?().err() } else { Some(told) }
    }

    /// The program runs, but can't do its work yet; `words` say why.
    pub fn not_ready(&self, words: &str) {
        words.clone_into(&mut self.0.trouble.lock());
    }

    /// Tells it at `listen` until the tasks stop. A port that is taken is no reason to stop a program: it goes on without.
    pub async fn serve(&self, listen: Listen, tasks: &Tasks) {
        let Listen(Some(address)) = listen else { return };
        let listener = match TcpListener::bind(address).await {
            Ok(listener) => listener,
            Err(error) => {
                tracing::warn!(%address, %error, "no numbers are told: can't listen; set metrics_listen");
                return;
            }
        };
        let router = Router::new()
            .route("/metrics", get(metrics))
            .route("/livez", get(|| async { "alive\n" }))
            .route("/readyz", get(readyz))
            .with_state(self.clone());
        let stop = tasks.token();
        tasks.spawn("numbers", async move {
            http::serve(listener, router, LIMITS, stop).await;
        });
    }
}

async fn metrics(State(numbers): State<Numbers>) -> Response {
    let written = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        encode(&mut text, &numbers.0.registry.read()).map(|()| text)
    });
    match written.await {
        Ok(Ok(text)) => ([(CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Ok(Err(error)) => broken(&error),
        Err(error) => broken(&error),
    }
}

fn broken(error: &dyn fmt::Display) -> Response {
    (StatusCode::INTERNAL_SERVER_ERROR, format!("the numbers can't be read: {error}\n")).into_response()
}

async fn readyz(State(numbers): State<Numbers>) -> Response {
    match tokio::task::spawn_blocking(move || numbers.trouble()).await {
        Ok(None) => "ready\n".into_response(),
        Ok(Some(trouble)) => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {trouble}\n")).into_response()
        }
        Err(error) => broken(&error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(registry: &Registry) -> String {
        let mut text = String::new();
        encode(&mut text, registry).unwrap();
        text
    }

    #[test]
    fn readings_are_taken_when_somebody_asks() {
        let mut registry = Registry::default();
        let reads = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let counted = reads.clone();
        counter(&mut registry, "darter_reads", "Reads", move || {
            single(counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed) as f64)
        });
        gauge(&mut registry, "darter_layers", "Layers", || {
            vec![(vec![("state", "a \"b\"".to_owned())], 2.0)]
        });
        told(&registry);
        let text = told(&registry);
        assert!(text.contains("darter_reads_total 1.0\n"), "{text}");
        assert!(text.contains("darter_layers{state=\"a \\\"b\\\"\"} 2.0\n"), "{text}");
        assert!(text.contains("# TYPE darter_reads counter"), "{text}");
    }

    #[test]
    fn a_place_is_an_address_or_nowhere() {
        #[derive(Deserialize)]
        struct Settings {
            listen: Listen,
        }
        let parse = |text: &str| toml::from_str::<Settings>(&format!("listen = {text:?}"));
        assert_eq!(parse("").unwrap().listen, Listen(None));
        assert_eq!(parse("127.0.0.1:7481").unwrap().listen, Listen::local(7481));
        assert!(parse("7481").err().unwrap().to_string().contains("host:port"));
    }

    async fn readiness(numbers: &Numbers) -> (StatusCode, String) {
        let answer = readyz(State(numbers.clone())).await;
        let status = answer.status();
        let body = axum::body::to_bytes(answer.into_body(), 1000).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn whether_it_is_ready_is_looked_at_when_somebody_asks() {
        let (numbers, well) = (Numbers::default(), Arc::new(std::sync::atomic::AtomicBool::new(true)));
        let not = |words: &str| (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {words}\n"));
        let ready = (StatusCode::OK, "ready\n".to_owned());
        assert_eq!(readiness(&numbers).await, not("it is starting"));
        let seen = well.clone();
        numbers.ready_while(move || {
            let is_well = seen.load(std::sync::atomic::Ordering::Relaxed);
            if is_well { Ok(()) } else { Err("the disk is gone".to_owned()) }
        });
        assert_eq!(readiness(&numbers).await, ready);
        well.store(false, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(readiness(&numbers).await, not("the disk is gone"));
        numbers.not_ready("there is no mesh");
        assert_eq!(readiness(&numbers).await, not("there is no mesh"));
        well.store(true, std::sync::atomic::Ordering::Relaxed);
        numbers.ready();
        assert_eq!(readiness(&numbers).await, ready);
    }

    #[tokio::test]
    async fn a_taken_port_stops_nobody() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tasks = Tasks::new();
        let listen = Listen(Some(taken.local_addr().unwrap()));
        Numbers::default().serve(listen, &tasks).await;
        assert!(!tasks.token().is_cancelled());
    }
}
