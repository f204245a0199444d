//! The scheduler over mutual TLS, as nodes and seeds see it.

use std::sync::Arc;
use std::time::Duration;

use darter_daemon::{run::install_tls_provider, tasks::Tasks};
use darter_identity::{Authority, Identity, Member};
use darter_proto::v1::peer_message::Message as Said;
use darter_proto::v1::scheduler_client::SchedulerClient;
use darter_proto::v1::scheduler_message::Message as Heard;
use darter_proto::v1::{self, PeerHello, PeerMessage, SchedulerMessage};
use darter_scheduler::{Config, Handle, start_with_identity};
use darter_scheduler_core::{Core, record};
use darter_types::{PROTOCOL_VERSION, Role};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

const SOON: Duration = Duration::from_secs(10);
const LAYER: [u8; 32] = [7; 32];

struct Cluster {
    authority: Arc<Authority>,
    scheduler: Handle,
    folder: tempfile::TempDir,
}

impl Cluster {
    async fn start() -> Self {
        install_tls_provider();
        let authority = Arc::new(Authority::create("test".parse().unwrap()).unwrap());
        let folder = tempfile::tempdir().unwrap();
        let config = Config {
            listen: "127.0.0.1:0".parse().unwrap(),
            record: folder.path().join("events"),
            ..Config::default()
        };
        let identity = identity(&authority, Role::Scheduler, "scheduler");
        let scheduler = start_with_identity(&config, identity, Tasks::new()).await.unwrap();
        Self { authority, scheduler, folder }
    }

    async fn connect(&self, role: Role, name: &str) -> Result<Peer, Status> {
        let hello = PeerHello {
            protocol: PROTOCOL_VERSION,
            address: format!("{name}:7420"),
            zone: String::new(),
            upload_slots: 4,
        };
        self.connect_saying(role, name, Said::Hello(hello)).await
    }

    async fn connect_saying(&self, role: Role, name: &str, first: Said) -> Result<Peer, Status> {
        let identity = identity(&self.authority, role, name);
        let channel = identity.channel(&self.scheduler.address().to_string(), &[Role::Scheduler]);
        let (say, said) = mpsc::channel(64);
        say.try_send(PeerMessage { message: Some(first) }).unwrap();
        let answer = SchedulerClient::new(channel).connect(ReceiverStream::new(said)).await?;
        Ok(Peer { say, hear: answer.into_inner() })
    }

    async fn peer(&self, role: Role, name: &str) -> Peer {
        let mut peer = self.connect(role, name).await.unwrap();
        assert!(matches!(peer.hear().await, Heard::Welcome(welcome) if welcome.scheduler == "scheduler"));
        peer.say(Said::Holdings(v1::Holdings { inventory_complete: true, ..Default::default() }));
        peer
    }
}

fn identity(authority: &Authority, role: Role, name: &str) -> Identity {
    let member = Member { cluster: authority.cluster().clone(), role, node: name.parse().unwrap() };
    Identity::issued_by(authority, &member, Duration::from_secs(600)).unwrap()
}

struct Peer {
    say: mpsc::Sender<PeerMessage>,
    hear: Streaming<SchedulerMessage>,
}

impl Peer {
    fn say(&self, message: Said) {
        self.say.try_send(PeerMessage { message: Some(message) }).unwrap();
    }

    async fn message(&mut self) -> Result<Option<SchedulerMessage>, Status> {
        timeout(SOON, self.hear.message()).await.expect("the scheduler says something")
    }

    async fn hear(&mut self) -> Heard {
        self.message().await.unwrap().expect("the stream goes on").message.unwrap()
    }

    fn open(&self) {
        let source =
            v1::Source { repository: "https://registry.example/app".into(), blob: vec![1; 32], size: 5 };
        let sources = vec![source];
        self.say(Said::Open(v1::OpenTask {
            diff_id: LAYER.to_vec(),
            format: 1,
            sources,
            wanted: Vec::new(),
        }));
    }

    fn hold(&self) {
        let held =
            v1::Holding { diff_id: LAYER.to_vec(), format: 1, has_map: true, spans_total: 2, spans: vec![3] };
        self.say(Said::Holdings(v1::Holdings { tasks: vec![held], ..Default::default() }));
    }

    async fn parents(&mut self) -> v1::Parents {
        match self.hear().await {
            Heard::Parents(parents) => parents,
            other => panic!("parents were expected, not {other:?}"),
        }
    }
}

fn names(parents: &v1::Parents) -> Vec<&str> {
    parents.parents.iter().map(|parent| parent.node.as_str()).collect()
}

#[tokio::test]
async fn two_nodes_ask_and_one_order_goes_to_the_seed() {
    let cluster = Cluster::start().await;
    let mut seed = cluster.peer(Role::Seed, "seed").await;
    let (mut a, mut b) = (cluster.peer(Role::Node, "a").await, cluster.peer(Role::Node, "b").await);
    a.open();
    b.open();
    let Heard::Make(order) = seed.hear().await else { panic!("an order was expected") };
    assert_eq!((order.diff_id.as_slice(), order.sources.len()), (&LAYER[..], 1));
    for node in [&mut a, &mut b] {
        assert_eq!(node.parents().await.seed.unwrap().address, "seed:7420");
    }
    let make = |state: v1::MakeState| {
        Said::Make(v1::MakeUpdate {
            diff_id: LAYER.to_vec(),
            format: 1,
            state: state.into(),
            ..Default::default()
        })
    };
    seed.say(make(v1::MakeState::Started));
    seed.hold();
    seed.say(make(v1::MakeState::Done));
    assert_eq!(names(&b.parents().await), ["seed"]);
    a.hold();
    let told = b.parents().await;
    assert_eq!(names(&told).len(), 2);
    drop(a);
    assert_eq!(names(&b.parents().await), ["seed"]);
    assert!(timeout(Duration::from_millis(500), seed.hear.message()).await.is_err(), "no second order");
}

#[tokio::test]
async fn another_protocol_and_another_role_are_refused() {
    let cluster = Cluster::start().await;
    let hello = PeerHello { protocol: PROTOCOL_VERSION + 1, ..Default::default() };
    let refused = cluster.connect_saying(Role::Node, "a", Said::Hello(hello)).await.err().unwrap();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let refused = cluster.connect(Role::Scheduler, "b").await.err().unwrap();
    assert_eq!(refused.code(), Code::PermissionDenied);
    let close = v1::CloseTask { diff_id: LAYER.to_vec(), format: 1 };
    let refused = cluster.connect_saying(Role::Node, "c", Said::Close(close)).await.err().unwrap();
    assert_eq!(refused.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn bad_message_ends_the_stream_with_its_reason() {
    let cluster = Cluster::start().await;
    let mut node = cluster.peer(Role::Node, "a").await;
    node.say(Said::Close(v1::CloseTask { diff_id: vec![1; 3], format: 1 }));
    assert_eq!(node.message().await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn second_connection_of_a_node_ends_the_first() {
    let cluster = Cluster::start().await;
    let mut first = cluster.peer(Role::Node, "a").await;
    let _second = cluster.peer(Role::Node, "a").await;
    assert!(matches!(first.hear().await, Heard::Rejected(_)));
    assert!(first.message().await.unwrap().is_none());
}

#[tokio::test]
async fn stop_ends_streams_and_the_recorded_events_replay() {
    let cluster = Cluster::start().await;
    let mut seed = cluster.peer(Role::Seed, "seed").await;
    let mut node = cluster.peer(Role::Node, "a").await;
    node.open();
    seed.hear().await;
    node.parents().await;
    cluster.scheduler.stop().await;
    assert!(!matches!(node.message().await, Ok(Some(_))));
    let log = std::fs::read_to_string(cluster.folder.path().join("events")).unwrap();
    let mut lines = log.lines();
    let (at, options) = record::parse_head(lines.next().unwrap()).unwrap();
    let mut core = Core::new(at, options);
    let events = lines.map(|line| record::parse(line).unwrap());
    let actions: Vec<_> = events.flat_map(|(now, event)| core.handle(now, event)).collect();
    assert!(actions.len() >= 2, "an order and an answer: {actions:?}");
}
