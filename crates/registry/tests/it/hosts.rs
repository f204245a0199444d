//! `hosts.toml` at work: mirrors, their order, TLS.

use std::path::Path;
use std::sync::Arc;

use darter_registry::{Client, ImageRef, Options, RegistryError};
use darter_types::{Digest, Repository};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::{ServerConfig, crypto::aws_lc_rs};

use crate::patience;
use crate::server::{Reply, Request, Server};

fn write(dir: &Path, folder: &str, text: &str) {
    std::fs::create_dir_all(dir.join(folder)).unwrap();
    std::fs::write(dir.join(folder).join("hosts.toml"), text).unwrap();
}

fn client(dir: &Path) -> Client {
    let options = Options { hosts_dir: Some(dir.to_owned()), patience: patience(), ..Options::default() };
    Client::new(options).unwrap()
}

fn app(authority: &str) -> Repository {
    format!("https://{authority}/app").parse().unwrap()
}

#[tokio::test]
async fn mirrors_are_asked_in_order_and_then_the_server() {
    let dead = Server::start(|_: &Request| Reply::new(503, "")).await;
    let empty = Server::start(|_: &Request| Reply::new(404, "")).await;
    let origin = Server::start(|_: &Request| Reply::new(200, "blob")).await;
    let no_pull = Server::start(|_: &Request| Reply::new(200, "wrong")).await;
    let dir = tempfile::tempdir().unwrap();
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\ncapabilities = [\"resolve\"]\n[host.\"http://{}\"]\n[host.\"http://{}\"]\n\
         [host.\"http://{}\".header]\nX-Key = \"k\"\n",
        origin.authority, no_pull.authority, dead.authority, empty.authority, empty.authority
    );
    write(dir.path(), "r.example", &text);
    let bytes = client(dir.path()).fetch(&app("r.example"), Digest::of(b"blob"), 10, None).await.unwrap();
    assert_eq!(bytes, "blob");
    assert_eq!((dead.seen().len(), empty.seen().len(), no_pull.seen().len()), (1, 1, 0));
    assert_eq!(empty.seen()[0].query["ns"], "r.example");
    assert_eq!(empty.seen()[0].header("x-key"), Some("k"));
    assert_eq!(origin.seen()[0].header("x-key"), None);
}

#[test]
fn who_brings_headers_or_a_certificate_of_the_configuration_is_not_anybody() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "plain.example", "server = \"https://plain.example\"\n");
    write(
        dir.path(),
        "header.example",
        "[host.\"https://m.example\"]\n[host.\"https://m.example\".header]\nX-Key = \"k\"\n",
    );
    std::fs::write(dir.path().join("header.example/c.pem"), "C").unwrap();
    write(
        dir.path(),
        "client.example",
        "server = \"https://client.example\"\nclient = \"../header.example/c.pem\"\n",
    );
    let client = client(dir.path());
    let asked = ["other.example", "plain.example", "header.example", "client.example"];
    assert_eq!(asked.map(|host| client.asks_as_anybody(&app(host))), [true, true, false, false]);
}

/// At a registry that is known to have a token server, which gives anybody tokens that are good for nothing.
#[tokio::test]
async fn header_of_hosts_toml_goes_before_an_anonymous_token() {
    let server = Server::start(|request: &Request| {
        let host = request.header("host").unwrap().to_owned();
        let challenge = format!(r#"Bearer realm="http://{host}/token",service="s""#);
        match (request.path.as_str(), request.header("authorization")) {
            ("/token", _) => Reply::new(200, r#"{"token":"anybody"}"#),
            (path, Some("Bearer mine")) if path.contains("/blobs/") => Reply::new(200, "blob"),
            _ => Reply::new(401, "").with("www-authenticate", challenge),
        }
    })
    .await;
    let (dir, authority) = (tempfile::tempdir().unwrap(), &server.authority);
    let text = format!(
        "server = \"http://{authority}\"\n[host.\"http://{authority}\"]\n\
         [host.\"http://{authority}\".header]\nAuthorization = \"Bearer mine\"\n"
    );
    write(dir.path(), authority, &text);
    let client = client(dir.path());
    let repository = format!("http://{authority}/app").parse().unwrap();
    client.pull_token(&repository, Some(&crate::user())).await.unwrap();
    assert_eq!(client.fetch(&repository, Digest::of(b"blob"), 10, None).await.unwrap(), "blob");
}

#[tokio::test]
async fn mirror_without_resolve_is_not_asked_for_a_tag() {
    let mirror = Server::start(|_: &Request| Reply::new(200, "{}")).await;
    let origin = Server::start(|_: &Request| Reply::new(404, "")).await;
    let dir = tempfile::tempdir().unwrap();
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\"]\n",
        origin.authority, mirror.authority
    );
    write(dir.path(), "_default", &text);
    let image: ImageRef = "r.example/app:1".parse().unwrap();
    let error = client(dir.path()).resolve(&image, false, None).await.unwrap_err();
    assert!(matches!(error.root(), RegistryError::NotFound { .. }), "{error:?}");
    assert_eq!((mirror.seen().len(), origin.seen().len()), (0, 1));
}

#[tokio::test]
async fn servers_own_address_is_the_identity_of_a_plain_http_registry() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "10.9.8.7_5000_", "server = \"http://10.9.8.7:5000\"\n");
    let image: ImageRef = "10.9.8.7:5000/app".parse().unwrap();
    let client = client(dir.path());
    assert_eq!(client.repository(&image, false).unwrap().to_string(), "http://10.9.8.7:5000/app");
    let found = client.resolve_repository("10.9.8.7", "app", false);
    assert_eq!(found[0].to_string(), "http://10.9.8.7:5000/app");
}

struct Tls {
    acceptor: TlsAcceptor,
    pem: String,
}

fn tls() -> Tls {
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let key = rustls_pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .unwrap();
    Tls { acceptor: Arc::new(config).into(), pem: made.cert.pem() }
}

#[tokio::test]
async fn certificate_is_verified_against_the_named_ca() {
    let Tls { acceptor, pem } = tls();
    let server = Server::start_with(Some(acceptor), |_: &Request| Reply::new(200, "blob")).await;
    let fetch = async |text: &str| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca.pem"), &pem).unwrap();
        let text = format!("server = \"https://{}\"\n{text}", server.authority);
        write(dir.path(), "r.example", &text);
        client(dir.path()).fetch(&app("r.example"), Digest::of(b"blob"), 10, None).await
    };
    let error = fetch("").await.unwrap_err();
    assert!(matches!(error, RegistryError::Tls { .. }), "{error:?}");
    assert!(!error.retryable());
    assert_eq!(fetch("ca = \"../ca.pem\"").await.unwrap(), "blob");
    assert_eq!(fetch("skip_verify = true").await.unwrap(), "blob");
}

#[tokio::test]
async fn plain_server_behind_https_is_said_as_containerd_does() {
    let server = Server::start(|_: &Request| Reply::new(200, "blob")).await;
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "r.example", &format!("server = \"https://{}\"", server.authority));
    let error = client(dir.path()).head_blob(&app("r.example"), Digest::of(b"x"), None).await.unwrap_err();
    assert!(error.to_string().contains("server gave HTTP response to HTTPS client"), "{error}");
}

#[tokio::test]
async fn unreadable_ca_of_the_options_is_an_error_at_the_start() {
    let options = Options { extra_ca: vec!["/nonexistent/ca.pem".into()], ..Options::default() };
    let error = Client::new(options).err().unwrap();
    assert!(error.to_string().contains("/nonexistent/ca.pem"), "{error}");
}
