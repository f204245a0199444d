//! Preheat orders for nodes: a seed makes, then nodes fetch.

use darter_daemon::tasks::Tasks;
use darter_identity::Identity;
use darter_identity::attend::{Attendance, FetchOrder, PreheatCommand, PreheatUpdate, attend};
use darter_types::Role;
use serde_json::{Value, json};

use crate::preheats::{GRACE, order, seed, state, update};
use crate::rest::Rest;
use crate::world::{World, hello, soon};

/// Attends until `tasks` stop; a seed is there already.
pub(crate) async fn attending(world: &World, identity: &Identity, tasks: &Tasks) -> Attendance {
    let mut attendance = attend(identity, world.address(), hello("node"), tasks);
    let told = attendance.members.wait_for(|members| !members.seeds.is_empty());
    soon("the node attends", told).await.unwrap();
    attendance
}

pub(crate) async fn fetch(node: &mut Attendance) -> FetchOrder {
    match order(node).await {
        PreheatCommand::Fetch(order) => order,
        other => panic!("{other:?} came instead of an order to fetch"),
    }
}

fn target<'a>(body: &'a Value, node: &str) -> &'a Value {
    let targets = body["targets"].as_array().unwrap();
    targets.iter().find(|target| target["node"] == node).unwrap_or_else(|| panic!("no {node} in {body}"))
}

async fn ordered(rest: &Rest, scope: Value) -> Value {
    let body = json!({
        "image": "r.example/a:1", "scope": scope, "username": "u", "password": "hidden-word"
    });
    let (status, made) = rest.post("/api/v1/preheats", body).await;
    assert_eq!(status, 201, "{made}");
    made
}

async fn made_by(seed: &mut Attendance) {
    let PreheatCommand::Start { id, credential, .. } = order(seed).await else { panic!("no order") };
    assert!(credential.is_some());
    seed.updates.send(update(&id, 10, true)).await.unwrap();
}

#[tokio::test]
async fn nodes_fetch_what_a_seed_has_made_and_see_no_credential() {
    let (world, tasks) = (World::new().await, Tasks::new());
    let mut seed = seed(&world, "seed-1", &tasks).await;
    let identities = [world.join(Role::Node, "node-1").await, world.join(Role::Node, "node-2").await];
    world.join(Role::Node, "node-3").await;
    let mut nodes =
        [attending(&world, &identities[0], &tasks).await, attending(&world, &identities[1], &tasks).await];
    let rest = Rest::new(&world);
    let made = ordered(&rest, json!("all-nodes")).await;
    assert_eq!((made["targets"].as_array().unwrap().len(), &made["away"]), (3, &json!(["node-3"])));
    assert!(made["targets"][0]["node"].is_null() && target(&made, "node-1")["state"] == "pending", "{made}");
    let id = made["id"].as_str().unwrap();
    made_by(&mut seed).await;
    for node in &mut nodes {
        let order = fetch(node).await;
        assert_eq!((order.image.as_str(), order.layers.len()), ("r.example/a:1", 1));
        assert_eq!(order.layers[0].source.repository.to_string(), "https://r.example/a");
        assert!((3500..=3610).contains(&order.life.as_secs()), "{:?}", order.life);
        node.updates.send(update(&order.id, 4, false)).await.unwrap();
        node.updates.send(update(&order.id, 10, true)).await.unwrap();
    }
    let body = state(&rest, id, |body| body["state"] == "succeeded").await;
    assert_eq!(target(&body, "node-2")["layers"][0]["read"], 10);
}

#[tokio::test]
async fn nodes_of_an_image_that_no_seed_can_make_fail_with_its_words() {
    let (world, tasks) = (World::new().await, Tasks::new());
    let mut seed = seed(&world, "seed-1", &tasks).await;
    let identity = world.join(Role::Node, "node-1").await;
    let _node = attending(&world, &identity, &tasks).await;
    let rest = Rest::new(&world);
    let made = ordered(&rest, json!({ "nodes": ["node-1"] })).await;
    let PreheatCommand::Start { id, .. } = order(&mut seed).await else { panic!("no order") };
    seed.updates.send(PreheatUpdate::failed(&id, "404 not found")).await.unwrap();
    let body = state(&rest, made["id"].as_str().unwrap(), |body| body["state"] == "failed").await;
    assert_eq!(target(&body, "node-1")["error"], "no seed has made it: 404 not found");
}

#[tokio::test]
async fn cancelled_order_is_cancelled_at_the_node() {
    let (world, tasks) = (World::new().await, Tasks::new());
    let mut seed = seed(&world, "seed-1", &tasks).await;
    let identity = world.join(Role::Node, "node-1").await;
    let mut node = attending(&world, &identity, &tasks).await;
    let rest = Rest::new(&world);
    let made = ordered(&rest, json!({ "percent-of-nodes": 1 })).await;
    made_by(&mut seed).await;
    let order_id = fetch(&mut node).await.id;
    let (status, body) = rest.delete(&format!("/api/v1/preheats/{}", made["id"].as_str().unwrap())).await;
    assert_eq!((status, &target(&body, "node-1")["state"]), (200, &json!("cancelled")));
    let PreheatCommand::Cancel { id } = order(&mut node).await else { panic!("another order came") };
    assert_eq!(id, order_id);
}

#[tokio::test]
async fn order_of_a_node_outlives_it_and_the_manager() {
    let (world, tasks) = (World::new().await, Tasks::new());
    let mut seed = seed(&world, "seed-1", &tasks).await;
    let identity = world.join(Role::Node, "node-1").await;
    let first = Tasks::new();
    let mut before = attending(&world, &identity, &first).await;
    let rest = Rest::new(&world);
    let made = ordered(&rest, json!({ "members": { "seeds": ["seed-1"], "nodes": ["node-1"] } })).await;
    let id = made["id"].as_str().unwrap();
    made_by(&mut seed).await;
    let given = fetch(&mut before).await;
    first.stop(GRACE).await;
    let words = |body: &Value| target(body, "node-1")["error"].as_str().unwrap_or_default().to_owned();
    let body = state(&rest, id, |body| words(body).contains("left while it had the order")).await;
    assert_eq!(target(&body, "node-1")["state"], "pending");
    // What the seed needed a credential for is done: the order goes on also after the manager has forgotten that.
    let world = world.restart().await;
    let rest = Rest::new(&world);
    let mut after = attending(&world, &identity, &tasks).await;
    let again = fetch(&mut after).await;
    assert_eq!((again.id.as_str(), &again.layers), (given.id.as_str(), &given.layers));
    after.updates.send(update(&again.id, 10, true)).await.unwrap();
    let body = state(&rest, id, |body| body["state"] == "succeeded").await;
    assert_eq!(target(&body, "node-1")["error"], Value::Null);
}
