//! Random events: whatever comes in whatever order, the promises hold. A failing seed is named and can be run again.

use std::collections::{BTreeMap, BTreeSet};

use darter_scheduler_core::{Action, Event, Fault, Holding, MakeState, PeerId, Spans, limits};
use darter_types::{LayerTask, Role};

use crate::replay::replay;
use crate::world::{World, node, source, task};

/// SplitMix64.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

/// What the test itself knows about the peers.
#[derive(Default)]
struct Known {
    connected: BTreeMap<PeerId, String>,
    seeds: BTreeSet<PeerId>,
    holds: BTreeSet<(PeerId, LayerTask)>,
    /// Open, and since when without an answer.
    unanswered: BTreeMap<(PeerId, LayerTask), u64>,
    open: BTreeSet<(PeerId, LayerTask)>,
    /// Orders that are out, and since when.
    ordered: BTreeMap<LayerTask, (PeerId, u64)>,
    next: u64,
}

const NODES: u64 = 25;
const TASKS: u64 = 6;

impl Known {
    fn forget(&mut self, peer: PeerId) {
        self.connected.remove(&peer);
        self.seeds.remove(&peer);
        self.holds.retain(|(holder, _)| *holder != peer);
        self.open.retain(|(child, _)| *child != peer);
        self.unanswered.retain(|(child, _), _| *child != peer);
        self.ordered.retain(|_, (seed, _)| *seed != peer);
    }

    fn event(&mut self, chance: &mut Chance, now: u64) -> Event {
        let some = chance.below(self.connected.len().max(1) as u64) as usize;
        let Some(peer) = self.connected.keys().nth(some).copied().filter(|_| chance.below(8) > 0) else {
            return self.connect(chance);
        };
        let layer = task(&chance.below(TASKS).to_string());
        match chance.below(12) {
            0 => {
                self.forget(peer);
                Event::PeerGone { peer }
            }
            1..=3 => self.hold(chance, peer, layer),
            4 => Event::InventoryComplete { peer },
            5..=7 => {
                self.open.insert((peer, layer));
                self.unanswered.insert((peer, layer), now);
                let sources = vec![source(&chance.below(20).to_string())];
                let wanted = Spans::from_bytes(&[chance.below(3) as u8]).unwrap();
                Event::OpenTask { peer, task: layer, sources, wanted }
            }
            8 => {
                self.open.remove(&(peer, layer));
                self.unanswered.remove(&(peer, layer));
                Event::CloseTask { peer, task: layer }
            }
            9 => {
                let faults = [Fault::Unreachable, Fault::Slow, Fault::WrongBytes, Fault::Refused];
                let fault = faults[chance.below(4) as usize];
                Event::ParentReport { peer, task: layer, parent: node(chance.below(NODES)), fault }
            }
            _ => self.make(chance, peer, layer),
        }
    }

    fn connect(&mut self, chance: &mut Chance) -> Event {
        self.next += 1;
        let (peer, name) = (PeerId(self.next), node(chance.below(NODES)));
        let before = self.connected.iter().find(|(_, node)| **node == name.to_string()).map(|(id, _)| *id);
        before.into_iter().for_each(|id| self.forget(id));
        self.connected.insert(peer, name.to_string());
        let role = if chance.below(5) == 0 { Role::Seed } else { Role::Node };
        if role == Role::Seed {
            self.seeds.insert(peer);
        }
        let zone = ["", "x", "y"][chance.below(3) as usize].to_owned();
        Event::PeerConnected {
            peer,
            node: name,
            role,
            address: "h:1".into(),
            zone,
            slots: chance.below(4) as u32,
        }
    }

    fn hold(&mut self, chance: &mut Chance, peer: PeerId, layer: LayerTask) -> Event {
        if chance.below(4) == 0 {
            self.holds.remove(&(peer, layer));
            return Event::Holdings { peer, held: Vec::new(), dropped: vec![layer.diff_id] };
        }
        self.holds.insert((peer, layer));
        let spans = Spans::from_bytes(&[chance.below(255) as u8 + 1]).unwrap();
        let held = Holding { task: layer, map: chance.below(2) == 0, spans_total: 8, spans };
        Event::Holdings { peer, held: vec![held], dropped: Vec::new() }
    }

    fn make(&mut self, chance: &mut Chance, peer: PeerId, layer: LayerTask) -> Event {
        let states = [
            MakeState::Started,
            MakeState::Done,
            MakeState::Impossible("no".into()),
            MakeState::Failed("no".into()),
        ];
        let state = states[chance.below(4) as usize].clone();
        if state == MakeState::Done && self.seeds.contains(&peer) {
            self.holds.insert((peer, layer));
        }
        if state != MakeState::Started && self.ordered.get(&layer).is_some_and(|(seed, _)| *seed == peer) {
            self.ordered.remove(&layer);
        }
        Event::MakeUpdate { peer, task: layer, state }
    }

    fn check(&mut self, now: u64, actions: &[Action], event: &Event) {
        for action in actions {
            match action {
                Action::SendParents { peer, task, parents, seed } => {
                    self.check_parents(*peer, *task, parents.iter().map(|parent| parent.node.to_string()));
                    let seed = seed.as_ref().map(|seed| seed.node.to_string());
                    assert!(seed.is_none_or(|seed| self.seeds.iter().any(|id| self.connected[id] == seed)));
                    assert!(self.open.contains(&(*peer, *task)), "told to one who did not ask");
                    self.unanswered.remove(&(*peer, *task));
                }
                Action::OrderMake { seed, task, sources } => {
                    assert!(self.seeds.contains(seed) && !sources.is_empty(), "{event:?}");
                    let before = self.ordered.insert(*task, (*seed, now));
                    let lost = before.is_none_or(|(_, at)| now >= at + limits::START_MS);
                    assert!(lost, "ordered twice, after {event:?}");
                }
                Action::Reject { peer, .. } => assert!(!self.connected.contains_key(peer)),
            }
        }
    }

    fn check_parents(&self, child: PeerId, task: LayerTask, parents: impl Iterator<Item = String>) {
        let parents: Vec<String> = parents.collect();
        assert!(parents.len() <= limits::MAX_PARENTS);
        for name in &parents {
            let id = self.connected.iter().find(|(_, node)| *node == name).map(|(id, _)| *id);
            let id = id.expect("a parent that left was told");
            assert!(id != child, "told itself");
            assert!(self.holds.contains(&(id, task)), "told one that holds nothing");
        }
    }
}

fn run(seed: u64) -> World {
    let (mut world, mut known, mut chance) = (World::just_started(), Known::default(), Chance(seed));
    for _ in 0..1_500 {
        world.now += chance.below(60);
        let event = if chance.below(6) == 0 { Event::Tick } else { known.event(&mut chance, world.now) };
        let actions = world.tell(event.clone());
        known.check(world.now, &actions, &event);
    }
    // Seeds that keep coming hold orders back; when they stop, everybody hears something.
    for _ in 0..20 {
        world.now += 200;
        let actions = world.tell(Event::Tick);
        known.check(world.now, &actions, &Event::Tick);
    }
    assert!(known.unanswered.is_empty(), "seed {seed}: never answered: {:?}", known.unanswered);
    world
}

#[test]
fn promises_hold_for_random_events() {
    for seed in 0..300 {
        run(seed);
    }
}

#[test]
fn random_runs_replay_to_the_same_actions() {
    for seed in 1_000..1_020 {
        let world = run(seed);
        assert_eq!(replay(&world.log), world.actions, "seed {seed}");
    }
}
