//! What the schedulers are told: what this peer holds, which layers it wants, what it saw of its parents.
//!
//! [`Control`] is the state that they should know; one connection a scheduler ([`session`]) brings its scheduler up to it. A
//! task's scheduler is the first in the task's rendezvous order that is not known to be away.

mod session;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use darter_identity::attend::MemberInfo;
use darter_proto::v1::peer_message::Message;
use darter_proto::v1::{Holding, MakeState, MakeUpdate, OpenTask, ParentFault, ParentReport};
use darter_types::{LayerSource, LayerTask, NodeName};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};

use crate::bits::Bits;
use crate::rendezvous;
use crate::status::SchedulerStatus;

pub(crate) use session::keep;

/// A scheduler that has been away for so long is stood in for by the next in order. Shorter, and a start of the whole
/// cluster would have layers made twice.
const AWAY_AFTER: Duration = Duration::from_secs(2);

/// Reports that a scheduler was not sent yet; beyond, they are dropped: they are hints.
const REPORTS_MAX: usize = 256;

struct Held {
    version: u64,
    /// The version at which it last became less.
    shrunk: u64,
    holding: Holding,
}

struct Opened {
    /// Who opens a layer anew waits for a new answer, also if the last one is only a moment old.
    version: u64,
    message: OpenTask,
}

struct Scheduler {
    member: MemberInfo,
    /// `None` while it is connected.
    away_since: Option<Instant>,
    /// Why there is no stream to it, in words.
    trouble: String,
    /// How far its clock was before ours when the stream began.
    clock_ahead_seconds: Option<i64>,
    reports: mpsc::Sender<Message>,
}

#[derive(Default)]
struct State {
    version: u64,
    held: HashMap<LayerTask, Held>,
    dropped: HashMap<LayerTask, u64>,
    open: HashMap<LayerTask, Opened>,
    schedulers: HashMap<NodeName, Scheduler>,
}

impl State {
    fn members(&self) -> Vec<MemberInfo> {
        self.schedulers.values().map(|scheduler| scheduler.member.clone()).collect()
    }

    /// The scheduler that has the task now; it may be away for a moment.
    fn owner(&self, task: LayerTask, members: &[MemberInfo]) -> Option<NodeName> {
        let order = rendezvous::order(task, members);
        let is_there = |member: &&MemberInfo| {
            let away = self.schedulers.get(&member.node).and_then(|scheduler| scheduler.away_since);
            away.is_none_or(|since| since.elapsed() < AWAY_AFTER)
        };
        order.iter().find(is_there).map(|member| member.node.clone())
    }
}

fn holding(task: LayerTask, has_map: bool, spans: &Bits) -> Holding {
    Holding {
        diff_id: task.diff_id.as_bytes().to_vec(),
        format: task.format,
        has_map,
        spans_total: spans.len(),
        spans: spans.as_bytes().to_vec(),
    }
}

pub(crate) struct Control {
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

impl Default for Control {
    fn default() -> Self {
        Self { state: Mutex::default(), changed: watch::Sender::new(0) }
    }
}

impl Control {
    fn change(&self, change: impl FnOnce(&mut State, u64)) {
        let mut state = self.state.lock();
        state.version += 1;
        let version = state.version;
        change(&mut state, version);
        drop(state);
        self.changed.send_replace(version);
    }

    /// This peer has these spans of the layer, and can give others the map if `has_map`.
    pub(crate) fn hold(&self, task: LayerTask, has_map: bool, spans: &Bits) {
        let holding = holding(task, has_map, spans);
        self.change(|state, version| {
            let was_dropped = state.dropped.remove(&task).is_some();
            let before = state.held.get(&task).map_or(0, |held| held.shrunk);
            let shrunk = if was_dropped { version } else { before };
            state.held.insert(task, Held { version, shrunk, holding });
        });
    }

    /// The same after something of it went.
    pub(crate) fn shrink(&self, task: LayerTask, has_map: bool, spans: &Bits) {
        let holding = holding(task, has_map, spans);
        self.change(|state, version| {
            state.dropped.remove(&task);
            state.held.insert(task, Held { version, shrunk: version, holding });
        });
    }

    /// This peer has nothing of the layer any more.
    pub(crate) fn drop_task(&self, task: LayerTask) {
        self.change(|state, version| {
            state.held.remove(&task);
            state.dropped.insert(task, version);
        });
    }

    /// This peer wants the layer.
    pub(crate) fn open(&self, task: LayerTask, sources: &[LayerSource]) {
        let message = OpenTask {
            diff_id: task.diff_id.as_bytes().to_vec(),
            format: task.format,
            sources: sources.iter().map(Into::into).collect(),
            wanted: Vec::new(),
        };
        self.change(|state, version| {
            state.open.insert(task, Opened { version, message });
        });
    }

    pub(crate) fn close(&self, task: LayerTask) {
        self.change(|state, _| {
            state.open.remove(&task);
        });
    }

    /// The schedulers that are known, by name.
    pub(crate) fn schedulers(&self) -> Vec<SchedulerStatus> {
        let state = self.state.lock();
        let status = |scheduler: &Scheduler| SchedulerStatus {
            node: scheduler.member.node.to_string(),
            address: scheduler.member.address.clone(),
            connected: scheduler.away_since.is_none(),
            trouble: scheduler.trouble.clone(),
            clock_ahead_seconds: scheduler.clock_ahead_seconds,
        };
        let mut all: Vec<_> = state.schedulers.values().map(status).collect();
        all.sort_by(|one, other| one.node.cmp(&other.node));
        all
    }

    /// Whether a scheduler is connected that can be expected to answer for the task.
    pub(crate) fn has_scheduler(&self, task: LayerTask) -> bool {
        let state = self.state.lock();
        let owner = state.owner(task, &state.members());
        owner.and_then(|owner| state.schedulers.get(&owner)).is_some_and(|owner| owner.away_since.is_none())
    }

    fn tell_owner(&self, task: LayerTask, message: Message) {
        let state = self.state.lock();
        let owner = state.owner(task, &state.members());
        if let Some(scheduler) = owner.and_then(|owner| state.schedulers.get(&owner)) {
            let _ = scheduler.reports.try_send(message);
        }
    }

    pub(crate) fn report(&self, task: LayerTask, parent: &str, fault: ParentFault) {
        let report = ParentReport {
            diff_id: task.diff_id.as_bytes().to_vec(),
            format: task.format,
            parent: parent.to_owned(),
            fault: fault.into(),
        };
        self.tell_owner(task, Message::Report(report));
    }

    pub(crate) fn make_update(&self, task: LayerTask, state: MakeState, reason: String) {
        let diff_id = task.diff_id.as_bytes().to_vec();
        let update = MakeUpdate { diff_id, format: task.format, state: state.into(), reason };
        self.tell_owner(task, Message::Make(update));
    }
}
