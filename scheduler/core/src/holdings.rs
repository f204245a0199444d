//! Who holds what.

use std::ops::RangeInclusive;

use darter_types::{DiffId, LayerTask};

use crate::core::Core;
use crate::limits::{MAX_HELD, MAX_HOLDERS, MAX_SPANS, MAX_TASKS, SILENT_MS};
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
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let known = self.tasks.get(&holding.task);
        let new = !peer.held.contains(&holding.task);
        let room = known.map_or(self.tasks.len() < MAX_TASKS, |task| task.holders.len() < MAX_HOLDERS);
        let nothing = !holding.map && holding.spans.is_empty();
        if new && (nothing || !room || peer.held.len() >= MAX_HELD) {
            return;
        }
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
        for task in tasks {
            let peer = self.peers.get_mut(&id).expect("it was there above");
            peer.held.remove(&task);
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
