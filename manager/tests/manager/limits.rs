//! What members may move: set by REST, heard by whom it concerns, and remembered.

use std::time::Duration;

use darter_daemon::tasks::Tasks;
use darter_identity::attend::{SetRates, attend};
use darter_types::{RateKind, Rates, Role};
use serde_json::json;
use tokio::sync::watch;

use crate::rest::Rest;
use crate::world::{World, hello, soon};

async fn hears(limits: &mut watch::Receiver<SetRates>, cluster: Rates, member: Rates) {
    let heard = limits.wait_for(|limits| *limits == SetRates { cluster, member });
    soon(&format!("hearing of {cluster:?} and {member:?}"), heard).await.unwrap();
}

fn upload(rate: u64) -> Rates {
    Rates::default().with(RateKind::Upload, Some(rate))
}

#[tokio::test]
async fn limits_are_heard_by_whom_they_concern_and_remembered() {
    let (world, tasks) = (World::new().await, Tasks::new());
    let (seed, node) = (world.join(Role::Seed, "a").await, world.join(Role::Node, "a").await);
    let mut of_seed = attend(&seed, world.address(), hello("a:1"), &tasks).limits;
    let mut of_node = attend(&node, world.address(), hello("a:2"), &tasks).limits;
    let rest = Rest::new(&world);
    let set = json!({ "upload": 5_000_000, "download": null });
    let (status, body) = rest.put("/api/v1/limits", set).await;
    let shown = json!({ "upload": 5_000_000, "download": null, "registry": null, "background": null });
    assert_eq!((status, &body), (200, &shown));
    assert_eq!(rest.put("/api/v1/nodes/seed/a/limits", json!({ "upload": 0 })).await.0, 200);
    hears(&mut of_seed, upload(5_000_000), upload(0)).await;
    hears(&mut of_node, upload(5_000_000), Rates::default()).await;

    let world = world.restart().await;
    let rest = Rest::new(&world);
    assert_eq!(rest.get("/api/v1/limits").await, (200, shown));
    assert_eq!(rest.get("/api/v1/nodes/seed/a/limits").await.1["upload"], 0);
    assert_eq!(rest.get("/api/v1/nodes").await.1["nodes"][1]["limits"]["upload"], 0);
    assert_eq!(rest.put("/api/v1/limits", json!({})).await.0, 200);
    hears(&mut of_node, Rates::default(), Rates::default()).await;
    hears(&mut of_seed, Rates::default(), upload(0)).await;
}

#[tokio::test]
async fn limits_are_known_at_a_start_without_the_manager() {
    let (world, tasks) = (World::new().await, Tasks::new());
    let node = world.join(Role::Node, "node-1").await;
    let mut limits = attend(&node, world.address(), hello("n:1"), &tasks).limits;
    assert_eq!(Rest::new(&world).put("/api/v1/limits", json!({ "upload": 5_000_000 })).await.0, 200);
    hears(&mut limits, upload(5_000_000), Rates::default()).await;
    let file = world.folder.path().join("node-node-1/limits");
    let written = async {
        while !std::fs::read_to_string(&file).unwrap_or_default().contains("5000000") {
            tokio::task::yield_now().await;
        }
    };
    soon("writing it down", written).await;
    tasks.stop(Duration::from_secs(5)).await;
    let address = world.address();
    world.manager.stop().await;
    let limits = attend(&node, address, hello("n:1"), &Tasks::new()).limits;
    assert_eq!(limits.borrow().cluster, upload(5_000_000));
}

#[tokio::test]
async fn what_is_no_limit_is_refused() {
    let world = World::new().await;
    world.join(Role::Scheduler, "s").await;
    let rest = Rest::new(&world);
    for bad in
        [json!({ "upload": 1 }), json!({ "upload": -1 }), json!({ "up": 0 }), json!({ "upload": "5MB" })]
    {
        let (status, body) = rest.put("/api/v1/limits", bad.clone()).await;
        assert_eq!(status, 400, "{bad}: {body}");
    }
    for (path, wanted) in [("seed/s", 404), ("scheduler/s", 400), ("king/s", 400)] {
        let path = format!("/api/v1/nodes/{path}/limits");
        assert_eq!(rest.put(&path, json!({ "upload": 0 })).await.0, wanted, "{path}");
        assert_eq!(rest.get(&path).await.0, wanted, "{path}");
    }
    assert_eq!(rest.get("/api/v1/limits").await.1["upload"], json!(null));
}
