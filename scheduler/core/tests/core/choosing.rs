//! Which parents a child is told.

use darter_scheduler_core::{Action, Event, Fault, Millis, PeerId, Spans, limits};
use darter_types::Role;

use crate::world::{World, parents, source, task, told};

/// A seed and `nodes` that hold the layer, and the child 99.
fn mesh(nodes: u64) -> World {
    let mut world = World::new();
    world.seed(1);
    world.hold(1, "a", 8);
    for peer in 2..2 + nodes {
        world.node(peer);
        world.hold(peer, "a", 8);
    }
    world.node(99);
    world
}

#[test]
fn seed_comes_last_when_two_nodes_can_do_it() {
    let mut world = mesh(2);
    let told = parents(&world.open(99, "a"), 99);
    assert_eq!(told.len(), 3);
    assert_eq!(told[2], "n1");
}

#[test]
fn no_more_than_eight_parents() {
    let mut world = mesh(30);
    let told = parents(&world.open(99, "a"), 99);
    assert_eq!(told.len(), limits::MAX_PARENTS);
    assert!(!told.contains(&"n1".to_owned()));
}

#[test]
fn nobody_is_its_own_parent() {
    let mut world = mesh(1);
    world.hold(99, "a", 3);
    assert!(!parents(&world.open(99, "a"), 99).contains(&"n99".to_owned()));
}

#[test]
fn free_upload_capacity_counts_before_the_zone() {
    let mut world = World::new();
    world.connect(2, Role::Node, "near", 1);
    world.connect(3, Role::Node, "far", 1);
    world.hold(2, "a", 8);
    world.hold(3, "a", 8);
    world.connect(10, Role::Node, "near", 1);
    world.connect(11, Role::Node, "near", 1);
    assert_eq!(parents(&world.open(10, "a"), 10), ["n2", "n3"]);
    world.hold(2, "b", 8);
    world.open(10, "b");
    assert_eq!(parents(&world.open(11, "a"), 11), ["n3", "n2"]);
}

#[test]
fn nearest_to_complete_comes_first() {
    let mut world = World::new();
    for (peer, spans) in [(2, 2), (3, 8), (4, 5)] {
        world.node(peer);
        world.hold(peer, "a", spans);
    }
    world.node(99);
    assert_eq!(parents(&world.open(99, "a"), 99), ["n3", "n4", "n2"]);
}

#[test]
fn who_has_the_wanted_spans_comes_first() {
    let mut world = World::new();
    for (peer, byte) in [(2, 0b1111), (3, 0b1000_0000)] {
        world.node(peer);
        world.hold(peer, "a", 0);
        let spans = Spans::from_bytes(&[byte]).unwrap();
        let held = vec![darter_scheduler_core::Holding { task: task("a"), map: true, spans_total: 8, spans }];
        world.tell(Event::Holdings { peer: PeerId(peer), held, dropped: Vec::new() });
    }
    world.node(99);
    let wanted = Spans::from_bytes(&[0b1000_0000]).unwrap();
    let open = Event::OpenTask { peer: PeerId(99), task: task("a"), sources: vec![source("a")], wanted };
    assert_eq!(parents(&world.tell(open), 99), ["n3", "n2"]);
}

#[test]
fn the_one_holder_of_a_span_is_among_the_parents() {
    let mut world = World::new();
    for peer in 2..40 {
        world.node(peer);
        world.hold(peer, "a", 7);
    }
    world.connect(50, Role::Node, "elsewhere", 1);
    world.hold(50, "a", 0);
    let spans = Spans::from_bytes(&[0b1000_0000]).unwrap();
    let held = vec![darter_scheduler_core::Holding { task: task("a"), map: true, spans_total: 8, spans }];
    world.tell(Event::Holdings { peer: PeerId(50), held, dropped: Vec::new() });
    world.node(99);
    assert!(parents(&world.open(99, "a"), 99).contains(&"n50".to_owned()));
}

#[test]
fn children_are_spread_over_equal_parents() {
    let mut world = mesh(20);
    for peer in 100..300 {
        world.node(peer);
        world.open(peer, "a");
    }
    let mut children = std::collections::BTreeMap::new();
    for action in &world.actions {
        let Action::SendParents { parents, .. } = action else { continue };
        parents.iter().for_each(|parent| *children.entry(parent.node.clone()).or_insert(0) += 1);
    }
    let most = children.values().max().unwrap();
    assert!(children.len() == 20 && *most <= 90, "{children:?}");
}

#[test]
fn new_holder_is_told_to_children_with_few_parents_at_the_next_tick() {
    let mut world = mesh(0);
    assert_eq!(parents(&world.open(99, "a"), 99), ["n1"]);
    world.node(2);
    assert!(world.hold(2, "a", 1).is_empty());
    assert_eq!(parents(&world.pass(200), 99).len(), 2);
    assert!(told(&world.pass(200), 99).is_none());
}

#[test]
fn children_with_enough_parents_are_left_alone() {
    let mut world = mesh(4);
    world.open(99, "a");
    world.node(50);
    world.hold(50, "a", 8);
    assert!(world.pass(200).is_empty());
}

#[test]
fn parent_that_left_is_replaced_at_the_next_tick() {
    let mut world = mesh(2);
    world.open(99, "a");
    world.gone(2);
    assert_eq!(parents(&world.pass(200), 99), ["n3", "n1"].map(str::to_owned).to_vec().as_slice());
}

#[test]
fn parent_that_dropped_the_layer_is_no_parent() {
    let mut world = mesh(2);
    world.open(99, "a");
    world.drop_layer(2, "a");
    assert!(!parents(&world.pass(200), 99).contains(&"n2".to_owned()));
}

#[test]
fn unreachable_parent_is_kept_away_for_thirty_seconds() {
    let mut world = mesh(2);
    world.open(99, "a");
    assert!(!parents(&world.report(99, "a", 2, Fault::Unreachable), 99).contains(&"n2".to_owned()));
    world.hold(2, "b", 8);
    assert!(!parents(&world.open(99, "b"), 99).contains(&"n2".to_owned()));
    assert!(told(&world.pass(29_000), 99).is_none());
    assert!(parents(&world.pass(1_000), 99).contains(&"n2".to_owned()));
}

#[test]
fn sender_of_wrong_bytes_is_kept_from_its_victim_for_good_and_from_all_after_two() {
    let mut world = mesh(3);
    world.node(98);
    world.node(97);
    world.open(99, "a");
    world.open(98, "a");
    let bad = "n2".to_owned();
    assert!(!parents(&world.report(99, "a", 2, Fault::WrongBytes), 99).contains(&bad));
    let others = parents(&world.open(97, "a"), 97);
    assert_eq!(others.last(), Some(&bad), "one witness makes it the last choice");
    world.pass(600_000);
    assert!(!parents(&world.open(99, "a"), 99).contains(&bad));
    world.report(98, "a", 2, Fault::WrongBytes);
    assert!(!parents(&world.pass(200), 97).contains(&bad));
}

#[test]
fn closed_task_is_heard_of_no_more_and_gives_slots_back() {
    let mut world = World::new();
    world.connect(2, Role::Node, "", 1);
    world.connect(3, Role::Node, "", 1);
    world.hold(2, "a", 8);
    world.hold(3, "a", 4);
    world.node(99);
    world.node(98);
    world.open(99, "a");
    world.close(99, "a");
    world.gone(3);
    assert!(world.pass(200).is_empty());
    assert_eq!(parents(&world.open(98, "a"), 98), ["n2"]);
}

#[test]
fn newer_connection_of_a_node_replaces_the_older() {
    let mut world = mesh(1);
    let (node, address) = (crate::world::node(2), "10.0.0.77:7420".to_owned());
    let hello = Event::PeerConnected {
        peer: PeerId(70),
        node,
        role: Role::Node,
        address,
        zone: String::new(),
        slots: 1,
    };
    assert!(matches!(&world.tell(hello)[..], [Action::Reject { peer: PeerId(2), .. }]));
    assert_eq!(parents(&world.open(99, "a"), 99), ["n1"]);
    assert_eq!(world.core.counts().peers, 3);
}

#[test]
fn everything_is_forgotten_when_nobody_has_or_wants_it() {
    let mut world = mesh(3);
    world.open(99, "a");
    [1, 2, 3, 4, 99].iter().for_each(|peer| drop(world.gone(*peer)));
    world.pass(200);
    assert_eq!(world.core.counts(), Default::default());
    assert!(world.core.handle(Millis(0), Event::Tick).is_empty());
}
