//! Credentials of pulls on disk, for nodes that are configured so: one file, encrypted with a key that lies elsewhere.
//!
//! Whoever gets the root alone, in a backup or on an old disk, reads no password and changes none unnoticed. The file is
//! replaced as a whole (`docs/formats.md`). One that is damaged, or sealed with another key, counts as none, and without its
//! key nothing is kept: neither keeps the program from starting.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use darter_daemon::tasks::Tasks;
use darter_identity::write_private;
use darter_registry::Credential;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// Credentials that are kept: those that were used last.
const KEPT_MAX: usize = 1024;
/// Of these, for one registry.
const KEPT_OF_ONE_MAX: usize = 64;
/// Seconds after which a credential is forgotten that no pull came with any more: a week.
const KEPT_FOR: u64 = 7 * 24 * 3600;
/// A longer one is not kept. Cloud registries' tokens have some kilobytes.
const SECRET_MAX: usize = 16 * 1024;
/// What a key file has at least.
const KEY_MIN: usize = 32;

/// Name and version of the file's form; what is sealed is bound to them.
const HEAD: &[u8; 12] = b"DARTERCR\x01\0\0\0";
const KEY_PURPOSE: &str = "darter credentials of pulls, version 1";

/// Where credentials of pulls are kept, and the file with the key for them.
#[derive(Debug, Clone)]
pub struct Sealed {
    pub file: PathBuf,
    /// It is made if it isn't there. It may not lie beside `file`.
    pub key: PathBuf,
}

/// A credential that a registry has let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct KeptCredential {
    pub authority: String,
    pub name: String,
    /// When it was, in seconds since 1970.
    pub at: u64,
    pub credential: Credential,
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// See the module's head.
#[derive(Clone)]
pub(super) struct Kept(Arc<Inner>);

struct Inner {
    file: PathBuf,
    key: RandomizedNonceKey,
    tasks: Tasks,
    state: Mutex<Writing>,
}

#[derive(Default)]
struct Writing {
    /// What is to be written next.
    next: Option<Vec<KeptCredential>>,
    is_running: bool,
}

impl Kept {
    /// Also gives what was kept before. `None` if the key can't be had.
    pub fn open(sealed: Sealed, tasks: Tasks) -> Option<(Self, Vec<KeptCredential>)> {
        let key = match read_key(&sealed) {
            Ok(key) => key,
            Err(reason) => {
                let file = sealed.key.display();
                tracing::error!(%file, reason, "no key: credentials of pulls are kept in memory only");
                return None;
            }
        };
        let found = read(&sealed.file, &key).unwrap_or_else(|reason| {
            let file = sealed.file.display();
            tracing::warn!(%file, reason, "the credentials of earlier pulls are forgotten");
            Vec::new()
        });
        let kept = Inner { file: sealed.file, key, tasks, state: Mutex::default() };
        Some((Self(Arc::new(kept)), worth_keeping(found)))
    }

    /// Puts these in the place of what is kept. A thread of its own does it; of several that wait it writes the last.
    pub fn save(&self, credentials: Vec<KeptCredential>) {
        let mut state = self.0.state.lock();
        state.next = Some(credentials);
        if !std::mem::replace(&mut state.is_running, true) {
            let inner = self.0.clone();
            self.0.tasks.spawn_blocking("keep credentials", move || inner.write_all());
        }
    }

    /// Waits until all is written.
    #[cfg(test)]
    pub async fn written(&self) {
        while self.0.state.lock().is_running {
            tokio::task::yield_now().await;
        }
    }
}

impl Inner {
    fn write_all(&self) {
        while let Some(next) = self.next() {
            let sealed = seal(&self.key, worth_keeping(next));
            let written = sealed
                .and_then(|sealed| write_private(&self.file, &sealed).map_err(|error| error.to_string()));
            if let Err(error) = written {
                let file = self.file.display();
                tracing::warn!(%file, error, "the credentials of pulls could not be kept");
            }
        }
    }

    fn next(&self) -> Option<Vec<KeptCredential>> {
        let mut state = self.state.lock();
        let next = state.next.take();
        state.is_running = next.is_some();
        next
    }
}

/// Those used last, the newest first; none that is too old or too long.
fn worth_keeping(mut all: Vec<KeptCredential>) -> Vec<KeptCredential> {
    let now = now();
    // A clock that was ahead must not make one last longer.
    let is_recent = |at: u64| at <= now + 3600 && at.saturating_add(KEPT_FOR) > now;
    all.retain(|one| is_recent(one.at) && secret_len(&one.credential) <= SECRET_MAX);
    all.sort_by_key(|one| std::cmp::Reverse(one.at));
    let has_room = all.len() <= KEPT_MAX;
    let mut counts: HashMap<String, usize> = HashMap::new();
    all.retain(|one| {
        let count = counts.entry(one.authority.clone()).or_default();
        *count += 1;
        has_room || *count <= KEPT_OF_ONE_MAX
    });
    all.truncate(KEPT_MAX);
    all
}

fn secret_len(credential: &Credential) -> usize {
    match credential {
        Credential::Basic { username, password } => username.len() + password.len(),
        Credential::Bearer(token) | Credential::IdentityToken(token) => token.len(),
    }
}

/// The file's key is derived from all that the key file has: systemd's credentials may be any bytes.
fn read_key(sealed: &Sealed) -> Result<RandomizedNonceKey, String> {
    let words = |error: io::Error| error.to_string();
    if is_beside(&sealed.key, &sealed.file) {
        return Err("the key lies beside what it is to protect".to_owned());
    }
    let found = match fs::read(&sealed.key) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => make_key(&sealed.key)?,
        found => found.map_err(words)?,
    };
    if fs::metadata(&sealed.key).map_err(words)?.mode() & 0o077 != 0 {
        return Err("others than its owner may read the key: chmod 600".to_owned());
    }
    if found.len() < KEY_MIN {
        return Err(format!("the key has {} bytes, not {KEY_MIN} at least", found.len()));
    }
    let derived = blake3::derive_key(KEY_PURPOSE, &found);
    RandomizedNonceKey::new(&AES_256_GCM, &derived).map_err(|_| "the key can't be used".to_owned())
}

/// Whether the first lies below the folder of the second.
fn is_beside(key: &Path, file: &Path) -> bool {
    let folder = |path: &Path| path.parent().and_then(|parent| parent.canonicalize().ok());
    match (folder(key), folder(file)) {
        (Some(key), Some(root)) => key.starts_with(root),
        _ => false,
    }
}

fn make_key(path: &Path) -> Result<Vec<u8>, String> {
    let mut key = vec![0; KEY_MIN];
    aws_lc_rs::rand::fill(&mut key).map_err(|_| "no random bytes".to_owned())?;
    write_private(path, &key).map_err(|error| error.to_string())?;
    Ok(key)
}

/// What the file has; nothing if there is none.
fn read(file: &Path, key: &RandomizedNonceKey) -> Result<Vec<KeptCredential>, String> {
    match fs::read(file) {
        Ok(bytes) => {
            open(key, bytes).ok_or_else(|| "the file is damaged, or sealed with another key".to_owned())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error.to_string()),
    }
}

fn open(key: &RandomizedNonceKey, mut bytes: Vec<u8>) -> Option<Vec<KeptCredential>> {
    let rest = bytes.strip_prefix(HEAD)?;
    let nonce = Nonce::try_assume_unique_for_key(rest.get(..NONCE_LEN)?).ok()?;
    let sealed = bytes.get_mut(HEAD.len() + NONCE_LEN..)?;
    let plain = key.open_in_place(nonce, Aad::from(HEAD), sealed).ok()?;
    let rows: Vec<Row> = serde_json::from_slice(plain).ok()?;
    Some(rows.into_iter().map(Row::into_credential).collect())
}

fn seal(key: &RandomizedNonceKey, credentials: Vec<KeptCredential>) -> Result<Vec<u8>, String> {
    let rows: Vec<Row> = credentials.into_iter().map(Row::from_credential).collect();
    let mut body = serde_json::to_vec(&rows).map_err(|_| "they can't be written as JSON".to_owned())?;
    let nonce = key.seal_in_place_append_tag(Aad::from(HEAD), &mut body);
    let nonce = nonce.map_err(|_| "they can't be encrypted".to_owned())?;
    Ok([HEAD.as_slice(), nonce.as_ref(), &body].concat())
}

/// A credential as it stands in the file, once that is open.
#[derive(Serialize, Deserialize)]
struct Row {
    authority: String,
    name: String,
    at: u64,
    secret: Secret,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Secret {
    Basic { username: String, password: String },
    Bearer(String),
    IdentityToken(String),
}

impl Row {
    fn from_credential(kept: KeptCredential) -> Self {
        let secret = match kept.credential {
            Credential::Basic { username, password } => Secret::Basic { username, password },
            Credential::Bearer(token) => Secret::Bearer(token),
            Credential::IdentityToken(token) => Secret::IdentityToken(token),
        };
        Self { authority: kept.authority, name: kept.name, at: kept.at, secret }
    }

    fn into_credential(self) -> KeptCredential {
        let credential = match self.secret {
            Secret::Basic { username, password } => Credential::Basic { username, password },
            Secret::Bearer(token) => Credential::Bearer(token),
            Secret::IdentityToken(token) => Credential::IdentityToken(token),
        };
        KeptCredential { authority: self.authority, name: self.name, at: self.at, credential }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn sealed(folder: &Path) -> Sealed {
        fs::create_dir_all(folder.join("root")).unwrap();
        Sealed { file: folder.join("root/credentials"), key: folder.join("etc/key") }
    }

    fn one(name: &str, at: u64) -> KeptCredential {
        let credential = Credential::from_user("me:hunter2").unwrap();
        KeptCredential { authority: "r.example".into(), name: name.into(), at, credential }
    }

    fn open(sealed: &Sealed) -> Option<(Kept, Vec<KeptCredential>)> {
        Kept::open(sealed.clone(), Tasks::new())
    }

    #[tokio::test]
    async fn what_is_kept_comes_back_and_shows_no_secret() {
        let folder = tempfile::tempdir().unwrap();
        let sealed = sealed(folder.path());
        let tokens = [Credential::Bearer("hunter2".into()), Credential::IdentityToken("hunter2".into())];
        let mut all = vec![one("basic", now())];
        all.extend(tokens.map(|credential| KeptCredential { credential, ..one("token", now() - 1) }));
        let (kept, before) = open(&sealed).unwrap();
        assert_eq!(before, []);
        kept.save(all.clone());
        kept.written().await;
        assert_eq!(open(&sealed).unwrap().1, all);
        let bytes = fs::read(&sealed.file).unwrap();
        assert!(!String::from_utf8_lossy(&bytes).contains("hunter2"));
        for file in [&sealed.file, &sealed.key] {
            assert_eq!(fs::metadata(file).unwrap().mode() & 0o777, 0o600);
        }
    }

    #[tokio::test]
    async fn old_ones_and_too_many_are_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let sealed = sealed(folder.path());
        let (kept, _) = open(&sealed).unwrap();
        let many = (0..KEPT_MAX as u64 + 5).map(|age| KeptCredential {
            authority: format!("r{}.example", age % 20),
            ..one(&format!("n{age}"), now() - age)
        });
        let long = KeptCredential {
            credential: Credential::Bearer("x".repeat(SECRET_MAX + 1)),
            ..one("long", now() + 9)
        };
        let (old, ahead) = (one("old", now() - KEPT_FOR), one("ahead", now() + KEPT_FOR));
        kept.save(many.chain([old, ahead, long]).collect());
        kept.written().await;
        let found = open(&sealed).unwrap().1;
        assert_eq!((found.len(), found[0].name.as_str()), (KEPT_MAX, "n0"));
    }

    #[test]
    fn one_registrys_many_repositories_push_out_no_others() {
        let many = (0..2000).map(|number| one(&format!("n{number}"), now()));
        let other = KeptCredential { authority: "other.example".into(), ..one("app", now() - 60) };
        let kept = worth_keeping(many.chain([other.clone()]).collect());
        assert_eq!(kept.len(), KEPT_OF_ONE_MAX + 1);
        assert!(kept.contains(&other));
    }

    #[tokio::test]
    async fn damaged_files_and_another_key_have_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let sealed = sealed(folder.path());
        let (kept, _) = open(&sealed).unwrap();
        kept.save(vec![one("basic", now())]);
        kept.written().await;
        let whole = fs::read(&sealed.file).unwrap();
        let mut damaged: Vec<Vec<u8>> = (0..whole.len()).map(|len| whole[..len].to_vec()).collect();
        damaged.extend((0..whole.len()).map(|at| {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            bytes
        }));
        for bytes in damaged {
            fs::write(&sealed.file, &bytes).unwrap();
            assert_eq!(open(&sealed).unwrap().1, [], "{} bytes", bytes.len());
        }
        fs::write(&sealed.file, &whole).unwrap();
        fs::remove_file(&sealed.key).unwrap();
        assert_eq!(open(&sealed).unwrap().1, []);
    }

    #[tokio::test]
    async fn keys_that_protect_nothing_are_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let good = sealed(folder.path());
        assert!(open(&good).is_some());
        fs::set_permissions(&good.key, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(open(&good).is_none());
        let short = Sealed { key: folder.path().join("short"), ..good.clone() };
        write_private(&short.key, b"too short").unwrap();
        assert!(open(&short).is_none());
        let beside = Sealed { key: folder.path().join("root/key"), ..good };
        assert!(open(&beside).is_none() && !beside.key.exists());
    }
}
