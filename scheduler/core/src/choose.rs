//! Choices: which parents for a child, which seed for a task. Nothing is changed here.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use darter_types::LayerTask;

use crate::hash::{pair, spread};
use crate::limits::{COVERING_PARENTS, MAX_CONSIDERED, MAX_PARENTS};
use crate::state::{Holder, Open, Peer, Task};
use crate::{Millis, PeerId, Spans};

/// The less, the better. The order of the fields is the order of what counts.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    suspect: bool,
    tier: Tier,
    /// How often its upload slots are given away already.
    load: u32,
    elsewhere: bool,
    /// Eighths of what is wanted that it lacks.
    lacks: u32,
    /// Told before is better: a child keeps its connections.
    new: bool,
    spread: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Tier {
    First,
    /// Seeds, when nodes can do the work.
    Seed,
    /// Has the map, and no whole span yet.
    MapOnly,
}

pub(crate) struct Chooser<'a> {
    pub(crate) now: Millis,
    pub(crate) id: LayerTask,
    pub(crate) task: &'a Task,
    pub(crate) peers: &'a BTreeMap<PeerId, Peer>,
    pub(crate) seeds: &'a BTreeSet<PeerId>,
}

impl Chooser<'_> {
    /// The parents for `child`, best first: at most [`MAX_PARENTS`].
    pub(crate) fn parents(&self, child: PeerId, open: &Open) -> Vec<PeerId> {
        let Some(peer) = self.peers.get(&child) else { return Vec::new() };
        let candidates = self.candidates(child, peer, open);
        let whole = |id: &&PeerId| !self.peers[*id].seed && !self.holder(**id).spans.is_empty();
        let nodes = candidates.iter().filter(whole).count();
        let mut ranked: Vec<(Rank, PeerId)> =
            candidates.iter().map(|id| (self.rank(*id, child, open, nodes), *id)).collect();
        ranked.sort();
        let ranked: Vec<PeerId> = ranked.into_iter().map(|(_, id)| id).collect();
        self.cover(&ranked, &open.wanted)
    }

    /// The seed to name to `child`: one that has the map, one that makes it, or one that knows why it can't be made.
    pub(crate) fn seed(&self, child: PeerId, open: &Open) -> Option<PeerId> {
        let peer = self.peers.get(&child)?;
        let fit = |id: &PeerId| !self.task.is_isolated(&self.peers[id].node, peer, open, self.now);
        let near = self.seeds.iter().copied().filter(|id| self.has_map(*id)).filter(fit).min_by_key(|id| {
            let seed = &self.peers[id];
            (seed.children.len() as u32 / seed.slots, seed.zone != peer.zone, pair(*id, child))
        });
        near.or_else(|| self.task.make.as_ref().map(|make| make.seed))
            .or(self.task.refuser.filter(|_| self.task.possible_sources(self.now).is_empty()))
            .filter(|id| self.peers.contains_key(id) && *id != child)
    }

    /// The seed to order the layer from: one that wants it itself (it was told to preheat it), else by rendezvous hashing, in
    /// which a busy seed has less weight.
    pub(crate) fn maker(&self) -> Option<PeerId> {
        let fit = |peer: &Peer| {
            !self.task.failed.contains(&peer.node, self.now) && !self.task.is_convicted(&peer.node)
        };
        let weight = |peer: &Peer| {
            let name = spread(&[peer.node.as_str().as_bytes(), self.id.diff_id.as_bytes()]);
            (name >> 16) / (1 + peer.making.len() as u64)
        };
        let seeds = self.seeds.iter().filter(|id| fit(&self.peers[id]));
        seeds.max_by_key(|id| (self.task.opens.contains_key(id), weight(&self.peers[id]))).copied()
    }

    /// Nodes alone, without a seed, can give the map and every span.
    pub(crate) fn nodes_cover(&self) -> bool {
        let good = |id: &PeerId| !self.peers[id].seed && !self.task.is_convicted(&self.peers[id].node);
        let mut covered = Spans::default();
        let mut map = false;
        for (_, holder) in self.task.holders.iter().filter(|(id, _)| good(id)) {
            covered.add(&holder.spans);
            map |= holder.map;
            if map && covered.count() >= self.task.spans_total {
                return true;
            }
        }
        false
    }

    pub(crate) fn a_seed_has_map(&self) -> bool {
        let good = |id: &PeerId| self.has_map(*id) && !self.task.is_convicted(&self.peers[id].node);
        self.seeds.iter().any(good)
    }

    fn has_map(&self, id: PeerId) -> bool {
        self.task.holders.get(&id).is_some_and(|holder| holder.map)
    }

    /// Some of the child's zone and some of all: which ones, when there are many, depends on the child, so that all get
    /// their share of children.
    fn candidates(&self, child: PeerId, peer: &Peer, open: &Open) -> BTreeSet<PeerId> {
        let fit = |id: &PeerId| {
            let holder = self.holder(*id);
            let holds = holder.map || !holder.spans.is_empty();
            holds && *id != child && !self.task.is_isolated(&self.peers[id].node, peer, open, self.now)
        };
        let start = PeerId(self.start(child));
        let all = rotated_map(&self.task.holders, start).filter(fit).take(MAX_CONSIDERED);
        let zone = self.task.holders_by_zone.get(&peer.zone).filter(|_| !peer.zone.is_empty());
        let near = zone.into_iter().flat_map(|ids| rotated_set(ids, start)).filter(fit).take(MAX_CONSIDERED);
        let told = open.told.iter().flat_map(|told| told.parents.iter().copied());
        near.chain(all).chain(told.filter(|id| self.task.holders.contains_key(id)).filter(fit)).collect()
    }

    fn start(&self, child: PeerId) -> u64 {
        let (first, last) = match (self.task.holders.first_key_value(), self.task.holders.last_key_value()) {
            (Some((first, _)), Some((last, _))) => (first.0, last.0),
            _ => return 0,
        };
        first + pair(child, PeerId(0)) % (last - first).saturating_add(1)
    }

    fn holder(&self, id: PeerId) -> &Holder {
        self.task.holders.get(&id).expect("only holders are asked for")
    }

    fn rank(&self, id: PeerId, child: PeerId, open: &Open, nodes: usize) -> Rank {
        let (parent, holder, zone) = (&self.peers[&id], self.holder(id), &self.peers[&child].zone);
        let told = open.told.as_ref().is_some_and(|told| told.parents.contains(&id));
        let others = (parent.children.len() as u32).saturating_sub(u32::from(told));
        Rank {
            suspect: parent.suspect_until > self.now,
            tier: tier(parent, holder, nodes),
            load: others / parent.slots,
            elsewhere: zone.is_empty() || parent.zone != *zone,
            lacks: self.lacks(holder, &open.wanted),
            new: !told,
            spread: pair(id, child),
        }
    }

    fn lacks(&self, holder: &Holder, wanted: &Spans) -> u32 {
        let (has, all) = if wanted.is_empty() {
            (holder.spans.count(), self.task.spans_total)
        } else {
            (holder.spans.count_common(wanted), wanted.count())
        };
        8 - (has * 8).checked_div(all).unwrap_or(8).min(8)
    }

    /// The first of `ranked`; the last places go to those who have spans that the first ones lack.
    fn cover(&self, ranked: &[PeerId], wanted: &Spans) -> Vec<PeerId> {
        if ranked.len() <= MAX_PARENTS {
            return ranked.to_vec();
        }
        let (first, rest) = ranked.split_at(MAX_PARENTS - COVERING_PARENTS);
        let mut chosen = first.to_vec();
        let mut covered = Spans::default();
        first.iter().for_each(|id| covered.add(&self.holder(*id).spans));
        for id in rest {
            if chosen.len() < MAX_PARENTS && self.holder(*id).spans.adds_to(&covered, wanted) {
                covered.add(&self.holder(*id).spans);
                chosen.push(*id);
            }
        }
        let fill: Vec<PeerId> = rest.iter().filter(|id| !chosen.contains(id)).copied().collect();
        chosen.extend(fill.into_iter().take(MAX_PARENTS - chosen.len()));
        chosen
    }
}

/// Seeds do a node's work only while fewer than two nodes can.
fn tier(parent: &Peer, holder: &Holder, nodes: usize) -> Tier {
    match parent.seed {
        true if nodes >= 2 => Tier::Seed,
        false if holder.spans.is_empty() => Tier::MapOnly,
        _ => Tier::First,
    }
}

fn rotated_map<V>(map: &BTreeMap<PeerId, V>, start: PeerId) -> impl Iterator<Item = PeerId> {
    map.range(start..).chain(map.range(..start)).map(|(id, _)| *id)
}

fn rotated_set(set: &BTreeSet<PeerId>, start: PeerId) -> impl Iterator<Item = PeerId> {
    set.range((Bound::Included(start), Bound::Unbounded)).chain(set.range(..start)).copied()
}
