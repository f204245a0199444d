//! Join tokens: what a new member shows the manager once.

use std::fmt;
use std::str::FromStr;

use darter_types::{ClusterName, Role};

use crate::IdentityError;

/// Bytes of the secret part.
pub const SECRET_LEN: usize = 32;

/// A role in a cluster, a secret that the manager knows the hash of, and the pin of the CA to expect.
///
/// Its text is `darter.<cluster>.<role>.<id>.<secret>.<pin>`, the last three in hexadecimal. `Display` writes the secret;
/// `Debug`, which logs use, does not.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    pub cluster: ClusterName,
    pub role: Role,
    /// Names the token in the manager's database; no secret.
    pub id: [u8; 8],
    pub secret: [u8; SECRET_LEN],
    /// SHA-256 of the CA's certificate in DER.
    pub pin: [u8; 32],
}

impl JoinToken {
    /// A token with a new id and secret.
    pub fn generate(cluster: ClusterName, role: Role, pin: [u8; 32]) -> Result<Self, IdentityError> {
        Ok(Self { cluster, role, id: random()?, secret: random()?, pin })
    }

    /// The id as the manager's lists and logs show it.
    pub fn id_text(&self) -> String {
        hex::encode(self.id)
    }
}

fn random<const N: usize>() -> Result<[u8; N], IdentityError> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| IdentityError::Crypto("no random bytes".to_owned()))?;
    Ok(bytes)
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (id, secret, pin) = (hex::encode(self.id), hex::encode(self.secret), hex::encode(self.pin));
        write!(f, "darter.{}.{}.{id}.{secret}.{pin}", self.cluster, self.role)
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({}.{}.{}, secret not shown)", self.cluster, self.role, self.id_text())
    }
}

fn hexadecimal<const N: usize>(text: &str) -> Result<[u8; N], IdentityError> {
    let mut bytes = [0; N];
    hex::decode_to_slice(text, &mut bytes)
        .map_err(|_| IdentityError::Token("a part of it is cut off or changed"))?;
    Ok(bytes)
}

impl FromStr for JoinToken {
    type Err = IdentityError;
    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let refuse = || IdentityError::Token("it must read darter.<cluster>.<role>.<id>.<secret>.<pin>");
        let rest = text.trim().strip_prefix("darter.").ok_or_else(refuse)?;
        // A cluster's name may have dots of its own, so the parts are counted from the end.
        let mut parts = rest.rsplitn(5, '.');
        let (Some(pin), Some(secret), Some(id), Some(role), Some(cluster)) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(refuse());
        };
        Ok(Self {
            cluster: cluster.parse()?,
            role: role.parse()?,
            id: hexadecimal(id)?,
            secret: hexadecimal(secret)?,
            pin: hexadecimal(pin)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken::generate("my.cluster".parse().unwrap(), Role::Node, [7; 32]).unwrap()
    }

    #[test]
    fn text_round_trips_also_with_a_dotted_cluster() {
        let token = token();
        assert_eq!(token.to_string().parse::<JoinToken>().unwrap(), token);
    }

    #[test]
    fn debug_shows_no_secret() {
        let token = token();
        assert!(!format!("{token:?}").contains(&hex::encode(token.secret)));
    }

    #[test]
    fn damaged_text_is_refused_without_being_repeated() {
        let text = token().to_string();
        let error = text[..text.len() - 1].parse::<JoinToken>().unwrap_err().to_string();
        assert!(!error.contains("my.cluster"), "{error}");
        assert!("darter.a.node".parse::<JoinToken>().is_err());
    }
}
