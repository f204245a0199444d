//! How many bytes a host may move in a second, by what they are moved for.

use std::fmt;
use std::str::FromStr;

/// What bytes are moved for. Each kind has a limit of its own; what is fetched in the background counts as downloaded, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RateKind {
    /// What comes from other peers, seeds included.
    Download,
    /// What goes to other peers.
    Upload,
    /// What comes from registries.
    Registry,
    /// What comes from other peers and no container has asked for.
    Background,
}

impl RateKind {
    pub const ALL: [RateKind; 4] =
        [RateKind::Download, RateKind::Upload, RateKind::Registry, RateKind::Background];

    pub fn as_str(self) -> &'static str {
        match self {
            RateKind::Download => "download",
            RateKind::Upload => "upload",
            RateKind::Registry => "registry",
            RateKind::Background => "background",
        }
    }
}

impl fmt::Display for RateKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that is no [`RateKind`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a kind of limit: download, upload, registry or background")]
pub struct RateKindError(String);

impl FromStr for RateKind {
    type Err = RateKindError;
    fn from_str(text: &str) -> Result<Self, RateKindError> {
        let known = RateKind::ALL.into_iter().find(|kind| kind.as_str() == text);
        known.ok_or_else(|| RateKindError(text.chars().take(80).collect()))
    }
}

/// For each kind the most bytes in a second; 0: no limit. `None`: nothing is said, somebody else's word counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Rates([Option<u64>; RateKind::ALL.len()]);

impl Rates {
    pub fn get(&self, kind: RateKind) -> Option<u64> {
        self.0[kind as usize]
    }

    pub fn set(&mut self, kind: RateKind, rate: Option<u64>) {
        self.0[kind as usize] = rate;
    }

    /// The same with `rate` for `kind`.
    pub fn with(mut self, kind: RateKind, rate: Option<u64>) -> Self {
        self.set(kind, rate);
        self
    }

    /// Whether nothing is said of any kind.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// For logs: `upload 5000000 B/s, background unlimited`; `none` if nothing is said.
impl fmt::Display for Rates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let said = RateKind::ALL.into_iter().filter_map(|kind| Some((kind, self.get(kind)?)));
        let mut before = "";
        for (kind, rate) in said {
            let rate = if rate == 0 { "unlimited".to_owned() } else { format!("{rate} B/s") };
            write!(f, "{before}{kind} {rate}")?;
            before = ", ";
        }
        if self.is_empty() { f.write_str("none") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_told_by_their_kinds() {
        let rates =
            Rates::default().with(RateKind::Upload, Some(5_000_000)).with(RateKind::Background, Some(0));
        assert_eq!(rates.to_string(), "upload 5000000 B/s, background unlimited");
        assert_eq!(Rates::default().to_string(), "none");
    }

    #[test]
    fn kinds_are_read_as_they_are_written() {
        for kind in RateKind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
            assert_eq!(Rates::default().with(kind, Some(7)).get(kind), Some(7));
        }
        assert!("Upload".parse::<RateKind>().is_err());
    }
}
