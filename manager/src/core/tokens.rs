//! When a join token counts.

use aws_lc_rs::constant_time::verify_slices_are_equal;
use darter_identity::JoinToken;
use darter_types::Role;
use sha2::{Digest, Sha256};

/// What the database knows of a join token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TokenRecord {
    pub(crate) id: String,
    /// SHA-256 of the secret: the database alone lets nobody join.
    pub(crate) secret_hash: [u8; 32],
    pub(crate) role: Role,
    /// Seconds since the epoch.
    pub(crate) expires_at: u64,
    pub(crate) uses_left: u32,
}

/// Why a token does not count. Only who knows the secret learns more than "unknown".
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TokenRefusal {
    #[error("the join token is not one of this manager's: take a new one with `darter-manager token`")]
    Unknown,
    #[error("the join token has expired: take a new one with `darter-manager token`")]
    Expired,
    #[error(
        "the join token has been used as often as it may: take a new one with `darter-manager token --uses N`"
    )]
    UsedUp,
}

pub(crate) fn secret_hash(token: &JoinToken) -> [u8; 32] {
    Sha256::digest(token.secret).into()
}

impl TokenRecord {
    pub(crate) fn new(token: &JoinToken, expires_at: u64, uses: u32) -> Self {
        let secret_hash = secret_hash(token);
        Self { id: token.id_text(), secret_hash, role: token.role, expires_at, uses_left: uses }
    }
}

/// Whether `token` counts at `now`. The caller must still take one of its uses, in one step with another look at them.
pub(crate) fn check(record: Option<&TokenRecord>, token: &JoinToken, now: u64) -> Result<Role, TokenRefusal> {
    let record = record.ok_or(TokenRefusal::Unknown)?;
    let same = verify_slices_are_equal(&record.secret_hash, &secret_hash(token)).is_ok();
    if !same || record.role != token.role {
        return Err(TokenRefusal::Unknown);
    }
    if record.expires_at <= now {
        return Err(TokenRefusal::Expired);
    }
    if record.uses_left == 0 {
        return Err(TokenRefusal::UsedUp);
    }
    Ok(record.role)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_000;

    fn token() -> (JoinToken, TokenRecord) {
        let token = JoinToken::generate("default".parse().unwrap(), Role::Node, [0; 32]).unwrap();
        let record = TokenRecord::new(&token, NOW + 1, 1);
        (token, record)
    }

    #[test]
    fn token_counts_until_its_last_second_and_use() {
        let (token, mut record) = token();
        assert_eq!(check(Some(&record), &token, NOW), Ok(Role::Node));
        assert_eq!(check(Some(&record), &token, NOW + 1), Err(TokenRefusal::Expired));
        record.uses_left = 0;
        assert_eq!(check(Some(&record), &token, NOW), Err(TokenRefusal::UsedUp));
    }

    #[test]
    fn wrong_secret_learns_nothing_of_the_token() {
        let (mut token, mut record) = token();
        token.secret[31] ^= 1;
        record.uses_left = 0;
        assert_eq!(check(Some(&record), &token, NOW + 9), Err(TokenRefusal::Unknown));
        assert_eq!(check(None, &token, NOW), Err(TokenRefusal::Unknown));
    }

    #[test]
    fn node_token_rewritten_to_seed_does_not_count() {
        let (mut token, record) = token();
        token.role = Role::Seed;
        assert_eq!(check(Some(&record), &token, NOW), Err(TokenRefusal::Unknown));
    }
}
