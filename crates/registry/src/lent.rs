//! Who is shown a credential. It is meant for one registry, and `hosts.toml` may have other hosts for that: mirrors, which answer in
//! the registry's stead, over plain HTTP if the file says so.
//!
//! The registry itself is shown it always: the host of that name, or the one that the registry's own file calls its `server`. A mirror
//! is shown it only where a client gave it with a pull, as containerd does then; what was found in Docker's configuration, or came from
//! another member, is the registry's alone. So is a token: it was made for one repository there.

use std::collections::HashSet;

use darter_types::{Digest, Registry};
use parking_lot::Mutex;

use crate::credential::Credential;
use crate::directory::Endpoint;

/// Credentials remembered as given with a pull; at more all are forgotten, and mirrors are shown none of them.
const LENT_MAX: usize = 4096;

#[derive(Default)]
pub(crate) struct Lent(Mutex<HashSet<(String, Digest)>>);

impl Lent {
    /// A client gave it with a pull from this registry.
    pub fn lend(&self, authority: &str, credential: &Credential) {
        let mut lent = self.0.lock();
        if lent.len() >= LENT_MAX {
            lent.clear();
        }
        lent.insert(key(authority, credential));
    }

    /// Whether mirrors of this registry are shown it.
    pub fn is_lent(&self, authority: &str, credential: &Credential) -> bool {
        let is_token = matches!(credential, Credential::Bearer(_));
        !is_token && self.0.lock().contains(&key(authority, credential))
    }

    /// What this endpoint of the registry is shown of the credential that is meant for the registry.
    pub fn shown<'a>(
        &self,
        endpoint: &Endpoint,
        registry: &Registry,
        credential: Option<&'a Credential>,
    ) -> Option<&'a Credential> {
        credential.filter(|credential| endpoint.is_registry || self.is_lent(&registry.authority, credential))
    }
}

/// Docker's own registry has another name than its host.
fn key(authority: &str, credential: &Credential) -> (String, Digest) {
    let usual = if authority == "registry-1.docker.io" { "docker.io" } else { authority };
    (usual.to_ascii_lowercase(), credential.fingerprint())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credential_is_lent_for_the_registry_of_its_pull_alone_and_a_token_never() {
        let lent = Lent::default();
        let [user, other] = ["me:one", "me:two"].map(|text| Credential::from_user(text).unwrap());
        let token = Credential::Bearer("token".to_owned());
        lent.lend("docker.io", &user);
        lent.lend("docker.io", &token);
        assert!(lent.is_lent("docker.io", &user) && lent.is_lent("registry-1.docker.io", &user));
        assert!(!lent.is_lent("r.example", &user));
        assert!(!lent.is_lent("docker.io", &other));
        assert!(!lent.is_lent("docker.io", &token));
    }

    #[test]
    fn beyond_the_limit_mirrors_are_shown_less_and_not_more() {
        let lent = Lent::default();
        let numbered = |number| Credential::from_user(&format!("me:{number}")).unwrap();
        (0..=LENT_MAX).for_each(|number| lent.lend("r.example", &numbered(number)));
        assert!(!lent.is_lent("r.example", &numbered(0)));
        assert!(lent.is_lent("r.example", &numbered(LENT_MAX)));
        assert!(lent.0.lock().len() <= LENT_MAX);
    }
}
