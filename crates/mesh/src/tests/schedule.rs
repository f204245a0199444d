//! What the schedulers are told, and what their word does.

use std::sync::Arc;

use darter_daemon::tasks::Tasks;
use darter_identity::ClientAuth;
use darter_proto::v1::peer_message::Message as Said;
use darter_proto::v1::scheduler_message::Message as Answer;
use darter_proto::v1::scheduler_server::{Scheduler, SchedulerServer};
use darter_proto::v1::{MakeOrder, MakeState, Parents, PeerMessage, SchedulerMessage, Welcome};
use darter_types::PROTOCOL_VERSION;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use super::world::{TestLayer, World, contents, eventually, member, read_all};

type Outbox = mpsc::Sender<Result<SchedulerMessage, Status>>;

/// Writes down what it hears, and says what the test says.
#[derive(Clone, Default)]
struct Stub {
    heard: Arc<Mutex<Vec<(String, Said)>>>,
    outboxes: Arc<Mutex<Vec<(String, Outbox)>>>,
}

#[tonic::async_trait]
impl Scheduler for Stub {
    type ConnectStream = ReceiverStream<Result<SchedulerMessage, Status>>;

    async fn connect(
        &self,
        request: Request<Streaming<PeerMessage>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let name = darter_identity::member(&request).unwrap().node.to_string();
        let (outbox, answers) = mpsc::channel(16);
        let welcome = Welcome { protocol: PROTOCOL_VERSION, scheduler: "stub".to_owned() };
        outbox.try_send(Ok(SchedulerMessage { message: Some(Answer::Welcome(welcome)) })).unwrap();
        self.outboxes.lock().push((name.clone(), outbox));
        let (heard, mut incoming) = (self.heard.clone(), request.into_inner());
        tokio::spawn(async move {
            while let Ok(Some(message)) = incoming.message().await {
                heard.lock().push((name.clone(), message.message.unwrap()));
            }
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}

impl Stub {
    async fn start(world: &World, tasks: &Tasks) -> Self {
        let stub = Self::default();
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let identity = world.identity("scheduler", "stub");
        let mut listener = identity.listener(tcp, &[b"h2"], ClientAuth::Required, tasks).unwrap();
        let address = listener.address().to_string();
        let (incoming, service) = (listener.grpc(), SchedulerServer::new(stub.clone()));
        tasks.spawn_until_stop("stub", async move {
            Server::builder().add_service(service).serve_with_incoming(incoming).await.unwrap();
        });
        world.members.send_modify(|members| members.schedulers.push(member("stub", &address)));
        stub
    }

    fn heard(&self, name: &str, what: impl Fn(&Said) -> bool) -> bool {
        self.heard.lock().iter().any(|(from, said)| from == name && what(said))
    }

    fn say(&self, name: &str, message: Answer) {
        let outboxes = self.outboxes.lock();
        let (_, outbox) = outboxes.iter().rev().find(|(to, _)| to == name).unwrap();
        outbox.try_send(Ok(SchedulerMessage { message: Some(message) })).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn order_is_obeyed_and_told_and_the_child_goes_where_it_is_sent() {
    let world = World::new();
    let made = TestLayer::new("a", 20, 100_000);
    let source = world.registry.push("library/a", &made.tar);
    let tasks = Tasks::new();
    let stub = Stub::start(&world, &tasks).await;
    let seed = world.peer("seed", "seed", |_| {}).await;
    let node = world.node("one").await;
    for name in ["seed", "one"] {
        let complete = |said: &Said| matches!(said, Said::Holdings(held) if held.inventory_complete);
        eventually("both have told what they hold", || stub.heard(name, complete)).await;
    }
    let layer = node.open(&made, &source);
    eventually("the node has opened the task", || stub.heard("one", |said| matches!(said, Said::Open(_))))
        .await;
    let (diff_id, format) = (made.task.diff_id.as_bytes().to_vec(), made.task.format);
    let sources = vec![(&source).into()];
    stub.say("seed", Answer::Make(MakeOrder { diff_id: diff_id.clone(), format, sources }));
    for state in [MakeState::Started, MakeState::Done] {
        let says = |said: &Said| matches!(said, Said::Make(update) if update.state() == state);
        eventually("the seed tells how far it is", || stub.heard("seed", says)).await;
    }
    let held =
        |said: &Said| matches!(said, Said::Holdings(held) if held.tasks.iter().any(|task| task.has_map));
    eventually("the seed tells that it has the layer", || stub.heard("seed", held)).await;
    let parent = darter_proto::v1::Parent {
        node: "seed".to_owned(),
        address: seed.mesh.address().to_string(),
        is_seed: true,
    };
    stub.say("one", Answer::Parents(Parents { diff_id, format, parents: vec![], seed: Some(parent) }));
    assert!(read_all(&layer).await == contents(&made));
    let whole = |said: &Said| matches!(said, Said::Holdings(held) if held.tasks.iter().any(|task| !task.spans.is_empty()));
    eventually("the node tells its spans", || stub.heard("one", whole)).await;
    drop(layer);
    eventually("the node has closed the task", || stub.heard("one", |said| matches!(said, Said::Close(_))))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn scheduler_that_comes_back_is_told_everything_again() {
    let world = World::new();
    let made = TestLayer::new("a", 2, 100_000);
    let source = world.registry.push("library/a", &made.tar);
    let _seed = world.seed("seed").await;
    let node = world.node("one").await;
    read_all(&node.open(&made, &source)).await;
    for _ in 0..2 {
        let tasks = Tasks::new();
        world.members.send_modify(|members| members.schedulers.clear());
        let stub = Stub::start(&world, &tasks).await;
        let held =
            |said: &Said| matches!(said, Said::Holdings(held) if held.tasks.iter().any(|task| task.has_map));
        eventually("the node tells what it has", || stub.heard("one", held)).await;
        tasks.stop(std::time::Duration::from_secs(1)).await;
    }
}
