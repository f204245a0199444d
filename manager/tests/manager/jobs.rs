//! Jobs in Harbor's words, from its request to the tables that it shows.

use darter_daemon::tasks::Tasks;
use darter_identity::attend::{PreheatCommand, PreheatUpdate};
use darter_proto::v1::credential::Kind;
use darter_types::Role;
use serde_json::{Value, json};

use crate::nodes::{attending, fetch};
use crate::preheats::{order, seed, update};
use crate::rest::Rest;
use crate::world::{World, soon};

const JOBS: &str = "/oapi/v1/jobs";

fn request(scope: &str) -> Value {
    json!({
        "type": "preheat",
        "args": {
            "type": "image", "url": "https://harbor.example/v2/library/app/manifests/v1", "tag": "",
            "filtered_query_params": "", "headers": { "Authorization": "Bearer pull-token" },
            "scope": scope, "concurrent_count": 0, "timeout": 0
        },
        "scheduler_cluster_ids": null
    })
}

async fn over(rest: &Rest, id: &Value) -> Value {
    let polled = async {
        loop {
            let (status, job) = rest.get(&format!("{JOBS}/{id}")).await;
            assert_eq!(status, 200, "{job}");
            if job["state"] != "PENDING" {
                return job;
            }
        }
    };
    soon("the end of the job", polled).await
}

#[tokio::test]
async fn job_is_pending_until_its_layers_are_there_and_then_a_table() {
    let (world, tasks) = (World::new().await, Tasks::new());
    let mut seed = seed(&world, "seed-1", &tasks).await;
    let rest = Rest::new(&world);
    let (status, job) = rest.post(JOBS, request("single_seed_peer")).await;
    assert_eq!((status, &job["state"], &job["result"]), (200, &json!("PENDING"), &Value::Null));
    assert!(job["id"].is_u64() && !job.to_string().contains("pull-token"), "{job}");
    for time in ["created_at", "updated_at"] {
        assert!(job[time].as_str().unwrap().ends_with('Z'), "{job}");
    }
    let PreheatCommand::Start { id, image, credential, .. } = order(&mut seed).await else {
        panic!("no order")
    };
    assert_eq!(image, "harbor.example/library/app:v1");
    assert_eq!(credential.unwrap().kind, Some(Kind::Bearer("pull-token".to_owned())));
    seed.updates.send(update(&id, 10, true)).await.unwrap();
    let job = over(&rest, &job["id"]).await;
    let state = &job["result"]["job_states"][0];
    let table = &state["results"][0];
    assert_eq!(
        (&job["state"], &state["state"], &state["error"]),
        (&json!("SUCCESS"), &json!("SUCCESS"), &json!(""))
    );
    let line = &table["success_tasks"][0];
    assert_eq!((&line["hostname"], &table["failure_tasks"]), (&json!("seed-1"), &json!([])));
    assert!(line["url"].as_str().unwrap().starts_with("https://harbor.example/v2/library/app/blobs/sha256:"));
}

#[tokio::test]
async fn job_that_fails_says_where_and_why() {
    let (world, tasks) = (World::new().await, Tasks::new());
    let mut seed = seed(&world, "seed-1", &tasks).await;
    let rest = Rest::new(&world);
    let (_, job) = rest.post(JOBS, request("all_seed_peers")).await;
    let PreheatCommand::Start { id, .. } = order(&mut seed).await else { panic!("no order") };
    seed.updates.send(PreheatUpdate::failed(&id, "404 not found")).await.unwrap();
    let job = over(&rest, &job["id"]).await;
    let state = &job["result"]["job_states"][0];
    assert_eq!((&job["state"], &state["error"]), (&json!("FAILURE"), &json!("404 not found")));
    let line = &state["results"][0]["failure_tasks"][0];
    assert_eq!((&line["hostname"], &line["description"]), (&json!("seed-1"), &json!("404 not found")));
}

#[tokio::test]
async fn all_peers_are_all_seeds_and_the_nodes_that_there_are() {
    let (world, tasks) = (World::new().await, Tasks::new());
    let mut seeds = [seed(&world, "seed-1", &tasks).await, seed(&world, "seed-2", &tasks).await];
    let rest = Rest::new(&world);
    let node = world.join(Role::Node, "node-1").await;
    for has_node in [false, true] {
        let mut node = if has_node { Some(attending(&world, &node, &tasks).await) } else { None };
        let (status, job) = rest.post(JOBS, request("all_peers")).await;
        assert_eq!(status, 200, "{job}");
        for seed in &mut seeds {
            let PreheatCommand::Start { id, .. } = order(seed).await else { panic!("no order") };
            seed.updates.send(update(&id, 10, true)).await.unwrap();
        }
        let mut names = vec!["seed-1", "seed-2"];
        if let Some(node) = &mut node {
            let id = fetch(node).await.id;
            node.updates.send(update(&id, 10, true)).await.unwrap();
            names.insert(0, "node-1");
        }
        let job = over(&rest, &job["id"]).await;
        let table = &job["result"]["job_states"][0]["results"][0];
        let lines = table["success_tasks"].as_array().unwrap();
        let mut ready: Vec<_> = lines.iter().map(|line| line["hostname"].as_str().unwrap()).collect();
        ready.sort_unstable();
        assert_eq!((&job["state"], ready), (&json!("SUCCESS"), names), "{job}");
    }
}

#[tokio::test]
async fn jobs_that_can_not_be_done_are_refused() {
    let world = World::new().await;
    let rest = Rest::new(&world);
    let mut file = request("single_seed_peer");
    file["args"]["type"] = json!("file");
    for (body, wanted) in [
        (request("all_peers"), 409),
        (request("all_seed_peers"), 409),
        (file, 422),
        (json!({ "type": "gc" }), 422),
        (json!([]), 400),
    ] {
        assert_eq!(rest.post(JOBS, body.clone()).await.0, wanted, "{body}");
    }
    assert_eq!(rest.get(&format!("{JOBS}/99")).await.0, 404);
    assert_eq!(rest.get(&format!("{JOBS}/x")).await.0, 400);
    assert_eq!(rest.with("wrong").post(JOBS, request("single_seed_peer")).await.0, 401);
}

/// A database that takes every order, and no job.
#[tokio::test]
async fn order_whose_job_can_not_be_written_is_cancelled() {
    let world = World::new().await;
    let refuses = "CREATE TRIGGER no_jobs BEFORE INSERT ON jobs BEGIN SELECT RAISE(ABORT, 'no jobs'); END";
    let database = rusqlite::Connection::open(world.config.root.join("manager.db")).unwrap();
    database.execute_batch(refuses).unwrap();
    let rest = Rest::new(&world);
    assert_eq!(rest.post(JOBS, request("single_seed_peer")).await.0, 500);
    let (_, all) = rest.get("/api/v1/preheats").await;
    let states: Vec<_> = all["preheats"].as_array().unwrap().iter().map(|order| &order["state"]).collect();
    assert_eq!(states, ["cancelled"], "{all}");
}

#[tokio::test]
async fn harbor_may_show_its_token_as_a_password() {
    let world = World::new().await;
    let basic = |password: &str| {
        let url = format!("http://{}{JOBS}/1", world.manager.http_address());
        reqwest::Client::new().get(url).basic_auth("harbor", Some(password.to_owned())).send()
    };
    assert_eq!(basic(world.manager.api_token()).await.unwrap().status(), 404);
    assert_eq!(basic("wrong").await.unwrap().status(), 401);
}
