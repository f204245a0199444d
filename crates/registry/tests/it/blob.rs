//! Streams of blobs over connections that break.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use darter_registry::{Client, Options, Patience, RegistryError};
use darter_types::Digest;
use futures_util::StreamExt;

use crate::server::{Reply, Request, Server};
use crate::{assert_no_secret, client, patience, repository};

fn content() -> Vec<u8> {
    (0..300_000u32).map(|n| (n * 7 + n / 256) as u8).collect()
}

#[tokio::test]
async fn broken_connection_is_resumed_where_it_broke() {
    let whole = content();
    let digest = Digest::of(&whole);
    let body = whole.clone();
    let server = Server::start(move |request: &Request| match request.range_start() {
        None => Reply::new(200, body.clone()).cut_after(100_000),
        Some(start) if start < 200_000 => Reply::partial(&body, start).cut_after(50_000),
        Some(start) => Reply::partial(&body, start),
    })
    .await;
    let blob = client().blob(&repository(&server), digest, None, 0).await.unwrap();
    assert_eq!(blob.size, Some(300_000));
    assert_eq!(blob.collect(1 << 20).await.unwrap(), whole);
    let starts: Vec<_> = server.seen().iter().map(Request::range_start).collect();
    assert_eq!(starts, [None, Some(100_000), Some(150_000), Some(200_000)]);
}

#[tokio::test]
async fn server_that_knows_no_ranges_is_read_past_what_we_have() {
    let whole = content();
    let (body, tries) = (whole.clone(), AtomicUsize::new(0));
    let server = Server::start(move |_: &Request| match tries.fetch_add(1, Ordering::SeqCst) {
        0 => Reply::new(200, body.clone()).cut_after(123_456),
        1 => Reply::new(200, body.clone()).cut_after(1_000),
        _ => Reply::new(200, body.clone()),
    })
    .await;
    let bytes = client().fetch(&repository(&server), Digest::of(&whole), 1 << 20, None).await.unwrap();
    assert_eq!(bytes, whole);
}

#[tokio::test]
async fn stream_starts_at_an_offset() {
    let whole = content();
    let body = whole.clone();
    let server = Server::start(move |request: &Request| {
        Reply::partial(&body, request.range_start().expect("a range"))
    })
    .await;
    let blob = client().blob(&repository(&server), Digest::of(&whole), None, 299_000).await.unwrap();
    assert_eq!(blob.size, Some(300_000));
    assert_eq!(blob.collect(1_000).await.unwrap(), whole[299_000..]);
}

#[tokio::test]
async fn wrong_bytes_are_no_blob() {
    let server = Server::start(|_: &Request| Reply::new(200, "other bytes")).await;
    let error = client().fetch(&repository(&server), Digest::of(b"right"), 100, None).await.unwrap_err();
    assert!(matches!(error, RegistryError::Digest { .. }), "{error:?}");
}

#[tokio::test]
async fn blob_above_the_limit_is_refused() {
    let server = Server::start(|_: &Request| Reply::new(200, vec![0; 1_000])).await;
    let error = client().fetch(&repository(&server), Digest::of(b"x"), 999, None).await.unwrap_err();
    assert!(matches!(error, RegistryError::TooLarge { limit: 999, .. }), "{error:?}");
}

#[tokio::test]
async fn size_that_changes_under_way_ends_the_stream() {
    let server = Server::start(|request: &Request| match request.range_start() {
        None => Reply::new(200, vec![1; 1_000]).cut_after(500),
        Some(start) => Reply::partial(&[1; 2_000], start),
    })
    .await;
    let error = client().fetch(&repository(&server), Digest::of(b"x"), 9_999, None).await.unwrap_err();
    assert!(matches!(error, RegistryError::Protocol { .. }), "{error:?}");
}

#[tokio::test]
async fn expired_address_is_asked_for_anew() {
    let whole = content();
    let body = whole.clone();
    let cdn = Server::start(move |request: &Request| match request.query["signature"].as_str() {
        "0" => Reply::new(200, body.clone()).cut_after(1_000),
        "1" => Reply::new(403, "<Error>expired</Error>"),
        _ => Reply::partial(&body, request.range_start().expect("a range")),
    })
    .await;
    let (target, tries) = (cdn.authority.clone(), AtomicUsize::new(0));
    let server = Server::start(move |_: &Request| {
        let signature = tries.fetch_add(1, Ordering::SeqCst);
        Reply::new(307, "").with("location", format!("http://{target}/b?signature={signature}"))
    })
    .await;
    let bytes = client().fetch(&repository(&server), Digest::of(&whole), 1 << 20, None).await.unwrap();
    assert_eq!(bytes, whole);
    assert_eq!(server.seen().len(), 3);
}

#[tokio::test]
async fn circle_of_redirects_ends() {
    let server = Server::start(|request: &Request| {
        Reply::new(302, "").with("location", format!("{}?signature=x", request.path))
    })
    .await;
    let error = client().head_blob(&repository(&server), Digest::of(b"x"), None).await.unwrap_err();
    assert!(matches!(error, RegistryError::Redirect { .. }), "{error:?}");
    assert_no_secret(&error);
    // Six for HEAD, and six for the GET that was tried instead.
    assert_eq!(server.seen().len(), 12);
}

#[tokio::test]
async fn too_many_requests_is_waited_out() {
    let tries = AtomicUsize::new(0);
    let server = Server::start(move |_: &Request| match tries.fetch_add(1, Ordering::SeqCst) {
        0 => Reply::new(429, "").with("retry-after", "0"),
        1 => Reply::new(503, ""),
        _ => Reply::new(200, "blob"),
    })
    .await;
    client().fetch(&repository(&server), Digest::of(b"blob"), 100, None).await.unwrap();
    assert_eq!(server.seen().len(), 3);
}

#[tokio::test]
async fn busy_registry_is_asked_for_a_size_again() {
    let tries = AtomicUsize::new(0);
    let server = Server::start(move |_: &Request| match tries.fetch_add(1, Ordering::SeqCst) {
        0 => Reply::new(429, ""),
        1 => Reply::new(429, "").with("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT"),
        _ => Reply::new(200, "blob"),
    })
    .await;
    let size = client().head_blob(&repository(&server), Digest::of(b"blob"), None).await.unwrap();
    assert_eq!(size, Some(4));
    assert_eq!(server.seen().len(), 3);
}

#[tokio::test]
async fn faint_registry_is_asked_for_a_size_once_more() {
    for (failures, asked) in [(1, 2), (2, 2)] {
        let tries = AtomicUsize::new(0);
        let server = Server::start(move |_: &Request| match tries.fetch_add(1, Ordering::SeqCst) {
            number if number < failures => Reply::new(503, ""),
            _ => Reply::new(200, "blob"),
        })
        .await;
        let size = client().head_blob(&repository(&server), Digest::of(b"blob"), None).await;
        match failures {
            1 => assert_eq!(size.unwrap(), Some(4)),
            _ => assert!(matches!(size, Err(RegistryError::Server { .. })), "{size:?}"),
        }
        assert_eq!(server.seen().len(), asked);
    }
}

#[tokio::test]
async fn connection_that_breaks_before_the_size_is_made_once_more() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let repository = format!("http://{}/a", listener.local_addr().unwrap()).parse().unwrap();
    let breaking = tokio::spawn(async move {
        // The client has asked, and gets no word.
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::io::AsyncReadExt::read(&mut stream, &mut [0; 1024]).await.unwrap();
        }
        tokio::time::timeout(Duration::from_millis(500), listener.accept()).await.is_ok()
    });
    let error = client().head_blob(&repository, Digest::of(b"x"), None).await.unwrap_err();
    assert!(matches!(error, RegistryError::Broken { .. }), "{error:?}");
    assert!(!breaking.await.unwrap(), "it came a third time");
}

#[tokio::test]
async fn longer_retry_after_than_we_wait_is_an_error_at_once() {
    let server = Server::start(|_: &Request| Reply::new(429, "").with("retry-after", "3600")).await;
    let error = client().fetch(&repository(&server), Digest::of(b"blob"), 100, None).await.unwrap_err();
    let RegistryError::TooManyRequests { retry_after, .. } = error else { panic!("{error:?}") };
    assert_eq!(retry_after, Some(Duration::from_secs(3600)));
    assert_eq!(server.seen().len(), 1);
}

#[tokio::test]
async fn retry_after_the_end_of_time_is_an_error_like_any_other() {
    let answer = |_: &Request| Reply::new(429, "").with("retry-after", "18446744073709551615");
    let server = Server::start(answer).await;
    let error = client().fetch(&repository(&server), Digest::of(b"blob"), 100, None).await.unwrap_err();
    assert!(matches!(error, RegistryError::TooManyRequests { .. }), "{error:?}");
}

#[tokio::test]
async fn silent_server_is_given_up() {
    // It listens, but nobody ever accepts.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let repository = format!("http://{}/a", listener.local_addr().unwrap()).parse().unwrap();
    let stall = Duration::from_millis(50);
    let patience = Patience { stall, answer: Duration::from_millis(60), ..patience() };
    let client = Client::new(Options { patience, ..Options::default() }).unwrap();
    let error = client.fetch(&repository, Digest::of(b"x"), 100, None).await.unwrap_err();
    assert!(matches!(error, RegistryError::Broken { .. }), "{error:?}");
}

#[tokio::test]
async fn nobody_there_is_unreachable() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let repository = format!("http://{}/a", listener.local_addr().unwrap()).parse().unwrap();
    drop(listener);
    let error = client().head_blob(&repository, Digest::of(b"x"), None).await.unwrap_err();
    assert!(matches!(error, RegistryError::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().to_lowercase().contains("connection refused"), "{error}");
}

#[tokio::test]
async fn blob_that_never_gets_whole_ends_with_an_error() {
    let server = Server::start(|request: &Request| match request.range_start() {
        None => Reply::new(200, vec![7; 1_000]).cut_after(10),
        Some(_) => Reply::new(404, ""),
    })
    .await;
    let mut blob = client().blob(&repository(&server), Digest::of(b"x"), None, 0).await.unwrap();
    assert_eq!(blob.stream.next().await.unwrap().unwrap().len(), 10);
    assert!(matches!(blob.stream.next().await, Some(Err(RegistryError::NotFound { .. }))));
    assert!(blob.stream.next().await.is_none());
}

#[tokio::test]
async fn address_signed_for_reading_tells_the_size_too() {
    let cdn = Server::start(|request: &Request| match request.method.as_str() {
        "HEAD" => Reply::new(403, ""),
        _ => Reply::partial(&[0; 815], 0),
    })
    .await;
    let target = format!("http://{}/b", cdn.authority);
    let server = Server::start(move |_: &Request| Reply::new(307, "").with("location", target.clone())).await;
    let size = client().head_blob(&repository(&server), Digest::of(b"x"), None).await.unwrap();
    assert_eq!(size, Some(815));
}

#[tokio::test]
async fn registry_without_head_is_asked_for_a_byte() {
    let server = Server::start(|request: &Request| match request.method.as_str() {
        "HEAD" => Reply::new(405, ""),
        _ => Reply::new(206, "x").with("content-range", "bytes 0-0/4711"),
    })
    .await;
    let size = client().head_blob(&repository(&server), Digest::of(b"x"), None).await.unwrap();
    assert_eq!(size, Some(4711));
}
