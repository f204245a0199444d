//! One stream to each scheduler, for as long as the scheduler is a member.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use darter_daemon::backoff::Backoff;
use darter_identity::attend::MemberInfo;
use darter_proto::convert;
use darter_proto::v1::peer_message::Message;
use darter_proto::v1::scheduler_client::SchedulerClient;
use darter_proto::v1::{
    CloseTask, Holdings, MakeOrder, Parents, PeerHello, PeerMessage, SchedulerMessage, scheduler_message,
};
use darter_types::{LayerTask, NodeName, PROTOCOL_VERSION, Role};
use tokio::sync::mpsc;
use tokio::time::{Interval, MissedTickBehavior, interval, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::{Control, Held, REPORTS_MAX, Scheduler};
use crate::layer::Peers;
use crate::serve::obey;
use crate::shared::Shared;

/// Tasks in one message of holdings.
const BATCH: usize = 256;

/// Messages that wait to be sent.
const OUTBOX_MAX: usize = 64;

/// Holdings that change within this time go out together.
const GATHER: Duration = Duration::from_millis(300);

/// How often a session looks whether it has to stand in for another.
const LOOK_EVERY: Duration = Duration::from_millis(500);

const WELCOME_DEADLINE: Duration = Duration::from_secs(5);
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(2);

/// A stream that ended sooner doesn't shorten the pauses: of two machines with one certificate each takes the other's place.
const SETTLED_AFTER: Duration = Duration::from_secs(60);

/// Why a stream ended about which nothing else is known.
const CLOSED: &str = "it closed the stream";

/// What this scheduler was told over this connection.
#[derive(Default)]
struct Sent {
    held: HashMap<LayerTask, u64>,
    /// Layers that are open, by the version of which it was told.
    open: HashMap<LayerTask, u64>,
    inventory_complete: bool,
}

/// Keeps a session with each scheduler of the cluster.
pub(crate) async fn keep(shared: Arc<Shared>) {
    let mut members = shared.members.clone();
    let mut sessions: HashMap<MemberInfo, CancellationToken> = HashMap::new();
    loop {
        let now = members.borrow_and_update().schedulers.clone();
        sessions.retain(|member, token| {
            let stays = now.contains(member);
            if !stays {
                token.cancel();
                shared.control.state.lock().schedulers.remove(&member.node);
            }
            stays
        });
        for member in now {
            sessions.entry(member).or_insert_with_key(|member| begin(&shared, member.clone()));
        }
        if members.changed().await.is_err() {
            // Nobody will say who else comes or goes; the sessions stay.
            std::future::pending::<()>().await;
        }
    }
}

fn begin(shared: &Arc<Shared>, member: MemberInfo) -> CancellationToken {
    let (reports, outbox) = mpsc::channel(REPORTS_MAX);
    let scheduler = Scheduler {
        member: member.clone(),
        away_since: Some(Instant::now()),
        trouble: "not connected yet".to_owned(),
        clock_ahead_seconds: None,
        reports,
    };
    shared.control.state.lock().schedulers.insert(member.node.clone(), scheduler);
    let token = CancellationToken::new();
    let (owner, stop) = (shared.clone(), token.clone());
    shared.tasks.spawn_until_stop("scheduler session", async move {
        stop.run_until_cancelled(keep_one(owner, member, outbox)).await;
    });
    token
}

async fn keep_one(shared: Arc<Shared>, member: MemberInfo, mut reports: mpsc::Receiver<Message>) {
    let mut backoff = Backoff::new(RETRY_MIN, RETRY_MAX);
    loop {
        let began = Instant::now();
        let ended = converse(&shared, &member, &mut reports).await;
        if began.elapsed() >= SETTLED_AFTER {
            backoff.reset();
        }
        tracing::debug!(scheduler = %member.node, reason = ended, "no stream to a scheduler");
        set_away(&shared, &member.node, &ended);
        tokio::time::sleep(backoff.next()).await;
    }
}

/// Notes why there is no stream; since when, only the first time.
fn set_away(shared: &Shared, scheduler: &NodeName, why: &str) {
    shared.control.change(|state, _| {
        if let Some(scheduler) = state.schedulers.get_mut(scheduler) {
            scheduler.away_since.get_or_insert_with(Instant::now);
            why.clone_into(&mut scheduler.trouble);
        }
    });
}

fn set_connected(shared: &Shared, scheduler: &NodeName, clock_ahead_seconds: Option<i64>) {
    shared.control.change(|state, _| {
        if let Some(scheduler) = state.schedulers.get_mut(scheduler) {
            scheduler.away_since = None;
            scheduler.trouble.clear();
            scheduler.clock_ahead_seconds = clock_ahead_seconds;
        }
    });
}

/// By the `date` of its answer, which is exact to a second.
fn clock_ahead(answer: &tonic::metadata::MetadataMap) -> Option<i64> {
    let date = answer.get("date")?.to_str().ok()?;
    let theirs = jiff::fmt::rfc2822::parse(date).ok()?.timestamp();
    Some(theirs.as_second() - jiff::Timestamp::now().as_second())
}

/// One connection, from hello to its end; returns why it ended.
async fn converse(
    shared: &Arc<Shared>,
    member: &MemberInfo,
    reports: &mut mpsc::Receiver<Message>,
) -> String {
    let (outbox, outgoing) = mpsc::channel(OUTBOX_MAX);
    let (clock, mut incoming) = match greet(shared, member, &outbox, outgoing).await {
        Ok(connected) => connected,
        Err(why) => return why,
    };
    set_connected(shared, &member.node, clock);
    tracing::info!(scheduler = %member.node, "connected to a scheduler");
    let mut changed = shared.control.changed.subscribe();
    let (mut look, mut gather) = (unhurried(LOOK_EVERY), unhurried(GATHER));
    let mut sent = Sent::default();
    loop {
        let messages = tokio::select! {
            message = incoming.message() => match heard(shared, message) {
                Some(ended) => return ended,
                None => continue,
            },
            Some(report) = reports.recv() => vec![report],
            // What is opened goes out at once; holdings gather.
            _ = changed.changed() => news(&shared.control, &member.node, &mut sent, false),
            _ = gather.tick() => news(&shared.control, &member.node, &mut sent, true),
            _ = look.tick() => news(&shared.control, &member.node, &mut sent, true),
        };
        for message in messages {
            if outbox.send(PeerMessage { message: Some(message) }).await.is_err() {
                return CLOSED.to_owned();
            }
        }
    }
}

/// An interval that catches up with nothing.
fn unhurried(period: Duration) -> Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Connects, says who we are, and waits to be let in; gives by how much the scheduler's clock is ahead, and its words to come.
async fn greet(
    shared: &Shared,
    member: &MemberInfo,
    outbox: &mpsc::Sender<PeerMessage>,
    outgoing: mpsc::Receiver<PeerMessage>,
) -> Result<(Option<i64>, Streaming<SchedulerMessage>), String> {
    let hello = PeerHello {
        protocol: PROTOCOL_VERSION,
        address: shared.address.clone(),
        zone: shared.options.zone.clone(),
        upload_slots: shared.options.upload_slots,
    };
    let first = PeerMessage { message: Some(Message::Hello(hello)) };
    outbox.try_send(first).expect("a new queue has room");
    let mut client = SchedulerClient::new(shared.identity.channel(&member.address, &[Role::Scheduler]));
    let connected = timeout(WELCOME_DEADLINE, client.connect(ReceiverStream::new(outgoing))).await;
    let response =
        connected.map_err(|_| "no answer in time")?.map_err(|status| status.message().to_owned())?;
    let clock = clock_ahead(response.metadata());
    let mut incoming = response.into_inner();
    welcomed(&mut incoming).await?;
    Ok((clock, incoming))
}

async fn welcomed(incoming: &mut Streaming<SchedulerMessage>) -> Result<(), String> {
    let first = timeout(WELCOME_DEADLINE, incoming.message()).await;
    let first = first.ok().and_then(Result::ok).flatten().and_then(|first| first.message);
    match first {
        Some(scheduler_message::Message::Welcome(welcome)) => {
            convert::check_protocol(welcome.protocol).map_err(|error| error.to_string())
        }
        Some(scheduler_message::Message::Rejected(rejected)) => Err(rejected.reason),
        _ => Err("no welcome".to_owned()),
    }
}

/// Acts on what came; `Some` if it ends the conversation.
fn heard(shared: &Arc<Shared>, message: Result<Option<SchedulerMessage>, Status>) -> Option<String> {
    match message {
        Ok(Some(message)) => hear(shared, message.message),
        Ok(None) => Some(CLOSED.to_owned()),
        Err(status) => Some(status.message().to_owned()),
    }
}

/// What the scheduler should know and was not told.
fn news(control: &Control, me: &NodeName, sent: &mut Sent, with_holdings: bool) -> Vec<Message> {
    let state = control.state.lock();
    let members = state.members();
    let mine = |task: LayerTask| state.owner(task, &members).as_ref() == Some(me);
    let mut news = Vec::new();
    if with_holdings || !sent.inventory_complete {
        let fresh = |task: &LayerTask, version: u64| sent.held.get(task) != Some(&version) && mine(*task);
        let held: Vec<_> = state.held.iter().filter(|(task, held)| fresh(task, held.version)).collect();
        let batches = held.chunks(BATCH);
        // A scheduler adds what it hears to what it knows: what became less is dropped first, in the same message.
        let told_more =
            |task: &LayerTask, held: &Held| sent.held.get(task).is_some_and(|told| *told < held.shrunk);
        news.extend(batches.map(|batch| {
            let tasks = batch.iter().map(|(_, held)| held.holding.clone()).collect();
            let less = batch.iter().filter(|(task, held)| told_more(task, held));
            let dropped = less.map(|(task, _)| task.diff_id.as_bytes().to_vec()).collect();
            Message::Holdings(Holdings { tasks, dropped, inventory_complete: false })
        }));
        let told: Vec<_> = held.iter().map(|(task, held)| (**task, held.version)).collect();
        sent.held.extend(told);
        let gone: Vec<_> =
            state.dropped.keys().filter(|task| sent.held.contains_key(task)).copied().collect();
        if !gone.is_empty() {
            sent.held.retain(|task, _| !state.dropped.contains_key(task));
            let dropped = gone.iter().map(|task| task.diff_id.as_bytes().to_vec()).collect();
            news.push(Message::Holdings(Holdings { tasks: Vec::new(), dropped, inventory_complete: false }));
        }
        if !sent.inventory_complete {
            sent.inventory_complete = true;
            news.push(Message::Holdings(Holdings { inventory_complete: true, ..Holdings::default() }));
        }
    }
    let closed: Vec<_> =
        sent.open.keys().filter(|task| !state.open.contains_key(task) || !mine(**task)).copied().collect();
    for task in closed {
        sent.open.remove(&task);
        let diff_id = task.diff_id.as_bytes().to_vec();
        news.push(Message::Close(CloseTask { diff_id, format: task.format }));
    }
    for (task, open) in &state.open {
        if sent.open.get(task) != Some(&open.version) && mine(*task) {
            sent.open.insert(*task, open.version);
            news.push(Message::Open(open.message.clone()));
        }
    }
    news
}

/// Acts on a scheduler's word; `Some` if it ends the conversation.
fn hear(shared: &Arc<Shared>, message: Option<scheduler_message::Message>) -> Option<String> {
    match message {
        Some(scheduler_message::Message::Parents(parents)) => hear_parents(shared, &parents),
        Some(scheduler_message::Message::Make(order)) => hear_order(shared, &order),
        Some(scheduler_message::Message::Rejected(rejected)) => return Some(rejected.reason),
        Some(scheduler_message::Message::Welcome(_)) | None => {}
    }
    None
}

fn hear_parents(shared: &Arc<Shared>, parents: &Parents) {
    let Ok(task) = convert::task(&parents.diff_id, parents.format) else { return };
    if let Some(layer) = shared.open_layer(task) {
        layer.open().hear(Peers::from_wire(parents, &shared.address));
    }
}

fn hear_order(shared: &Arc<Shared>, order: &MakeOrder) {
    let (Ok(task), Ok(sources)) =
        (convert::task(&order.diff_id, order.format), convert::sources(&order.sources))
    else {
        return;
    };
    if shared.is_seed() {
        obey(shared, task, sources);
    }
}

#[cfg(test)]
mod tests {
    use darter_types::DiffId;

    use super::*;

    fn connected(control: &Control, node: &NodeName) {
        let scheduler = Scheduler {
            member: MemberInfo {
                node: node.clone(),
                address: "127.0.0.1:7410".to_owned(),
                zone: String::new(),
            },
            away_since: None,
            trouble: String::new(),
            clock_ahead_seconds: None,
            reports: mpsc::channel(1).0,
        };
        control.state.lock().schedulers.insert(node.clone(), scheduler);
    }

    #[test]
    fn a_clock_is_compared_by_the_date_of_an_answer() {
        let ahead = |date: &str| {
            let mut answer = tonic::metadata::MetadataMap::new();
            answer.insert("date", date.parse().unwrap());
            clock_ahead(&answer)
        };
        for seconds in [3600, -3600] {
            let theirs = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds);
            // As HTTP writes it.
            let date = theirs.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
            let found = ahead(&date).unwrap();
            assert!((found - seconds).abs() < 60, "{found} s by {date}");
        }
        assert_eq!(ahead("soon"), None);
        assert_eq!(clock_ahead(&tonic::metadata::MetadataMap::new()), None);
    }

    #[test]
    fn layer_closed_and_opened_again_before_it_was_told_is_asked_for_again() {
        let (control, node) = (Control::default(), "scheduler-1".parse::<NodeName>().unwrap());
        connected(&control, &node);
        let task = LayerTask::current(DiffId::from_bytes([7; 32]));
        let mut sent = Sent { inventory_complete: true, ..Sent::default() };
        let mut opened = || {
            let news = news(&control, &node, &mut sent, false);
            news.iter().filter(|message| matches!(message, Message::Open(_))).count()
        };
        control.open(task, &[]);
        assert_eq!(opened(), 1);
        assert_eq!(opened(), 0);
        control.close(task);
        control.open(task, &[]);
        assert_eq!(opened(), 1);
    }
}
