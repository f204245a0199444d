//! `Cluster.Attend`: one stream a member. It hears who else lives, and seeds and nodes hear orders.

use std::pin::Pin;
use std::time::Duration;

use darter_daemon::tasks::Tasks;
use darter_identity::attend::{Hello, PreheatUpdate, SetRates};
use darter_identity::{Member, PeerInfo, require};
use darter_proto::convert::{WireError, check_protocol};
use darter_proto::v1::cluster_server::Cluster;
use darter_proto::v1::manager_message::Message as ToMember;
use darter_proto::v1::member_message::Message as FromMember;
use darter_proto::v1::{ClusterView, ManagerMessage, MemberMessage};
use darter_types::Role;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::internal;
use crate::core::limits::Table;
use crate::core::liveness::DEAD_AFTER;
use crate::db::Store;
use crate::limits::Limits;
use crate::preheats::Preheats;
use crate::root::now;
use crate::roster::{Leave, Place, Presence, Roster, sighting};

/// For the first message of a stream.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);

/// Messages that the member has not read yet; one that reads none for [`SEND_DEADLINE`] is let go.
const OUTGOING_MAX: usize = 16;
const SEND_DEADLINE: Duration = Duration::from_secs(10);

pub(crate) struct ClusterService {
    pub(crate) store: Store,
    pub(crate) roster: Roster,
    pub(crate) preheats: Preheats,
    pub(crate) limits: Limits,
    pub(crate) tasks: Tasks,
}

type Outgoing = mpsc::Sender<Result<ManagerMessage, Status>>;

#[tonic::async_trait]
impl Cluster for ClusterService {
    type AttendStream = Pin<Box<dyn Stream<Item = Result<ManagerMessage, Status>> + Send>>;

    async fn attend(
        &self,
        request: Request<Streaming<MemberMessage>>,
    ) -> Result<Response<Self::AttendStream>, Status> {
        let member = require(&request, &[Role::Scheduler, Role::Seed, Role::Node])?;
        let from = request.extensions().get::<PeerInfo>().map(|peer| peer.address.ip());
        let mut incoming = request.into_inner();
        let hello = first_message(&mut incoming).await?;
        self.welcome(&member, &hello).await?;
        let presence = self.roster.enter(&member, hello.clone(), from);
        if let Some(other) = &presence.twin {
            let one = Place { from, address: hello.address.clone() };
            tracing::warn!(%member, %one, %other, "two machines use one member's certificate and throw each other out");
        }
        let (outgoing, stream) = mpsc::channel(OUTGOING_MAX);
        let (preheats, store) = (self.preheats.clone(), self.store.clone());
        let limits = self.limits.table();
        let visit = Visit { member, hello, presence, outgoing, preheats, limits, store };
        self.tasks.spawn_alone("attending member", visit.run(incoming));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

impl ClusterService {
    async fn welcome(&self, member: &Member, hello: &Hello) -> Result<(), Status> {
        let seen = sighting(member.role, &member.node, hello, now());
        let revoked = self.store.call(move |storage| {
            let revoked = storage.is_revoked(seen.role, &seen.node)?;
            if !revoked {
                storage.record_sightings(&[seen])?;
            }
            Ok(revoked)
        });
        if revoked.await.map_err(internal)? {
            return Err(ended(Leave::Revoked, member));
        }
        Ok(())
    }
}

/// What a member is told at the end.
fn ended(leave: Leave, member: &Member) -> Status {
    match leave {
        Leave::Replaced => Status::aborted("this member attends on another stream now"),
        Leave::Revoked => Status::permission_denied(format!("{member} was revoked")),
    }
}

/// Returns when the member must go.
async fn left(leave: &mut watch::Receiver<Option<Leave>>) -> Leave {
    loop {
        if let Some(leave) = *leave.borrow_and_update() {
            return leave;
        }
        if leave.changed().await.is_err() {
            // The roster forgets it only when this stay is over.
            std::future::pending::<()>().await;
        }
    }
}

async fn first_message(incoming: &mut Streaming<MemberMessage>) -> Result<Hello, Status> {
    let first = timeout(HELLO_DEADLINE, incoming.message()).await;
    let first = first.map_err(|_| Status::deadline_exceeded("no hello came"))??;
    let Some(FromMember::Hello(hello)) = first.and_then(|message| message.message) else {
        return Err(WireError::Missing("hello").into());
    };
    check_protocol(hello.protocol)?;
    Ok(Hello::try_from(&hello)?)
}

/// A member's stay, from its hello to its end.
struct Visit {
    member: Member,
    hello: Hello,
    presence: Presence,
    outgoing: Outgoing,
    preheats: Preheats,
    limits: watch::Receiver<Table>,
    store: Store,
}

impl Visit {
    async fn run(mut self, mut incoming: Streaming<MemberMessage>) {
        let member = self.member.clone();
        tracing::info!(%member, "attends");
        match self.exchange(&mut incoming).await {
            Ok(()) => tracing::info!(%member, "left"),
            Err(status) => {
                tracing::info!(%member, reason = status.message(), "left");
                let _member_left = self.outgoing.try_send(Err(status));
            }
        }
        let seen = sighting(member.role, &member.node, &self.hello, now());
        drop(self.presence);
        if let Err(error) = self.store.call(move |storage| storage.record_sightings(&[seen])).await {
            tracing::warn!(%error, "can't write down when a member was last seen");
        }
    }

    async fn exchange(&mut self, incoming: &mut Streaming<MemberMessage>) -> Result<(), Status> {
        self.presence.view.mark_changed();
        let mut told = self.limits_now();
        let mut dead_at = Instant::now() + DEAD_AFTER;
        loop {
            tokio::select! {
                message = timeout_at(dead_at, incoming.message()) => {
                    let message = message.map_err(|_| Status::deadline_exceeded("no heartbeat came"))?;
                    let Some(message) = message? else { return Ok(()) };
                    dead_at = Instant::now() + DEAD_AFTER;
                    self.presence.heard();
                    self.receive(message).await?;
                }
                Ok(()) = self.presence.view.changed() => self.tell().await?,
                Ok(()) = self.limits.changed() => {
                    if self.limits_now() != told {
                        told = self.limits_now();
                        self.tell().await?;
                    }
                }
                Some(order) = self.presence.orders.recv() => self.send(order).await?,
                leave = left(&mut self.presence.leave) => return Err(ended(leave, &self.member)),
            }
        }
    }

    fn limits_now(&self) -> SetRates {
        self.limits.borrow().set_for(self.member.role, &self.member.node)
    }

    /// Who lives, and what the member may move: all of it each time.
    async fn tell(&mut self) -> Result<(), Status> {
        let mut view: ClusterView = (&*self.presence.view.borrow_and_update()).into();
        view.limits = Some((&self.limits_now()).into());
        self.send(ToMember::View(view)).await
    }

    async fn receive(&self, message: MemberMessage) -> Result<(), Status> {
        match message.message {
            Some(FromMember::Heartbeat(_)) => Ok(()),
            Some(FromMember::Preheat(update)) if matches!(self.member.role, Role::Seed | Role::Node) => {
                let update = PreheatUpdate::try_from(&update)?;
                self.preheats.report(self.presence.seat(), update).await;
                Ok(())
            }
            Some(FromMember::Preheat(_)) => {
                Err(Status::permission_denied("only seeds and nodes report on preheats"))
            }
            Some(FromMember::Hello(_)) | None => {
                Err(WireError::Missing("a message that may follow a hello").into())
            }
        }
    }

    async fn send(&self, message: ToMember) -> Result<(), Status> {
        let sent =
            self.outgoing.send_timeout(Ok(ManagerMessage { message: Some(message) }), SEND_DEADLINE).await;
        sent.map_err(|_| Status::deadline_exceeded("the member does not read what it is sent"))
    }
}
