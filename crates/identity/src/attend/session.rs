//! The stream to the manager, again and again.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use darter_daemon::backoff::Backoff;
use darter_proto::v1::cluster_client::ClusterClient;
use darter_proto::v1::manager_message::Message as FromManager;
use darter_proto::v1::member_message::Message as FromMember;
use darter_proto::v1::{self, Heartbeat, MemberHello, MemberMessage};
use darter_types::{PROTOCOL_VERSION, Role};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{
    ClusterMembers, HEARTBEAT_SECONDS, Hello, PreheatCommand, PreheatUpdate, SetRates, Standing, rates, view,
};
use crate::Identity;

const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(15);

/// A stream that ended sooner doesn't shorten the pauses: two machines with one certificate end each other's, for ever.
const SETTLED_AFTER: Duration = Duration::from_secs(60);

/// For the manager to take the stream.
const OPEN_DEADLINE: Duration = Duration::from_secs(15);

/// Messages on their way to the manager; when it does not read them, the stream is given up.
const OUTGOING_MAX: usize = 16;

/// For a message to find room among them.
const SEND_DEADLINE: Duration = Duration::from_secs(10);

pub(super) struct Session {
    identity: Identity,
    manager: String,
    hello: Hello,
    heard: Heard,
    commands: mpsc::Sender<PreheatCommand>,
}

/// Where what the manager says goes to: those who ask, and files for the next start.
pub(super) struct Heard {
    pub(super) standing: watch::Sender<Standing>,
    pub(super) file: Option<PathBuf>,
    pub(super) members: watch::Sender<ClusterMembers>,
    pub(super) limits_file: Option<PathBuf>,
    pub(super) limits: watch::Sender<SetRates>,
}

impl Session {
    pub(super) fn new(
        identity: Identity,
        manager: String,
        hello: Hello,
        heard: Heard,
        commands: mpsc::Sender<PreheatCommand>,
    ) -> Self {
        Self { identity, manager, hello, heard, commands }
    }

    /// Never returns.
    pub(super) async fn run(self, mut updates: mpsc::Receiver<PreheatUpdate>) {
        let mut pauses = Pauses(Backoff::new(RETRY_MIN, RETRY_MAX));
        loop {
            let (began, mut heard) = (Instant::now(), false);
            let ended = self.attend_once(&mut updates, &mut heard).await;
            let lived = if heard { began.elapsed() } else { Duration::ZERO };
            self.note_end(ended.err());
            drop_during(&mut updates, pauses.after(lived)).await;
        }
    }

    /// For people: in the log, and for whoever asks.
    fn note_end(&self, status: Option<Status>) {
        let words = status.as_ref().map_or_else(|| "it has ended the stream".to_owned(), words);
        match status {
            None => tracing::info!(manager = self.manager, "the manager ended the stream, attending again"),
            Some(_) => {
                tracing::warn!(manager = self.manager, error = words, "not attending, trying again");
            }
        }
        let now = SystemTime::now();
        self.heard.standing.send_modify(|standing| standing.ended(status.as_ref(), &words, now));
    }

    /// One stream from hello to end; `heard` says whether the manager ever answered.
    async fn attend_once(
        &self,
        updates: &mut mpsc::Receiver<PreheatUpdate>,
        heard: &mut bool,
    ) -> Result<(), Status> {
        let (outgoing, stream) = mpsc::channel(OUTGOING_MAX);
        send(&outgoing, FromMember::Hello(self.hello())).await?;
        // A channel of its own for each stream: it shows the newest certificate.
        let mut client = ClusterClient::new(self.identity.channel(&self.manager, &[Role::Manager]));
        let opened = timeout(OPEN_DEADLINE, client.attend(ReceiverStream::new(stream))).await;
        let mut incoming = opened.map_err(|_| Status::deadline_exceeded("no answer"))??.into_inner();
        self.exchange(&mut incoming, &outgoing, updates, heard).await
    }

    async fn exchange(
        &self,
        incoming: &mut Streaming<v1::ManagerMessage>,
        outgoing: &mpsc::Sender<MemberMessage>,
        updates: &mut mpsc::Receiver<PreheatUpdate>,
        heard: &mut bool,
    ) -> Result<(), Status> {
        let mut heartbeat = interval(Duration::from_secs(HEARTBEAT_SECONDS));
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut reporting = true;
        loop {
            tokio::select! {
                message = incoming.message() => match message? {
                    Some(message) => {
                        if !std::mem::replace(heard, true) {
                            self.heard.standing.send_modify(Standing::begun);
                        }
                        self.receive(message, outgoing).await?;
                    }
                    None => return Ok(()),
                },
                _ = heartbeat.tick() => send(outgoing, FromMember::Heartbeat(Heartbeat {})).await?,
                update = updates.recv(), if reporting => match update {
                    Some(update) => send(outgoing, FromMember::Preheat((&update).into())).await?,
                    None => reporting = false,
                },
            }
        }
    }

    async fn receive(
        &self,
        message: v1::ManagerMessage,
        outgoing: &mpsc::Sender<MemberMessage>,
    ) -> Result<(), Status> {
        let message =
            message.message.ok_or_else(|| Status::invalid_argument("the manager's message is empty"))?;
        match message {
            FromManager::View(view) => {
                self.heard.limit(view.limits.as_ref().into()).await;
                self.heard.adopt((&view).try_into()?).await;
            }
            FromManager::Preheat(order) => self.command(order.into(), outgoing).await?,
            FromManager::Fetch(order) => {
                self.command(PreheatCommand::Fetch((&order).try_into()?), outgoing).await?;
            }
            FromManager::Cancel(cancel) => {
                self.command(PreheatCommand::Cancel { id: cancel.id }, outgoing).await?
            }
        }
        Ok(())
    }

    /// An order that finds no room is answered at once, so that the manager can turn to another member.
    async fn command(
        &self,
        command: PreheatCommand,
        outgoing: &mpsc::Sender<MemberMessage>,
    ) -> Result<(), Status> {
        match self.commands.try_send(command) {
            Ok(()) => Ok(()),
            Err(refused) => match refused.into_inner() {
                PreheatCommand::Cancel { .. } => Ok(()),
                refused @ (PreheatCommand::Start { .. } | PreheatCommand::Fetch(_)) => {
                    let update = PreheatUpdate::failed(refused.id(), "this member takes no more orders");
                    send(outgoing, FromMember::Preheat((&update).into())).await
                }
            },
        }
    }

    fn hello(&self) -> MemberHello {
        let Hello { version, address, zone } = self.hello.clone();
        MemberHello { protocol: PROTOCOL_VERSION, version, address, zone }
    }
}

/// Between one stream and the next.
struct Pauses(Backoff);

impl Pauses {
    /// The pause after a stream that lived for so long.
    fn after(&mut self, lived: Duration) -> Duration {
        if lived >= SETTLED_AFTER {
            self.0.reset();
        }
        self.0.next()
    }
}

/// The manager's word counts even if it can't be written down.
impl Heard {
    async fn adopt(&self, members: ClusterMembers) {
        let written = members.clone();
        if hear(&self.members, members) {
            write_down(self.file.clone(), move |file| view::save(file, &written)).await;
        }
    }

    async fn limit(&self, limits: SetRates) {
        if hear(&self.limits, limits) {
            let SetRates { cluster, member } = &limits;
            tracing::info!(%cluster, %member, "the manager has changed this member's limits");
            write_down(self.limits_file.clone(), move |file| rates::save(file, &limits)).await;
        }
    }
}

/// Whether it is news.
fn hear<T: PartialEq>(known: &watch::Sender<T>, now: T) -> bool {
    known.send_if_modified(|known| {
        let changed = *known != now;
        *known = now;
        changed
    })
}

async fn write_down(file: Option<PathBuf>, save: impl FnOnce(&Path) -> io::Result<()> + Send + 'static) {
    let Some(file) = file else { return };
    let written = tokio::task::spawn_blocking(move || save(&file)).await;
    if let Err(error) = written.expect("writing the file does not panic") {
        tracing::warn!(%error, "can't write down what the manager said");
    }
}

async fn send(outgoing: &mpsc::Sender<MemberMessage>, message: FromMember) -> Result<(), Status> {
    let message = MemberMessage { message: Some(message) };
    let sent = outgoing.send_timeout(message, SEND_DEADLINE).await;
    sent.map_err(|_| Status::unavailable("the manager does not read what it is sent"))
}

/// Waits, and drops what is reported meanwhile, so that no reporter hangs while the manager is away.
async fn drop_during(updates: &mut mpsc::Receiver<PreheatUpdate>, pause: Duration) {
    let dropping = async {
        while updates.recv().await.is_some() {}
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = sleep(pause) => {}
        () = dropping => {}
    }
}

/// The status and, where it hides one, the cause.
fn words(status: &Status) -> String {
    let mut cause = std::error::Error::source(status);
    let mut words = status.message().to_owned();
    while let Some(error) = cause {
        words = error.to_string();
        cause = error.source();
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_until_a_stream_has_lived_for_a_minute() {
        let mut pauses = Pauses(Backoff::new(RETRY_MIN, RETRY_MAX));
        let last = (0..20).map(|_| pauses.after(Duration::from_secs(20))).last().unwrap();
        assert!(last >= RETRY_MAX / 2, "{last:?}");
        let first = pauses.after(SETTLED_AFTER);
        assert!(first <= RETRY_MIN, "{first:?}");
    }
}
