//! The streams of nodes and seeds.

use std::time::Duration;

use darter_daemon::tasks::Tasks;
use darter_identity::{Member, require};
use darter_proto::convert::WireError;
use darter_proto::v1::peer_message::Message;
use darter_proto::v1::scheduler_message::Message as Outgoing;
use darter_proto::v1::{PeerHello, PeerMessage, SchedulerMessage, Welcome, scheduler_server::Scheduler};
use darter_scheduler_core::{Event, PeerId};
use darter_types::{NodeName, PROTOCOL_VERSION, Role};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::driver::{Answer, Driver, OUTBOX_MAX, Outbox};
use crate::translate;

/// For the first message of a stream.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);

pub(crate) struct Service {
    name: NodeName,
    driver: Driver,
    tasks: Tasks,
}

impl Service {
    pub(crate) fn new(name: NodeName, driver: Driver, tasks: Tasks) -> Self {
        Self { name, driver, tasks }
    }

    fn welcome(&self) -> SchedulerMessage {
        let welcome = Welcome { protocol: PROTOCOL_VERSION, scheduler: self.name.to_string() };
        SchedulerMessage { message: Some(Outgoing::Welcome(welcome)) }
    }
}

#[tonic::async_trait]
impl Scheduler for Service {
    type ConnectStream = ReceiverStream<Answer>;

    async fn connect(
        &self,
        request: Request<Streaming<PeerMessage>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let member = require(&request, &[Role::Node, Role::Seed])?;
        let mut incoming = request.into_inner();
        let hello = first(&mut incoming).await?;
        let peer = self.driver.next_peer();
        let connected = translate::hello(peer, &member, &hello)?;
        let (messages, outgoing) = mpsc::channel(OUTBOX_MAX);
        messages.try_send(Ok(self.welcome())).expect("a new channel has room");
        let closed = CancellationToken::new();
        let outbox = Outbox { messages: messages.clone(), closed: closed.clone() };
        self.driver.connect(peer, connected, outbox).await?;
        tracing::info!(%member, peer = peer.0, address = hello.address, "a peer connected");
        let stream = PeerStream { member, peer, driver: self.driver.clone(), messages, closed };
        self.tasks.spawn_alone("peer stream", stream.run(incoming));
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

async fn first(incoming: &mut Streaming<PeerMessage>) -> Result<PeerHello, Status> {
    let message = timeout(HELLO_DEADLINE, incoming.message()).await;
    match message.map_err(|_| Status::deadline_exceeded("no hello"))??.and_then(|message| message.message) {
        Some(Message::Hello(hello)) => Ok(hello),
        _ => Err(WireError::Missing("hello").into()),
    }
}

/// What one peer says, from hello to the end.
struct PeerStream {
    member: Member,
    peer: PeerId,
    driver: Driver,
    messages: mpsc::Sender<Answer>,
    closed: CancellationToken,
}

impl PeerStream {
    async fn run(self, incoming: Streaming<PeerMessage>) {
        let ended = self.closed.run_until_cancelled(self.read(incoming)).await;
        match &ended {
            None => tracing::debug!(member = %self.member, "a peer's stream was closed"),
            Some(Ok(())) => tracing::info!(member = %self.member, "a peer left"),
            Some(Err(status)) => {
                tracing::info!(member = %self.member, error = status.message(), "a peer's stream broke");
                // Nobody may be there to hear it.
                let _ = self.messages.try_send(Err(status.clone()));
            }
        }
        // Fails only when the scheduler stops.
        let _ = self.driver.event(Event::PeerGone { peer: self.peer }).await;
    }

    async fn read(&self, mut incoming: Streaming<PeerMessage>) -> Result<(), Status> {
        while let Some(message) = incoming.message().await? {
            for event in translate::events(self.peer, message)? {
                self.driver.event(event).await?;
            }
        }
        Ok(())
    }
}
