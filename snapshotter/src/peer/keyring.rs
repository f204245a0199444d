//! Credentials for repositories: those that were seen in a pull, else Docker's configuration. The former are in memory only,
//! unless the node is configured to keep them ([`super::kept`]).
//!
//! Anybody who may start a pod can name any repository with any password. So what a pull came with is kept only if the
//! registry let it in; while it is under way the newest counts, since a registry's tokens change all the time. And what a registry
//! refuses one day is forgotten, so that a helper is asked that knows a newer one. One that it answers with 403, which may be the
//! wrong right, gives way to what a helper or Docker's configuration has, if the registry takes that.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use darter_mesh::Renew;
use darter_registry::{Client, Credential, ImageRef, RegistryError};
use darter_types::{LayerSource, Registry, Repository};
use parking_lot::Mutex;

use super::kept::{Kept, KeptCredential, now};
use super::names::{Name, Names};
use super::verdicts::{Verdict, Verdicts};
use crate::cri::{Auth, Credentials};

/// Pulls of one repository under way, each with credentials of its own; at more the oldest of them no longer count.
const TRIALS_MAX: usize = 16;

/// So many repositories' credentials are remembered, and places; of more the oldest go.
const SEEN_MAX: usize = 4096;

/// A credential that goes on being used is written down anew when its date is so old.
const DATE_AGE: u64 = 3600;

/// What pulls of a repository came with.
#[derive(Default)]
struct Seen {
    /// The last that the registry let in.
    proven: Option<Credential>,
    /// By now the registry answers it with 403, and lets in what Docker's configuration has: that counts first.
    is_set_aside: bool,
    /// When that was, in seconds since 1970.
    proven_at: u64,
    /// Of pulls under way, the newest last.
    trials: Vec<(u64, Credential)>,
}

impl Seen {
    /// The registry let this one in. False if that was known a moment ago.
    fn prove(&mut self, credential: Credential) -> bool {
        self.is_set_aside = false;
        let at = now();
        let is_news =
            self.proven.as_ref() != Some(&credential) || at >= self.proven_at.saturating_add(DATE_AGE);
        if is_news {
            (self.proven, self.proven_at) = (Some(credential), at);
        }
        is_news
    }

    fn newest(&self) -> Option<&Credential> {
        self.trials.last().map(|(_, credential)| credential).or(self.proven.as_ref())
    }

    /// What counts before Docker's configuration, and what does if that has nothing.
    fn before_and_behind(&self) -> (Option<Credential>, Option<Credential>) {
        let newest = self.newest().cloned();
        if self.is_set_aside && self.trials.is_empty() { (None, newest) } else { (newest, None) }
    }
}

pub(super) struct Keyring {
    registry: Arc<Client>,
    seen: Mutex<Names<Seen>>,
    trials: AtomicU64,
    /// Where pulls on this node found a repository, by the same names.
    places: Mutex<Names<Option<Repository>>>,
    /// Where proven ones are kept, if they are.
    kept: Option<Kept>,
    verdicts: Verdicts,
}

impl Keyring {
    /// With what was `kept` before, and will be from now on.
    pub fn new(registry: Arc<Client>, kept: Option<(Kept, Vec<KeptCredential>)>) -> Self {
        let (kept, known) = kept.unzip();
        let mut seen = Names::new(SEEN_MAX);
        // The newest come first, and are to be the newest.
        for one in known.into_iter().flatten().rev() {
            let proven = Seen { proven: Some(one.credential), proven_at: one.at, ..Seen::default() };
            *seen.entry((one.authority, one.name)) = proven;
        }
        let (seen, places) = (Mutex::new(seen), Mutex::new(Names::new(SEEN_MAX)));
        Self { registry, seen, trials: AtomicU64::new(0), places, kept, verdicts: Verdicts::default() }
    }

    /// Writes down what is proven by now, in a while.
    fn keep(&self, seen: &Names<Seen>) {
        let Some(kept) = &self.kept else { return };
        let proven = seen.iter().filter_map(|((authority, name), seen)| {
            Some(KeptCredential {
                authority: authority.clone(),
                name: name.clone(),
                at: seen.proven_at,
                credential: seen.proven.clone()?,
            })
        });
        kept.save(proven.collect());
    }

    /// Where a pull on this node found the repository: it knows scheme and port, which containerd's labels lack.
    pub fn place(&self, authority: &str, name: &str) -> Option<Repository> {
        self.places.lock().get(&(authority.to_owned(), name.to_owned())).cloned().flatten()
    }

    /// Whether this registry has ever said anything.
    pub fn has_answered(&self, registry: &Registry) -> bool {
        self.registry.has_answered(registry)
    }

    /// What a repository is read with; `None`: without a credential. It waits only where a credential helper has to be asked.
    pub async fn credential(&self, repository: &Repository) -> Option<Credential> {
        let key = key_of(repository);
        let (before, behind) = self.seen.lock().get(&key).map(Seen::before_and_behind).unwrap_or_default();
        match before {
            Some(known) => Some(known),
            None => self.registry.credential_for(&key.0, &key.1).await.or(behind),
        }
    }

    /// The same, now that the registry has answered this one with 401: it is forgotten.
    pub async fn instead_of(
        &self,
        repository: &Repository,
        refused: Option<&Credential>,
    ) -> Option<Credential> {
        if let Some(refused) = refused {
            self.forget(repository, refused);
        }
        self.credential(repository).await
    }

    /// What is configured on this node, if it is another one than this, which the registry has answered with 403.
    pub async fn beside(&self, repository: &Repository, forbidden: &Credential) -> Option<Credential> {
        let key = key_of(repository);
        let configured = self.registry.credential_for(&key.0, &key.1).await;
        configured.filter(|other| other != forbidden)
    }

    /// What the registry itself says of a credential, now or a moment ago.
    async fn verdict(&self, source: &LayerSource, credential: &Credential) -> Verdict {
        let ask = || async {
            let asked = self.registry.head_blob(&source.repository, source.blob.0, Some(credential)).await;
            match asked.as_ref().map_err(RegistryError::root) {
                Err(RegistryError::Unauthorized { .. }) => Verdict::Refused,
                Err(RegistryError::Forbidden { .. }) => Verdict::Forbidden,
                Ok(_) => Verdict::LetIn,
                Err(_) => Verdict::Unknown,
            }
        };
        self.verdicts.of(&source.repository, credential, ask).await
    }

    /// Whether a pull was let in with it, and nothing has been found out since.
    fn is_proven(&self, repository: &Repository, credential: &Credential) -> bool {
        let seen = self.seen.lock();
        let seen = seen.get(&key_of(repository)).filter(|seen| !seen.is_set_aside);
        seen.is_some_and(|seen| seen.proven.as_ref() == Some(credential))
    }

    /// What a pull was let in with gives way to what is configured on this node, until a pull is let in with it again.
    fn set_aside(&self, repository: &Repository, credential: &Credential) {
        let mut all = self.seen.lock();
        let seen = all.get_mut(&key_of(repository));
        if let Some(seen) = seen.filter(|seen| seen.proven.as_ref() == Some(credential)) {
            seen.is_set_aside = true;
            tracing::info!(%repository, "the registry answers a pull's credential with 403, and takes the node's own: it gives way");
        }
    }

    /// What a pull was let in with counts no more, here and where it is kept.
    fn forget(&self, repository: &Repository, credential: &Credential) {
        let (key, mut all) = (key_of(repository), self.seen.lock());
        let seen = all.get_mut(&key).filter(|seen| seen.proven.as_ref() == Some(credential));
        let Some(seen) = seen else { return };
        (seen.proven, seen.is_set_aside) = (None, false);
        if seen.newest().is_none() {
            all.remove(&key);
        }
        tracing::info!(%repository, "the registry takes a pull's credential no more: it is forgotten");
        self.keep(&all);
    }
}

#[async_trait]
impl Renew for Keyring {
    /// Who says that it was refused may have asked another registry: this one is asked itself, before anything is forgotten.
    async fn renew(&self, source: &LayerSource, refused: Option<Credential>) -> Option<Credential> {
        let repository = &source.repository;
        if let Some(refused) = refused.filter(|refused| self.is_proven(repository, refused)) {
            match self.verdict(source, &refused).await {
                Verdict::Refused => self.forget(repository, &refused),
                Verdict::Forbidden => {
                    if let Some(other) = self.beside(repository, &refused).await {
                        // Else both may lack a right, and no token has expired: what a pull was let in with goes on counting.
                        if self.verdict(source, &other).await == Verdict::LetIn {
                            self.set_aside(repository, &refused);
                        }
                        return Some(other);
                    }
                }
                Verdict::LetIn | Verdict::Unknown => {}
            }
        }
        self.credential(repository).await
    }
}

fn key_of(repository: &Repository) -> Name {
    (usual_name(&repository.registry.authority).to_owned(), repository.name.clone())
}

/// Docker's own registry has another name than its host.
fn usual_name(authority: &str) -> &str {
    if authority == "registry-1.docker.io" { "docker.io" } else { authority }
}

impl Credentials for Keyring {
    fn try_out(&self, image: &str, auth: Auth) -> u64 {
        let number = self.trials.fetch_add(1, Ordering::Relaxed);
        let meant_for = auth.server_address.clone();
        let image = image.parse::<ImageRef>().ok().filter(|image| is_meant(&meant_for, image));
        if let (Some(credential), Some(image)) = (to_credential(auth), image) {
            if meant_for.is_empty() {
                self.lend(&image, &credential);
            }
            let mut seen = self.seen.lock();
            let trials = &mut seen.entry(name_of(image)).trials;
            if trials.len() >= TRIALS_MAX {
                trials.remove(0);
            }
            trials.push((number, credential));
        }
        number
    }

    fn settle(&self, image: &str, number: u64, pulled: bool) {
        let Ok(image) = image.parse::<ImageRef>() else { return };
        let (key, mut all) = (name_of(image), self.seen.lock());
        let Some(seen) = all.get_mut(&key) else { return };
        let Some(at) = seen.trials.iter().position(|(trial, _)| *trial == number) else { return };
        let (_, credential) = seen.trials.remove(at);
        let is_news = pulled && seen.prove(credential);
        if seen.newest().is_none() {
            all.remove(&key);
        }
        if is_news {
            self.keep(&all);
        }
    }

    fn lend(&self, image: &ImageRef, credential: &Credential) {
        self.registry.lend(&image.registry_authority, credential);
    }

    fn grant(&self, image: ImageRef, repository: Repository, credential: Option<Credential>) {
        if let Some(credential) = credential {
            let mut all = self.seen.lock();
            if all.entry(name_of(image.clone())).prove(credential) {
                self.keep(&all);
            }
        }
        *self.places.lock().entry(name_of(image)) = Some(repository);
    }
}

fn name_of(image: ImageRef) -> Name {
    (image.registry_authority, image.name)
}

/// Whether containerd shows the image's registry a credential that is meant for this address: empty, or one of its very host.
fn is_meant(address: &str, image: &ImageRef) -> bool {
    if address.is_empty() {
        return true;
    }
    let asked = match image.registry_authority.as_str() {
        "docker.io" => "registry-1.docker.io",
        other => other,
    };
    let named = address.split_once("://").and_then(|(_, rest)| rest.split('/').next());
    named.is_some_and(|named| named.eq_ignore_ascii_case(asked))
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
    use darter_daemon::tasks::Tasks;
    use futures_util::FutureExt;

    use super::*;
    use crate::peer::Sealed;
    use crate::peer::testing::TestRegistry;

    fn keyring() -> Keyring {
        keyring_with(None)
    }

    fn keyring_with(kept: Option<(Kept, Vec<KeptCredential>)>) -> Keyring {
        darter_daemon::run::install_tls_provider();
        Keyring::new(Arc::new(Client::new(Default::default()).unwrap()), kept)
    }

    /// What is known without a wait.
    fn known(keyring: &Keyring, repository: &str) -> Option<Credential> {
        keyring.credential(&repository.parse().unwrap()).now_or_never().expect("no helper is asked")
    }

    #[test]
    fn a_credential_serves_its_repository_only() {
        let keyring = keyring();
        let auth = Auth { auth: STANDARD.encode("me:secret"), ..Default::default() };
        let image = "r.example:5000/team/app:1";
        let trial = keyring.try_out(image, auth);
        let credential = |text: &str| known(&keyring, text);
        assert_eq!(credential("http://r.example:5000/team/app"), Credential::from_user("me:secret"));
        assert_eq!(credential("https://r.example:5000/team/other"), None);
        assert_eq!(credential("https://other.example/team/app"), None);
        keyring.settle(image, trial, false);
        assert_eq!(credential("http://r.example:5000/team/app"), None);
    }

    #[test]
    fn wrong_credentials_neither_replace_right_ones_nor_make_them_forgotten() {
        let keyring = keyring();
        let image = "r.example/team/app:1";
        let pull = |password: &str| {
            keyring.try_out(
                image,
                Auth { auth: STANDARD.encode(format!("me:{password}")), ..Default::default() },
            )
        };
        let known = || known(&keyring, "https://r.example/team/app");
        let password = |password: &str| Credential::from_user(&format!("me:{password}"));
        let right = pull("right");
        assert_eq!(known(), password("right"), "the pull itself needs it");
        keyring.settle(image, right, true);
        let (wrong, next) = (pull("wrong"), pull("next"));
        keyring.settle(image, wrong, false);
        assert_eq!(known(), password("next"));
        keyring.settle(image, next, false);
        assert_eq!(known(), password("right"));
        let newer = pull("newer");
        keyring.settle(image, newer, true);
        assert_eq!(known(), password("newer"));
    }

    #[test]
    fn dockers_registry_is_known_by_its_usual_name() {
        let keyring = keyring();
        let auth = Auth { identity_token: "refresh".into(), ..Default::default() };
        keyring.try_out("alpine", auth);
        let found = known(&keyring, "https://registry-1.docker.io/library/alpine");
        assert_eq!(found, Some(Credential::IdentityToken("refresh".into())));
    }

    #[test]
    fn a_granted_place_is_known_by_the_images_name() {
        let keyring = keyring();
        let repository: Repository = "http://r.example:5000/team/app".parse().unwrap();
        let credential = Credential::from_user("me:secret");
        keyring.grant("r.example:5000/team/app:1".parse().unwrap(), repository.clone(), credential.clone());
        assert_eq!(keyring.place("r.example:5000", "team/app"), Some(repository.clone()));
        assert_eq!(known(&keyring, "http://r.example:5000/team/app"), credential);
        assert_eq!(keyring.place("r.example:5000", "team/other"), None);
    }

    #[tokio::test]
    async fn what_the_registry_refuses_is_forgotten_here_and_where_it_is_kept_and_dockers_word_counts() {
        let folder = tempfile::tempdir().unwrap();
        let registry = TestRegistry::start(|_| "401 Unauthorized").await;
        let address = &registry.address;
        let (file, key) = (folder.path().join("root/credentials"), folder.path().join("key"));
        std::fs::create_dir(folder.path().join("root")).unwrap();
        let kept = || Kept::open(Sealed { file: file.clone(), key: key.clone() }, Tasks::new());
        let made = |kept| Keyring::new(registry.client(folder.path()), kept);
        let keyring = made(kept());
        let repository: Repository = format!("http://{address}/team/app").parse().unwrap();
        let blob = darter_types::BlobDigest(darter_types::Digest::of(b"layer"));
        let source = LayerSource { repository: repository.clone(), blob, size: 5 };
        let (old, docker) = (Credential::from_user("me:old"), Credential::from_user("docker:word"));
        keyring.grant(format!("{address}/team/app:1").parse().unwrap(), repository.clone(), old.clone());
        // That another one was refused says nothing about this one.
        assert_eq!(keyring.renew(&source, docker.clone()).await, old);
        assert_eq!(keyring.renew(&source, old).await, docker);
        keyring.kept.as_ref().unwrap().written().await;
        assert_eq!(made(kept()).credential(&repository).await, docker);
    }

    #[tokio::test]
    async fn layers_that_are_refused_together_are_looked_into_once() {
        let folder = tempfile::tempdir().unwrap();
        let status = |user: Option<&str>| user.map_or("401 Unauthorized", |_| "403 Forbidden");
        let registry = TestRegistry::start(status).await;
        let keyring = Keyring::new(registry.client(folder.path()), None);
        let repository: Repository = format!("http://{}/team/app", registry.address).parse().unwrap();
        let image = format!("{}/team/app:1", registry.address).parse().unwrap();
        let old = Credential::from_user("me:old");
        keyring.grant(image, repository.clone(), old.clone());
        let (keyring, repository, old) = (&keyring, &repository, &old);
        let renew = |layer: u8| async move {
            let blob = darter_types::BlobDigest(darter_types::Digest::of(&[layer]));
            let source = LayerSource { repository: repository.clone(), blob, size: 5 };
            keyring.renew(&source, old.clone()).await
        };
        let docker = Credential::from_user("docker:word");
        assert_eq!(renew(0).await, docker);
        let asked = registry.asked.load(Ordering::Relaxed);
        assert!(asked > 0);
        let all = futures_util::future::join_all((1..20).map(renew)).await;
        assert!(all.iter().all(|found| *found == docker));
        assert_eq!(registry.asked.load(Ordering::Relaxed), asked);
    }

    /// A keyring of a node where `docker:word` is configured, with `me:old` of a pull, and a layer of that pull's repository.
    fn with_old(registry: &TestRegistry, folder: &std::path::Path) -> (Keyring, LayerSource) {
        let keyring = Keyring::new(registry.client(folder), None);
        let repository: Repository = format!("http://{}/team/app", registry.address).parse().unwrap();
        let blob = darter_types::BlobDigest(darter_types::Digest::of(b"layer"));
        let image = format!("{}/team/app:1", registry.address).parse().unwrap();
        keyring.grant(image, repository.clone(), Credential::from_user("me:old"));
        (keyring, LayerSource { repository, blob, size: 5 })
    }

    #[tokio::test]
    async fn what_gets_403_gives_way_for_later_pulls_too_until_one_is_let_in_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let registry = TestRegistry::start(|user| match user {
            None => "401 Unauthorized",
            Some("docker:word") => "200 OK",
            Some(_) => "403 Forbidden",
        });
        let registry = registry.await;
        let (keyring, source) = with_old(&registry, folder.path());
        let credential = || keyring.credential(&source.repository);
        let [old, docker, new] = ["me:old", "docker:word", "me:new"].map(Credential::from_user);
        assert_eq!(credential().await, old);
        assert_eq!(keyring.renew(&source, old.clone()).await, docker);
        assert_eq!(credential().await, docker);
        for refused in [&old, &docker] {
            assert_eq!(keyring.renew(&source, refused.clone()).await, docker, "no way back and forth");
        }
        let image = format!("{}/team/app:2", registry.address);
        let auth = |text: &str| Auth { auth: STANDARD.encode(text), ..Default::default() };
        let pull = keyring.try_out(&image, auth("me:new"));
        assert_eq!(credential().await, new, "a pull under way counts");
        keyring.settle(&image, pull, false);
        assert_eq!(credential().await, docker);
        let pull = keyring.try_out(&image, auth("me:old"));
        keyring.settle(&image, pull, true);
        assert_eq!(credential().await, old);
    }

    #[tokio::test]
    async fn what_is_configured_puts_nothing_aside_that_is_refused_like_itself() {
        let folder = tempfile::tempdir().unwrap();
        let status = |user: Option<&str>| user.map_or("401 Unauthorized", |_| "403 Forbidden");
        let registry = TestRegistry::start(status).await;
        let (keyring, source) = with_old(&registry, folder.path());
        let old = Credential::from_user("me:old");
        assert_eq!(keyring.renew(&source, old.clone()).await, Credential::from_user("docker:word"));
        assert_eq!(keyring.credential(&source.repository).await, old);
    }

    #[tokio::test]
    async fn what_is_set_aside_counts_where_nothing_else_is_configured_any_more() {
        let folder = tempfile::tempdir().unwrap();
        let registry = TestRegistry::start(|user| match user {
            None => "401 Unauthorized",
            Some("docker:word") => "200 OK",
            Some(_) => "403 Forbidden",
        });
        let (registry, old) = (registry.await, Credential::from_user("me:old"));
        let (keyring, source) = with_old(&registry, folder.path());
        keyring.renew(&source, old.clone()).await;
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        assert_eq!(keyring.credential(&source.repository).await, old);
    }

    #[tokio::test]
    async fn a_registry_that_is_away_makes_nothing_forgotten() {
        let keyring = keyring();
        let repository: Repository = "http://127.0.0.1:1/team/app".parse().unwrap();
        let blob = darter_types::BlobDigest(darter_types::Digest::of(b"layer"));
        let source = LayerSource { repository: repository.clone(), blob, size: 5 };
        let credential = Credential::from_user("me:secret");
        keyring.grant("127.0.0.1:1/team/app:1".parse().unwrap(), repository, credential.clone());
        assert_eq!(keyring.renew(&source, credential.clone()).await, credential);
    }

    #[test]
    fn a_credential_that_is_meant_for_another_host_is_none_and_one_for_the_registry_is_its_alone() {
        let known_of = |image: &str, address: &str| {
            let (keyring, image) = (keyring(), image.parse::<ImageRef>().unwrap());
            let (auth, server_address) = (STANDARD.encode("me:secret"), address.to_owned());
            keyring.try_out(&image.to_string(), Auth { auth, server_address, ..Default::default() });
            let found = known(&keyring, &format!("https://{}/{}", image.registry_authority, image.name));
            found.map(|found| keyring.registry.is_lent(&image.registry_authority, &found))
        };
        let (here, hub) = ("r.example:5000/team/app:1", "alpine");
        assert_eq!(known_of(here, ""), Some(true));
        for meant in ["https://r.example:5000", "http://R.example:5000/v1/"] {
            assert_eq!(known_of(here, meant), Some(false), "{meant}");
        }
        assert_eq!(known_of(hub, "https://registry-1.docker.io/v2/"), Some(false));
        let others = ["https://r.example", "https://other.example:5000", "r.example:5000", "https://", "?"];
        for meant in others {
            assert_eq!(known_of(here, meant), None, "{meant}");
        }
        assert_eq!(known_of(hub, "https://index.docker.io/v1/"), None, "as in containerd");
    }

    #[test]
    fn mirrors_are_shown_what_a_pull_brought_and_not_what_it_found() {
        let keyring = keyring();
        let (image, repository) = ("r.example/team/app:1", "https://r.example/team/app");
        let [brought, found] = ["me:brought", "me:found"].map(|text| Credential::from_user(text).unwrap());
        keyring.grant(image.parse().unwrap(), repository.parse().unwrap(), Some(found.clone()));
        keyring.try_out(image, Auth { auth: STANDARD.encode("me:brought"), ..Default::default() });
        let is_lent = |registry, credential| keyring.registry.is_lent(registry, credential);
        assert!(is_lent("r.example", &brought) && !is_lent("r.example", &found));
        assert!(!is_lent("other.example", &brought));
    }

    #[test]
    fn an_empty_auth_is_none() {
        assert_eq!(to_credential(Auth::default()), None);
    }

    #[tokio::test]
    async fn what_the_registry_let_in_is_kept_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let kept = || {
            let (file, key) = (folder.path().join("root/credentials"), folder.path().join("key"));
            Kept::open(Sealed { file, key }, Tasks::new())
        };
        let keyring = keyring_with(kept());
        let auth = |text: &str| Auth { auth: STANDARD.encode(text), ..Default::default() };
        let (right, wrong) = ("r.example/team/app:1", "r.example/team/other:1");
        let tried = [keyring.try_out(right, auth("me:hunter2")), keyring.try_out(wrong, auth("me:no"))];
        keyring.settle(wrong, tried[1], false);
        keyring.settle(right, tried[0], true);
        keyring.kept.as_ref().unwrap().written().await;
        let again = keyring_with(kept());
        assert_eq!(known(&again, "https://r.example/team/app"), Credential::from_user("me:hunter2"));
        assert_eq!(known(&again, "https://r.example/team/other"), None);
        assert_eq!(known(&keyring_with(None), "https://r.example/team/app"), None);
    }
}
