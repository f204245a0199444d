//! Whose limits there are, and which can be set.

use std::collections::HashMap;

use darter_identity::attend::SetRates;
use darter_types::{NodeName, RateKind, Rates, Role};

/// Bytes per second. With less a read of a single piece takes so long that its reader gives up.
pub const RATE_MIN: u64 = 100_000;
/// Beyond what any host moves; numbers up to here are exact wherever they are read.
pub const RATE_MAX: u64 = 1_000_000_000_000;

/// Whom limits are set for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Whose {
    /// Every seed and node.
    Cluster,
    Member(Role, NodeName),
}

/// Why a limit can't be set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LimitError {
    #[error(
        "{kind}: {rate} is no limit: 0 for none, or {RATE_MIN} to {RATE_MAX} bytes per second, or null for what the host has configured"
    )]
    Rate { kind: RateKind, rate: u64 },
    #[error("a {0} moves no layers: seeds and nodes have limits")]
    Role(Role),
}

/// All that is set.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Table {
    pub(crate) cluster: Rates,
    pub(crate) members: HashMap<(Role, NodeName), Rates>,
}

impl Table {
    pub(crate) fn of(&self, role: Role, node: &NodeName) -> Rates {
        self.members.get(&(role, node.clone())).copied().unwrap_or_default()
    }

    /// What a member is told.
    pub(crate) fn set_for(&self, role: Role, node: &NodeName) -> SetRates {
        SetRates { cluster: self.cluster, member: self.of(role, node) }
    }
}

pub(crate) fn checked(whose: &Whose, rates: &Rates) -> Result<(), LimitError> {
    if let Whose::Member(role, _) = whose
        && !matches!(role, Role::Seed | Role::Node)
    {
        return Err(LimitError::Role(*role));
    }
    for kind in RateKind::ALL {
        if let Some(rate) = rates.get(kind).filter(|rate| *rate != 0 && !(RATE_MIN..=RATE_MAX).contains(rate))
        {
            return Err(LimitError::Rate { kind, rate });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_none_or_one_that_reads_can_live_with() {
        let upload = |rate| checked(&Whose::Cluster, &Rates::default().with(RateKind::Upload, rate));
        for good in [None, Some(0), Some(RATE_MIN), Some(RATE_MAX)] {
            assert_eq!(upload(good), Ok(()));
        }
        for bad in [1, RATE_MIN - 1, RATE_MAX + 1] {
            assert_eq!(upload(Some(bad)), Err(LimitError::Rate { kind: RateKind::Upload, rate: bad }));
        }
    }

    #[test]
    fn who_moves_nothing_has_no_limits() {
        let whose = |role| Whose::Member(role, "a".parse().unwrap());
        assert!(checked(&whose(Role::Scheduler), &Rates::default()).is_err());
        assert!(checked(&whose(Role::Seed), &Rates::default()).is_ok());
    }
}
