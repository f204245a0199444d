//! Who gets a certificate.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use darter_daemon::tasks::Tasks;
use darter_identity::attend::attend;
use darter_types::Role;

use crate::world::World;

#[tokio::test]
async fn token_makes_a_member_of_its_role() {
    let world = World::new().await;
    let seed = world.join(Role::Seed, "seed-1").await;
    assert_eq!(seed.member().to_string(), "spiffe://darter/default/seed/seed-1");
}

#[tokio::test]
async fn stored_certificate_is_used_again_while_the_manager_is_down_and_is_private() {
    let world = World::new().await;
    let token = world.token(Role::Node);
    let first = world.try_join(&token, "node-1").await.unwrap();
    let file = world.folder.path().join("node-node-1/identity.pem");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let (address, folder) = (world.address(), world.folder);
    world.manager.stop().await;
    let name = first.member().node.clone();
    let again =
        darter_identity::Identity::join(&address, &token, &name, file.parent().unwrap()).await.unwrap();
    assert_eq!(again.chain(), first.chain());
    drop(folder);
}

#[tokio::test]
async fn stored_certificate_of_another_node_or_a_damaged_one_is_not_used() {
    let world = World::new().await;
    let token = world.manager.mint_token(Role::Node, crate::world::HOUR, 3).unwrap();
    let folder = world.folder.path().join("shared");
    let join = |name: &'static str| {
        let (address, token, folder) = (world.address(), token.clone(), folder.clone());
        async move {
            darter_identity::Identity::join(&address, &token, &name.parse().unwrap(), &folder).await.unwrap()
        }
    };
    let one = join("node-1").await;
    let two = join("node-2").await;
    assert_eq!(two.member().node.as_str(), "node-2");
    assert_ne!(one.chain(), two.chain());
    std::fs::write(folder.join("identity.pem"), "not a certificate").unwrap();
    assert_eq!(join("node-2").await.member(), two.member());
}

#[tokio::test]
async fn used_up_token_is_refused() {
    let world = World::new().await;
    let token = world.token(Role::Node);
    world.try_join(&token, "node-1").await.unwrap();
    let error = world.try_join(&token, "node-2").await.unwrap_err().to_string();
    assert!(error.contains("used as often as it may"), "{error}");
}

#[tokio::test]
async fn one_use_is_given_once_to_many_at_the_same_moment() {
    let world = World::new().await;
    let token = world.token(Role::Node);
    let names = ["a", "b", "c", "d", "e", "f"];
    let joined = futures_util::future::join_all(names.map(|name| world.try_join(&token, name))).await;
    assert_eq!(joined.iter().filter(|joined| joined.is_ok()).count(), 1);
}

#[tokio::test]
async fn token_with_another_secret_or_role_is_refused() {
    let world = World::new().await;
    let mut forged = world.token(Role::Node);
    forged.secret[0] ^= 1;
    let error = world.try_join(&forged, "node-1").await.unwrap_err().to_string();
    assert!(error.contains("not one of this manager's"), "{error}");
    let mut raised = world.token(Role::Node);
    raised.role = Role::Seed;
    assert!(world.try_join(&raised, "node-1").await.is_err());
}

#[tokio::test]
async fn expired_token_is_refused() {
    let world = World::new().await;
    let token = world.manager.mint_token(Role::Node, Duration::from_secs(1), 1_000_000).unwrap();
    let expired = async {
        for number in 0.. {
            if let Err(error) = world.try_join(&token, &format!("node-{number}")).await {
                return error.to_string();
            }
        }
        unreachable!()
    };
    let error = crate::world::soon("expiry", expired).await;
    assert!(error.contains("has expired"), "{error}");
}

#[tokio::test]
async fn manager_that_is_not_the_pinned_one_is_refused() {
    let (world, impostor) = (World::new().await, World::new().await);
    let token = world.token(Role::Node);
    let error = impostor.try_join(&token, "node-1").await.unwrap_err();
    assert!(matches!(error, darter_identity::IdentityError::Untrusted(_)), "{error:?}");
    let error = error.to_string();
    assert!(error.contains("not the one that the join token pins"), "{error}");
    assert!(world.try_join(&token, "node-1").await.is_ok(), "the impostor used the token");
}

#[tokio::test]
async fn token_made_beside_a_running_manager_counts() {
    let world = World::new().await;
    let token = darter_manager::mint_token(&world.config, Role::Scheduler, crate::world::HOUR, 1).unwrap();
    assert!(world.try_join(&token, "s-1").await.is_ok());
}

#[tokio::test]
async fn tokens_outlive_a_restart_and_so_does_the_authority() {
    let world = World::new().await;
    let token = world.token(Role::Node);
    let world = world.restart().await;
    assert!(world.try_join(&token, "node-1").await.is_ok());
}

#[tokio::test]
async fn nobody_can_join_as_a_manager() {
    let world = World::new().await;
    assert!(world.manager.mint_token(Role::Manager, crate::world::HOUR, 1).is_err());
}

#[tokio::test]
async fn token_does_not_take_the_name_of_a_member_that_is_there_until_it_is_released() {
    let (world, tasks) = (World::new().await, Tasks::new());
    let node = world.join(Role::Node, "node-1").await;
    let seed = world.join(Role::Seed, "seed-1").await;
    let attend = |identity| attend(identity, world.address(), crate::world::hello("a:1"), &tasks);
    let mut members = attend(&node).members;
    let _seed = attend(&seed);
    let has_come = members.wait_for(|members| !members.seeds.is_empty());
    crate::world::soon("the seed's coming", has_come).await.unwrap();
    let again = || async {
        let (name, folder) = ("seed-1".parse().unwrap(), tempfile::tempdir().unwrap());
        darter_identity::Identity::join(&world.address(), &world.token(Role::Seed), &name, folder.path())
            .await
    };
    let error = again().await.unwrap_err().to_string();
    assert!(error.contains("darter-manager release --role seed seed-1"), "{error}");
    let name = "seed-1".parse().unwrap();
    assert!(darter_manager::release(&world.config, Role::Seed, &"nobody".parse().unwrap(), false).is_err());
    let refused = darter_manager::release(&world.config, Role::Seed, &name, false).unwrap_err().to_string();
    assert!(refused.contains("seed seed-1 was there ") && refused.contains(" at a:1: stop it"), "{refused}");
    darter_manager::release(&world.config, Role::Seed, &name, true).unwrap();
    assert_eq!(again().await.unwrap().member(), seed.member());
}

#[tokio::test]
async fn name_of_a_member_that_never_attended_is_given_again() {
    let world = World::new().await;
    world.join(Role::Node, "node-1").await;
    let (name, folder) = ("node-1".parse().unwrap(), tempfile::tempdir().unwrap());
    let token = world.token(Role::Node);
    assert!(darter_identity::Identity::join(&world.address(), &token, &name, folder.path()).await.is_ok());
}
