//! Preheat orders, from the API to a seed and back.

use darter_daemon::tasks::Tasks;
use darter_identity::attend::{Attendance, PreheatCommand, PreheatLayer, PreheatUpdate, attend};
use darter_types::{BlobDigest, DiffId, Digest, Role};
use serde_json::{Value, json};

use crate::rest::Rest;
use crate::world::{World, hello, soon};

const GRACE: std::time::Duration = std::time::Duration::from_secs(5);

async fn seed(world: &World, name: &str, tasks: &Tasks) -> Attendance {
    let identity = world.join(Role::Seed, name).await;
    let mut attendance = attend(&identity, world.address(), hello(name), tasks);
    let listed =
        attendance.members.wait_for(|members| members.seeds.iter().any(|seed| seed.node.as_str() == name));
    soon("a seed being listed", listed).await.unwrap();
    attendance
}

async fn order(attendance: &mut Attendance) -> PreheatCommand {
    soon("an order", attendance.preheats.recv()).await.unwrap()
}

fn start(command: PreheatCommand) -> (String, String, bool) {
    match command {
        PreheatCommand::Start { id, image, credential, .. } => (id, image, credential.is_some()),
        PreheatCommand::Cancel { .. } => panic!("a cancel came instead of an order"),
    }
}

fn update(id: &str, read: u64, done: bool) -> PreheatUpdate {
    let digest = Digest::of(b"layer");
    let layer =
        PreheatLayer { diff_id: DiffId(digest), blob: BlobDigest(digest), size: 10, read, done, error: None };
    PreheatUpdate { id: id.to_owned(), layers: vec![layer], done, error: None }
}

async fn state(rest: &Rest, id: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let path = format!("/api/v1/preheats/{id}");
    let reached = async {
        loop {
            let (status, body) = rest.get(&path).await;
            assert_eq!(status, 200, "{body}");
            if wanted(&body) {
                return body;
            }
        }
    };
    soon("the state", reached).await
}

#[tokio::test]
async fn order_waits_for_a_seed_and_is_followed_to_its_end() {
    let (world, tasks) = (World::new().await, Tasks::new());
    let rest = Rest::new(&world);
    let body = json!({ "image": "r.example/a:1", "username": "u", "password": "hidden-word" });
    let (status, made) = rest.post("/api/v1/preheats", body).await;
    assert_eq!((status, made["state"].as_str()), (201, Some("pending")));
    let mut seed = seed(&world, "seed-1", &tasks).await;
    let command = order(&mut seed).await;
    assert!(!format!("{command:?}").contains("hidden-word"));
    let (id, image, credential) = start(command);
    assert_eq!((made["id"].as_str(), image.as_str(), credential), (Some(id.as_str()), "r.example/a:1", true));
    seed.updates.send(update(&id, 4, false)).await.unwrap();
    let body = state(&rest, &id, |body| body["layers"][0]["read"] == 4).await;
    assert_eq!((body["state"].as_str(), body["seed"].as_str()), (Some("running"), Some("seed-1")));
    seed.updates.send(update(&id, 10, true)).await.unwrap();
    let body = state(&rest, &id, |body| body["state"] == "succeeded").await;
    assert_eq!(body["layers"][0]["done"], true);
}

#[tokio::test]
async fn order_goes_to_another_seed_when_one_fails_or_leaves() {
    let world = World::new().await;
    let tasks = [Tasks::new(), Tasks::new(), Tasks::new()];
    let mut seeds = Vec::new();
    for (number, tasks) in tasks.iter().enumerate() {
        seeds.push(seed(&world, &format!("seed-{number}"), tasks).await);
    }
    let rest = Rest::new(&world);
    let (_, made) = rest.post("/api/v1/preheats", json!({ "image": "r.example/a:1" })).await;
    let id = made["id"].as_str().unwrap();
    let number = |body: &Value| body["seed"].as_str().unwrap()["seed-".len()..].parse::<usize>().unwrap();
    let first = number(&state(&rest, id, |body| body["state"] == "running").await);
    start(order(&mut seeds[first]).await);
    let failure =
        PreheatUpdate { id: id.to_owned(), done: true, error: Some("disk full".to_owned()), layers: vec![] };
    seeds[first].updates.send(failure).await.unwrap();
    let is_other = |body: &Value, not: &[usize]| body["state"] == "running" && !not.contains(&number(body));
    let second = number(&state(&rest, id, |body| is_other(body, &[first])).await);
    start(order(&mut seeds[second]).await);
    tasks[second].clone().stop(GRACE).await;
    let third = number(&state(&rest, id, |body| is_other(body, &[first, second])).await);
    start(order(&mut seeds[third]).await);
    seeds[third].updates.send(update(id, 10, true)).await.unwrap();
    state(&rest, id, |body| body["state"] == "succeeded").await;
}

#[tokio::test]
async fn cancelled_order_is_cancelled_at_the_seed() {
    let (world, tasks) = (World::new().await, Tasks::new());
    let mut seed = seed(&world, "seed-1", &tasks).await;
    let rest = Rest::new(&world);
    let (_, made) = rest.post("/api/v1/preheats", json!({ "image": "r.example/a:1" })).await;
    let (id, ..) = start(order(&mut seed).await);
    assert_eq!(made["id"], id.as_str());
    let (status, body) = rest.delete(&format!("/api/v1/preheats/{id}")).await;
    assert_eq!(
        (status, body["state"].as_str(), body["error"].as_str()),
        (200, Some("failed"), Some("cancelled"))
    );
    let PreheatCommand::Cancel { id: cancelled } = order(&mut seed).await else {
        panic!("another order came")
    };
    assert_eq!(cancelled, id);
}

#[tokio::test]
async fn restart_goes_on_with_public_orders_and_ends_private_ones() {
    let world = World::new().await;
    let rest = Rest::new(&world);
    let (_, public) = rest.post("/api/v1/preheats", json!({ "image": "r.example/public:1" })).await;
    let secret = json!({ "image": "r.example/private:1", "username": "u", "password": "p" });
    let (_, private) = rest.post("/api/v1/preheats", secret).await;
    let world = world.restart().await;
    let (rest, tasks) = (Rest::new(&world), Tasks::new());
    let body = state(&rest, private["id"].as_str().unwrap(), |body| body["state"] == "failed").await;
    assert!(body["error"].as_str().unwrap().contains("order it again"), "{body}");
    let mut seed = seed(&world, "seed-1", &tasks).await;
    assert_eq!(start(order(&mut seed).await).0, public["id"].as_str().unwrap());
}
