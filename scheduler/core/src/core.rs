//! The core itself: its state, who comes and goes, who opens and closes.

use std::collections::{BTreeMap, BTreeSet};

use darter_types::{LayerSource, LayerTask, NodeName, Role};

use crate::choose::Chooser;
use crate::limits::{AVOID_MS, MAX_OPEN, MAX_PEERS, SUSPECT_MS};
use crate::state::{Open, Peer, Task};
use crate::{Action, Event, Fault, Millis, PeerId, Spans};

/// What a deployment may choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// After a start, and after a seed came, a layer that nobody seems to have is not ordered before this long: those
    /// that have it may not have said so yet.
    pub grace_ms: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { grace_ms: 2_000 }
    }
}

/// How much there is of everything, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    pub peers: usize,
    pub seeds: usize,
    pub tasks: usize,
    pub open: usize,
    pub making: usize,
}

/// The scheduler's state. See the head of the crate for what it promises.
pub struct Core {
    pub(crate) options: Options,
    /// The latest time that was heard; it doesn't go back.
    pub(crate) now: Millis,
    pub(crate) started: Millis,
    pub(crate) peers: BTreeMap<PeerId, Peer>,
    pub(crate) seeds: BTreeSet<PeerId>,
    pub(crate) nodes: BTreeMap<NodeName, PeerId>,
    pub(crate) tasks: BTreeMap<LayerTask, Task>,
    /// Tasks of which something changed since the last tick.
    pub(crate) changed: BTreeSet<LayerTask>,
    /// Tasks that are not ordered yet because somebody may turn out to hold them.
    pub(crate) held_back: BTreeSet<LayerTask>,
    /// When to look at which task again.
    pub(crate) timers: BTreeSet<(Millis, LayerTask)>,
    /// When room may be made again for more tasks.
    pub(crate) room_again: Millis,
    pub(crate) actions: Vec<Action>,
}

impl Core {
    /// A core that knows nothing; `now` is the moment of its start.
    pub fn new(now: Millis, options: Options) -> Self {
        Self {
            options,
            now,
            started: now,
            peers: BTreeMap::new(),
            seeds: BTreeSet::new(),
            nodes: BTreeMap::new(),
            tasks: BTreeMap::new(),
            changed: BTreeSet::new(),
            held_back: BTreeSet::new(),
            timers: BTreeSet::new(),
            room_again: Millis(0),
            actions: Vec::new(),
        }
    }

    /// Takes what happened at `now`, and says what is to be done, in this order. Events of connections that are not
    /// known (any more) change nothing.
    pub fn handle(&mut self, now: Millis, event: Event) -> Vec<Action> {
        self.now = self.now.max(now);
        match event {
            Event::PeerConnected { peer, node, role, address, zone, slots } => {
                self.connected(peer, node, role, address, zone, slots);
            }
            Event::PeerGone { peer } => self.gone(peer),
            Event::Holdings { peer, held, dropped } => self.holdings(peer, held, &dropped),
            Event::InventoryComplete { peer } => self.inventory_complete(peer),
            Event::OpenTask { peer, task, sources, wanted } => self.open(peer, task, sources, wanted),
            Event::CloseTask { peer, task } => self.close(peer, task),
            Event::ParentReport { peer, task, parent, fault } => self.report(peer, task, parent, fault),
            Event::MakeUpdate { peer, task, state } => self.make_update(peer, task, state),
            Event::Tick => self.tick(),
        }
        std::mem::take(&mut self.actions)
    }

    pub fn counts(&self) -> Counts {
        Counts {
            peers: self.peers.len(),
            seeds: self.seeds.len(),
            tasks: self.tasks.len(),
            open: self.peers.values().map(|peer| peer.open.len()).sum(),
            making: self.peers.values().map(|peer| peer.making.len()).sum(),
        }
    }

    fn connected(
        &mut self,
        id: PeerId,
        node: NodeName,
        role: Role,
        address: String,
        zone: String,
        slots: u32,
    ) {
        if self.peers.contains_key(&id) {
            return;
        }
        if let Some(old) = self.nodes.get(&node).copied() {
            self.gone(old);
            self.reject(old, "another connection of this node took its place".to_owned());
        }
        if !matches!(role, Role::Node | Role::Seed) {
            return self.reject(id, format!("a {role} is no peer"));
        }
        if self.peers.len() >= MAX_PEERS {
            return self.reject(id, format!("this scheduler serves {MAX_PEERS} peers already"));
        }
        let peer = Peer {
            node: node.clone(),
            seed: role == Role::Seed,
            address,
            zone,
            slots: slots.max(1),
            inventory_until: Some(self.now.plus(self.options.grace_ms)),
            held: BTreeSet::new(),
            held_bytes: 0,
            open: BTreeSet::new(),
            children: BTreeSet::new(),
            making: BTreeSet::new(),
            suspect_until: Millis(0),
            unreachable: Default::default(),
        };
        self.nodes.insert(node, id);
        if peer.seed {
            self.seeds.insert(id);
            let wanted = self.tasks.iter().filter(|(_, task)| !task.opens.is_empty() && task.make.is_none());
            self.changed.extend(wanted.map(|(id, _)| *id));
        }
        self.peers.insert(id, peer);
    }

    pub(crate) fn reject(&mut self, peer: PeerId, reason: String) {
        self.actions.push(Action::Reject { peer, reason });
    }

    fn gone(&mut self, id: PeerId) {
        let Some(peer) = self.peers.remove(&id) else { return };
        self.nodes.remove(&peer.node);
        self.seeds.remove(&id);
        for task in &peer.open {
            self.forget_open(id, *task);
        }
        for (task, child) in &peer.children {
            self.lost_parent(*task, *child);
        }
        for task in &peer.held {
            self.lost_holder(id, *task, peer.seed, &peer.zone);
        }
        for task in &peer.making {
            self.lost_maker(id, *task);
        }
    }

    /// A parent of `child` is no more: the child is told at the next tick.
    pub(crate) fn lost_parent(&mut self, task: LayerTask, child: PeerId) {
        let Some(entry) = self.tasks.get_mut(&task) else { return };
        if entry.opens.contains_key(&child) {
            entry.waiting.insert(child);
            self.changed.insert(task);
        }
    }

    fn open(&mut self, id: PeerId, task: LayerTask, sources: Vec<LayerSource>, wanted: Spans) {
        let room = self.tasks.contains_key(&task) || self.has_room(task);
        let Some(peer) = self.peers.get(&id) else { return };
        if !room || (peer.open.len() >= MAX_OPEN && !peer.open.contains(&task)) {
            return self.actions.push(Action::SendParents {
                peer: id,
                task,
                parents: Vec::new(),
                seed: None,
            });
        }
        let entry = self.tasks.entry(task).or_default();
        entry.add_sources(sources, self.now);
        entry.opens.entry(id).or_default().wanted = wanted;
        entry.waiting.insert(id);
        self.peers.get_mut(&id).expect("it was there above").open.insert(task);
        // Whoever opens a task again wants to hear again.
        self.take_back(id, task);
        self.see_to_maker(task);
        self.tell(id, task);
    }

    fn close(&mut self, id: PeerId, task: LayerTask) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        if peer.open.remove(&task) {
            self.forget_open(id, task);
            self.forget_if_empty(task);
        }
    }

    fn forget_open(&mut self, id: PeerId, task: LayerTask) {
        self.take_back(id, task);
        let Some(entry) = self.tasks.get_mut(&task) else { return };
        entry.opens.remove(&id);
        entry.waiting.remove(&id);
        self.changed.insert(task);
    }

    /// What this child was told no longer counts: its parents get their slots back.
    pub(crate) fn take_back(&mut self, child: PeerId, task: LayerTask) {
        let Some(open) = self.tasks.get_mut(&task).and_then(|entry| entry.opens.get_mut(&child)) else {
            return;
        };
        for parent in open.told.take().unwrap_or_default().parents {
            if let Some(parent) = self.peers.get_mut(&parent) {
                parent.children.remove(&(task, child));
            }
        }
    }

    fn report(&mut self, id: PeerId, task: LayerTask, parent: NodeName, fault: Fault) {
        let (now, until) = (self.now, self.now.plus(AVOID_MS));
        let Some(child) = self.peers.get_mut(&id) else { return };
        let witness = child.node.clone();
        let Some(entry) = self.tasks.get_mut(&task) else { return };
        let Some(open) = entry.opens.get_mut(&id) else { return };
        if parent == witness {
            return;
        }
        match fault {
            Fault::Unreachable => child.unreachable.insert(parent.clone(), until, now),
            Fault::Slow => open.avoided.insert(parent.clone(), until, now),
            Fault::Refused => {
                open.avoided.insert(parent.clone(), until, now);
                entry.refused = true;
            }
            Fault::WrongBytes => {
                entry.accuse(parent.clone(), witness);
                if entry.is_convicted(&parent) {
                    entry.wake_all();
                }
            }
        }
        entry.waiting.insert(id);
        self.timers.insert((until, task));
        self.suspect(&parent, fault);
        self.changed.insert(task);
        self.see_to_maker(task);
        self.tell(id, task);
    }

    /// A fault that others may meet too makes a parent the last choice everywhere, for a time.
    fn suspect(&mut self, parent: &NodeName, fault: Fault) {
        let ms = match fault {
            Fault::WrongBytes => SUSPECT_MS,
            Fault::Unreachable => AVOID_MS,
            Fault::Slow | Fault::Refused => return,
        };
        let until = self.now.plus(ms);
        if let Some(peer) = self.nodes.get(parent).and_then(|id| self.peers.get_mut(id)) {
            peer.suspect_until = peer.suspect_until.max(until);
        }
    }

    pub(crate) fn forget_if_empty(&mut self, task: LayerTask) {
        if self.tasks.get(&task).is_some_and(|entry| entry.is_forgettable(self.now)) {
            self.tasks.remove(&task);
            self.changed.remove(&task);
            self.held_back.remove(&task);
        }
    }

    pub(crate) fn chooser(&self, id: LayerTask) -> Option<Chooser<'_>> {
        self.tasks.get(&id).map(|task| Chooser {
            now: self.now,
            id,
            task,
            peers: &self.peers,
            seeds: &self.seeds,
        })
    }

    pub(crate) fn open_of(&self, child: PeerId, task: LayerTask) -> Option<&Open> {
        self.tasks.get(&task)?.opens.get(&child)
    }
}
