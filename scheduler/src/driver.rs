//! Runs the core: one task owns it, has the clock, feeds it events and carries out its actions.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use darter_daemon::tasks::Tasks;
use darter_proto::v1;
use darter_proto::v1::scheduler_message::Message;
use darter_scheduler_core::{Action, Core, Event, Millis, Options, PeerId};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::metrics::Metrics;
use crate::recorder::Recorder;
use crate::translate;

/// Events that the core has not seen yet. When it is full, streams are not read on.
const EVENTS_MAX: usize = 8_192;

/// Messages to one peer that it has not taken yet. A peer that lets it fill up loses its stream and connects anew.
pub(crate) const OUTBOX_MAX: usize = 8_192;

/// How often news for many children goes out.
const TICK: Duration = Duration::from_millis(200);

pub(crate) type Answer = Result<v1::SchedulerMessage, Status>;

/// A cheap handle to the task that owns the core.
#[derive(Clone)]
pub(crate) struct Driver {
    commands: mpsc::Sender<Command>,
    next: Arc<AtomicU64>,
    metrics: Arc<Metrics>,
}

/// The way to one peer.
pub(crate) struct Outbox {
    pub(crate) messages: mpsc::Sender<Answer>,
    /// Cancelled when the scheduler wants to hear no more from this connection.
    pub(crate) closed: CancellationToken,
}

enum Command {
    Connect(PeerId, Event, Outbox),
    Event(Event),
}

impl Driver {
    pub(crate) fn start(recorder: Option<Recorder>, tasks: &Tasks) -> Self {
        let (commands, received) = mpsc::channel(EVENTS_MAX);
        let (options, metrics) = (Options::default(), Arc::<Metrics>::default());
        let mut running = Running {
            core: Core::new(Millis(0), options),
            started: Instant::now(),
            outboxes: BTreeMap::new(),
            recorder,
            metrics: metrics.clone(),
        };
        if let Some(recorder) = &mut running.recorder {
            recorder.head(Millis(0), options);
        }
        tasks.spawn_until_stop("schedule", running.run(received));
        Self { commands, next: Arc::new(AtomicU64::new(1)), metrics }
    }

    pub(crate) fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    pub(crate) fn next_peer(&self) -> PeerId {
        PeerId(self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// Fails only when the scheduler stops.
    pub(crate) async fn connect(&self, peer: PeerId, hello: Event, outbox: Outbox) -> Result<(), Status> {
        self.send(Command::Connect(peer, hello, outbox)).await
    }

    /// Fails only when the scheduler stops.
    pub(crate) async fn event(&self, event: Event) -> Result<(), Status> {
        self.send(Command::Event(event)).await
    }

    async fn send(&self, command: Command) -> Result<(), Status> {
        self.commands.send(command).await.map_err(|_| Status::unavailable("the scheduler is stopping"))
    }
}

struct Running {
    core: Core,
    started: Instant,
    outboxes: BTreeMap<PeerId, Outbox>,
    recorder: Option<Recorder>,
    metrics: Arc<Metrics>,
}

impl Running {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Connect(peer, hello, outbox)) => {
                        self.outboxes.insert(peer, outbox);
                        self.handle(hello);
                    }
                    Some(Command::Event(event)) => self.handle(event),
                    None => return,
                },
                _ = tick.tick() => {
                    self.handle(Event::Tick);
                    *self.metrics.counts.lock() = self.core.counts();
                }
            }
        }
    }

    fn handle(&mut self, event: Event) {
        if let Event::PeerGone { peer } = &event {
            self.close(*peer);
        }
        self.metrics.events.inc();
        let now = Millis(self.started.elapsed().as_millis() as u64);
        if let Some(recorder) = &mut self.recorder {
            recorder.event(now, &event);
        }
        for action in self.core.handle(now, event) {
            self.perform(action);
        }
    }

    fn perform(&mut self, action: Action) {
        tracing::debug!(?action);
        match action {
            Action::SendParents { peer, task, parents, seed } => {
                self.metrics.parents.inc();
                self.send(peer, Message::Parents(translate::parents(task, &parents, seed.as_ref())));
            }
            Action::OrderMake { seed, task, sources } => {
                self.metrics.orders.inc();
                tracing::info!(%task, seed = seed.0, "ordering a layer");
                self.send(seed, Message::Make(translate::order(task, &sources)));
            }
            Action::Reject { peer, reason } => {
                self.metrics.rejected.inc();
                tracing::info!(peer = peer.0, reason, "a peer is rejected");
                self.send(peer, Message::Rejected(v1::Rejected { reason }));
                self.close(peer);
            }
        }
    }

    /// A peer that takes nothing is let go; the core hears of it when its stream ends.
    fn send(&mut self, peer: PeerId, message: Message) {
        let Some(outbox) = self.outboxes.get(&peer) else { return };
        let message = v1::SchedulerMessage { message: Some(message) };
        if outbox.messages.try_send(Ok(message)).is_err() {
            tracing::warn!(peer = peer.0, "a peer does not take its messages and is let go");
            self.close(peer);
        }
    }

    fn close(&mut self, peer: PeerId) {
        if let Some(outbox) = self.outboxes.remove(&peer) {
            outbox.closed.cancel();
        }
    }
}
