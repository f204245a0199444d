//! The REST API: who may use it, and how it answers.

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

    pub(crate) async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.send(self.client.post(format!("{}{path}", self.base)).json(&body)).await
    }
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
