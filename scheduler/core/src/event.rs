//! What the core is told and what it says.

use darter_types::{DiffId, LayerSource, LayerTask, NodeName, Role};

use crate::Spans;

/// Milliseconds since some moment before the core started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Millis(pub u64);

impl Millis {
    pub(crate) fn plus(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }
}

/// One connection of a peer. Whoever feeds the core gives each connection another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct PeerId(pub u64);

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A peer said hello. Its node's earlier connection, if there is one, counts as gone.
    PeerConnected {
        peer: PeerId,
        node: NodeName,
        role: Role,
        address: String,
        zone: String,
        slots: u32,
    },
    PeerGone {
        peer: PeerId,
    },
    /// What a peer has in addition to what it said before; `dropped` layers are gone, and go first.
    Holdings {
        peer: PeerId,
        held: Vec<Holding>,
        dropped: Vec<DiffId>,
    },
    /// The peer has now said all that it had when it connected.
    InventoryComplete {
        peer: PeerId,
    },
    /// `wanted` spans are needed soon; empty: all.
    OpenTask {
        peer: PeerId,
        task: LayerTask,
        sources: Vec<LayerSource>,
        wanted: Spans,
    },
    CloseTask {
        peer: PeerId,
        task: LayerTask,
    },
    ParentReport {
        peer: PeerId,
        task: LayerTask,
        parent: NodeName,
        fault: Fault,
    },
    MakeUpdate {
        peer: PeerId,
        task: LayerTask,
        state: MakeState,
    },
    /// Time passed. Expected every 200 ms or so; news for many children goes out with it.
    Tick,
}

/// How much of a layer a peer has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holding {
    pub task: LayerTask,
    pub map: bool,
    /// 0 as long as it is unknown.
    pub spans_total: u32,
    pub spans: Spans,
}

/// What a child saw of a parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    Unreachable,
    Slow,
    WrongBytes,
    /// The parent doesn't give it to this child.
    Refused,
}

/// What a seed says about a layer that it was told to make, or makes for another reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MakeState {
    Started,
    Done,
    /// No seed can make it of these sources.
    Impossible(String),
    /// This seed can't; another may.
    Failed(String),
}

/// Something to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// The best parent first; it replaces what was said before. `seed` has the map or makes it.
    SendParents {
        peer: PeerId,
        task: LayerTask,
        parents: Vec<Parent>,
        seed: Option<Parent>,
    },
    OrderMake {
        seed: PeerId,
        task: LayerTask,
        sources: Vec<LayerSource>,
    },
    /// Say so and end the connection.
    Reject {
        peer: PeerId,
        reason: String,
    },
}

/// A peer as its children are told about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parent {
    pub node: NodeName,
    pub address: String,
    pub seed: bool,
}
