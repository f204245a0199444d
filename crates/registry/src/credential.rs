//! Who we are for a registry, and where Docker wrote that down.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use darter_types::Digest;

use crate::helper::Helpers;

/// What a registry may ask for. `Debug` shows only which kind it is.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    Basic {
        username: String,
        password: String,
    },
    /// A short-lived token for one repository, as a token server gives it.
    Bearer(String),
    /// A refresh token, which a token server turns into a short-lived one.
    IdentityToken(String),
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Basic { .. } => "Basic(…)",
            Self::Bearer(_) => "Bearer(…)",
            Self::IdentityToken(_) => "IdentityToken(…)",
        })
    }
}

impl Credential {
    /// `user:password`, as `darter pull --user` takes it. `None` without a colon.
    pub fn from_user(text: &str) -> Option<Self> {
        let (username, password) = text.split_once(':')?;
        Some(Self::Basic { username: username.to_owned(), password: password.to_owned() })
    }

    /// The value of an `Authorization` header for a basic challenge.
    pub(crate) fn basic_header(&self) -> Option<String> {
        match self {
            Self::Basic { username, password } => {
                Some(format!("Basic {}", STANDARD.encode(format!("{username}:{password}"))))
            }
            Self::Bearer(_) | Self::IdentityToken(_) => None,
        }
    }

    /// Names this credential in a cache's key without being it.
    pub(crate) fn fingerprint(&self) -> Digest {
        let text = match self {
            Self::Basic { username, password } => format!("basic\0{username}\0{password}"),
            Self::Bearer(token) => format!("bearer\0{token}"),
            Self::IdentityToken(token) => format!("identity\0{token}"),
        };
        Digest::of(text.as_bytes())
    }

    /// `words`, which somebody else wrote, without this credential should they repeat it.
    pub(crate) fn cut_from(&self, words: &str) -> String {
        let (Self::Basic { password: secret, .. } | Self::Bearer(secret) | Self::IdentityToken(secret)) =
            self;
        let cut = if secret.is_empty() { words.to_owned() } else { words.replace(secret.as_str(), "…") };
        match self.basic_header().and_then(|header| header.strip_prefix("Basic ").map(str::to_owned)) {
            Some(encoded) => cut.replace(&encoded, "…"),
            None => cut,
        }
    }
}

/// `$DOCKER_CONFIG/config.json`, else `~/.docker/config.json`.
pub fn default_docker_config() -> Option<PathBuf> {
    let from_variable = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from);
    let folder = from_variable.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".docker")))?;
    Some(folder.join("config.json"))
}

#[derive(serde::Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: HashMap<String, Entry>,
    /// The helper of a registry, by the registry's name.
    #[serde(default, rename = "credHelpers")]
    helpers: HashMap<String, String>,
    /// The helper of all others.
    #[serde(default, rename = "credsStore")]
    store: String,
}

impl DockerConfig {
    /// `None` if it isn't there, or can't be read.
    fn read(path: &Path) -> Option<Self> {
        let bytes = std::fs::read(path).ok()?;
        // The error's own text could quote what is in the file.
        let unread = |error: &serde_json::Error| {
            tracing::warn!(path = %path.display(), line = error.line(), "docker's configuration can't be read");
        };
        serde_json::from_slice(&bytes).inspect_err(unread).ok()
    }

    fn helper_of(&self, authority: &str) -> Option<&str> {
        let own = self.helpers.iter().find(|(key, _)| normal_key(key) == authority).map(|(_, helper)| helper);
        own.or(Some(&self.store)).map(String::as_str).filter(|helper| !helper.is_empty())
    }
}

#[derive(Default, serde::Deserialize)]
#[serde(default)]
struct Entry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

impl Entry {
    fn credential(self) -> Option<Credential> {
        if !self.registrytoken.is_empty() {
            return Some(Credential::Bearer(self.registrytoken));
        }
        if !self.identitytoken.is_empty() {
            return Some(Credential::IdentityToken(self.identitytoken));
        }
        if self.auth.is_empty() {
            let given = !self.username.is_empty();
            return given.then_some(Credential::Basic { username: self.username, password: self.password });
        }
        let decoded = STANDARD.decode(self.auth.trim()).ok()?;
        let text = String::from_utf8(decoded).ok()?;
        Credential::from_user(text.trim_end_matches('\0'))
    }
}

/// What the file at `path` has for this repository: its helper's answer, else the longest key that fits. A file that is not
/// there has nothing. It waits only for a helper.
pub(crate) async fn from_docker_config(
    path: &Path,
    helpers: &Helpers,
    authority: &str,
    name: &str,
) -> Option<Credential> {
    let config = DockerConfig::read(path)?;
    if let Some(helper) = config.helper_of(authority)
        && let Some(found) = helpers.credential(helper, authority).await
    {
        return Some(found);
    }
    let wanted = format!("{authority}/{name}");
    let fits = |key: &str| wanted.strip_prefix(key).is_some_and(|rest| rest.starts_with('/'));
    let found = config.auths.into_iter().map(|(key, entry)| (normal_key(&key), entry));
    let best = found.filter(|(key, _)| fits(key)).max_by_key(|(key, _)| key.len());
    best.and_then(|(_, entry)| entry.credential())
}

/// Asks the helpers that have a registry of their own in the file at `path`, so that their answers are known when a pull
/// needs them.
pub(crate) fn ask_helpers(path: &Path, helpers: &Helpers) {
    for (registry, helper) in DockerConfig::read(path).into_iter().flat_map(|config| config.helpers) {
        helpers.ask_ahead(&helper, &normal_key(&registry));
    }
}

/// Keys are hosts, addresses such as `https://index.docker.io/v1/`, or a host with the start of a path.
fn normal_key(key: &str) -> String {
    let bare = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let bare = bare.trim_end_matches('/');
    let bare = bare.strip_suffix("/v1").or_else(|| bare.strip_suffix("/v2")).unwrap_or(bare);
    match bare {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
        other => other.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lookup(json: &str, authority: &str, name: &str) -> Option<Credential> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, json).unwrap();
        from_docker_config(&path, &Helpers::default(), authority, name).await
    }

    fn basic(username: &str, password: &str) -> Option<Credential> {
        Some(Credential::Basic { username: username.to_owned(), password: password.to_owned() })
    }

    #[tokio::test]
    async fn docker_hub_has_its_old_key() {
        let auth = STANDARD.encode("me:se:cret");
        let json = format!(r#"{{"auths":{{"https://index.docker.io/v1/":{{"auth":"{auth}"}}}}}}"#);
        assert_eq!(lookup(&json, "docker.io", "library/alpine").await, basic("me", "se:cret"));
        assert_eq!(lookup(&json, "other.example", "library/alpine").await, None);
    }

    #[tokio::test]
    async fn ports_and_longest_path_decide() {
        let json = r#"{"auths":{"r.example:5000":{"username":"a","password":"1"},
            "r.example:5000/team":{"username":"b","password":"2"}}}"#;
        assert_eq!(lookup(json, "r.example:5000", "team/app").await, basic("b", "2"));
        assert_eq!(lookup(json, "r.example:5000", "teams/app").await, basic("a", "1"));
        assert_eq!(lookup(json, "r.example", "team/app").await, None);
    }

    #[tokio::test]
    async fn own_helper_goes_before_the_store_and_the_file_comes_last() {
        let json = r#"{"credHelpers":{"https://index.docker.io/v1/":"hub","r.example:5000":"own"},"credsStore":"all"}"#;
        let config: DockerConfig = serde_json::from_str(json).unwrap();
        assert_eq!(config.helper_of("docker.io"), Some("hub"));
        assert_eq!(config.helper_of("r.example:5000"), Some("own"));
        assert_eq!(config.helper_of("other.example"), Some("all"));
        let json = r#"{"credsStore":"no-such","auths":{"r.example":{"username":"a","password":"1"}}}"#;
        assert_eq!(lookup(json, "r.example", "app").await, basic("a", "1"));
    }

    #[tokio::test]
    async fn identity_token_is_one() {
        let json = r#"{"auths":{"r.example":{"auth":"PHRva2VuPjo=","identitytoken":"refresh"}}}"#;
        assert_eq!(
            lookup(json, "r.example", "a").await,
            Some(Credential::IdentityToken("refresh".to_owned()))
        );
    }

    #[tokio::test]
    async fn broken_file_has_nothing() {
        assert_eq!(lookup("{", "r.example", "a").await, None);
        assert_eq!(
            from_docker_config(Path::new("/nonexistent/c.json"), &Helpers::default(), "r.example", "a").await,
            None
        );
    }

    #[test]
    fn debug_and_foreign_words_show_no_secret() {
        let credential = Credential::from_user("me:hunter2").unwrap();
        assert_eq!(format!("{credential:?}"), "Basic(…)");
        let encoded = STANDARD.encode("me:hunter2");
        let words = credential.cut_from(&format!("no hunter2 and no {encoded}"));
        assert_eq!(words, "no … and no …");
    }
}
