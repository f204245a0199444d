//! Who is alive, as the members hear it.

use std::time::Duration;

use darter_daemon::tasks::Tasks;
use darter_identity::Identity;
use darter_identity::attend::{Attendance, ClusterMembers, PreheatUpdate, attend};
use darter_types::Role;
use tokio::sync::watch;

use crate::rest::Rest;
use crate::world::{World, hello, soon};

const GRACE: Duration = Duration::from_secs(5);

fn attend_as(world: &World, identity: &Identity, tasks: &Tasks) -> Attendance {
    attend(identity, world.address(), hello(&format!("{}:1", identity.member().node)), tasks)
}

fn names(members: &ClusterMembers) -> (Vec<&str>, Vec<&str>) {
    (
        members.schedulers.iter().map(|member| member.node.as_str()).collect(),
        members.seeds.iter().map(|member| member.node.as_str()).collect(),
    )
}

async fn hears(members: &mut watch::Receiver<ClusterMembers>, schedulers: &[&str], seeds: &[&str]) {
    let heard = members.wait_for(|members| names(members) == (schedulers.to_vec(), seeds.to_vec()));
    soon(&format!("hearing of {schedulers:?} and {seeds:?}"), heard).await.unwrap();
}

#[tokio::test]
async fn members_hear_who_comes_and_who_leaves() {
    let world = World::new().await;
    let (staying, leaving) = (Tasks::new(), Tasks::new());
    let node = world.join(Role::Node, "node-1").await;
    let mut members = attend_as(&world, &node, &staying).members;
    let scheduler = world.join(Role::Scheduler, "s-1").await;
    let seed = world.join(Role::Seed, "seed-1").await;
    let _scheduler = attend_as(&world, &scheduler, &staying);
    let _seed = attend_as(&world, &seed, &leaving);
    hears(&mut members, &["s-1"], &["seed-1"]).await;
    assert_eq!(members.borrow().seeds[0].address, "seed-1:1");
    leaving.stop(GRACE).await;
    hears(&mut members, &["s-1"], &[]).await;
}

#[tokio::test]
async fn members_attend_again_after_a_restart_of_the_manager() {
    let (world, tasks) = (World::new().await, Tasks::new());
    let scheduler = world.join(Role::Scheduler, "s-1").await;
    let node = world.join(Role::Node, "node-1").await;
    let _scheduler = attend_as(&world, &scheduler, &tasks);
    let mut members = attend_as(&world, &node, &tasks).members;
    hears(&mut members, &["s-1"], &[]).await;
    let world = world.restart().await;
    let seed = world.join(Role::Seed, "seed-1").await;
    let _seed = attend_as(&world, &seed, &tasks);
    hears(&mut members, &["s-1"], &["seed-1"]).await;
}

#[tokio::test]
async fn what_was_heard_last_is_known_at_a_start_without_the_manager() {
    let (world, tasks) = (World::new().await, Tasks::new());
    let token = world.token(Role::Node);
    let node = world.try_join(&token, "node-1").await.unwrap();
    let seed = world.join(Role::Seed, "seed-1").await;
    let mut members = attend_as(&world, &node, &tasks).members;
    let _seed = attend_as(&world, &seed, &Tasks::new());
    hears(&mut members, &[], &["seed-1"]).await;
    let file = world.folder.path().join("node-node-1/members");
    let written = async {
        while !std::fs::read_to_string(&file).unwrap_or_default().contains("seed-1") {
            tokio::task::yield_now().await;
        }
    };
    soon("writing it down", written).await;
    tasks.stop(GRACE).await;
    let (address, folder) = (world.address(), world.folder);
    world.manager.stop().await;
    let name = node.member().node.clone();
    let again = Identity::join(&address, &token, &name, file.parent().unwrap()).await.unwrap();
    let later = attend(&again, address, hello("node-1:1"), &Tasks::new());
    assert_eq!(names(&later.members.borrow()).1, ["seed-1"]);
    drop(folder);
}

#[tokio::test]
async fn api_shows_who_is_alive_and_who_was() {
    let (world, tasks) = (World::new().await, Tasks::new());
    let node = world.join(Role::Node, "node-1").await;
    let _attendance = attend_as(&world, &node, &tasks);
    let rest = Rest::new(&world);
    let alive = |wanted: bool| {
        let rest = &rest;
        async move {
            loop {
                let (status, body) = rest.get("/api/v1/nodes").await;
                assert_eq!(status, 200);
                let shown = body["nodes"][0].clone();
                if shown["alive"] == wanted {
                    return shown;
                }
            }
        }
    };
    let shown = soon("being alive", alive(true)).await;
    assert_eq!((shown["node"].as_str(), shown["role"].as_str()), (Some("node-1"), Some("node")));
    assert_eq!(shown["zone"], "here");
    tasks.stop(GRACE).await;
    let shown = soon("being dead", alive(false)).await;
    assert!(shown["last_seen"].is_string());
}

#[tokio::test]
async fn member_knows_who_is_in_its_place_and_when_it_is_revoked() {
    let (world, tasks) = (World::new().await, Tasks::new());
    let node = world.join(Role::Node, "node-1").await;
    let mut first = attend_as(&world, &node, &tasks).standing;
    soon("attending", first.wait_for(|standing| standing.attends)).await.unwrap();
    // A second machine with the same certificate.
    let mut second = attend(&node, world.address(), hello("elsewhere:1"), &tasks).standing;
    soon("being replaced", first.wait_for(|standing| standing.replaced.is_some())).await.unwrap();
    let (status, _) = Rest::new(&world).delete("/api/v1/nodes/node/node-1").await;
    assert!(status < 300, "{status}");
    for standing in [&mut first, &mut second] {
        let refused = soon("being refused", standing.wait_for(|standing| standing.refused)).await.unwrap();
        assert!(refused.trouble.contains("was revoked") && refused.heard.is_some(), "{refused:?}");
    }
    tasks.stop(GRACE).await;
}

#[tokio::test]
async fn scheduler_that_reports_on_a_preheat_is_put_out() {
    let (world, tasks) = (World::new().await, Tasks::new());
    let scheduler = world.join(Role::Scheduler, "scheduler-1").await;
    let mut client = darter_proto::v1::cluster_client::ClusterClient::new(
        scheduler.channel(&world.address(), &[Role::Manager]),
    );
    use darter_proto::v1::member_message::Message;
    use darter_proto::v1::{MemberHello, MemberMessage};
    let hello = MemberHello { protocol: darter_types::PROTOCOL_VERSION, ..MemberHello::default() };
    let report =
        darter_proto::v1::PreheatUpdate::from(&PreheatUpdate { id: "1".into(), ..Default::default() });
    let messages = [Message::Hello(hello), Message::Preheat(report)];
    let messages = messages.map(|message| MemberMessage { message: Some(message) });
    let mut answers = client.attend(tokio_stream::iter(messages)).await.unwrap().into_inner();
    let refused = async {
        loop {
            match answers.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the stream ended without a word"),
                Err(status) => return status,
            }
        }
    };
    let status = soon("being put out", refused).await;
    assert_eq!(status.code(), tonic::Code::PermissionDenied);
    tasks.stop(GRACE).await;
}
