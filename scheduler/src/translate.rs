//! Wire messages to the core's events, and its answers back.

use darter_identity::Member;
use darter_proto::convert::{self, WireError};
use darter_proto::v1;
use darter_proto::v1::peer_message::Message;
use darter_scheduler_core::{Event, Fault, Holding, MakeState, Parent, PeerId, Spans, limits};
use darter_types::{LayerSource, LayerTask};

/// An address or a zone may have this many bytes.
const TEXT_MAX: usize = 255;

/// A seed's reason is cut there: it is for people.
const REASON_MAX: usize = 1_000;

/// Holdings, or dropped layers, in one message.
const HOLDINGS_MAX: usize = 8_192;

/// The event of a hello by `member`; another protocol is refused.
pub(crate) fn hello(peer: PeerId, member: &Member, hello: &v1::PeerHello) -> Result<Event, WireError> {
    convert::check_protocol(hello.protocol)?;
    Ok(Event::PeerConnected {
        peer,
        node: member.node.clone(),
        role: member.role,
        address: text("address", &hello.address)?,
        zone: text("zone", &hello.zone)?,
        slots: hello.upload_slots,
    })
}

/// The events of a message that follows the hello.
pub(crate) fn events(peer: PeerId, message: v1::PeerMessage) -> Result<Vec<Event>, WireError> {
    Ok(match message.message.ok_or(WireError::Missing("message"))? {
        Message::Hello(_) => return Err(WireError::invalid("message", "a second hello")),
        Message::Holdings(holdings) => return holdings_events(peer, &holdings),
        Message::Open(open) => vec![Event::OpenTask {
            peer,
            task: convert::task(&open.diff_id, open.format)?,
            sources: sources(&open.sources)?,
            wanted: spans("wanted", &open.wanted)?,
        }],
        Message::Close(close) => {
            vec![Event::CloseTask { peer, task: convert::task(&close.diff_id, close.format)? }]
        }
        Message::Report(report) => vec![Event::ParentReport {
            peer,
            task: convert::task(&report.diff_id, report.format)?,
            parent: report.parent.parse().map_err(|error| WireError::invalid("parent", error))?,
            fault: fault(report.fault())?,
        }],
        Message::Make(make) => {
            let task = convert::task(&make.diff_id, make.format)?;
            vec![Event::MakeUpdate { peer, task, state: make_state(&make)? }]
        }
    })
}

pub(crate) fn parents(task: LayerTask, parents: &[Parent], seed: Option<&Parent>) -> v1::Parents {
    v1::Parents {
        diff_id: task.diff_id.as_bytes().to_vec(),
        format: task.format,
        parents: parents.iter().map(parent).collect(),
        seed: seed.map(parent),
    }
}

pub(crate) fn order(task: LayerTask, sources: &[LayerSource]) -> v1::MakeOrder {
    v1::MakeOrder {
        diff_id: task.diff_id.as_bytes().to_vec(),
        format: task.format,
        sources: sources.iter().map(v1::Source::from).collect(),
    }
}

fn parent(parent: &Parent) -> v1::Parent {
    v1::Parent { node: parent.node.to_string(), address: parent.address.clone(), is_seed: parent.seed }
}

fn holdings_events(peer: PeerId, message: &v1::Holdings) -> Result<Vec<Event>, WireError> {
    if message.tasks.len().max(message.dropped.len()) > HOLDINGS_MAX {
        return Err(WireError::invalid("tasks", format!("more than {HOLDINGS_MAX} in one message")));
    }
    let held = message.tasks.iter().map(holding).collect::<Result<_, _>>()?;
    let dropped =
        message.dropped.iter().map(|diff_id| convert::diff_id(diff_id)).collect::<Result<_, _>>()?;
    let mut events = Vec::new();
    if !message.tasks.is_empty() || !message.dropped.is_empty() {
        events.push(Event::Holdings { peer, held, dropped });
    }
    if message.inventory_complete {
        events.push(Event::InventoryComplete { peer });
    }
    Ok(events)
}

fn holding(holding: &v1::Holding) -> Result<Holding, WireError> {
    if holding.spans_total > limits::MAX_SPANS {
        return Err(WireError::invalid("spans_total", format!("more than {}", limits::MAX_SPANS)));
    }
    Ok(Holding {
        task: convert::task(&holding.diff_id, holding.format)?,
        map: holding.has_map,
        spans_total: holding.spans_total,
        spans: spans("spans", &holding.spans)?,
    })
}

/// As many as the core keeps: a node that names more loses nothing by it.
fn sources(list: &[v1::Source]) -> Result<Vec<LayerSource>, WireError> {
    convert::sources(&list[..list.len().min(limits::MAX_SOURCES)])
}

fn spans(field: &'static str, bytes: &[u8]) -> Result<Spans, WireError> {
    Spans::from_bytes(bytes).ok_or_else(|| WireError::invalid(field, "more than a layer may have"))
}

fn text(field: &'static str, text: &str) -> Result<String, WireError> {
    if text.len() > TEXT_MAX || text.chars().any(char::is_control) {
        return Err(WireError::invalid(field, "it must be one short line"));
    }
    Ok(text.to_owned())
}

fn fault(fault: v1::ParentFault) -> Result<Fault, WireError> {
    match fault {
        v1::ParentFault::Unspecified => Err(WireError::Missing("fault")),
        v1::ParentFault::Unreachable => Ok(Fault::Unreachable),
        v1::ParentFault::Slow => Ok(Fault::Slow),
        v1::ParentFault::WrongBytes => Ok(Fault::WrongBytes),
        v1::ParentFault::Refused => Ok(Fault::Refused),
    }
}

fn make_state(make: &v1::MakeUpdate) -> Result<MakeState, WireError> {
    let reason = || make.reason.chars().take(REASON_MAX).collect();
    match make.state() {
        v1::MakeState::Unspecified => Err(WireError::Missing("state")),
        v1::MakeState::Started => Ok(MakeState::Started),
        v1::MakeState::Done => Ok(MakeState::Done),
        v1::MakeState::Impossible => Ok(MakeState::Impossible(reason())),
        v1::MakeState::Failed => Ok(MakeState::Failed(reason())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use darter_types::{PROTOCOL_VERSION, Role};

    const PEER: PeerId = PeerId(1);

    fn member() -> Member {
        Member { cluster: "c".parse().unwrap(), role: Role::Seed, node: "s".parse().unwrap() }
    }

    fn message(message: Message) -> v1::PeerMessage {
        v1::PeerMessage { message: Some(message) }
    }

    #[test]
    fn another_protocol_is_refused() {
        let mut said = v1::PeerHello { protocol: PROTOCOL_VERSION, ..Default::default() };
        assert!(hello(PEER, &member(), &said).is_ok());
        said.protocol += 1;
        assert!(matches!(hello(PEER, &member(), &said), Err(WireError::Protocol { .. })));
    }

    #[test]
    fn role_and_name_come_from_the_certificate() {
        let said = v1::PeerHello { protocol: PROTOCOL_VERSION, ..Default::default() };
        let Event::PeerConnected { node, role, .. } = hello(PEER, &member(), &said).unwrap() else {
            panic!()
        };
        assert_eq!((node.as_str(), role), ("s", Role::Seed));
    }

    #[test]
    fn last_message_of_the_inventory_says_so() {
        let held =
            v1::Holding { diff_id: vec![1; 32], format: 1, has_map: true, spans_total: 8, spans: vec![3] };
        let holdings =
            v1::Holdings { tasks: vec![held], dropped: vec![vec![2; 32]], inventory_complete: true };
        let events = events(PEER, message(Message::Holdings(holdings))).unwrap();
        assert!(
            matches!(&events[0], Event::Holdings { held, dropped, .. } if held.len() == 1 && dropped.len() == 1)
        );
        assert_eq!(events[1], Event::InventoryComplete { peer: PEER });
    }

    #[test]
    fn what_is_too_long_or_lacks_a_part_is_refused() {
        let held =
            v1::Holding { diff_id: vec![1; 32], spans_total: limits::MAX_SPANS + 1, ..Default::default() };
        let holdings = v1::Holdings { tasks: vec![held], ..Default::default() };
        let short = v1::CloseTask { diff_id: vec![1; 31], format: 1 };
        let nothing = v1::ParentReport { diff_id: vec![1; 32], parent: "p".into(), ..Default::default() };
        let stateless = v1::MakeUpdate { diff_id: vec![1; 32], ..Default::default() };
        for bad in [
            Message::Holdings(holdings),
            Message::Close(short),
            Message::Report(nothing),
            Message::Make(stateless),
            Message::Hello(v1::PeerHello::default()),
        ] {
            assert!(events(PEER, message(bad.clone())).is_err(), "{bad:?} was taken");
        }
        assert!(events(PEER, v1::PeerMessage::default()).is_err());
    }
}
