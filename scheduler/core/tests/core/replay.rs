//! A recorded log replays to the same actions.

use darter_scheduler_core::{
    Action, Core, Event, Fault, Holding, MakeState, Millis, Options, PeerId, Spans, record,
};
use darter_types::Role;

use crate::world::{World, node, source, task};

pub fn replay(log: &[String]) -> Vec<Action> {
    let (at, options) = record::parse_head(&log[0]).unwrap();
    let mut core = Core::new(at, options);
    let events = log[1..].iter().map(|line| record::parse(line).unwrap());
    events.flat_map(|(now, event)| core.handle(now, event)).collect()
}

#[test]
fn recorded_story_replays_to_the_same_actions() {
    let mut world = World::just_started();
    world.seed(1);
    (2..20).for_each(|peer| world.node(peer));
    (2..10).for_each(|peer| drop(world.open(peer, "a")));
    world.pass(2_000);
    world.make(1, "a", MakeState::Started);
    world.make(1, "a", MakeState::Done);
    (2..8).for_each(|peer| drop(world.hold(peer, "a", peer as u32)));
    world.pass(200);
    world.report(3, "a", 4, Fault::Slow);
    world.gone(5);
    world.pass(200);
    assert!(world.actions.len() > 10);
    assert_eq!(replay(&world.log), world.actions);
}

#[test]
fn every_event_is_read_as_it_was_written() {
    let (peer, task_a) = (PeerId(7), task("a"));
    let spans = Spans::from_bytes(&[1, 0, 0xf0]).unwrap();
    let states = [
        MakeState::Started,
        MakeState::Done,
        MakeState::Impossible("100% wrong = \"no\"\n\u{e4}".into()),
        MakeState::Failed(String::new()),
    ];
    let mut events = vec![
        Event::PeerConnected {
            peer,
            node: node(7),
            role: Role::Seed,
            address: "[::1]:7420".into(),
            zone: "hall 2".into(),
            slots: 3,
        },
        Event::PeerGone { peer },
        Event::Holdings {
            peer,
            held: vec![Holding { task: task_a, map: true, spans_total: 24, spans: spans.clone() }],
            dropped: vec![task("b").diff_id, task("c").diff_id],
        },
        Event::InventoryComplete { peer },
        Event::OpenTask { peer, task: task_a, sources: vec![source("a"), source("b")], wanted: spans },
        Event::CloseTask { peer, task: task_a },
        Event::Tick,
    ];
    events.extend(states.map(|state| Event::MakeUpdate { peer, task: task_a, state }));
    let faults = [Fault::Unreachable, Fault::Slow, Fault::WrongBytes, Fault::Refused];
    events.extend(faults.map(|fault| Event::ParentReport { peer, task: task_a, parent: node(1), fault }));
    for event in events {
        let line = record::encode(Millis(12), &event);
        assert!(!line.contains('\n'));
        assert_eq!(record::parse(&line), Ok((Millis(12), event)), "{line}");
    }
}

#[test]
fn lines_that_are_none_are_refused() {
    for bad in [
        "",
        "x tick",
        "1",
        "1 dance peer=1",
        "1 gone",
        "1 gone peer=-1",
        "1 open peer=1 task=a wanted=",
        "1 hold peer=1 has=a,b",
    ] {
        assert!(record::parse(bad).is_err(), "{bad:?} was taken");
    }
    assert!(record::parse_head("darter-scheduler-log 2 at=0 grace=1").is_err());
    let options = Options { grace_ms: 5 };
    assert_eq!(record::parse_head(&record::encode_head(Millis(3), options)), Ok((Millis(3), options)));
}
