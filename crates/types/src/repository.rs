//! Registries and repositories: the places that images come from.

use std::fmt;
use std::str::FromStr;

/// Why a text names no repository.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a repository: {reason}")]
pub struct RepositoryError {
    text: String,
    reason: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scheme {
    Http,
    Https,
}

impl Scheme {
    pub fn as_str(self) -> &'static str {
        match self {
            Scheme::Http => "http",
            Scheme::Https => "https",
        }
    }
}

/// Scheme, host and port of a registry, written `https://host:port`; the port is left out where it is the scheme's own.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Registry {
    pub scheme: Scheme,
    /// Host name or address, lower case, an IPv6 address in brackets; with `:port` if it is not the scheme's own.
    pub authority: String,
}

impl Registry {
    /// Fails unless `authority` is `host` or `host:port` of the characters that a URL allows there.
    pub fn new(scheme: Scheme, authority: &str) -> Result<Self, RepositoryError> {
        let refuse = |reason| RepositoryError { text: authority.chars().take(200).collect(), reason };
        let good = |b: u8| b.is_ascii_alphanumeric() || b"-._:[]".contains(&b);
        if authority.is_empty() || authority.len() > 255 || !authority.bytes().all(good) {
            return Err(refuse("the host must be a name or an address, with :port at most"));
        }
        let default = match scheme {
            Scheme::Http => ":80",
            Scheme::Https => ":443",
        };
        let lower = authority.to_ascii_lowercase();
        let authority = lower.strip_suffix(default).unwrap_or(&lower).to_owned();
        Ok(Self { scheme, authority })
    }
}

impl fmt::Display for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme.as_str(), self.authority)
    }
}

/// A repository in a registry, written `https://host:port/name`. It is the unit of "who may read".
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Repository {
    pub registry: Registry,
    /// The path, for example `library/alpine`: components of `a-z0-9._-`, separated by `/` (OCI distribution specification).
    pub name: String,
}

impl Repository {
    /// Fails unless `name` is one that the OCI distribution specification allows.
    pub fn new(registry: Registry, name: &str) -> Result<Self, RepositoryError> {
        let component = |part: &str| {
            let edge = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
            let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
            part.bytes().all(inner) && edge(part.bytes().next()) && edge(part.bytes().last())
        };
        if name.is_empty() || name.len() > 255 || !name.split('/').all(component) {
            let reason =
                "the name must be lower-case components of a-z, 0-9, '.', '_' and '-', separated by '/'";
            return Err(RepositoryError { text: name.chars().take(300).collect(), reason });
        }
        Ok(Self { registry, name: name.to_owned() })
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.name)
    }
}

impl FromStr for Repository {
    type Err = RepositoryError;
    fn from_str(text: &str) -> Result<Self, RepositoryError> {
        let refuse = |reason| RepositoryError { text: text.chars().take(300).collect(), reason };
        let (scheme, rest) = match text.split_once("://") {
            Some(("http", rest)) => (Scheme::Http, rest),
            Some(("https", rest)) => (Scheme::Https, rest),
            _ => return Err(refuse("it must start with http:// or https://")),
        };
        let (authority, name) = rest.split_once('/').ok_or_else(|| refuse("it has no path"))?;
        Self::new(Registry::new(scheme, authority)?, name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_port_is_no_part_of_the_name() {
        let a: Repository = "https://Registry.Example:443/team/app".parse().unwrap();
        let b: Repository = "https://registry.example/team/app".parse().unwrap();
        assert_eq!(a, b);
        assert_eq!(a.to_string(), "https://registry.example/team/app");
    }

    #[test]
    fn paths_that_climb_are_refused() {
        for bad in [
            "https://r/..",
            "https://r/a/../b",
            "https://r/a//b",
            "https://r/A",
            "ftp://r/a",
            "https://u@r/a",
        ] {
            assert!(bad.parse::<Repository>().is_err(), "{bad:?} was taken");
        }
    }
}
