//! What an API token lets its bearer do.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

/// The first token, and those that were made before tokens had roles, live for ever; all others end within this time, in
/// seconds.
pub(crate) const LIFE_MAX: u64 = 366 * 24 * 3600;

/// Tokens that are remembered. One more is refused: somebody makes them without end.
pub(crate) const TOKENS_MAX: usize = 1_000;

const NAME_MAX: usize = 63;

/// Why a word is no role, no scope or no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    #[error("{0:?} is not a role of an API token: reader, operator or admin")]
    Role(String),
    #[error("{0:?} is not a scope of an API token: preheats, nodes, join-tokens or api-tokens")]
    Area(String),
    #[error(
        "a token's name has 1 to 63 letters, digits, '.', '_' and '-', and starts with a letter or digit"
    )]
    Name,
    #[error("a token lives for 1 second to 366 days")]
    Life,
    #[error(
        "a token makes and removes none that gives more than itself: no higher role, no further scope, no later end"
    )]
    More,
    #[error(
        "a token does not remove itself: use another, or `darter-manager api-token remove` on the manager's host"
    )]
    Itself,
}

/// How much a token may do where its scopes let it in. Each may all that the one before may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ApiRole {
    /// Looks.
    Reader,
    /// Orders and cancels preheats, sets limits.
    Operator,
    /// Puts members out, makes and removes tokens.
    Admin,
}

impl ApiRole {
    const ALL: [ApiRole; 3] = [ApiRole::Reader, ApiRole::Operator, ApiRole::Admin];

    pub fn as_str(self) -> &'static str {
        match self {
            ApiRole::Reader => "reader",
            ApiRole::Operator => "operator",
            ApiRole::Admin => "admin",
        }
    }
}

impl FromStr for ApiRole {
    type Err = AccessError;
    fn from_str(text: &str) -> Result<Self, AccessError> {
        let known = ApiRole::ALL.into_iter().find(|role| role.as_str() == text);
        known.ok_or_else(|| AccessError::Role(text.chars().take(80).collect()))
    }
}

/// A part of the API that a token may be confined to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ApiScope {
    Preheats,
    Nodes,
    JoinTokens,
    ApiTokens,
}

impl ApiScope {
    pub(crate) const ALL: [ApiScope; 4] =
        [ApiScope::Preheats, ApiScope::Nodes, ApiScope::JoinTokens, ApiScope::ApiTokens];

    pub fn as_str(self) -> &'static str {
        match self {
            ApiScope::Preheats => "preheats",
            ApiScope::Nodes => "nodes",
            ApiScope::JoinTokens => "join-tokens",
            ApiScope::ApiTokens => "api-tokens",
        }
    }
}

impl FromStr for ApiScope {
    type Err = AccessError;
    fn from_str(text: &str) -> Result<Self, AccessError> {
        let known = ApiScope::ALL.into_iter().find(|scope| scope.as_str() == text);
        known.ok_or_else(|| AccessError::Area(text.chars().take(80).collect()))
    }
}

/// What a request needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Need {
    pub(crate) scope: ApiScope,
    pub(crate) role: ApiRole,
}

/// What a token gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Grant {
    pub(crate) role: ApiRole,
    /// Empty: everything, also what later versions add.
    pub(crate) scopes: BTreeSet<ApiScope>,
    /// Seconds since the epoch; `None`: never.
    pub(crate) expires_at: Option<u64>,
}

/// What the database knows of an API token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiToken {
    /// The first bytes of the hash, in hexadecimal: names it where it is listed or removed.
    pub(crate) id: String,
    pub(crate) name: String,
    /// SHA-256 of the token: the database alone lets nobody in.
    pub(crate) hash: [u8; 32],
    pub(crate) grant: Grant,
    pub(crate) created_at: u64,
}

impl ApiToken {
    pub(crate) fn new(name: String, hash: [u8; 32], grant: Grant, created_at: u64) -> Self {
        Self { id: hex::encode(&hash[..8]), name, hash, grant, created_at }
    }
}

impl Grant {
    /// Everything, for ever.
    pub(crate) fn whole() -> Self {
        Self { role: ApiRole::Admin, scopes: BTreeSet::new(), expires_at: None }
    }

    /// For `life` seconds from `now` on.
    pub(crate) fn new(
        role: ApiRole,
        scopes: BTreeSet<ApiScope>,
        life: u64,
        now: u64,
    ) -> Result<Self, AccessError> {
        if life == 0 || life > LIFE_MAX {
            return Err(AccessError::Life);
        }
        Ok(Self { role, scopes, expires_at: Some(now + life) })
    }

    pub(crate) fn has_expired(&self, now: u64) -> bool {
        self.expires_at.is_some_and(|end| end <= now)
    }

    pub(crate) fn allows(&self, need: Need) -> bool {
        self.role >= need.role && (self.scopes.is_empty() || self.scopes.contains(&need.scope))
    }

    /// Whether its bearer may make or remove a token that gives `other`.
    pub(crate) fn may_give(&self, other: &Grant) -> Result<(), AccessError> {
        let scopes =
            self.scopes.is_empty() || !other.scopes.is_empty() && other.scopes.is_subset(&self.scopes);
        let life = self.expires_at.is_none_or(|mine| other.expires_at.is_some_and(|end| end <= mine));
        if scopes && life && other.role <= self.role { Ok(()) } else { Err(AccessError::More) }
    }
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scopes: Vec<&str> = self.scopes.iter().map(|scope| scope.as_str()).collect();
        let scopes = if scopes.is_empty() { "everything".to_owned() } else { scopes.join(", ") };
        write!(f, "{} of {scopes}", self.role.as_str())
    }
}

pub(crate) fn checked_name(name: &str) -> Result<(), AccessError> {
    let good = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && name.len() <= NAME_MAX;
    if good { Ok(()) } else { Err(AccessError::Name) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(role: ApiRole, scopes: &[ApiScope], expires_at: Option<u64>) -> Grant {
        Grant { role, scopes: scopes.iter().copied().collect(), expires_at }
    }

    #[test]
    fn role_and_scope_must_both_be_enough() {
        let ordering = Need { scope: ApiScope::Preheats, role: ApiRole::Operator };
        assert!(Grant::whole().allows(ordering));
        assert!(grant(ApiRole::Operator, &[ApiScope::Preheats], None).allows(ordering));
        assert!(!grant(ApiRole::Reader, &[ApiScope::Preheats], None).allows(ordering));
        assert!(!grant(ApiRole::Admin, &[ApiScope::Nodes], None).allows(ordering));
    }

    #[test]
    fn token_counts_until_its_last_second() {
        let made = Grant::new(ApiRole::Reader, BTreeSet::new(), 10, 100).unwrap();
        assert!(!made.has_expired(109) && made.has_expired(110));
        assert!(!Grant::whole().has_expired(u64::MAX));
        for life in [0, LIFE_MAX + 1] {
            assert_eq!(Grant::new(ApiRole::Reader, BTreeSet::new(), life, 0), Err(AccessError::Life));
        }
    }

    #[test]
    fn nobody_gives_what_he_does_not_have() {
        let mine = grant(ApiRole::Admin, &[ApiScope::ApiTokens, ApiScope::Nodes], Some(100));
        assert_eq!(mine.may_give(&grant(ApiRole::Admin, &[ApiScope::Nodes], Some(100))), Ok(()));
        for more in [
            grant(ApiRole::Reader, &[ApiScope::Preheats], Some(50)),
            grant(ApiRole::Reader, &[], Some(50)),
            grant(ApiRole::Reader, &[ApiScope::Nodes], Some(101)),
            grant(ApiRole::Reader, &[ApiScope::Nodes], None),
        ] {
            assert_eq!(mine.may_give(&more), Err(AccessError::More), "{more:?}");
        }
        let operator = grant(ApiRole::Operator, &[], None);
        assert_eq!(operator.may_give(&grant(ApiRole::Admin, &[], None)), Err(AccessError::More));
        assert_eq!(Grant::whole().may_give(&Grant::whole()), Ok(()));
    }

    #[test]
    fn names_of_tokens_are_plain() {
        assert!(checked_name("ci.build_1").is_ok());
        for bad in ["", "-a", "a b", "ä", "a\n", &"x".repeat(64)] {
            assert!(checked_name(bad).is_err(), "{bad:?} was taken");
        }
    }
}
