//! The REST API: who may use it, and how it answers.

use std::sync::atomic::{AtomicU32, Ordering};

use darter_daemon::numbers::Listen;
use serde_json::{Value, json};

use crate::world::World;

pub(crate) struct Rest {
    client: reqwest::Client,
    base: String,
    token: String,
}

impl Rest {
    pub(crate) fn new(world: &World) -> Self {
        let base = format!("http://{}", world.manager.http_address());
        Self { client: reqwest::Client::new(), base, token: world.manager.api_token().to_owned() }
    }

    /// The same API, with another token.
    pub(crate) fn with(&self, token: &str) -> Self {
        Self { client: self.client.clone(), base: self.base.clone(), token: token.to_owned() }
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> (u16, Value) {
        let response = request.bearer_auth(&self.token).send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, Value) {
        self.send(self.client.get(format!("{}{path}", self.base))).await
    }

    pub(crate) async fn delete(&self, path: &str) -> (u16, Value) {
        self.send(self.client.delete(format!("{}{path}", self.base))).await
    }

    pub(crate) async fn put(&self, path: &str, body: Value) -> (u16, Value) {
        self.send(self.client.put(format!("{}{path}", self.base)).json(&body)).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.send(self.client.post(format!("{}{path}", self.base)).json(&body)).await
    }
}

/// Nobody takes a table away, but a disk may.
#[tokio::test]
async fn it_is_ready_while_its_database_answers() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut world = World::new().await;
    world.config.metrics_listen = Listen(Some(free));
    let world = world.restart().await;
    let readyz = async || {
        let answer = reqwest::get(format!("http://{free}/readyz")).await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    assert_eq!(readyz().await, (200, "ready\n".to_owned()));
    let database = rusqlite::Connection::open(world.config.root.join("manager.db")).unwrap();
    database.execute_batch("ALTER TABLE api_tokens RENAME TO away").unwrap();
    let (status, words) = readyz().await;
    assert_eq!(status, 503, "{words}");
    assert!(words.starts_with("not ready: the database: no such table"), "{words}");
    database.execute_batch("ALTER TABLE away RENAME TO api_tokens").unwrap();
    assert_eq!(readyz().await.0, 200);
}

#[tokio::test]
async fn only_healthy_is_open() {
    let world = World::new().await;
    let mut rest = Rest::new(&world);
    assert_eq!(rest.get("/api/v1/nodes").await.0, 200);
    rest.token = "wrong".to_owned();
    assert_eq!(rest.get("/healthy").await.0, 200);
    for path in ["/api/v1/nodes", "/api/v1/preheats/1", "/api/v1/nothing"] {
        let (status, body) = rest.get(path).await;
        assert_eq!(status, 401, "{path}");
        assert!(body["error"].as_str().unwrap().contains("api-token"), "{body}");
    }
    let bare = rest.client.get(format!("{}/api/v1/nodes", rest.base)).send().await.unwrap();
    assert_eq!(bare.status(), 401);
    assert!(bare.headers().contains_key("www-authenticate"));
}

#[tokio::test]
async fn first_token_is_in_its_private_file_and_stays_over_a_restart() {
    use std::os::unix::fs::PermissionsExt;
    let world = World::new().await;
    let file = world.config.root.join("api-token");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let before = std::fs::read_to_string(&file).unwrap();
    assert_eq!(before.trim(), world.manager.api_token());
    let world = world.restart().await;
    assert_eq!(before.trim(), world.manager.api_token());
    assert_eq!(Rest::new(&world).get("/api/v1/nodes").await.0, 200);
}

#[tokio::test]
async fn secrets_are_not_in_the_database() {
    let world = World::new().await;
    let token = world.token(darter_types::Role::Node);
    let (secret, api_token) = (token.secret, world.manager.api_token().to_owned());
    let (root, folder) = (world.config.root.clone(), world.folder);
    world.manager.stop().await;
    for file in ["manager.db", "manager.db-wal"] {
        let Ok(bytes) = std::fs::read(root.join(file)) else { continue };
        let holds = |wanted: &[u8]| bytes.windows(wanted.len()).any(|window| window == wanted);
        assert!(!holds(&secret) && !holds(api_token.as_bytes()), "{file} holds a secret");
    }
    drop(folder);
}

#[tokio::test]
async fn mistakes_are_told_apart_in_json() {
    let world = World::new().await;
    let rest = Rest::new(&world);
    let words = |answer: (u16, Value)| (answer.0, answer.1["error"].as_str().unwrap().to_owned());
    assert_eq!(words(rest.get("/api/v1/nothing").await).0, 404);
    assert_eq!(words(rest.get("/nothing").await).0, 404);
    assert_eq!(words(rest.get("/api/v1/preheats/none").await).0, 404);
    assert_eq!(words(rest.delete("/api/v1/preheats/none").await).0, 404);
    assert_eq!(words(rest.delete("/api/v1/nodes/node/none").await).0, 404);
    assert_eq!(words(rest.delete("/api/v1/nodes").await).0, 405);
    assert_eq!(words(rest.delete("/healthy").await).0, 405);
    for body in [
        json!({}),
        json!({ "image": "" }),
        json!({ "image": "https://r.example/a" }),
        json!({ "image": "r.example/a", "extra": 1 }),
        json!({ "image": "r.example/a", "username": "u" }),
        json!({ "image": "r.example/a", "platform": "linux" }),
    ] {
        let (status, words) = words(rest.post("/api/v1/preheats", body.clone()).await);
        assert_eq!(status, 400, "{body}");
        assert!(!words.is_empty());
    }
}

#[tokio::test]
async fn join_token_over_rest_makes_a_member() {
    let world = World::new().await;
    let rest = Rest::new(&world);
    let order = json!({ "role": "node", "ttl_seconds": 60, "uses": 1 });
    let (status, body) = rest.post("/api/v1/join-tokens", order).await;
    assert_eq!(status, 201);
    let token = body["token"].as_str().unwrap().parse().unwrap();
    world.try_join(&token, "node-1").await.unwrap();
    for bad in [
        json!({ "role": "manager", "ttl_seconds": 60 }),
        json!({ "role": "king", "ttl_seconds": 60 }),
        json!({ "role": "node", "ttl_seconds": 0 }),
        json!({ "role": "node", "ttl_seconds": u64::MAX }),
        json!({ "role": "node", "ttl_seconds": 60, "uses": 0 }),
    ] {
        assert_eq!(rest.post("/api/v1/join-tokens", bad.clone()).await.0, 400, "{bad}");
    }
}

async fn api_token(rest: &Rest, role: &str, scopes: &[&str], ttl_seconds: u64) -> (String, String) {
    static MADE: AtomicU32 = AtomicU32::new(0);
    let name = format!("test-{}", MADE.fetch_add(1, Ordering::Relaxed));
    let body = json!({ "name": name, "role": role, "scopes": scopes, "ttl_seconds": ttl_seconds });
    let (status, made) = rest.post("/api/v1/api-tokens", body).await;
    assert_eq!(status, 201, "{made}");
    (made["id"].as_str().unwrap().to_owned(), made["token"].as_str().unwrap().to_owned())
}

#[tokio::test]
async fn token_opens_what_its_role_and_scopes_name() {
    let world = World::new().await;
    let rest = Rest::new(&world);
    let image = || json!({ "image": "r.example/a:1" });
    let reader = rest.with(&api_token(&rest, "reader", &["preheats"], 60).await.1);
    let operator = rest.with(&api_token(&rest, "operator", &[], 60).await.1);
    assert_eq!(reader.post("/api/v1/preheats", image()).await.0, 403);
    let (status, made) = operator.post("/api/v1/preheats", image()).await;
    assert_eq!(status, 201);
    let path = format!("/api/v1/preheats/{}", made["id"].as_str().unwrap());
    assert_eq!(reader.get(&path).await.0, 200);
    assert_eq!(reader.delete(&path).await.0, 403);
    assert_eq!(reader.get("/api/v1/nodes").await.0, 403);
    assert_eq!(operator.get("/api/v1/nodes").await.0, 200);
    for (path, body) in [
        ("/api/v1/api-tokens", json!({ "name": "more", "role": "admin" })),
        ("/api/v1/join-tokens", json!({ "role": "node", "ttl_seconds": 60 })),
    ] {
        let (status, body) = operator.post(path, body).await;
        assert_eq!(status, 403);
        assert!(body["error"].as_str().unwrap().contains("admin"), "{body}");
    }
}

#[tokio::test]
async fn second_token_of_a_name_is_a_conflict() {
    let world = World::new().await;
    let rest = Rest::new(&world);
    let order = || json!({ "name": "ci", "role": "reader" });
    assert_eq!(rest.post("/api/v1/api-tokens", order()).await.0, 201);
    let (status, body) = rest.post("/api/v1/api-tokens", order()).await;
    assert_eq!(status, 409);
    assert!(body["error"].as_str().unwrap().contains("API token ci already"), "{body}");
}

#[tokio::test]
async fn token_makes_no_better_one() {
    let world = World::new().await;
    let rest = Rest::new(&world);
    let narrow = rest.with(&api_token(&rest, "admin", &["api-tokens"], 3600).await.1);
    for more in [
        json!({ "name": "n", "role": "admin" }),
        json!({ "name": "n", "role": "reader", "scopes": ["nodes"] }),
        json!({ "name": "n", "role": "reader", "scopes": ["api-tokens"], "ttl_seconds": 7200 }),
    ] {
        assert_eq!(narrow.post("/api/v1/api-tokens", more.clone()).await.0, 403, "{more}");
    }
    let (id, _) = api_token(&narrow, "reader", &["api-tokens"], 60).await;
    assert_eq!(narrow.delete(&format!("/api/v1/api-tokens/{id}")).await.0, 200);
}

#[tokio::test]
async fn token_removes_neither_itself_nor_a_better_one() {
    let world = World::new().await;
    let rest = Rest::new(&world);
    let (own, token) = api_token(&rest, "admin", &["api-tokens"], 3600).await;
    let (_, listed) = rest.get("/api/v1/api-tokens").await;
    let first = listed["tokens"][0]["id"].as_str().unwrap();
    let narrow = rest.with(&token);
    assert_eq!(narrow.delete(&format!("/api/v1/api-tokens/{first}")).await.0, 403);
    assert_eq!(narrow.delete(&format!("/api/v1/api-tokens/{own}")).await.0, 409);
    assert_eq!(rest.delete(&format!("/api/v1/api-tokens/{first}")).await.0, 409);
}

#[tokio::test]
async fn removed_and_expired_tokens_are_refused() {
    let world = World::new().await;
    let rest = Rest::new(&world);
    let (id, token) = api_token(&rest, "reader", &[], 60).await;
    assert_eq!(rest.with(&token).get("/api/v1/nodes").await.0, 200);
    let (_, listed) = rest.get("/api/v1/api-tokens").await;
    assert_eq!(listed["tokens"].as_array().unwrap().len(), 2);
    assert!(!listed.to_string().contains(&token));
    assert_eq!(rest.delete(&format!("/api/v1/api-tokens/{id}")).await.0, 200);
    assert_eq!(rest.with(&token).get("/api/v1/nodes").await.0, 401);
    assert_eq!(rest.delete(&format!("/api/v1/api-tokens/{id}")).await.0, 404);
    let short = rest.with(&api_token(&rest, "reader", &[], 1).await.1);
    let refused = async {
        loop {
            let (status, body) = short.get("/api/v1/nodes").await;
            if status == 401 {
                return body;
            }
        }
    };
    let body = crate::world::soon("the token's end", refused).await;
    assert!(body["error"].as_str().unwrap().contains("expired"), "{body}");
}

#[tokio::test]
async fn bodies_without_end_are_refused_in_json() {
    let world = World::new().await;
    let rest = Rest::new(&world);
    let (status, body) = rest.post("/api/v1/preheats", json!({ "image": "a".repeat(3 << 20) })).await;
    assert_eq!(status, 413);
    assert!(body["error"].is_string(), "{body}");
}

#[tokio::test]
async fn document_is_open_and_the_same_as_in_the_docs() {
    let world = World::new().await;
    let (status, body) = Rest::new(&world).with("none").get("/api/v1/openapi.json").await;
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");
    let written: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    assert_eq!((status, body), (200, written));
}
