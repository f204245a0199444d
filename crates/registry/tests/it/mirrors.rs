//! Which hosts of a `hosts.toml` are shown a registry's credential.

use darter_registry::{Client, Credential, Options, RegistryError};
use darter_types::{Digest, Repository};

use crate::server::{Reply, Request, Server};
use crate::{BASIC, patience, user};

const BODY: &[u8] = b"blob";

/// Asks for a password, and lets in with the right one.
async fn basic() -> Server {
    Server::start(|request: &Request| match request.header("authorization") {
        Some(BASIC) => Reply::new(200, BODY),
        _ => Reply::new(401, "").with("www-authenticate", r#"Basic realm="here""#),
    })
    .await
}

/// Has a token server of its own, which gives a token to whoever shows the password.
async fn bearer() -> Server {
    Server::start(|request: &Request| {
        let host = request.header("host").unwrap().to_owned();
        match (request.path.as_str(), request.header("authorization")) {
            ("/token", Some(BASIC)) => Reply::new(200, r#"{"token":"the-token"}"#),
            ("/token", _) => Reply::new(401, ""),
            (_, Some("Bearer the-token")) => Reply::new(200, BODY),
            _ => Reply::new(401, "").with(
                "www-authenticate",
                format!(r#"Bearer realm="http://{host}/token",service="s",scope="repository:app:pull""#),
            ),
        }
    })
    .await
}

/// A client whose `hosts.toml` for `folder` names the mirror and the server.
fn client(folder: &str, mirror: &Server, server: &Server) -> (tempfile::TempDir, Client) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join(folder)).unwrap();
    let text = format!("server = \"http://{}\"\n[host.\"http://{}\"]\n", server.authority, mirror.authority);
    std::fs::write(dir.path().join(folder).join("hosts.toml"), text).unwrap();
    let hosts_dir = Some(dir.path().to_owned());
    let client = Client::new(Options { hosts_dir, patience: patience(), ..Options::default() }).unwrap();
    (dir, client)
}

fn app(authority: &str) -> Repository {
    format!("https://{authority}/app").parse().unwrap()
}

async fn fetch(client: &Client, from: &str, credential: &Credential) -> Result<bytes::Bytes, RegistryError> {
    client.fetch(&app(from), Digest::of(BODY), 10, Some(credential)).await
}

/// Whether anything that it was sent could be a credential.
fn was_shown_one(server: &Server) -> bool {
    let seen = server.seen();
    assert!(!seen.is_empty(), "it was not asked at all");
    seen.iter().any(|request| {
        let form = String::from_utf8_lossy(&request.body).contains("refresh_token");
        form || request.header("authorization").is_some()
    })
}

#[tokio::test]
async fn a_mirror_that_asks_is_not_shown_the_registrys_credential() {
    for mirror in [basic().await, bearer().await] {
        for credential in
            [user(), Credential::Bearer("b".to_owned()), Credential::IdentityToken("i".to_owned())]
        {
            let server = Server::start(|_: &Request| Reply::new(404, "")).await;
            let (_dir, client) = client("r.example", &mirror, &server);
            fetch(&client, "r.example", &credential).await.unwrap_err();
            assert!(!was_shown_one(&mirror), "{credential:?}");
        }
    }
}

#[tokio::test]
async fn mirrors_are_opened_by_what_a_client_gave_where_there_are_any() {
    let (mirror, server) = (basic().await, basic().await);
    let (_dir, client) = client("r.example", &mirror, &server);
    assert!(!client.opens_mirrors(&app("r.example"), &user()), "nobody gave it");
    for registry in ["r.example", "other.example"] {
        client.lend(registry, &user());
    }
    assert!(client.opens_mirrors(&app("r.example"), &user()));
    assert!(!client.opens_mirrors(&app("other.example"), &user()), "it has none");
}

/// Under whatever name: the registry's own file says where it is.
#[tokio::test]
async fn the_server_is_the_registry() {
    for server in [basic().await, bearer().await] {
        let mirror = basic().await;
        let (_dir, client) = client("r.example", &mirror, &server);
        assert_eq!(fetch(&client, "r.example", &user()).await.unwrap(), BODY);
        assert!(was_shown_one(&server) && !was_shown_one(&mirror));
    }
}

#[tokio::test]
async fn the_server_of_the_default_folder_is_a_mirror() {
    let (mirror, server) = (basic().await, basic().await);
    let (_dir, client) = client("_default", &mirror, &server);
    let error = fetch(&client, "r.example", &user()).await.unwrap_err();
    assert!(matches!(error, RegistryError::Unauthorized { .. }), "{error:?}");
    assert!(!was_shown_one(&server) && !was_shown_one(&mirror));
    assert_eq!(client.pull_token(&app("r.example"), Some(&user())).await.unwrap(), None);
    assert!(!was_shown_one(&server));
}

#[tokio::test]
async fn what_a_client_gave_with_a_pull_is_shown_to_the_mirrors_of_its_registry_alone() {
    for mirror in [basic().await, bearer().await] {
        let server = Server::start(|_: &Request| Reply::new(404, "")).await;
        let (dir, client) = client("r.example", &mirror, &server);
        let text = format!("[host.\"http://{}\"]\n", mirror.authority);
        std::fs::create_dir(dir.path().join("127.0.0.1:1")).unwrap();
        std::fs::write(dir.path().join("127.0.0.1:1/hosts.toml"), text).unwrap();
        client.lend("r.example", &user());
        fetch(&client, "127.0.0.1:1", &user()).await.unwrap_err();
        assert!(!was_shown_one(&mirror), "another registry's");
        assert_eq!(fetch(&client, "r.example", &user()).await.unwrap(), BODY);
        assert!(was_shown_one(&mirror));
    }
}
