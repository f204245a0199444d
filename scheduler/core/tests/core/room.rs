//! How much one peer can make the core remember.

use darter_scheduler_core::limits::{MAX_HELD, MAX_SPANS, MAX_TASKS};
use darter_scheduler_core::{Event, Holding, PeerId, Spans};

use crate::world::{World, parents, task};

impl World {
    /// A layer with as many spans as there may be.
    fn hold_large(&mut self, peer: u64, name: &str) {
        let spans = Spans::first(MAX_SPANS);
        let held = vec![Holding { task: task(name), map: true, spans_total: MAX_SPANS, spans }];
        self.tell(Event::Holdings { peer: PeerId(peer), held, dropped: Vec::new() });
    }

    /// `peer` holds so many layers of its own.
    fn hold_many(&mut self, peer: u64, count: usize, spans: u32) {
        let holding = |number: usize| Holding {
            task: task(&format!("{peer}/{number}")),
            map: true,
            spans_total: spans,
            spans: Spans::first(spans),
        };
        let held = (0..count).map(holding).collect();
        // Not recorded: the log of these would be the largest thing here.
        self.core.handle(self.time(), Event::Holdings { peer: PeerId(peer), held, dropped: Vec::new() });
    }
}

#[test]
fn holdings_of_one_peer_take_no_more_than_their_budget() {
    let mut world = World::new();
    world.node(1);
    world.hold_many(1, 10_000, MAX_SPANS);
    let large = world.core.counts().tasks;
    assert!((1_900..2_100).contains(&large), "{large} layers of 8 KiB of spans each are remembered");
}

#[test]
fn what_a_peer_drops_makes_room_for_what_it_gets() {
    let mut world = World::new();
    world.node(1);
    world.node(2);
    world.hold_many(1, 3_000, MAX_SPANS);
    world.hold_large(1, "a");
    assert!(parents(&world.open(2, "a"), 2).is_empty());
    let dropped = (0..10).map(|number| task(&format!("1/{number}")).diff_id).collect();
    world.tell(Event::Holdings { peer: PeerId(1), held: Vec::new(), dropped });
    world.hold_large(1, "a");
    assert_eq!(parents(&world.open(2, "a"), 2), ["n1"]);
}

#[test]
fn peers_that_fill_the_table_make_room_for_layers_that_are_wanted() {
    let mut world = World::new();
    world.node(10);
    world.hold(10, "before", 8);
    for peer in 1..=5 {
        world.node(peer);
        world.hold_many(peer, MAX_HELD, 1);
    }
    assert_eq!(world.core.counts().tasks, MAX_TASKS);
    world.node(11);
    world.pass(1_000);
    world.hold(10, "a", 8);
    assert_eq!(parents(&world.open(11, "a"), 11), ["n10"]);
    assert_eq!(parents(&world.open(11, "before"), 11), ["n10"], "who holds little loses nothing");
    assert!(world.core.counts().tasks < MAX_TASKS);
}
