//! Steps on their way to a collector that speaks HTTP and answers when it likes. One process has one collector, so this is
//! one test.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::http::HeaderMap;
use axum::routing::post;
use darter_daemon::numbers::Registry;
use darter_daemon::tasks::Tasks;
use darter_daemon::traces::{QUEUE_MAX, Settings, Step, Trail, register, start};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

/// Counts of `darter_traces_spans_total`: sent, dropped, failed.
fn counts() -> [u64; 3] {
    let mut registry = Registry::default();
    register(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    ["sent", "dropped", "failed"].map(|result| {
        let start = format!("darter_traces_spans_total{{result=\"{result}\"}} ");
        let value = text.lines().find_map(|line| line.strip_prefix(&start)).unwrap();
        value.parse::<f64>().unwrap() as u64
    })
}

/// A collector that says when a request has come, and answers one for each permit.
async fn collector() -> (String, mpsc::UnboundedReceiver<HeaderMap>, Arc<Semaphore>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (came, requests) = mpsc::unbounded_channel();
    let permits = Arc::new(Semaphore::new(0));
    let gate = permits.clone();
    let take = async move |headers: HeaderMap, spans: Bytes| {
        assert!(!spans.is_empty());
        came.send(headers).unwrap();
        gate.acquire().await.unwrap().forget();
    };
    let router = Router::new().route("/v1/traces", post(take));
    tokio::spawn(async move { axum::serve(listener, router).await });
    (format!("http://{address}"), requests, permits)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_slow_collector_does_not_take_is_dropped_and_counted() {
    darter_daemon::run::install_tls_provider();
    assert!(!Step::of_pull("before it was begun").is_followed());
    let (endpoint, mut requests, permits) = collector().await;
    let text = format!("endpoint = {endpoint:?}\nprotocol = \"http/protobuf\"\nshare = 0");
    let settings: Settings = toml::from_str(&text).unwrap();
    start(&settings, "darter-test", "here", &Tasks::new());
    assert!(!Step::of_read("of a share of nothing").is_followed());

    let pull = Step::of_pull("pull").with("darter.number", || 7u64);
    let trail = pull.trail();
    assert!(trail.is_followed() && Trail::current() == Trail::NONE);
    let below = trail.over(async { Step::here("below") }).await;
    assert!(below.is_followed());
    drop((below, pull));
    let headers = timeout(Duration::from_secs(20), requests.recv()).await.unwrap().unwrap();
    assert_eq!(headers["content-type"], "application/x-protobuf");

    // Nothing is answered: whoever makes steps goes on all the same.
    let more = QUEUE_MAX + 100;
    (0..more).for_each(|_| drop(trail.step("too many")));
    assert_eq!(counts(), [0, 100, 0]);
    permits.add_permits(1000);
    let all = (QUEUE_MAX + 2) as u64;
    let told = async {
        while counts() != [all, 100, 0] {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(timeout(Duration::from_secs(60), told).await.is_ok(), "{:?}", counts());

    // What others say is honoured up to a limit.
    let followed = (0..1000).filter(|_| Step::for_member(trail, "answer").is_followed()).count();
    assert!((100..400).contains(&followed), "{followed} of 1000");
    assert!(!Step::for_member(Trail::NONE, "answer").is_followed());
}
