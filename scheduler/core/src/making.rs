//! Orders to seeds: one at a time for a task, passed on when a seed can't.

use darter_types::{LayerSource, LayerTask};

use crate::choose::Chooser;
use crate::core::Core;
use crate::limits::{FAILED_MS, IMPOSSIBLE_MS, MAX_TASKS, SILENT_MS, START_MS};
use crate::state::{Make, Task, source_key};
use crate::{Action, Holding, MakeState, Millis, PeerId, Spans};

impl Core {
    /// Has the layer made if somebody wants it and the mesh can't give it.
    pub(crate) fn see_to_maker(&mut self, task: LayerTask) {
        self.check_deadline(task);
        if !self.is_making_needed(task) {
            self.held_back.remove(&task);
            return;
        }
        if let Some(until) = self.inventories_until() {
            self.held_back.insert(task);
            self.timers.insert((until, task));
            return;
        }
        self.held_back.remove(&task);
        self.order(task);
    }

    fn is_making_needed(&self, id: LayerTask) -> bool {
        let Some(chooser) = self.chooser(id) else { return false };
        let Task { opens, make, refused, .. } = chooser.task;
        if opens.is_empty() || make.is_some() || chooser.a_seed_has_map() {
            return false;
        }
        *refused || !chooser.nodes_cover()
    }

    /// Until then, peers may still say what they have: just after a start, or when a seed has just come.
    fn inventories_until(&self) -> Option<Millis> {
        let start = self.started.plus(self.options.grace_ms);
        let seeds = self.seeds.iter().filter_map(|id| self.peers[id].inventory_until);
        seeds.chain([start]).filter(|until| *until > self.now).min()
    }

    fn order(&mut self, task: LayerTask) {
        if let Some(seed) = self.seeds.iter().find(|id| self.peers[id].making.contains(&task)).copied() {
            return self.adopt(seed, task, Vec::new());
        }
        let Some(seed) = self.chooser(task).as_ref().and_then(Chooser::maker) else { return };
        let entry = self.tasks.get_mut(&task).expect("its chooser was there");
        let sources = entry.possible_sources(self.now);
        if sources.is_empty() {
            return;
        }
        let deadline = self.now.plus(START_MS);
        entry.make = Some(Make { seed, started: false, deadline, sources: sources.clone() });
        entry.wake_all();
        self.timers.insert((deadline, task));
        self.changed.insert(task);
        self.peers.get_mut(&seed).expect("the maker is connected").making.insert(task);
        self.actions.push(Action::OrderMake { seed, task, sources });
    }

    /// A seed makes the layer by itself, or is the one left of several: it has the order from now on.
    fn adopt(&mut self, seed: PeerId, task: LayerTask, sources: Vec<LayerSource>) {
        let deadline = self.now.plus(SILENT_MS);
        let entry = self.tasks.entry(task).or_default();
        let sources = if sources.is_empty() { entry.possible_sources(self.now) } else { sources };
        entry.make = Some(Make { seed, started: true, deadline, sources });
        entry.wake_all();
        self.timers.insert((deadline, task));
        self.changed.insert(task);
    }

    /// A seed that doesn't start loses the order, unless it is busy with others that it has started; one that fell silent
    /// gets it again, and has to start anew in time.
    fn check_deadline(&mut self, task: LayerTask) {
        let busy = self.is_maker_busy(task);
        let Some(entry) = self.tasks.get_mut(&task) else { return };
        let Some(make) = entry.make.as_mut().filter(|make| make.deadline <= self.now) else { return };
        if busy && !make.started {
            make.deadline = self.now.plus(START_MS);
            self.timers.insert((make.deadline, task));
        } else if make.started && !make.sources.is_empty() {
            make.started = false;
            make.deadline = self.now.plus(START_MS);
            self.timers.insert((make.deadline, task));
            let (seed, sources) = (make.seed, make.sources.clone());
            self.actions.push(Action::OrderMake { seed, task, sources });
        } else {
            let seed = make.seed;
            self.end_make(task);
            self.exclude(seed, task);
        }
    }

    fn is_maker_busy(&self, task: LayerTask) -> bool {
        let make_of = |task: &LayerTask| self.tasks.get(task).and_then(|entry| entry.make.as_ref());
        let Some(seed) = make_of(&task).map(|make| make.seed) else { return false };
        let started =
            |other: &LayerTask| make_of(other).is_some_and(|make| make.seed == seed && make.started);
        self.peers[&seed].making.iter().any(|other| *other != task && started(other))
    }

    fn end_make(&mut self, task: LayerTask) -> Option<Make> {
        let entry = self.tasks.get_mut(&task)?;
        let make = entry.make.take()?;
        entry.wake_all();
        if let Some(seed) = self.peers.get_mut(&make.seed) {
            seed.making.remove(&task);
        }
        self.changed.insert(task);
        Some(make)
    }

    fn is_waited_for(&self, task: LayerTask) -> bool {
        self.tasks.get(&task).is_some_and(|entry| !entry.opens.is_empty())
    }

    fn exclude(&mut self, seed: PeerId, task: LayerTask) {
        let (Some(entry), Some(peer)) = (self.tasks.get_mut(&task), self.peers.get(&seed)) else { return };
        let until = self.now.plus(FAILED_MS);
        entry.failed.insert(peer.node.clone(), until, self.now);
        self.timers.insert((until, task));
        self.changed.insert(task);
    }

    /// The seed that had the order is gone. It is not excluded: when it comes back, it may go on.
    pub(crate) fn lost_maker(&mut self, id: PeerId, task: LayerTask) {
        if self.has_order(id, task) {
            self.end_make(task);
        }
    }

    fn has_order(&self, id: PeerId, task: LayerTask) -> bool {
        self.tasks.get(&task).and_then(|task| task.make.as_ref()).is_some_and(|make| make.seed == id)
    }

    pub(crate) fn make_update(&mut self, id: PeerId, task: LayerTask, state: MakeState) {
        let is_seed = self.peers.get(&id).is_some_and(|peer| peer.seed);
        let room = self.tasks.contains_key(&task) || self.tasks.len() < MAX_TASKS;
        if !is_seed || !room {
            return;
        }
        let ours = self.has_order(id, task);
        if state != MakeState::Started && !ours {
            self.peers.get_mut(&id).expect("it is a connected seed").making.remove(&task);
        }
        match state {
            MakeState::Started => self.make_started(id, task, ours),
            MakeState::Done => self.make_done(id, task, ours),
            MakeState::Impossible(_) if ours => self.make_impossible(id, task),
            MakeState::Failed(_) if ours => {
                self.end_make(task);
                // A seed stops also because nobody waits: that is no fault of its own, and who comes next finds there what
                // it has read.
                if self.is_waited_for(task) {
                    self.exclude(id, task);
                }
            }
            MakeState::Impossible(_) | MakeState::Failed(_) => {}
        }
        self.see_to_maker(task);
    }

    /// A seed that started without an order (a preheat, a child's own request, an order from before a restart) has it
    /// from now on, unless another seed has.
    fn make_started(&mut self, id: PeerId, task: LayerTask, ours: bool) {
        self.peers.get_mut(&id).expect("it is a connected seed").making.insert(task);
        let entry = self.tasks.entry(task).or_default();
        if ours || entry.make.is_none() {
            let sources = entry.make.take().map(|make| make.sources).unwrap_or_default();
            self.adopt(id, task, sources);
        }
    }

    fn make_done(&mut self, id: PeerId, task: LayerTask, ours: bool) {
        if ours {
            self.end_make(task);
        }
        self.tasks.entry(task).or_default().refused = false;
        let held = Holding { task, map: true, spans_total: 0, spans: Spans::default() };
        self.holdings(id, vec![held], &[]);
    }

    /// Remembered for these sources, not for the layer: another source may be good.
    fn make_impossible(&mut self, id: PeerId, task: LayerTask) {
        let Some(make) = self.end_make(task) else { return };
        let until = self.now.plus(IMPOSSIBLE_MS);
        let entry = self.tasks.get_mut(&task).expect("its order was there");
        for source in &make.sources {
            entry.impossible.insert(source_key(source), until, self.now);
        }
        entry.refuser = Some(id);
        self.timers.insert((until, task));
    }
}
