//! The members of a cluster on the wire and in the file `members`.
//!
//! The file has one line a member: kind, node, address and zone, separated by tabs.

use std::io;
use std::path::{Path, PathBuf};

use darter_proto::convert::WireError;
use darter_proto::v1;
use darter_types::{BlobDigest, DiffId};

use super::{
    ClusterMembers, FETCH_LAYERS_MAX, MemberInfo, PreheatCommand, PreheatLayer, PreheatUpdate, kept,
};

const HEAD: &str = "darter-members 1 ";

/// What an address or a zone may have; more than any sane one.
const TEXT_MAX: usize = 255;

/// Characters that a member may say of what went wrong; more are cut off.
const WORDS_MAX: usize = 2_000;

pub(super) fn path(folder: &Path) -> PathBuf {
    folder.join("members")
}

pub(super) fn save(path: &Path, members: &ClusterMembers) -> io::Result<()> {
    kept::save(path, HEAD, &encode(members))
}

/// Nobody, if there is no such file or it is damaged: the manager will say.
pub(super) fn load(path: &Path) -> ClusterMembers {
    kept::load(path, HEAD, decode)
}

fn encode(members: &ClusterMembers) -> String {
    let lines = |kind: &str, list: &[MemberInfo]| -> String {
        list.iter().map(|m| format!("{kind}\t{}\t{}\t{}\n", m.node, m.address, m.zone)).collect()
    };
    lines("scheduler", &members.schedulers) + &lines("seed", &members.seeds)
}

fn decode(body: &str) -> Option<ClusterMembers> {
    let mut members = ClusterMembers::default();
    for line in body.lines() {
        let mut parts = line.split('\t');
        let list = match parts.next()? {
            "scheduler" => &mut members.schedulers,
            "seed" => &mut members.seeds,
            _ => return None,
        };
        let (node, address, zone) = (parts.next()?, parts.next()?, parts.next()?);
        list.push(MemberInfo {
            node: node.parse().ok()?,
            address: address.to_owned(),
            zone: zone.to_owned(),
        });
    }
    Some(members)
}

/// An address or a zone: one short line.
fn line(field: &'static str, text: &str) -> Result<String, WireError> {
    if text.len() > TEXT_MAX || text.chars().any(char::is_control) {
        return Err(WireError::invalid(field, "it must be one short line"));
    }
    Ok(text.to_owned())
}

impl TryFrom<&v1::MemberHello> for super::Hello {
    type Error = WireError;
    fn try_from(hello: &v1::MemberHello) -> Result<Self, WireError> {
        Ok(Self {
            version: line("version", &hello.version)?,
            address: line("address", &hello.address)?,
            zone: line("zone", &hello.zone)?,
        })
    }
}

impl TryFrom<&v1::Member> for MemberInfo {
    type Error = WireError;
    fn try_from(member: &v1::Member) -> Result<Self, WireError> {
        Ok(Self {
            node: member.node.parse().map_err(|error| WireError::invalid("node", error))?,
            address: line("address", &member.address)?,
            zone: line("zone", &member.zone)?,
        })
    }
}

impl From<&MemberInfo> for v1::Member {
    fn from(member: &MemberInfo) -> Self {
        Self { node: member.node.to_string(), address: member.address.clone(), zone: member.zone.clone() }
    }
}

impl TryFrom<&v1::ClusterView> for ClusterMembers {
    type Error = WireError;
    fn try_from(view: &v1::ClusterView) -> Result<Self, WireError> {
        let all = |list: &[v1::Member]| list.iter().map(MemberInfo::try_from).collect::<Result<Vec<_>, _>>();
        Ok(Self { schedulers: all(&view.schedulers)?, seeds: all(&view.seeds)? })
    }
}

impl From<&ClusterMembers> for v1::ClusterView {
    fn from(members: &ClusterMembers) -> Self {
        let all = |list: &[MemberInfo]| list.iter().map(v1::Member::from).collect();
        Self { schedulers: all(&members.schedulers), seeds: all(&members.seeds), limits: None }
    }
}

impl From<v1::PreheatOrder> for PreheatCommand {
    fn from(order: v1::PreheatOrder) -> Self {
        let platform = Some(order.platform).filter(|platform| !platform.is_empty());
        Self::Start { id: order.id, image: order.image, platform, credential: order.credential }
    }
}

impl From<&PreheatUpdate> for v1::PreheatUpdate {
    fn from(update: &PreheatUpdate) -> Self {
        Self {
            id: update.id.clone(),
            layers: update.layers.iter().map(v1::PreheatLayer::from).collect(),
            done: update.done,
            error: update.error.clone().unwrap_or_default(),
            repository: update.repository.as_ref().map(ToString::to_string).unwrap_or_default(),
        }
    }
}

impl From<&PreheatLayer> for v1::PreheatLayer {
    fn from(layer: &PreheatLayer) -> Self {
        Self {
            diff_id: layer.diff_id.as_bytes().to_vec(),
            blob: layer.blob.as_bytes().to_vec(),
            size: layer.size,
            read: layer.read,
            done: layer.done,
            error: layer.error.clone().unwrap_or_default(),
        }
    }
}

impl TryFrom<&v1::PreheatUpdate> for PreheatUpdate {
    type Error = WireError;
    fn try_from(update: &v1::PreheatUpdate) -> Result<Self, WireError> {
        if update.layers.len() > FETCH_LAYERS_MAX {
            return Err(WireError::invalid("layers", format_args!("there may be {FETCH_LAYERS_MAX}")));
        }
        let repository = Some(&update.repository).filter(|text| !text.is_empty());
        let repository = repository.map(|text| text.parse()).transpose();
        Ok(Self {
            repository: repository.map_err(|error| WireError::invalid("repository", error))?,
            id: update.id.clone(),
            layers: update.layers.iter().map(PreheatLayer::try_from).collect::<Result<_, _>>()?,
            done: update.done,
            error: words(&update.error),
        })
    }
}

/// A member's words on what went wrong, as far as anybody reads them; `None` if there are none. They are shown on terminals,
/// which shall not obey them.
fn words(error: &str) -> Option<String> {
    let shown = |letter: char| if letter.is_control() { char::REPLACEMENT_CHARACTER } else { letter };
    Some(error.chars().take(WORDS_MAX).map(shown).collect()).filter(|error: &String| !error.is_empty())
}

/// Sizes in OCI's manifests, and in databases, are of 63 bits; no blob is larger.
const SIZE_MAX: u64 = i64::MAX as u64;

impl TryFrom<&v1::PreheatLayer> for PreheatLayer {
    type Error = WireError;
    fn try_from(layer: &v1::PreheatLayer) -> Result<Self, WireError> {
        Ok(Self {
            diff_id: DiffId::from_slice(&layer.diff_id)
                .map_err(|error| WireError::invalid("diff_id", error))?,
            blob: BlobDigest::from_slice(&layer.blob).map_err(|error| WireError::invalid("blob", error))?,
            size: layer.size.min(SIZE_MAX),
            read: layer.read.min(SIZE_MAX),
            done: layer.done,
            error: words(&layer.error),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_can_neither_command_a_terminal_nor_name_a_size_that_no_database_takes() {
        assert_eq!(words("gone\x1b[2J\n").as_deref(), Some("gone\u{fffd}[2J\u{fffd}"));
        let layer = v1::PreheatLayer {
            diff_id: vec![1; 32],
            blob: vec![2; 32],
            size: u64::MAX,
            read: u64::MAX,
            ..v1::PreheatLayer::default()
        };
        let layer = PreheatLayer::try_from(&layer).unwrap();
        assert_eq!([layer.size, layer.read], [SIZE_MAX; 2]);
    }

    fn members() -> ClusterMembers {
        let info = |node: &str, zone: &str| MemberInfo {
            node: node.parse().unwrap(),
            address: format!("{node}:7410"),
            zone: zone.to_owned(),
        };
        ClusterMembers {
            schedulers: vec![info("s1", "")],
            seeds: vec![info("seed1", "a b"), info("seed2", "c")],
        }
    }

    #[test]
    fn file_round_trips() {
        let folder = tempfile::tempdir().unwrap();
        let path = path(folder.path());
        assert_eq!(load(&path), ClusterMembers::default());
        save(&path, &members()).unwrap();
        assert_eq!(load(&path), members());
    }

    #[test]
    fn any_flipped_bit_makes_the_file_count_as_none() {
        let text = kept::sealed(HEAD, &encode(&members()));
        for position in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[position] ^= 1;
            let read =
                String::from_utf8(bytes).ok().and_then(|text| kept::opened(HEAD, &text).and_then(decode));
            assert_eq!(read, None, "byte {position}");
        }
    }

    #[test]
    fn zone_with_a_tab_is_refused() {
        let member = v1::Member { node: "a".to_owned(), address: "a:1".to_owned(), zone: "x\ty".to_owned() };
        assert!(MemberInfo::try_from(&member).is_err());
    }
}
