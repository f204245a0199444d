//! Serving HTTP/1.1 so that nobody who reaches the port can keep others from being answered.
//!
//! There is a bound on connections, and times for a request's head and for its answer. When all places are taken the connection
//! that has asked for nothing for longest gives way to the next one, also if it is still reading what it asked for; if all
//! wait for an answer, the next one is turned away.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response, StatusCode};
use axum::response::IntoResponse;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

/// What one listener bears.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at the same time.
    pub connections: usize,
    /// For the head of a request, from the connection's beginning or from the answer before.
    pub head: Duration,
    /// From a request's head to the head of its answer; the body of the request comes within it.
    pub answer: Duration,
}

/// After an error that is not the connection's own, as having no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Answers on `listener` until `stop` is cancelled; what is being answered then is answered.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, stop: CancellationToken) {
    let places = Arc::new(Places::new(limits.connections));
    let open = TaskTracker::new();
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        match accepted {
            Ok((stream, _)) => {
                // Without a place it is closed at once.
                if let Some(place) = places.enter() {
                    open.spawn(attend(stream, place, router.clone(), limits, stop.clone()));
                }
            }
            Err(error) if is_of_connection(&error) => {}
            Err(error) => {
                tracing::warn!(%error, "no connection can be accepted just now");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    open.close();
    open.wait().await;
}

fn is_of_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// One connection, until it ends, gives way, or all do.
async fn attend(
    stream: TcpStream,
    place: Arc<Place>,
    router: Router,
    limits: Limits,
    stop: CancellationToken,
) {
    let leave = place.guest.leave.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let (router, place) = (router.clone(), place.clone());
        async move {
            let _busy = place.begin();
            let answer = timeout(limits.answer, router.oneshot(request.map(Body::new))).await;
            Ok::<Response<Body>, Infallible>(match answer {
                Ok(Ok(answer)) => answer,
                Ok(Err(never)) => match never {},
                Err(_) => (StatusCode::REQUEST_TIMEOUT, "the request took too long\n").into_response(),
            })
        }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(limits.head);
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
    tokio::select! {
        // Whoever broke it off needs no word.
        _ = connection.as_mut() => {}
        () = leave.cancelled() => {}
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            let _ = timeout(limits.answer, connection).await;
        }
    }
}

/// The connections that are open.
struct Places {
    most: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Counts what happens, so that the order is known.
    now: u64,
    guests: Vec<Arc<Guest>>,
}

/// One connection, as the others see it.
struct Guest {
    /// A request waits for its answer: one at most, as HTTP/1.1 has them.
    is_busy: AtomicBool,
    /// When it came, or was last answered.
    idle_since: AtomicU64,
    leave: CancellationToken,
}

/// Gives the place back when it is dropped.
struct Place {
    places: Arc<Places>,
    guest: Arc<Guest>,
}

/// A request waits for its answer as long as this lives.
struct Busy(Arc<Place>);

impl Places {
    fn new(most: usize) -> Self {
        Self { most, state: Mutex::default() }
    }

    fn enter(self: &Arc<Self>) -> Option<Arc<Place>> {
        let mut state = self.state.lock();
        if state.guests.len() >= self.most {
            let at = state.longest_idle()?;
            state.guests.swap_remove(at).leave.cancel();
        }
        let guest = Arc::new(Guest {
            is_busy: AtomicBool::new(false),
            idle_since: AtomicU64::new(state.tick()),
            leave: CancellationToken::new(),
        });
        state.guests.push(guest.clone());
        drop(state);
        Some(Arc::new(Place { places: self.clone(), guest }))
    }
}

impl State {
    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    fn longest_idle(&self) -> Option<usize> {
        let guests = self.guests.iter().enumerate();
        let idle = guests.filter(|(_, guest)| !guest.is_busy.load(Ordering::Relaxed));
        idle.min_by_key(|(_, guest)| guest.idle_since.load(Ordering::Relaxed)).map(|(at, _)| at)
    }
}

impl Place {
    fn begin(self: &Arc<Self>) -> Busy {
        self.guest.is_busy.store(true, Ordering::Relaxed);
        Busy(self.clone())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let Place { places, guest } = &*self.0;
        guest.idle_since.store(places.state.lock().tick(), Ordering::Relaxed);
        guest.is_busy.store(false, Ordering::Relaxed);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.state.lock().guests.retain(|guest| !Arc::ptr_eq(guest, &self.guest));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::{get, post};
    use std::net::SocketAddr;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const SOON: Duration = Duration::from_secs(10);
    const LIMITS: Limits =
        Limits { connections: 64, head: Duration::from_secs(3600), answer: Duration::from_secs(3600) };

    async fn server(limits: Limits) -> (SocketAddr, CancellationToken) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
        let router = Router::new()
            .route("/healthy", get(|| async { "well" }))
            .route("/echo", post(|body: String| async { body }))
            .route("/slow", get(|| async { std::future::pending::<&str>().await }));
        tokio::spawn(serve(listener, router, limits, stop.clone()));
        (address, stop)
    }

    async fn send(address: SocketAddr, words: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(words.as_bytes()).await.unwrap();
        stream
    }

    /// All that comes until the connection ends.
    async fn rest(mut stream: TcpStream) -> String {
        let mut said = Vec::new();
        let _ = timeout(SOON, stream.read_to_end(&mut said)).await.expect("the connection ends");
        String::from_utf8_lossy(&said).into_owned()
    }

    async fn ask(address: SocketAddr) -> String {
        rest(send(address, "GET /healthy HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n").await).await
    }

    #[tokio::test]
    async fn two_hundred_slow_connections_keep_nobody_from_being_answered() {
        let (address, _stop) = server(LIMITS).await;
        let mut slow = Vec::new();
        for words in ["", "GET /healthy HTTP/1.1\r\nHo"].into_iter().cycle().take(200) {
            slow.push(send(address, words).await);
        }
        for _ in 0..20 {
            let said = ask(address).await;
            assert!(said.ends_with("well"), "{said:?}");
        }
        // The first of them had to go, the last ones are still there.
        assert_eq!(rest(slow.remove(0)).await, "");
        let mut last = slow.pop().unwrap();
        last.write_all(b"st: h\r\nConnection: close\r\n\r\n").await.unwrap();
        assert!(rest(last).await.ends_with("well"));
    }

    #[tokio::test]
    async fn who_waits_for_an_answer_keeps_the_place() {
        let (address, _stop) = server(Limits { connections: 2, ..LIMITS }).await;
        let slow = "GET /slow HTTP/1.1\r\nHost: h\r\n\r\n";
        let _both = [send(address, slow).await, send(address, slow).await];
        let turned_away = async { while !ask(address).await.is_empty() {} };
        timeout(SOON, turned_away).await.expect("a third one is turned away");
    }

    #[tokio::test]
    async fn heads_and_bodies_that_do_not_come_end_the_connection() {
        let short = Duration::from_millis(100);
        let (address, _stop) = server(Limits { head: short, answer: short, ..LIMITS }).await;
        let said = rest(send(address, "GET /healthy HTTP/1.1\r\nHo").await).await;
        assert!(!said.contains("well"), "{said:?}");
        assert_eq!(rest(send(address, "").await).await, "");
        let head = "POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\nfew";
        let said = rest(send(address, head).await).await;
        assert!(said.starts_with("HTTP/1.1 408"), "{said:?}");
    }

    #[tokio::test]
    async fn one_connection_asks_several_times_and_a_stop_ends_it() {
        let (address, stop) = server(LIMITS).await;
        let mut stream = send(address, "").await;
        for _ in 0..2 {
            stream.write_all(b"GET /healthy HTTP/1.1\r\nHost: h\r\n\r\n").await.unwrap();
            let mut said = vec![0; 1000];
            let count = timeout(SOON, stream.read(&mut said)).await.unwrap().unwrap();
            assert!(String::from_utf8_lossy(&said[..count]).ends_with("well"));
        }
        stop.cancel();
        assert_eq!(rest(stream).await, "");
    }
}
