//! Who holds what.

use std::ops::RangeInclusive;

use darter_types::{DiffId, LayerTask};

use crate::core::Core;
use crate::limits::{
    HOLDING_BYTES, MAX_HELD, MAX_HELD_BYTES, MAX_HOLDERS, MAX_SPANS, MAX_TASKS, ROOM_EVERY_MS, ROOM_HOLDINGS,
    SILENT_MS,
};
use crate::state::Holder;
use crate::{Holding, PeerId};

impl Core {
    pub(crate) fn holdings(&mut self, id: PeerId, held: Vec<Holding>, dropped: &[DiffId]) {
        if !self.peers.contains_key(&id) {
            return;
        }
        for diff_id in dropped {
            self.drop_layer(id, *diff_id);
        }
        for holding in held {
            self.hold(id, holding);
        }
    }

    pub(crate) fn inventory_complete(&mut self, id: PeerId) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        peer.inventory_until = None;
        let waiting = std::mem::take(&mut self.held_back);
        self.changed.extend(waiting);
    }

    /// Notes a holding, unless there is no room: then this peer is no parent for it.
    fn hold(&mut self, id: PeerId, holding: Holding) {
        let Some(peer) = self.peers.get(&id) else { return };
        let new = !peer.held.contains(&holding.task);
        let nothing = !holding.map && holding.spans.is_empty();
        if new && (nothing || peer.held.len() >= MAX_HELD || !self.has_room(holding.task)) {
            return;
        }
        let known = self.tasks.get(&holding.task).and_then(|task| task.holders.get(&id));
        let before = known.map_or(0, Holder::bytes);
        let after = HOLDING_BYTES + known.map_or(0, |holder| holder.spans.len()).max(holding.spans.len());
        let Some(peer) = self.peers.get_mut(&id) else { return };
        if peer.held_bytes - before + after > MAX_HELD_BYTES {
            return;
        }
        peer.held_bytes = peer.held_bytes - before + after;
        peer.held.insert(holding.task);
        let entry = self.tasks.entry(holding.task).or_default();
        entry.spans_total = entry.spans_total.max(holding.spans_total.min(MAX_SPANS));
        let holder = entry.holders.entry(id).or_default();
        let (had_map, had_none) = (holder.map, holder.spans.is_empty());
        holder.map |= holding.map;
        holder.spans.add(&holding.spans);
        let news = holder.map != had_map || holder.spans.is_empty() != had_none;
        if new {
            entry.holders_by_zone.entry(peer.zone.clone()).or_default().insert(id);
        }
        if let Some(make) = entry.make.as_mut().filter(|make| make.seed == id) {
            make.deadline = make.deadline.max(self.now.plus(SILENT_MS));
            make.started = true;
        }
        if news || new {
            self.changed.insert(holding.task);
        }
    }

    /// The peer has this layer no more, in no format.
    fn drop_layer(&mut self, id: PeerId, diff_id: DiffId) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let tasks: Vec<LayerTask> = peer.held.range(formats(diff_id)).copied().collect();
        tasks.into_iter().for_each(|task| self.drop_holding(id, task));
    }

    fn drop_holding(&mut self, id: PeerId, task: LayerTask) {
        let bytes = self.tasks.get(&task).and_then(|entry| entry.holders.get(&id)).map_or(0, Holder::bytes);
        let Some(peer) = self.peers.get_mut(&id) else { return };
        peer.held.remove(&task);
        peer.held_bytes -= bytes;
        let children: Vec<PeerId> = peer
            .children
            .range((task, PeerId(0))..=(task, PeerId(u64::MAX)))
            .map(|(_, child)| *child)
            .collect();
        for child in &children {
            peer.children.remove(&(task, *child));
        }
        let (seed, zone) = (peer.seed, peer.zone.clone());
        self.lost_holder(id, task, seed, &zone);
        children.into_iter().for_each(|child| self.lost_parent(task, child));
    }

    /// Whether the task can be remembered, with one more holder. Whoever wants to fill the table needs many names for it: it
    /// is always the node with the most holdings that makes room.
    pub(crate) fn has_room(&mut self, task: LayerTask) -> bool {
        if let Some(known) = self.tasks.get(&task) {
            return known.holders.len() < MAX_HOLDERS;
        }
        if self.tasks.len() >= MAX_TASKS && self.now >= self.room_again {
            self.make_room();
        }
        self.tasks.len() < MAX_TASKS
    }

    fn make_room(&mut self) {
        self.room_again = self.now.plus(ROOM_EVERY_MS);
        let nodes = self.peers.iter().filter(|(_, peer)| !peer.seed);
        let Some((&id, largest)) = nodes.max_by_key(|(_, peer)| peer.held.len()) else { return };
        let unwanted = |task: &&LayerTask| self.tasks.get(task).is_none_or(|entry| entry.opens.is_empty());
        let unwanted: Vec<LayerTask> =
            largest.held.iter().filter(unwanted).take(ROOM_HOLDINGS).copied().collect();
        for task in unwanted {
            self.drop_holding(id, task);
            self.forget_if_empty(task);
        }
    }

    /// `id` holds the task no more; whoever counted on it is told at the next tick.
    pub(crate) fn lost_holder(&mut self, id: PeerId, task: LayerTask, seed: bool, zone: &str) {
        let Some(entry) = self.tasks.get_mut(&task) else { return };
        entry.holders.remove(&id);
        if let Some(there) = entry.holders_by_zone.get_mut(zone) {
            there.remove(&id);
            if there.is_empty() {
                entry.holders_by_zone.remove(zone);
            }
        }
        if seed {
            entry.wake_all();
        }
        self.changed.insert(task);
    }
}

fn formats(diff_id: DiffId) -> RangeInclusive<LayerTask> {
    LayerTask { diff_id, format: 0 }..=LayerTask { diff_id, format: u32::MAX }
}
