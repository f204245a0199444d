//! What the core remembers of peers and tasks.

use std::collections::{BTreeMap, BTreeSet};

use darter_types::{BlobDigest, LayerSource, LayerTask, NodeName, Repository};

use crate::limits::{HOLDING_BYTES, MAX_REMEMBERED, MAX_SOURCES, WITNESSES};
use crate::{Millis, Parent, PeerId, Spans};

/// A connected peer.
pub(crate) struct Peer {
    pub(crate) node: NodeName,
    pub(crate) seed: bool,
    pub(crate) address: String,
    pub(crate) zone: String,
    /// At least 1.
    pub(crate) slots: u32,
    /// While its inventory is incomplete and this moment has not come, it may turn out to hold anything.
    pub(crate) inventory_until: Option<Millis>,
    pub(crate) held: BTreeSet<LayerTask>,
    /// What they take together, about.
    pub(crate) held_bytes: usize,
    pub(crate) open: BTreeSet<LayerTask>,
    /// Who was told this peer as a parent, for what.
    pub(crate) children: BTreeSet<(LayerTask, PeerId)>,
    /// Layers that it was told to make, or said that it makes.
    pub(crate) making: BTreeSet<LayerTask>,
    /// Until then it comes last among parents.
    pub(crate) suspect_until: Millis,
    /// Parents that this peer can't reach, and until when that is believed.
    pub(crate) unreachable: Expiring<NodeName>,
}

impl Peer {
    pub(crate) fn as_parent(&self) -> Parent {
        Parent { node: self.node.clone(), address: self.address.clone(), seed: self.seed }
    }
}

/// A task that somebody holds, wants or makes, or of which a failure is remembered.
#[derive(Default)]
pub(crate) struct Task {
    pub(crate) holders: BTreeMap<PeerId, Holder>,
    pub(crate) holders_by_zone: BTreeMap<String, BTreeSet<PeerId>>,
    /// 0 as long as nobody said.
    pub(crate) spans_total: u32,
    pub(crate) opens: BTreeMap<PeerId, Open>,
    /// Children whose answer may have become better.
    pub(crate) waiting: BTreeSet<PeerId>,
    /// Where the next tick goes on among those waiting.
    pub(crate) turn: PeerId,
    pub(crate) sources: Vec<LayerSource>,
    pub(crate) make: Option<Make>,
    /// Seeds that could not make it, and until when they are not asked.
    pub(crate) failed: Expiring<NodeName>,
    /// A holder refused a child: only a seed can settle who may have it, so nodes that hold it do not suffice.
    pub(crate) refused: bool,
    pub(crate) impossible: Expiring<(Repository, BlobDigest)>,
    /// The seed that called the sources impossible: it has the words for whoever asks.
    pub(crate) refuser: Option<PeerId>,
    /// Parents that were seen sending wrong bytes, and by whom.
    pub(crate) accused: BTreeMap<NodeName, BTreeSet<NodeName>>,
}

#[derive(Default)]
pub(crate) struct Holder {
    pub(crate) map: bool,
    pub(crate) spans: Spans,
}

impl Holder {
    pub(crate) fn bytes(&self) -> usize {
        HOLDING_BYTES + self.spans.len()
    }
}

/// A task as one child has it open.
#[derive(Default)]
pub(crate) struct Open {
    pub(crate) wanted: Spans,
    pub(crate) told: Option<Told>,
    pub(crate) avoided: Expiring<NodeName>,
}

#[derive(Clone, PartialEq, Eq, Default)]
pub(crate) struct Told {
    pub(crate) parents: BTreeSet<PeerId>,
    pub(crate) seed: Option<PeerId>,
}

/// An order that is out.
pub(crate) struct Make {
    pub(crate) seed: PeerId,
    pub(crate) started: bool,
    /// If the seed says nothing until then, something is done about it.
    pub(crate) deadline: Millis,
    pub(crate) sources: Vec<LayerSource>,
}

impl Task {
    /// Nobody holds it, wants it or makes it, and nothing about it is worth remembering.
    pub(crate) fn is_forgettable(&self, now: Millis) -> bool {
        self.holders.is_empty()
            && self.opens.is_empty()
            && self.make.is_none()
            && !self.failed.any(now)
            && !self.impossible.any(now)
    }

    /// Notes where the layer can be had. When there is no room, a source that proved impossible gives way.
    pub(crate) fn add_sources(&mut self, sources: Vec<LayerSource>, now: Millis) {
        for source in sources {
            if self
                .sources
                .iter()
                .any(|known| known.repository == source.repository && known.blob == source.blob)
            {
                continue;
            }
            if self.sources.len() >= MAX_SOURCES {
                let dead = self.sources.iter().position(|known| self.is_impossible(known, now));
                let Some(dead) = dead else { return };
                self.sources.remove(dead);
            }
            self.sources.push(source);
        }
    }

    pub(crate) fn is_impossible(&self, source: &LayerSource, now: Millis) -> bool {
        self.impossible.contains(&source_key(source), now)
    }

    pub(crate) fn possible_sources(&self, now: Millis) -> Vec<LayerSource> {
        self.sources.iter().filter(|source| !self.is_impossible(source, now)).cloned().collect()
    }

    pub(crate) fn accuse(&mut self, parent: NodeName, witness: NodeName) {
        if self.accused.len() >= MAX_REMEMBERED && !self.accused.contains_key(&parent) {
            self.accused.pop_first();
        }
        let witnesses = self.accused.entry(parent).or_default();
        if witnesses.len() < MAX_REMEMBERED {
            witnesses.insert(witness);
        }
    }

    /// Enough children saw wrong bytes from it.
    pub(crate) fn is_convicted(&self, parent: &NodeName) -> bool {
        self.accused.get(parent).is_some_and(|witnesses| witnesses.len() >= WITNESSES)
    }

    /// `parent` must not be told to `child` for this task.
    pub(crate) fn is_isolated(&self, parent: &NodeName, child: &Peer, open: &Open, now: Millis) -> bool {
        *parent == child.node
            || open.avoided.contains(parent, now)
            || child.unreachable.contains(parent, now)
            || self.is_convicted(parent)
            || self.accused.get(parent).is_some_and(|witnesses| witnesses.contains(&child.node))
    }

    /// All who have it open look again.
    pub(crate) fn wake_all(&mut self) {
        self.waiting.extend(self.opens.keys().copied());
    }
}

pub(crate) fn source_key(source: &LayerSource) -> (Repository, BlobDigest) {
    (source.repository.clone(), source.blob)
}

/// Things that are believed until a moment each; at most [`MAX_REMEMBERED`].
pub(crate) struct Expiring<K>(BTreeMap<K, Millis>);

impl<K> Default for Expiring<K> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: Ord + Clone> Expiring<K> {
    pub(crate) fn insert(&mut self, key: K, until: Millis, now: Millis) {
        self.0.retain(|_, until| *until > now);
        if self.0.len() >= MAX_REMEMBERED {
            let first = self.0.iter().min_by_key(|(_, until)| **until).map(|(key, _)| key.clone());
            first.map(|key| self.0.remove(&key));
        }
        self.0.insert(key, until);
    }

    pub(crate) fn contains(&self, key: &K, now: Millis) -> bool {
        self.0.get(key).is_some_and(|until| *until > now)
    }

    pub(crate) fn any(&self, now: Millis) -> bool {
        self.0.values().any(|until| *until > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn earliest_gives_way_when_there_is_no_room() {
        let mut set = Expiring::default();
        for key in 0..=MAX_REMEMBERED as u64 {
            set.insert(key, Millis(1000 + key), Millis(0));
        }
        assert!(!set.contains(&0, Millis(0)));
        assert!(set.contains(&1, Millis(0)));
    }

    #[test]
    fn nothing_is_believed_past_its_moment() {
        let mut set = Expiring::default();
        set.insert(1, Millis(10), Millis(0));
        assert!(set.contains(&1, Millis(9)));
        assert!(!set.contains(&1, Millis(10)) && !set.any(Millis(10)));
    }
}
