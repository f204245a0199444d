//! Orders to seeds.

use darter_scheduler_core::{Action, Event, Fault, MakeState, PeerId};
use darter_types::Role;

use crate::world::{World, node, orders, parents, source, told};

#[test]
fn layer_is_ordered_once_however_many_nodes_ask() {
    let mut world = World::new();
    world.seed(1);
    world.seed(2);
    (10..110).for_each(|peer| world.node(peer));
    let mut actions = Vec::new();
    (10..110).for_each(|peer| actions.extend(world.open(peer, "a")));
    let seed = orders(&actions);
    assert_eq!(seed.len(), 1);
    let seed = Some(format!("n{}", seed[0]));
    assert!((10..110).all(|peer| told(&actions, peer).unwrap().1 == seed));
}

#[test]
fn child_that_opens_while_the_layer_is_made_is_told_the_maker() {
    let mut world = World::new();
    world.seed(1);
    world.node(2);
    world.node(3);
    assert_eq!(orders(&world.open(2, "a")), [1]);
    world.make(1, "a", MakeState::Started);
    let actions = world.open(3, "a");
    assert_eq!((orders(&actions), told(&actions, 3).unwrap().1), (vec![], Some("n1".to_owned())));
}

#[test]
fn order_of_a_seed_that_goes_passes_to_another() {
    let mut world = World::new();
    (1..=3).for_each(|peer| world.seed(peer));
    world.node(9);
    let first = orders(&world.open(9, "a"))[0];
    world.gone(first);
    let actions = world.pass(200);
    let second = orders(&actions)[0];
    assert_ne!(first, second);
    assert_eq!(told(&actions, 9).unwrap().1, Some(format!("n{second}")));
}

#[test]
fn seed_that_failed_is_not_asked_again_until_its_time_is_over() {
    let mut world = World::new();
    world.seed(1);
    world.seed(2);
    world.node(9);
    let first = orders(&world.open(9, "a"))[0];
    let second = orders(&world.make(first, "a", MakeState::Failed("disk full".into())))[0];
    assert_ne!(first, second);
    assert!(orders(&world.make(second, "a", MakeState::Failed("disk full".into()))).is_empty());
    assert_eq!(told(&world.pass(200), 9).unwrap().1, None);
    assert_eq!(orders(&world.pass(60_000)).len(), 1);
}

#[test]
fn seed_that_stops_when_nobody_waits_any_more_is_ordered_again() {
    let mut world = World::new();
    world.seed(1);
    world.seed(2);
    world.node(9);
    let first = orders(&world.open(9, "a"))[0];
    world.make(first, "a", MakeState::Started);
    world.close(9, "a");
    world.make(first, "a", MakeState::Failed("nobody waited for it any more".into()));
    assert_eq!(orders(&world.open(9, "a")), [first]);
    let other = orders(&world.make(first, "a", MakeState::Failed("disk full".into())));
    assert_eq!(other, [3 - first], "now somebody waited");
}

#[test]
fn seed_that_does_not_start_loses_the_order() {
    let mut world = World::new();
    world.seed(1);
    world.seed(2);
    world.node(9);
    let first = orders(&world.open(9, "a"))[0];
    assert!(orders(&world.pass(29_000)).is_empty());
    assert_ne!(orders(&world.pass(1_000)), [first]);
}

#[test]
fn silent_seed_is_given_the_same_order_again() {
    let mut world = World::new();
    world.seed(1);
    world.seed(2);
    world.node(9);
    let first = orders(&world.open(9, "a"))[0];
    world.make(first, "a", MakeState::Started);
    assert!(orders(&world.pass(599_000)).is_empty());
    assert_eq!(orders(&world.pass(1_000)), [first]);
    world.make(first, "a", MakeState::Started);
    assert!(orders(&world.pass(60_000)).is_empty());
}

#[test]
fn impossible_source_does_not_break_the_layer_of_another() {
    let mut world = World::new();
    world.seed(1);
    world.node(8);
    world.node(9);
    world.open_from(8, "a", &["stranger"]);
    world.make(1, "a", MakeState::Impossible("wrong diff ID".into()));
    assert!(orders(&world.open_from(8, "a", &["stranger"])).is_empty());
    let actions = world.open_from(9, "a", &["stranger", "right"]);
    let Some(Action::OrderMake { sources, .. }) = actions.first() else { panic!("{actions:?}") };
    assert_eq!(*sources, [source("right")]);
}

#[test]
fn who_opens_an_impossible_layer_is_told_the_seed_that_knows_why() {
    let mut world = World::new();
    world.seed(1);
    world.node(9);
    world.open(9, "a");
    world.make(1, "a", MakeState::Impossible("404".into()));
    assert_eq!(told(&world.open(9, "a"), 9).unwrap(), (vec![], Some("n1".to_owned())));
    world.close(9, "a");
    world.pass(300_000);
    assert_eq!(orders(&world.open(9, "a")), [1]);
}

#[test]
fn seed_with_the_map_is_named_and_nothing_is_ordered() {
    let mut world = World::new();
    world.seed(1);
    world.seed(2);
    world.hold(2, "a", 8);
    world.node(9);
    let actions = world.open(9, "a");
    assert!(orders(&actions).is_empty());
    assert_eq!(told(&actions, 9).unwrap(), (vec!["n2".to_owned()], Some("n2".to_owned())));
}

#[test]
fn nodes_that_have_all_spare_the_registry() {
    let mut world = World::new();
    world.seed(1);
    world.node(2);
    world.node(9);
    world.hold(2, "a", 8);
    assert!(orders(&world.open(9, "a")).is_empty());
    world.hold(2, "b", 7);
    assert_eq!(orders(&world.open(9, "b")), [1]);
}

#[test]
fn child_that_nodes_refuse_gets_a_seed() {
    let mut world = World::new();
    world.seed(1);
    world.node(2);
    world.node(9);
    world.hold(2, "a", 8);
    world.open(9, "a");
    let actions = world.report(9, "a", 2, Fault::Refused);
    assert_eq!(orders(&actions), [1]);
    assert_eq!(told(&actions, 9).unwrap(), (vec![], Some("n1".to_owned())));
}

#[test]
fn after_a_start_unknown_layers_wait_for_inventories() {
    let mut world = World::just_started();
    world.node(9);
    assert!(world.open(9, "a").is_empty() && world.open(9, "b").is_empty());
    world.now = 1_500;
    world.seed(1);
    world.hold(1, "a", 8);
    let actions = world.pass(200);
    assert_eq!(told(&actions, 9).unwrap().1, Some("n1".to_owned()));
    assert!(orders(&actions).is_empty());
    assert_eq!(orders(&world.pass(300)), [1], "b is ordered when the grace is over");
}

#[test]
fn seed_that_has_just_come_is_heard_before_another_makes_it() {
    let mut world = World::new();
    world.seed(1);
    world.node(9);
    let (node, address, zone) = (node(2), "10.0.0.2:7420".to_owned(), String::new());
    world.tell(Event::PeerConnected { peer: PeerId(2), node, role: Role::Seed, address, zone, slots: 4 });
    assert!(world.open(9, "a").is_empty());
    world.hold(2, "a", 8);
    let actions = world.tell(Event::InventoryComplete { peer: PeerId(2) });
    assert!(orders(&actions).is_empty());
    assert_eq!(told(&world.pass(200), 9).unwrap().1, Some("n2".to_owned()));
}

#[test]
fn without_a_seed_the_answer_is_nobody_and_a_seed_that_comes_is_told() {
    let mut world = World::new();
    world.node(9);
    assert_eq!(told(&world.open(9, "a"), 9).unwrap(), (vec![], None));
    world.seed(1);
    let actions = world.pass(200);
    assert_eq!((orders(&actions), told(&actions, 9).unwrap().1), (vec![1], Some("n1".to_owned())));
}

#[test]
fn make_that_a_seed_began_by_itself_is_not_ordered_from_another() {
    let mut world = World::new();
    world.seed(1);
    world.seed(2);
    world.node(9);
    world.make(2, "a", MakeState::Started);
    let actions = world.open(9, "a");
    assert_eq!((orders(&actions), told(&actions, 9).unwrap().1), (vec![], Some("n2".to_owned())));
    world.make(2, "a", MakeState::Done);
    assert_eq!(parents(&world.pass(200), 9), ["n2"]);
}

#[test]
fn what_a_node_says_about_making_is_ignored() {
    let mut world = World::new();
    world.seed(1);
    world.node(2);
    world.node(9);
    world.make(2, "a", MakeState::Done);
    assert_eq!(orders(&world.open(9, "a")), [1]);
    world.make(2, "a", MakeState::Impossible("lie".into()));
    assert_eq!(told(&world.open(9, "a"), 9).unwrap().1, Some("n1".to_owned()));
}

#[test]
fn busy_seed_gets_fewer_orders() {
    let mut world = World::new();
    world.seed(1);
    world.seed(2);
    world.node(9);
    let seeds: Vec<u64> =
        (0..100).flat_map(|layer| orders(&world.open(9, &format!("layer-{layer}")))).collect();
    let first = seeds.iter().filter(|seed| **seed == 1).count();
    assert!((35..=65).contains(&first), "{first} of 100");
}

#[test]
fn seed_that_is_busy_with_started_layers_keeps_its_queued_orders() {
    let mut world = World::new();
    world.seed(1);
    world.node(9);
    world.open(9, "a");
    world.open(9, "b");
    world.make(1, "a", MakeState::Started);
    assert!(orders(&world.pass(100_000)).is_empty());
    assert_eq!(told(&world.open(9, "b"), 9).unwrap().1, Some("n1".to_owned()));
    world.make(1, "a", MakeState::Done);
    world.pass(30_000);
    assert_eq!(told(&world.open(9, "b"), 9).unwrap().1, None, "it had nothing else to do");
}

#[test]
fn seed_that_makes_by_itself_takes_over_when_the_ordered_one_fails() {
    let mut world = World::new();
    world.seed(1);
    world.seed(2);
    world.node(9);
    let ordered = orders(&world.open(9, "a"))[0];
    let other = 3 - ordered;
    world.make(other, "a", MakeState::Started);
    assert!(orders(&world.make(ordered, "a", MakeState::Failed("401".into()))).is_empty());
    assert_eq!(told(&world.pass(200), 9).unwrap().1, Some(format!("n{other}")));
}

#[test]
fn seed_that_goes_takes_only_its_own_orders_with_it() {
    let mut world = World::new();
    world.seed(1);
    world.seed(2);
    world.node(9);
    let ordered = orders(&world.open(9, "a"))[0];
    world.make(ordered, "a", MakeState::Started);
    world.make(3 - ordered, "a", MakeState::Started);
    world.gone(3 - ordered);
    assert!(orders(&world.pass(200)).is_empty());
    assert_eq!(told(&world.actions, 9).unwrap().1, Some(format!("n{ordered}")));
}

#[test]
fn seed_that_wants_a_layer_itself_makes_it() {
    for wanting in [1, 2] {
        let mut world = World::new();
        world.seed(1);
        world.seed(2);
        for layer in 0..10 {
            assert_eq!(orders(&world.open(wanting, &layer.to_string())), [wanting]);
        }
    }
}
