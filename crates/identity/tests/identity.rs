//! Two members, and strangers: what mutual TLS and signatures let through.

use std::time::{Duration, SystemTime};

use darter_daemon::tasks::Tasks;
use darter_identity::{Authority, ClientAuth, Identity, IdentityError, Listener, Member, member, require};
use darter_proto::v1::identity_client::IdentityClient;
use darter_proto::v1::{IssuedCertificate, JoinRequest, RenewRequest, identity_server};
use darter_types::Role;
use futures_util::StreamExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tonic::transport::server::Connected;
use tonic::transport::{Endpoint, Server};
use tonic::{Code, Request, Response, Status};

const PIECES: &[u8] = b"darter-test/1";
const LIFE: Duration = Duration::from_secs(3600);

fn authority(cluster: &str) -> Authority {
    Authority::create(cluster.parse().unwrap()).unwrap()
}

fn identity(authority: &Authority, role: Role, node: &str) -> Identity {
    let member = Member { cluster: authority.cluster().clone(), role, node: node.parse().unwrap() };
    Identity::issued_by(authority, &member, LIFE).unwrap()
}

async fn listen(identity: &Identity, tasks: &Tasks) -> (Listener, String) {
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let listener = identity.listener(tcp, &[b"h2", PIECES], ClientAuth::Required, tasks).unwrap();
    let address = listener.address().to_string();
    (listener, address)
}

#[tokio::test]
async fn both_ends_of_a_raw_stream_know_each_other() {
    let (ca, tasks) = (authority("default"), Tasks::new());
    let (seed, node) = (identity(&ca, Role::Seed, "seed-1"), identity(&ca, Role::Node, "node-1"));
    let (mut listener, address) = listen(&seed, &tasks).await;
    let mut streams = listener.raw(PIECES);
    let (mut ours, server) = node.connect(&address, &[Role::Seed, Role::Node], PIECES).await.unwrap();
    let (mut theirs, client) = streams.recv().await.unwrap();
    assert_eq!((&server, &client), (seed.member(), node.member()));
    ours.write_all(b"hello").await.unwrap();
    ours.flush().await.unwrap();
    let mut bytes = [0; 5];
    theirs.read_exact(&mut bytes).await.unwrap();
    assert_eq!(&bytes, b"hello");
}

#[tokio::test]
async fn server_in_another_role_than_expected_is_refused() {
    let (ca, tasks) = (authority("default"), Tasks::new());
    let (_listener, address) = listen(&identity(&ca, Role::Node, "claims-to-be-a-seed"), &tasks).await;
    let node = identity(&ca, Role::Node, "node-1");
    let error = node.connect(&address, &[Role::Seed], PIECES).await.unwrap_err();
    assert!(error.to_string().contains("is a node, not a seed"), "{error}");
}

#[tokio::test]
async fn server_of_another_authority_is_refused_even_with_the_same_names() {
    let tasks = Tasks::new();
    let (_listener, address) = listen(&identity(&authority("default"), Role::Seed, "seed-1"), &tasks).await;
    let node = identity(&authority("default"), Role::Node, "node-1");
    assert!(matches!(node.connect(&address, &[Role::Seed], PIECES).await, Err(IdentityError::Tls { .. })));
}

#[tokio::test]
async fn stranger_without_certificate_gets_no_stream() {
    let tasks = Tasks::new();
    let (mut listener, address) =
        listen(&identity(&authority("default"), Role::Seed, "seed-1"), &tasks).await;
    let mut streams = listener.raw(PIECES);
    let stranger = stranger_config(PIECES);
    let tcp = tokio::net::TcpStream::connect(&address).await.unwrap();
    let name = rustls_pki_types::ServerName::try_from("x").unwrap();
    let tls = tokio_rustls::TlsConnector::from(stranger).connect(name, tcp).await;
    let read = match tls {
        Ok(mut tls) => tls.read(&mut [0; 1]).await,
        Err(error) => Err(error),
    };
    assert!(read.is_err(), "a stranger without certificate got a stream");
    assert!(streams.try_recv().is_err());
}

/// A client that takes any server and shows no certificate.
fn stranger_config(alpn: &[u8]) -> std::sync::Arc<rustls::ClientConfig> {
    let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(std::sync::Arc::new(anyone::Anyone))
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    std::sync::Arc::new(config)
}

mod anyone {
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::{DigitallySignedStruct, Error, SignatureScheme};
    use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

    #[derive(Debug)]
    pub(crate) struct Anyone;

    impl ServerCertVerifier for Anyone {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }
        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }
        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ECDSA_NISTP256_SHA256]
        }
    }
}

#[tokio::test]
async fn member_with_a_certificate_of_another_authority_gets_no_stream() {
    let tasks = Tasks::new();
    let (mut listener, address) =
        listen(&identity(&authority("default"), Role::Seed, "seed-1"), &tasks).await;
    let mut streams = listener.raw(PIECES);
    let node = identity(&authority("default"), Role::Node, "node-1");
    assert!(node.connect(&address, &[Role::Seed], PIECES).await.is_err());
    assert!(streams.try_recv().is_err());
}

/// A service with one call for everybody and one for seeds only.
struct Calls;

#[tonic::async_trait]
impl identity_server::Identity for Calls {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<IssuedCertificate>, Status> {
        assert_eq!(member(&request), None);
        Ok(Response::new(IssuedCertificate::default()))
    }
    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<IssuedCertificate>, Status> {
        require(&request, &[Role::Seed])?;
        Ok(Response::new(IssuedCertificate::default()))
    }
}

async fn serve_calls(identity: &Identity, tasks: &Tasks) -> String {
    serve_calls_at("127.0.0.1:0", identity, tasks).await
}

async fn serve_calls_at(address: &str, identity: &Identity, tasks: &Tasks) -> String {
    let tcp = TcpListener::bind(address).await.unwrap();
    let mut listener = identity.listener(tcp, &[b"h2"], ClientAuth::Optional, tasks).unwrap();
    let server = Server::builder().add_service(identity_server::IdentityServer::new(Calls));
    let (incoming, stop) = (listener.grpc(), tasks.token().cancelled_owned());
    tasks.spawn("calls", async move { server.serve_with_incoming_shutdown(incoming, stop).await.unwrap() });
    listener.address().to_string()
}

#[tokio::test]
async fn node_may_not_make_a_seed_s_call() {
    let (ca, tasks) = (authority("default"), Tasks::new());
    let address = serve_calls(&identity(&ca, Role::Scheduler, "s"), &tasks).await;
    let call = |role| {
        let channel = identity(&ca, role, "caller").channel(&address, &[Role::Scheduler]);
        async move { IdentityClient::new(channel).renew(RenewRequest::default()).await }
    };
    assert!(call(Role::Seed).await.is_ok());
    let refused = call(Role::Node).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("it is for a seed"), "{refused}");
}

#[tokio::test]
async fn stranger_reaches_only_what_asks_for_no_certificate() {
    let tasks = Tasks::new();
    let address = serve_calls(&identity(&authority("default"), Role::Manager, "m"), &tasks).await;
    let connector = tower::service_fn(move |_: http::Uri| {
        let address = address.clone();
        async move {
            let tcp = tokio::net::TcpStream::connect(address).await?;
            let name = rustls_pki_types::ServerName::try_from("x").unwrap();
            let tls = tokio_rustls::TlsConnector::from(stranger_config(b"h2")).connect(name, tcp).await?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(tls))
        }
    });
    let channel = Endpoint::from_static("http://x").connect_with_connector_lazy(connector);
    let mut client = IdentityClient::new(channel);
    assert!(client.join(JoinRequest::default()).await.is_ok());
    assert_eq!(client.renew(RenewRequest::default()).await.unwrap_err().code(), Code::Unauthenticated);
}

#[tokio::test]
async fn channel_connects_again_when_the_server_comes_back() {
    let (ca, tasks) = (authority("default"), Tasks::new());
    let server = identity(&ca, Role::Scheduler, "s");
    let address = serve_calls(&server, &tasks).await;
    let mut client =
        IdentityClient::new(identity(&ca, Role::Seed, "c").channel(&address, &[Role::Scheduler]));
    client.renew(RenewRequest::default()).await.unwrap();
    tasks.stop(Duration::from_secs(5)).await;
    assert!(client.renew(RenewRequest::default()).await.is_err());
    let tasks = Tasks::new();
    serve_calls_at(&address, &server, &tasks).await;
    client.renew(RenewRequest::default()).await.unwrap();
}

#[test]
fn signature_outlives_the_certificate() {
    let ca = authority("default");
    let (seed, node) = (identity(&ca, Role::Seed, "seed-1"), identity(&ca, Role::Node, "node-1"));
    let (signature, chain) = seed.sign_with_chain(b"root");
    let signed_at = SystemTime::now();
    assert_eq!(node.verify_signed(b"root", &signature, &chain, signed_at).unwrap(), *seed.member());
    // Looked at years later, what counts is still the moment of signing; a moment outside the certificate's life does not.
    assert!(node.verify_signed(b"root", &signature, &chain, signed_at + 2 * LIFE).is_err());
    assert!(node.verify_signed(b"root", &signature, &chain, signed_at - 2 * LIFE).is_err());
}

#[test]
fn signature_of_other_bytes_or_another_authority_is_refused() {
    let ca = authority("default");
    let (seed, node) = (identity(&ca, Role::Seed, "seed-1"), identity(&ca, Role::Node, "node-1"));
    let (signature, chain) = seed.sign_with_chain(b"root");
    let now = SystemTime::now();
    assert!(node.verify_signed(b"toor", &signature, &chain, now).is_err());
    assert!(node.verify_signed(b"root", &signature, &[], now).is_err());
    let mut flipped = signature.clone();
    flipped[10] ^= 1;
    assert!(node.verify_signed(b"root", &flipped, &chain, now).is_err());
    let elsewhere = identity(&authority("default"), Role::Seed, "seed-1");
    let (forged, forged_chain) = elsewhere.sign_with_chain(b"root");
    assert!(node.verify_signed(b"root", &forged, &forged_chain, now).is_err());
    assert!(node.verify_signed(b"root", &forged, &chain, now).is_err());
}

#[test]
fn node_signs_as_a_node() {
    let ca = authority("default");
    let node = identity(&ca, Role::Node, "node-1");
    let (signature, chain) = node.sign_with_chain(b"root");
    let signer = node.verify_signed(b"root", &signature, &chain, SystemTime::now()).unwrap();
    assert_eq!(signer.role, Role::Node);
}

#[test]
fn authority_issues_only_for_its_own_cluster() {
    let member: Member = "spiffe://darter/other/seed/a".parse().unwrap();
    assert!(matches!(
        Identity::issued_by(&authority("default"), &member, LIFE),
        Err(IdentityError::Cluster { .. })
    ));
}

/// Connects and says nothing.
async fn silent(address: &str) -> tokio::net::TcpStream {
    tokio::net::TcpStream::connect(address).await.unwrap()
}

#[tokio::test]
async fn members_get_in_past_any_number_of_connections_that_say_nothing() {
    let (ca, tasks) = (authority("default"), Tasks::new());
    let (mut listener, address) = listen(&identity(&ca, Role::Seed, "seed-1"), &tasks).await;
    let mut streams = listener.raw(PIECES);
    let mut idle = Vec::new();
    for _ in 0..300 {
        idle.push(silent(&address).await);
    }
    let node = identity(&ca, Role::Node, "node-1");
    let connected = node.connect(&address, &[Role::Seed], PIECES);
    tokio::time::timeout(Duration::from_secs(1), connected).await.unwrap().unwrap();
    assert_eq!(&streams.recv().await.unwrap().1, node.member());
}

#[tokio::test]
async fn connection_that_says_nothing_is_closed_within_seconds() {
    let tasks = Tasks::new();
    let (_listener, address) = listen(&identity(&authority("default"), Role::Seed, "seed-1"), &tasks).await;
    let mut idle = silent(&address).await;
    let closed = tokio::time::timeout(Duration::from_secs(6), idle.read(&mut [0])).await;
    assert_eq!(closed.expect("it is open after six seconds").unwrap(), 0);
}

#[tokio::test]
async fn clients_without_certificate_have_few_places_and_members_do_not_need_them() {
    let (ca, tasks) = (authority("default"), Tasks::new());
    let manager = identity(&ca, Role::Manager, "manager");
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut listener = manager.listener(tcp, &[b"h2"], ClientAuth::Optional, &tasks).unwrap();
    let address = listener.address().to_string();
    let mut incoming = listener.grpc();
    let (mut kept, mut streams) = (Vec::new(), Vec::new());
    let name = || rustls_pki_types::ServerName::try_from("x").unwrap();
    for stays in (0..20).map(|number| number < 16) {
        let connector = tokio_rustls::TlsConnector::from(stranger_config(b"h2"));
        let mut stream = connector.connect(name(), silent(&address).await).await.unwrap();
        if stays {
            kept.push(incoming.next().await.unwrap().unwrap());
        } else {
            assert_eq!(stream.read(&mut [0]).await.unwrap_or(0), 0);
        }
        streams.push(stream);
    }
    let node = identity(&ca, Role::Node, "node-1");
    node.connect(&address, &[Role::Manager], b"h2").await.unwrap();
    let member = incoming.next().await.unwrap().unwrap().connect_info().member;
    assert_eq!(member.as_ref(), Some(node.member()));
}
