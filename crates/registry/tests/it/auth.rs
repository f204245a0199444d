//! Tokens, passwords, and what a registry refuses.

use std::sync::atomic::{AtomicUsize, Ordering};

use darter_registry::{Credential, RegistryError};
use darter_types::Digest;

use crate::server::{Reply, Request, Server};
use crate::{BASIC, assert_no_secret, client, repository, user};

const BODY: &[u8] = b"blob";

fn digest() -> Digest {
    Digest::of(BODY)
}

/// A registry and token server in one. It lets in who brings `the-token`, and gives that for the right password.
async fn token_registry() -> Server {
    Server::start(|request: &Request| {
        let host = request.header("host").unwrap().to_owned();
        match request.path.as_str() {
            "/token" => {
                let form =
                    url::form_urlencoded::parse(&request.body).any(|(k, v)| k == "refresh_token" && v == "r");
                let good = request.header("authorization") == Some(BASIC) || form;
                let scope = request.query.get("scope").map(String::as_str);
                assert!(form || scope == Some("repository:team/app:pull"), "{scope:?}");
                if good {
                    Reply::new(200, r#"{"access_token":"the-token","expires_in":300}"#)
                } else {
                    Reply::new(401, r#"{"errors":[{"code":"UNAUTHORIZED","message":"hunter3 is wrong"}]}"#)
                }
            }
            _ if request.header("authorization") == Some("Bearer the-token") => Reply::new(200, BODY),
            _ => {
                let challenge = format!(
                    r#"Bearer realm="http://{host}/token",service="s",scope="repository:team/app:pull""#
                );
                Reply::new(401, "").with("www-authenticate", challenge)
            }
        }
    })
    .await
}

#[tokio::test]
async fn token_is_fetched_once_and_used_again() {
    let server = token_registry().await;
    let (client, repository) = (client(), repository(&server));
    for _ in 0..3 {
        let bytes = client.fetch(&repository, digest(), 100, Some(&user())).await.unwrap();
        assert_eq!(bytes, BODY);
    }
    assert_eq!(server.count("/token"), 1);
    // Only the first request had to be told.
    assert_eq!(server.seen().len(), 1 + 1 + 3);
}

#[tokio::test]
async fn concurrent_requests_share_one_token() {
    let server = token_registry().await;
    let (client, repository, user) = (client(), repository(&server), user());
    let ask = || client.head_blob(&repository, digest(), Some(&user));
    let sizes = futures_util::future::join_all((0..8).map(|_| ask())).await;
    assert!(sizes.into_iter().all(|size| size.unwrap() == Some(4)));
    assert_eq!(server.count("/token"), 1);
}

#[tokio::test]
async fn wrong_password_is_unauthorized_in_the_registrys_words() {
    let server = token_registry().await;
    let wrong = Credential::from_user("me:hunter3").unwrap();
    let error = client().fetch(&repository(&server), digest(), 100, Some(&wrong)).await.unwrap_err();
    assert!(matches!(error, RegistryError::Unauthorized { .. }), "{error:?}");
    assert!(!error.retryable());
    let text = error.to_string();
    assert!(
        text.starts_with("pull access denied, repository does not exist or may require authorization"),
        "{text}"
    );
    assert!(text.contains("failed to fetch oauth token"), "{text}");
    // The server repeated the password; it is cut out.
    assert!(text.contains("unauthorized: … is wrong"), "{text}");
    assert_eq!(server.count("/token"), 1);
}

#[tokio::test]
async fn anonymous_reader_is_refused_as_such() {
    let server = token_registry().await;
    let error = client().head_blob(&repository(&server), digest(), None).await.unwrap_err();
    assert!(error.to_string().contains("failed to fetch anonymous token"), "{error}");
}

#[tokio::test]
async fn identity_token_is_posted() {
    let server = token_registry().await;
    let identity = Credential::IdentityToken("r".to_owned());
    client().head_blob(&repository(&server), digest(), Some(&identity)).await.unwrap();
    let post = server.seen().into_iter().find(|request| request.path == "/token").unwrap();
    let body = String::from_utf8(post.body).unwrap();
    assert_eq!(post.method, "POST");
    assert!(body.contains("grant_type=refresh_token") && body.contains("service=s"), "{body}");
}

#[tokio::test]
async fn token_server_that_is_faint_once_costs_no_answer() {
    let tries = AtomicUsize::new(0);
    let server = Server::start(move |request: &Request| {
        let host = request.header("host").unwrap();
        let challenge = format!(r#"Bearer realm="http://{host}/token",service="s""#);
        match request.path.as_str() {
            "/token" if tries.fetch_add(1, Ordering::SeqCst) == 0 => Reply::new(503, ""),
            "/token" => Reply::new(200, r#"{"access_token":"the-token","expires_in":300}"#),
            _ if request.header("authorization") == Some("Bearer the-token") => Reply::new(200, BODY),
            _ => Reply::new(401, "").with("www-authenticate", challenge),
        }
    })
    .await;
    let size = client().head_blob(&repository(&server), digest(), Some(&user())).await.unwrap();
    assert_eq!((size, server.count("/token")), (Some(4), 2));
}

#[tokio::test]
async fn pull_token_is_a_token_that_works() {
    let server = token_registry().await;
    let repository = repository(&server);
    let token = client().pull_token(&repository, Some(&user())).await.unwrap().unwrap();
    assert_eq!(token, Credential::Bearer("the-token".to_owned()));
    assert_eq!(client().fetch(&repository, digest(), 100, Some(&token)).await.unwrap(), BODY);
    assert_eq!(server.count("/token"), 1);
    assert_eq!(client().pull_token(&repository, None).await.unwrap(), None);
}

#[tokio::test]
async fn refused_token_is_replaced_by_a_new_one() {
    let server = Server::start(|request: &Request| {
        let host = request.header("host").unwrap().to_owned();
        let old = request.header("authorization") == Some("Bearer old");
        let challenge = format!(r#"Bearer realm="http://{host}/token",service="s""#);
        let refused = || Reply::new(401, "").with("www-authenticate", challenge.clone());
        match (request.path.as_str(), request.header("authorization")) {
            ("/token", _) => Reply::new(200, r#"{"token":"old"}"#),
            // The first blob with the old token is fine, the second one meets its end.
            (path, Some(_)) if old && path.ends_with(&Digest::of(b"1").to_string()) => Reply::new(200, "1"),
            _ => refused(),
        }
    })
    .await;
    let (client, repository) = (client(), repository(&server));
    client.fetch(&repository, Digest::of(b"1"), 10, Some(&user())).await.unwrap();
    let error = client.fetch(&repository, Digest::of(b"2"), 10, Some(&user())).await.unwrap_err();
    assert!(matches!(error, RegistryError::Unauthorized { .. }), "{error:?}");
    assert_eq!(server.count("/token"), 2);
}

#[tokio::test]
async fn token_is_asked_for_the_scope_that_the_registry_names() {
    let server = Server::start(|request: &Request| {
        let host = request.header("host").unwrap().to_owned();
        let scope = request.query.get("scope").map(String::as_str);
        match (request.path.as_str(), request.header("authorization")) {
            ("/token", _) if scope == Some("repository:other/name:pull") => {
                Reply::new(200, r#"{"token":"the-token"}"#)
            }
            ("/token", _) => Reply::new(403, ""),
            (_, Some("Bearer the-token")) => Reply::new(200, BODY),
            _ => Reply::new(401, "").with(
                "www-authenticate",
                format!(r#"Bearer realm="http://{host}/token",scope="repository:other/name:pull""#),
            ),
        }
    })
    .await;
    let (client, repository) = (client(), repository(&server));
    for _ in 0..2 {
        client.head_blob(&repository, digest(), None).await.unwrap();
    }
    assert_eq!(server.count("/token"), 1);
}

#[tokio::test]
async fn public_repository_is_readable_beside_a_private_one() {
    let server = Server::start(|request: &Request| {
        if request.path.starts_with("/v2/public/") { Reply::new(200, BODY) } else { basic_registry(request) }
    })
    .await;
    let client = client();
    client.head_blob(&repository(&server), digest(), None).await.unwrap_err();
    let public = format!("http://{}/public/app", server.authority).parse().unwrap();
    assert_eq!(client.fetch(&public, digest(), 100, None).await.unwrap(), BODY);
}

fn basic_registry(request: &Request) -> Reply {
    match request.header("authorization") {
        Some(BASIC) => Reply::new(200, BODY),
        _ => {
            let body = r#"{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}"#;
            Reply::new(401, body).with("www-authenticate", r#"Basic realm="here""#)
        }
    }
}

#[tokio::test]
async fn password_is_sent_when_asked_for() {
    let server = Server::start(basic_registry).await;
    let (client, repository) = (client(), repository(&server));
    assert_eq!(client.fetch(&repository, digest(), 100, Some(&user())).await.unwrap(), BODY);
    let first = &server.seen()[0];
    assert_eq!(first.header("authorization"), None);
    // A registry without token server gets what was given.
    assert_eq!(client.pull_token(&repository, Some(&user())).await.unwrap(), Some(user()));
}

#[tokio::test]
async fn wrong_or_missing_password_is_unauthorized() {
    let server = Server::start(basic_registry).await;
    let wrong = Credential::from_user("me:no").unwrap();
    let error = client().head_blob(&repository(&server), digest(), Some(&wrong)).await.unwrap_err();
    assert!(matches!(error, RegistryError::Unauthorized { .. }), "{error:?}");
    // An answer to HEAD has no body: the words are asked for.
    assert!(error.to_string().ends_with("unauthorized: authentication required"), "{error}");
    let error = client().fetch(&repository(&server), digest(), 100, Some(&wrong)).await.unwrap_err();
    assert!(error.to_string().ends_with("unauthorized: authentication required"), "{error}");
    let error = client().head_blob(&repository(&server), digest(), None).await.unwrap_err();
    assert!(error.to_string().ends_with("no basic auth credentials"), "{error}");
}

#[tokio::test]
async fn redirect_does_not_take_the_password_along() {
    let cdn = Server::start(|_: &Request| Reply::new(200, BODY)).await;
    let target = format!("http://{}/signed?signature=secret", cdn.authority);
    let server = Server::start(move |request: &Request| match request.header("authorization") {
        Some(BASIC) => Reply::new(307, "").with("location", target.clone()),
        _ => basic_registry(request),
    })
    .await;
    let bytes = client().fetch(&repository(&server), digest(), 100, Some(&user())).await.unwrap();
    assert_eq!(bytes, BODY);
    let asked = &cdn.seen()[0];
    assert_eq!(asked.header("authorization"), None);
    assert_eq!(asked.query["signature"], "secret");
}

#[tokio::test]
async fn refusals_are_told_apart_and_show_no_secret() {
    let cases: [(u16, fn(&RegistryError) -> bool, bool); 5] = [
        (403, |e| matches!(e, RegistryError::Forbidden { .. }), false),
        (404, |e| matches!(e, RegistryError::NotFound { .. }), false),
        (429, |e| matches!(e, RegistryError::TooManyRequests { .. }), true),
        (503, |e| matches!(e, RegistryError::Server { .. }), true),
        (418, |e| matches!(e, RegistryError::Status { .. }), false),
    ];
    for (status, is_it, retryable) in cases {
        let server = Server::start(move |request: &Request| match request.header("authorization") {
            None => basic_registry(request),
            Some(_) => Reply::new(status, r#"{"errors":[{"code":"DENIED","message":"not hunter2"}]}"#),
        })
        .await;
        let error = client().head_blob(&repository(&server), digest(), Some(&user())).await.unwrap_err();
        assert!(is_it(&error), "{status}: {error:?}");
        assert_eq!(error.retryable(), retryable, "{status}");
        assert_no_secret(&error);
        let error = client().fetch(&repository(&server), digest(), 9, Some(&user())).await.unwrap_err();
        assert!(is_it(&error), "{status}: {error:?}");
        assert_no_secret(&error);
    }
}
