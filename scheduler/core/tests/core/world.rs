//! A core with short words for its events, and for what it answered.

use darter_scheduler_core::{
    Action, Core, Event, Fault, Holding, MakeState, Millis, Options, PeerId, Spans, record,
};
use darter_types::{BlobDigest, DiffId, Digest, LayerSource, LayerTask, NodeName, Role};

pub struct World {
    pub core: Core,
    pub now: u64,
    pub log: Vec<String>,
    pub actions: Vec<Action>,
}

pub fn task(name: &str) -> LayerTask {
    LayerTask::current(DiffId(Digest::of(name.as_bytes())))
}

pub fn source(name: &str) -> LayerSource {
    LayerSource {
        repository: format!("https://registry.example/{name}").parse().unwrap(),
        blob: BlobDigest(Digest::of(name.as_bytes())),
        size: 9,
    }
}

pub fn node(peer: u64) -> NodeName {
    format!("n{peer}").parse().unwrap()
}

impl World {
    /// A core whose grace after the start is over.
    pub fn new() -> Self {
        let mut world = Self::just_started();
        world.pass(10_000);
        world
    }

    pub fn just_started() -> Self {
        let options = Options::default();
        let log = vec![record::encode_head(Millis(0), options)];
        Self { core: Core::new(Millis(0), options), now: 0, log, actions: Vec::new() }
    }

    pub fn time(&self) -> Millis {
        Millis(self.now)
    }

    pub fn tell(&mut self, event: Event) -> Vec<Action> {
        self.log.push(record::encode(Millis(self.now), &event));
        let actions = self.core.handle(Millis(self.now), event);
        self.actions.extend(actions.iter().cloned());
        actions
    }

    /// Time passes, with a tick at its end.
    pub fn pass(&mut self, ms: u64) -> Vec<Action> {
        self.now += ms;
        self.tell(Event::Tick)
    }

    pub fn connect(&mut self, peer: u64, role: Role, zone: &str, slots: u32) {
        let address = format!("10.0.0.{peer}:7420");
        let zone = zone.to_owned();
        self.tell(Event::PeerConnected { peer: PeerId(peer), node: node(peer), role, address, zone, slots });
        self.tell(Event::InventoryComplete { peer: PeerId(peer) });
    }

    pub fn node(&mut self, peer: u64) {
        self.connect(peer, Role::Node, "", 4);
    }

    pub fn seed(&mut self, peer: u64) {
        self.connect(peer, Role::Seed, "", 4);
    }

    pub fn gone(&mut self, peer: u64) -> Vec<Action> {
        self.tell(Event::PeerGone { peer: PeerId(peer) })
    }

    /// `peer` has the map and the first `spans` of eight.
    pub fn hold(&mut self, peer: u64, name: &str, spans: u32) -> Vec<Action> {
        let held = vec![Holding { task: task(name), map: true, spans_total: 8, spans: Spans::first(spans) }];
        self.tell(Event::Holdings { peer: PeerId(peer), held, dropped: Vec::new() })
    }

    pub fn drop_layer(&mut self, peer: u64, name: &str) -> Vec<Action> {
        let dropped = vec![task(name).diff_id];
        self.tell(Event::Holdings { peer: PeerId(peer), held: Vec::new(), dropped })
    }

    pub fn open(&mut self, peer: u64, name: &str) -> Vec<Action> {
        self.open_from(peer, name, &[name])
    }

    pub fn open_from(&mut self, peer: u64, name: &str, sources: &[&str]) -> Vec<Action> {
        let sources = sources.iter().map(|name| source(name)).collect();
        let wanted = Spans::default();
        self.tell(Event::OpenTask { peer: PeerId(peer), task: task(name), sources, wanted })
    }

    pub fn close(&mut self, peer: u64, name: &str) -> Vec<Action> {
        self.tell(Event::CloseTask { peer: PeerId(peer), task: task(name) })
    }

    pub fn report(&mut self, peer: u64, name: &str, parent: u64, fault: Fault) -> Vec<Action> {
        self.tell(Event::ParentReport { peer: PeerId(peer), task: task(name), parent: node(parent), fault })
    }

    pub fn make(&mut self, peer: u64, name: &str, state: MakeState) -> Vec<Action> {
        self.tell(Event::MakeUpdate { peer: PeerId(peer), task: task(name), state })
    }
}

/// The seeds that `actions` order the layer from.
pub fn orders(actions: &[Action]) -> Vec<u64> {
    let seed = |action: &Action| match action {
        Action::OrderMake { seed, .. } => Some(seed.0),
        _ => None,
    };
    actions.iter().filter_map(seed).collect()
}

/// What `actions` tell `child` last: the names of its parents and of the seed.
pub fn told(actions: &[Action], child: u64) -> Option<(Vec<String>, Option<String>)> {
    actions.iter().rev().find_map(|action| match action {
        Action::SendParents { peer, parents, seed, .. } if peer.0 == child => {
            let parents = parents.iter().map(|parent| parent.node.to_string()).collect();
            Some((parents, seed.as_ref().map(|seed| seed.node.to_string())))
        }
        _ => None,
    })
}

pub fn parents(actions: &[Action], child: u64) -> Vec<String> {
    told(actions, child).expect("the child was told").0
}
