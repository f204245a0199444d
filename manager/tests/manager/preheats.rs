//! Preheat orders, from the API to a seed and back.

use darter_daemon::tasks::Tasks;
use darter_identity::attend::{Attendance, PreheatCommand, PreheatLayer, PreheatUpdate, attend};
use darter_types::{BlobDigest, DiffId, Digest, Role};
use serde_json::{Value, json};

use crate::rest::Rest;
use crate::world::{World, hello, soon};

pub(crate) const GRACE: std::time::Duration = std::time::Duration::from_secs(5);

pub(crate) async fn seed(world: &World, name: &str, tasks: &Tasks) -> Attendance {
    let identity = world.join(Role::Seed, name).await;
    let mut attendance = attend(&identity, world.address(), hello(name), tasks);
    let listed =
        attendance.members.wait_for(|members| members.seeds.iter().any(|seed| seed.node.as_str() == name));
    soon("a seed being listed", listed).await.unwrap();
    attendance
}

pub(crate) async fn order(attendance: &mut Attendance) -> PreheatCommand {
    soon("an order", attendance.preheats.recv()).await.unwrap()
}

fn start(command: PreheatCommand) -> (String, String, bool) {
    match command {
        PreheatCommand::Start { id, image, credential, .. } => (id, image, credential.is_some()),
        PreheatCommand::Fetch(_) => panic!("a node's order came to a seed"),
        PreheatCommand::Cancel { .. } => panic!("a cancel came instead of an order"),
    }
}

pub(crate) fn update(id: &str, read: u64, done: bool) -> PreheatUpdate {
    let digest = Digest::of(b"layer");
    let layer =
        PreheatLayer { diff_id: DiffId(digest), blob: BlobDigest(digest), size: 10, read, done, error: None };
    let repository = Some("https://r.example/a".parse().unwrap());
    PreheatUpdate { id: id.to_owned(), layers: vec![layer], done, error: None, repository }
}

pub(crate) async fn state(rest: &Rest, id: &str, wanted: impl Fn(&Value) -> bool) -> Value {
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
    let order = made["id"].as_str().unwrap();
    assert_eq!((id.as_str(), image.as_str(), credential), (&*format!("{order}.0"), "r.example/a:1", true));
    seed.updates.send(update(&id, 4, false)).await.unwrap();
    let body = state(&rest, order, |body| body["layers"][0]["read"] == 4).await;
    assert_eq!((body["state"].as_str(), body["seed"].as_str()), (Some("running"), Some("seed-1")));
    seed.updates.send(update(&id, 10, true)).await.unwrap();
    let body = state(&rest, order, |body| body["state"] == "succeeded").await;
    assert_eq!(
        (&body["layers"][0]["done"], &body["targets"][0]["layers"][0]["done"]),
        (&json!(true), &json!(true))
    );
    assert!(body["ended_at"].is_string(), "{body}");
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
    let part = format!("{id}.0");
    seeds[first].updates.send(PreheatUpdate::failed(&part, "disk full")).await.unwrap();
    let is_other = |body: &Value, not: &[usize]| body["state"] == "running" && !not.contains(&number(body));
    let second = number(&state(&rest, id, |body| is_other(body, &[first])).await);
    start(order(&mut seeds[second]).await);
    tasks[second].clone().stop(GRACE).await;
    let third = number(&state(&rest, id, |body| is_other(body, &[first, second])).await);
    start(order(&mut seeds[third]).await);
    seeds[third].updates.send(update(&part, 10, true)).await.unwrap();
    state(&rest, id, |body| body["state"] == "succeeded").await;
}

#[tokio::test]
async fn cancelled_order_is_cancelled_at_the_seed() {
    let (world, tasks) = (World::new().await, Tasks::new());
    let mut seed = seed(&world, "seed-1", &tasks).await;
    let rest = Rest::new(&world);
    let (_, made) = rest.post("/api/v1/preheats", json!({ "image": "r.example/a:1" })).await;
    let (id, ..) = start(order(&mut seed).await);
    let (status, body) = rest.delete(&format!("/api/v1/preheats/{}", made["id"].as_str().unwrap())).await;
    assert_eq!((status, body["state"].as_str()), (200, Some("cancelled")));
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
    assert_eq!(start(order(&mut seed).await).0, format!("{}.0", public["id"].as_str().unwrap()));
}

#[tokio::test]
async fn images_go_to_all_seeds_and_each_target_has_a_state() {
    let (world, tasks) = (World::new().await, Tasks::new());
    let mut seeds = [seed(&world, "seed-1", &tasks).await, seed(&world, "seed-2", &tasks).await];
    let rest = Rest::new(&world);
    let body = json!({ "images": ["r.example/a:1", "r.example/b:1"], "scope": "all-seeds" });
    let (status, made) = rest.post("/api/v1/preheats", body).await;
    assert_eq!((status, made["targets"].as_array().map(Vec::len)), (201, Some(4)), "{made}");
    let id = made["id"].as_str().unwrap();
    for (number, seed) in seeds.iter_mut().enumerate() {
        for image in ["r.example/a:1", "r.example/b:1"] {
            let (part, given, _) = start(order(seed).await);
            assert_eq!(given, image);
            let failed = number == 1 && given == "r.example/b:1";
            let error = failed.then(|| "disk full".to_owned());
            let done = PreheatUpdate { error, ..update(&part, 10, true) };
            seed.updates.send(done).await.unwrap();
        }
    }
    let body = state(&rest, id, |body| body["state"] == "failed").await;
    assert_eq!(body["error"], "1 of 4 failed; r.example/b:1 at seed-2: disk full");
    let good = body["targets"].as_array().unwrap().iter().filter(|target| target["state"] == "succeeded");
    assert_eq!(good.count(), 3, "{body}");
    let (_, list) = rest.get("/api/v1/preheats").await;
    assert_eq!((&list["preheats"][0]["id"], &list["preheats"][0]["state"]), (&json!(id), &json!("failed")));
}

#[tokio::test]
async fn order_that_is_not_done_in_time_fails_and_its_seed_stops() {
    let (world, tasks) = (World::new().await, Tasks::new());
    let mut seed = seed(&world, "seed-1", &tasks).await;
    let rest = Rest::new(&world);
    let body = json!({ "image": "r.example/a:1", "timeout_seconds": 1 });
    let (_, made) = rest.post("/api/v1/preheats", body).await;
    let (part, ..) = start(order(&mut seed).await);
    let body = state(&rest, made["id"].as_str().unwrap(), |body| body["state"] == "failed").await;
    assert_eq!(body["error"], "not done within 1 s");
    let PreheatCommand::Cancel { id } = order(&mut seed).await else { panic!("another order came") };
    assert_eq!(id, part);
}

#[tokio::test]
async fn seed_has_a_few_parts_at_a_time_and_gets_the_next_when_one_is_done() {
    let (world, tasks) = (World::new().await, Tasks::new());
    let mut seed = seed(&world, "seed-1", &tasks).await;
    let rest = Rest::new(&world);
    let images: Vec<String> = (0..20).map(|number| format!("r.example/a:{number}")).collect();
    let (_, made) = rest.post("/api/v1/preheats", json!({ "images": images })).await;
    let running = |body: &Value| {
        body["targets"].as_array().unwrap().iter().filter(|target| target["state"] == "running").count()
    };
    assert_eq!(running(&made), 8);
    for _ in 0..20 {
        let (part, ..) = start(order(&mut seed).await);
        seed.updates.send(update(&part, 10, true)).await.unwrap();
    }
    state(&rest, made["id"].as_str().unwrap(), |body| body["state"] == "succeeded").await;
}

#[tokio::test]
async fn order_for_seeds_that_are_not_there_says_so() {
    let world = World::new().await;
    let rest = Rest::new(&world);
    let order = |scope: Value| json!({ "image": "r.example/a:1", "scope": scope });
    for (scope, wanted, words) in [
        (json!("all-seeds"), 409, "no seed attends"),
        (json!({ "seeds": ["seed-9"] }), 409, "seed-9"),
        (json!("all-nodes"), 409, "no node attends"),
        (json!({ "nodes": ["node-1"] }), 409, "no node \"node-1\""),
        (json!({ "members": {} }), 400, "1 to 100 names"),
        (json!({ "members": { "node": ["node-1"] } }), 400, "node"),
        (json!({ "percent": 0 }), 400, "percent"),
        (json!({ "percent": 300 }), 400, ""),
        (json!("everybody"), 400, "one-seed"),
    ] {
        let (status, body) = rest.post("/api/v1/preheats", order(scope)).await;
        assert_eq!(status, wanted, "{body}");
        assert!(body["error"].as_str().unwrap().contains(words), "{body}");
    }
    for wrong in [
        json!({ "image": "a", "images": ["b"] }),
        json!({ "images": [] }),
        json!({ "image": "a", "timeout_seconds": 0 }),
        json!({ "image": "a", "platform": null }),
    ] {
        assert_eq!(rest.post("/api/v1/preheats", wrong.clone()).await.0, 400, "{wrong}");
    }
}

#[tokio::test]
async fn listed_seed_that_is_away_gets_its_part_when_it_comes() {
    let (world, tasks) = (World::new().await, Tasks::new());
    let identity = world.join(Role::Seed, "seed-2").await;
    let mut other = seed(&world, "seed-1", &tasks).await;
    let rest = Rest::new(&world);
    let body = json!({ "image": "r.example/a:1", "scope": { "seeds": ["seed-1", "seed-2"] } });
    let (status, made) = rest.post("/api/v1/preheats", body).await;
    assert_eq!(status, 201, "{made}");
    let (part, ..) = start(order(&mut other).await);
    other.updates.send(update(&part, 10, true)).await.unwrap();
    let id = made["id"].as_str().unwrap();
    let body = state(&rest, id, |body| body["targets"][0]["state"] == "succeeded").await;
    assert_eq!((&body["state"], &body["targets"][1]["state"]), (&json!("running"), &json!("pending")));
    let mut late = attend(&identity, world.address(), hello("seed-2"), &tasks);
    let (part, ..) = start(order(&mut late).await);
    late.updates.send(update(&part, 10, true)).await.unwrap();
    state(&rest, id, |body| body["state"] == "succeeded").await;
}
