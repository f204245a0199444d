//! Who is who: clusters, nodes, roles.

use std::fmt;
use std::str::FromStr;

/// Why a text can't name a cluster or a node, or is no role.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("{0:?} is not a name: 1 to 63 of a-z, 0-9, '-' and '.', with a letter or digit at both ends")]
    Name(String),
    #[error("{0:?} is not a role: manager, scheduler, seed or node")]
    Role(String),
}

fn checked(text: &str) -> Result<String, NameError> {
    let edge = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let inner = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.');
    let good = text.len() <= 63 && inner && edge(text.bytes().next()) && edge(text.bytes().last());
    if good { Ok(text.to_owned()) } else { Err(NameError::Name(text.chars().take(80).collect())) }
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(String);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                checked(text).map(Self)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// A cluster: the nodes that share a mesh.
    ClusterName
);
name!(
    /// A member of a cluster, unique in it: as a rule its host name.
    NodeName
);

/// What a member may do; its certificate says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    Manager,
    Scheduler,
    /// A peer that may read from registries for others and whose signature on a map counts.
    Seed,
    Node,
}

impl Role {
    pub const ALL: [Role; 4] = [Role::Manager, Role::Scheduler, Role::Seed, Role::Node];

    pub fn as_str(self) -> &'static str {
        match self {
            Role::Manager => "manager",
            Role::Scheduler => "scheduler",
            Role::Seed => "seed",
            Role::Node => "node",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        Role::ALL
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| NameError::Role(text.chars().take(80).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_host_names() {
        assert!("node-1.example".parse::<NodeName>().is_ok());
        for bad in ["", "-a", "a-", "A", "a/b", "a b", &"x".repeat(64)] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad:?} was taken");
        }
    }
}
