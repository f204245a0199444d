//! Credentials for repositories: those that were seen in a pull, else Docker's configuration. The former are in memory only.

use std::collections::HashMap;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use darter_registry::{Client, Credential, ImageRef};
use darter_types::{Registry, Repository};
use parking_lot::Mutex;

use crate::cri::{Auth, Credentials};

/// So many repositories' credentials are remembered; when there are more, all are forgotten but the newest.
const SEEN_MAX: usize = 4096;

pub(super) struct Keyring {
    registry: Arc<Client>,
    /// By registry, as people write it, and name.
    seen: Mutex<HashMap<(String, String), Credential>>,
    /// Where pulls on this node found a repository, by the same names.
    places: Mutex<HashMap<(String, String), Repository>>,
}

impl Keyring {
    pub fn new(registry: Arc<Client>) -> Self {
        Self { registry, seen: Mutex::default(), places: Mutex::default() }
    }

    /// Where a pull on this node found the repository: it knows scheme and port, which containerd's labels lack.
    pub fn place(&self, authority: &str, name: &str) -> Option<Repository> {
        self.places.lock().get(&(authority.to_owned(), name.to_owned())).cloned()
    }

    /// Whether this registry has ever said anything.
    pub fn has_answered(&self, registry: &Registry) -> bool {
        self.registry.has_answered(registry)
    }

    /// What a repository is read with; `None`: without a credential.
    pub fn credential(&self, repository: &Repository) -> Option<Credential> {
        let authority = usual_name(&repository.registry.authority);
        let seen = self.seen.lock().get(&(authority.to_owned(), repository.name.clone())).cloned();
        seen.or_else(|| self.registry.credential_for(authority, &repository.name))
    }
}

/// Docker's own registry has another name than its host.
fn usual_name(authority: &str) -> &str {
    if authority == "registry-1.docker.io" { "docker.io" } else { authority }
}

impl Credentials for Keyring {
    fn remember(&self, image: &str, auth: Auth) {
        let Some(credential) = to_credential(auth) else { return };
        let Ok(image) = image.parse::<ImageRef>() else { return };
        keep(&self.seen, image, credential);
    }

    fn forget(&self, image: &str) {
        if let Ok(image) = image.parse::<ImageRef>() {
            self.seen.lock().remove(&(image.registry_authority, image.name));
        }
    }

    fn grant(&self, image: ImageRef, repository: Repository, credential: Option<Credential>) {
        if let Some(credential) = credential {
            keep(&self.seen, image.clone(), credential);
        }
        keep(&self.places, image, repository);
    }
}

fn keep<T>(known: &Mutex<HashMap<(String, String), T>>, image: ImageRef, value: T) {
    let mut known = known.lock();
    if known.len() >= SEEN_MAX {
        known.clear();
    }
    known.insert((image.registry_authority, image.name), value);
}

/// In the order in which containerd looks at the fields.
fn to_credential(auth: Auth) -> Option<Credential> {
    if !auth.username.is_empty() {
        return Some(Credential::Basic { username: auth.username, password: auth.password });
    }
    if !auth.identity_token.is_empty() {
        return Some(Credential::IdentityToken(auth.identity_token));
    }
    if !auth.auth.is_empty() {
        let text = String::from_utf8(STANDARD.decode(auth.auth.trim()).ok()?).ok()?;
        return Credential::from_user(text.trim_end_matches('\0'));
    }
    (!auth.registry_token.is_empty()).then_some(Credential::Bearer(auth.registry_token))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keyring() -> Keyring {
        darter_daemon::run::install_tls_provider();
        Keyring::new(Arc::new(Client::new(Default::default()).unwrap()))
    }

    #[test]
    fn a_credential_serves_its_repository_only() {
        let keyring = keyring();
        let auth = Auth { auth: STANDARD.encode("me:secret"), ..Default::default() };
        keyring.remember("r.example:5000/team/app:1", auth);
        let credential = |text: &str| keyring.credential(&text.parse().unwrap());
        assert_eq!(credential("http://r.example:5000/team/app"), Credential::from_user("me:secret"));
        assert_eq!(credential("https://r.example:5000/team/other"), None);
        assert_eq!(credential("https://other.example/team/app"), None);
        keyring.forget("r.example:5000/team/app:2");
        assert_eq!(credential("http://r.example:5000/team/app"), None);
    }

    #[test]
    fn dockers_registry_is_known_by_its_usual_name() {
        let keyring = keyring();
        let auth = Auth { identity_token: "refresh".into(), ..Default::default() };
        keyring.remember("alpine", auth);
        let repository = "https://registry-1.docker.io/library/alpine".parse().unwrap();
        assert_eq!(keyring.credential(&repository), Some(Credential::IdentityToken("refresh".into())));
    }

    #[test]
    fn a_granted_place_is_known_by_the_images_name() {
        let keyring = keyring();
        let repository: Repository = "http://r.example:5000/team/app".parse().unwrap();
        let credential = Credential::from_user("me:secret");
        keyring.grant("r.example:5000/team/app:1".parse().unwrap(), repository.clone(), credential.clone());
        assert_eq!(keyring.place("r.example:5000", "team/app"), Some(repository.clone()));
        assert_eq!(keyring.credential(&repository), credential);
        assert_eq!(keyring.place("r.example:5000", "team/other"), None);
    }

    #[test]
    fn an_empty_auth_is_none() {
        assert_eq!(to_credential(Auth::default()), None);
    }
}
