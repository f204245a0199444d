//! The limits that the manager sets, on the wire and in the file `limits`: one line for each, `cluster` or `member`, kind and
//! bytes per second, separated by tabs.

use std::io;
use std::path::{Path, PathBuf};

use darter_proto::v1;
use darter_types::{RateKind, Rates};

use super::kept;

const HEAD: &str = "darter-limits 1 ";

/// What the manager has set for this member. It goes before what the host has configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SetRates {
    /// For all members.
    pub cluster: Rates,
    /// For this member alone; it goes before what is set for all.
    pub member: Rates,
}

pub(super) fn path(folder: &Path) -> PathBuf {
    folder.join("limits")
}

pub(super) fn save(path: &Path, set: &SetRates) -> io::Result<()> {
    kept::save(path, HEAD, &encode(set))
}

pub(super) fn load(path: &Path) -> SetRates {
    kept::load(path, HEAD, decode)
}

fn encode(set: &SetRates) -> String {
    let lines = |whose: &str, rates: &Rates| -> String {
        let said = RateKind::ALL.into_iter().filter_map(|kind| Some((kind, rates.get(kind)?)));
        said.map(|(kind, rate)| format!("{whose}\t{kind}\t{rate}\n")).collect()
    };
    lines("cluster", &set.cluster) + &lines("member", &set.member)
}

fn decode(body: &str) -> Option<SetRates> {
    let mut set = SetRates::default();
    for line in body.lines() {
        let mut parts = line.split('\t');
        let rates = match parts.next()? {
            "cluster" => &mut set.cluster,
            "member" => &mut set.member,
            _ => return None,
        };
        rates.set(parts.next()?.parse().ok()?, Some(parts.next()?.parse().ok()?));
    }
    Some(set)
}

fn rates(wire: Option<&v1::Rates>) -> Rates {
    let Some(wire) = wire else { return Rates::default() };
    Rates::default()
        .with(RateKind::Download, wire.download)
        .with(RateKind::Upload, wire.upload)
        .with(RateKind::Registry, wire.registry)
        .with(RateKind::Background, wire.background)
}

fn to_wire(rates: &Rates) -> v1::Rates {
    v1::Rates {
        download: rates.get(RateKind::Download),
        upload: rates.get(RateKind::Upload),
        registry: rates.get(RateKind::Registry),
        background: rates.get(RateKind::Background),
    }
}

impl From<Option<&v1::Limits>> for SetRates {
    fn from(wire: Option<&v1::Limits>) -> Self {
        let part = |part: fn(&v1::Limits) -> Option<&v1::Rates>| rates(wire.and_then(part));
        Self {
            cluster: part(|limits| limits.cluster.as_ref()),
            member: part(|limits| limits.member.as_ref()),
        }
    }
}

impl From<&SetRates> for v1::Limits {
    fn from(set: &SetRates) -> Self {
        Self { cluster: Some(to_wire(&set.cluster)), member: Some(to_wire(&set.member)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set() -> SetRates {
        SetRates {
            cluster: Rates::default().with(RateKind::Upload, Some(5_000_000)),
            member: Rates::default().with(RateKind::Upload, Some(0)).with(RateKind::Background, Some(7)),
        }
    }

    #[test]
    fn limits_round_trip_through_the_file_and_over_the_wire() {
        let folder = tempfile::tempdir().unwrap();
        let path = path(folder.path());
        assert_eq!(load(&path), SetRates::default());
        save(&path, &set()).unwrap();
        assert_eq!(load(&path), set());
        assert_eq!(SetRates::from(Some(&v1::Limits::from(&set()))), set());
        assert_eq!(SetRates::from(None), SetRates::default());
    }

    #[test]
    fn a_damaged_file_sets_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = path(folder.path());
        save(&path, &set()).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("5000000", "5000001")).unwrap();
        assert_eq!(load(&path), SetRates::default());
    }
}
