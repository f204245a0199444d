//! Certificates that end soon, and calls that go on.

use std::time::{Duration, SystemTime};

use darter_daemon::tasks::Tasks;
use darter_identity::enrol::Enrolment;
use darter_identity::{ClientAuth, Identity, require};
use darter_proto::v1::identity_client::IdentityClient;
use darter_proto::v1::identity_server::IdentityServer;
use darter_proto::v1::{IssuedCertificate, JoinRequest, RenewRequest, identity_server};
use darter_types::{PROTOCOL_VERSION, Role};
use tokio::net::TcpListener;
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status};

use crate::world::{World, soon};

struct Echo;

#[tonic::async_trait]
impl identity_server::Identity for Echo {
    async fn join(&self, _: Request<JoinRequest>) -> Result<Response<IssuedCertificate>, Status> {
        Err(Status::unimplemented("not here"))
    }
    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<IssuedCertificate>, Status> {
        require(&request, &[Role::Node])?;
        Ok(Response::new(IssuedCertificate::default()))
    }
}

async fn serve(identity: &Identity, tasks: &Tasks) -> String {
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut listener = identity.listener(tcp, &[b"h2"], ClientAuth::Required, tasks).unwrap();
    let incoming = listener.grpc();
    let server = Server::builder().add_service(IdentityServer::new(Echo));
    tasks.spawn_until_stop("echo", async move { server.serve_with_incoming(incoming).await.unwrap() });
    listener.address().to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_fails_while_certificates_of_two_seconds_are_renewed() {
    let (world, tasks) = (World::with_life(2).await, Tasks::new());
    let seed = world.join(Role::Seed, "seed-1").await;
    let node = world.join(Role::Node, "node-1").await;
    seed.keep_fresh(world.address(), &tasks);
    node.keep_fresh(world.address(), &tasks);
    let address = serve(&seed, &tasks).await;
    let mut standing = IdentityClient::new(node.channel(&address, &[Role::Seed]));
    let until = (node.expires(), seed.expires());
    let lives = Duration::from_secs(5);
    let mut calls = 0;
    while node.expires() < until.0 + lives || seed.expires() < until.1 + lives {
        standing.renew(RenewRequest::default()).await.expect("a call on the standing connection failed");
        let mut fresh = IdentityClient::new(node.channel(&address, &[Role::Seed]));
        fresh.renew(RenewRequest::default()).await.expect("a call on a new connection failed");
        calls += 2;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(calls > 100, "only {calls} calls were made");
    assert!(!tasks.failed());
}

#[tokio::test]
async fn certificate_that_expired_while_the_manager_was_down_is_replaced_by_joining_again() {
    let world = World::with_life(2).await;
    let token = world.manager.mint_token(Role::Node, crate::world::HOUR, 2).unwrap();
    let node = world.try_join(&token, "node-1").await.unwrap();
    let expired = node.expires();
    let (mut config, folder) = (world.config, world.folder);
    config.grpc_listen = world.manager.grpc_address();
    world.manager.stop().await;
    let tasks = Tasks::new();
    node.keep_fresh(config.grpc_listen.to_string(), &tasks);
    until("expiry", || SystemTime::now() > expired).await;
    let manager = darter_manager::start(config).await.unwrap();
    until("joining again", || node.expires() > expired).await;
    manager.stop().await;
    drop(folder);
}

#[tokio::test]
async fn node_whose_certificate_has_expired_begins_alone_and_joins_again_by_a_token_that_comes_later() {
    let mut world = World::with_life(2).await;
    world.config.grpc_listen = world.manager.grpc_address();
    let enrolment = Enrolment {
        root: world.folder.path().join("node"),
        manager: world.address(),
        join_token: world.token(Role::Node).to_string(),
        join_token_file: world.folder.path().join("token"),
        node_name: "node-1".to_owned(),
    };
    let joined = enrolment.join(Role::Node).await.unwrap();
    world.manager.stop().await;
    until("expiry", || !joined.is_valid(SystemTime::now())).await;

    let enrolment = Enrolment { join_token: String::new(), ..enrolment };
    let begun = tokio::time::timeout(Duration::from_secs(1), enrolment.join(Role::Node)).await;
    let node = begun.expect("nobody was waited for").unwrap();
    assert_eq!((node.member(), node.expires()), (joined.member(), joined.expires()));
    let tasks = Tasks::new();
    node.keep_fresh(enrolment.manager.clone(), &tasks);
    let manager = darter_manager::start(world.config).await.unwrap();
    let token = manager.mint_token(Role::Node, crate::world::HOUR, 1).unwrap();
    std::fs::write(&enrolment.join_token_file, token.to_string()).unwrap();
    until("joining again", || node.is_valid(SystemTime::now())).await;
    manager.stop().await;
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    let waiting = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    soon(what, waiting).await;
}

#[tokio::test]
async fn renewed_certificate_has_the_identity_that_was_shown_and_revocation_ends_it() {
    let world = World::new().await;
    let node = world.join(Role::Node, "node-1").await;
    let mut client = IdentityClient::new(node.channel(&world.address(), &[Role::Manager]));
    let other_protocol = RenewRequest { protocol: PROTOCOL_VERSION + 1, csr: Vec::new() };
    assert_eq!(client.renew(other_protocol).await.unwrap_err().code(), Code::FailedPrecondition);
    let no_request = RenewRequest { protocol: PROTOCOL_VERSION, csr: b"x".to_vec() };
    assert_eq!(client.renew(no_request.clone()).await.unwrap_err().code(), Code::InvalidArgument);
    let rest = crate::rest::Rest::new(&world);
    let (status, _) = rest.delete("/api/v1/nodes/node/node-1").await;
    assert_eq!(status, 200);
    assert_eq!(client.renew(no_request).await.unwrap_err().code(), Code::PermissionDenied);
    let token = world.token(Role::Node);
    std::fs::remove_dir_all(world.folder.path().join("node-node-1")).unwrap();
    let error = world.try_join(&token, "node-1").await.unwrap_err().to_string();
    assert!(error.contains("was revoked"), "{error}");
}
