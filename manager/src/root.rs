//! The manager's folder: `manager.db`, `ca.pem`, `api-token`. `darter-manager token` works on it while the manager runs.

use std::collections::BTreeSet;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use darter_identity::{Authority, JoinToken};
use darter_types::{NodeName, Role};
use sha2::{Digest, Sha256};

use crate::core::access::{self, AccessError, ApiRole, ApiScope, ApiToken, Grant};
use crate::core::names;
use crate::core::tokens::TokenRecord;
use crate::db::{Audit, Sqlite, Store};
use crate::{Config, ManagerError, folder};

/// A token that lived for ever would be a password.
const TOKEN_LIFE_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// The opened folder.
pub(crate) struct Root {
    folder: PathBuf,
    pub(crate) authority: Arc<Authority>,
    pub(crate) store: Store,
}

/// Seconds since the epoch.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// A time as RFC 3339 writes it. One beyond what that can write is shown as the last that it can.
pub(crate) fn rfc3339(seconds: u64) -> String {
    let second = i64::try_from(seconds).ok().and_then(|second| jiff::Timestamp::from_second(second).ok());
    second.unwrap_or(jiff::Timestamp::MAX).to_string()
}

/// How API tokens are stored and looked up.
pub(crate) fn api_token_hash(token: &str) -> [u8; 32] {
    Sha256::digest(token).into()
}

/// Keeps every other program out of the folder as long as the file is open.
fn locked(root: &Path) -> Result<File, ManagerError> {
    let path = root.join("lock");
    let lock = File::create(&path).and_then(|file| file.lock().map(|()| file));
    lock.map_err(|source| ManagerError::Root { path, source })
}

fn new_api_token() -> io::Result<String> {
    let mut secret = [0; 32];
    aws_lc_rs::rand::fill(&mut secret).map_err(|_| io::Error::other("no random bytes"))?;
    Ok(hex::encode(secret))
}

/// What a new API token is to be.
#[derive(Debug, Clone)]
pub struct ApiTokenWish {
    /// For lists and for the audit log.
    pub name: String,
    pub role: ApiRole,
    /// Empty: everything.
    pub scopes: BTreeSet<ApiScope>,
    /// 1 second to 366 days.
    pub life: Duration,
}

/// Who asks for something: a name for the audit log, and what he may do.
#[derive(Debug, Clone)]
pub(crate) struct Actor {
    pub(crate) name: String,
    pub(crate) grant: Grant,
    /// Of the token that he showed.
    pub(crate) token: Option<String>,
}

impl Actor {
    /// Whoever can read the manager's folder.
    fn command_line() -> Self {
        Self { name: "command line".to_owned(), grant: Grant::whole(), token: None }
    }
}

impl Root {
    /// Opens the folder, and makes it, the CA and the database when they are not there yet.
    pub(crate) fn open(config: &Config) -> Result<Self, ManagerError> {
        let at = |source| ManagerError::Root { path: config.root.clone(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(&config.root).map_err(at)?;
        // Two programs that start together on an empty folder must not make a CA each.
        let _lock = locked(&config.root)?;
        folder::check_files(&config.root)?;
        let (ca, database) = (config.root.join("ca.pem"), config.root.join("manager.db"));
        // Another CA would lock every member out, one after the other.
        if database.exists() && !ca.exists() {
            return Err(ManagerError::NoCa { ca, database });
        }
        let authority = Arc::new(Authority::open(&ca, config.cluster()?)?);
        let store = Store::new(Arc::new(Sqlite::open(&database)?));
        Ok(Self { folder: config.root.clone(), authority, store })
    }

    /// For a command beside a manager that runs or has run: see [`folder::check_command`].
    fn of_command(config: &Config) -> Result<Self, ManagerError> {
        folder::check_command(&config.root)?;
        Self::open(config)
    }

    /// The API token in `api-token`, made when the database has none at all. `None` if the file was taken away since, or is no text any more.
    pub(crate) fn first_api_token(&self, root: &Path) -> Result<Option<String>, ManagerError> {
        let path = root.join("api-token");
        let at = |source| ManagerError::Root { path: path.clone(), source };
        // The manager at its start and `api-token add` beside it must not make one each.
        let _lock = locked(root)?;
        if self.store.blocking().has_api_tokens()? {
            return match std::fs::read(&path) {
                Ok(bytes) => Ok(String::from_utf8(bytes).ok().map(|text| text.trim().to_owned())),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(at(error)),
            };
        }
        let token = new_api_token().map_err(at)?;
        // The file first: a token that is in the database alone could never be used.
        darter_identity::write_private(&path, format!("{token}\n").as_bytes()).map_err(at)?;
        let first = ApiToken::new("first".to_owned(), api_token_hash(&token), Grant::whole(), now());
        self.store.blocking().add_api_token(&first)?;
        Ok(Some(token))
    }

    /// A new join token. The manager's own role can't be had by token.
    pub(crate) fn mint_token(
        &self,
        actor: &str,
        role: Role,
        life: Duration,
        uses: u32,
    ) -> Result<JoinToken, ManagerError> {
        if role == Role::Manager {
            return Err(ManagerError::Token("a manager does not join: scheduler, seed or node"));
        }
        if life.is_zero() || life > TOKEN_LIFE_MAX || uses == 0 {
            return Err(ManagerError::Token("it must live for 1 second to 366 days and have 1 use at least"));
        }
        let token = JoinToken::generate(self.authority.cluster().clone(), role, self.authority.pin())?;
        let record = TokenRecord::new(&token, now() + life.as_secs().max(1), uses);
        let storage = self.store.blocking();
        storage.add_join_token(&record)?;
        let subject = format!("{} for {role}, {uses} uses", token.id_text());
        storage.record(&Audit { at: now(), actor: actor.to_owned(), action: "join token made", subject })?;
        Ok(token)
    }
}

impl Root {
    /// A new API token, which is shown this once, and what is remembered of it.
    pub(crate) fn mint_api_token(
        &self,
        actor: &Actor,
        wish: ApiTokenWish,
    ) -> Result<(String, ApiToken), ManagerError> {
        access::checked_name(&wish.name)?;
        let grant = Grant::new(wish.role, wish.scopes, wish.life.as_secs(), now())?;
        actor.grant.may_give(&grant)?;
        let secret =
            new_api_token().map_err(|source| ManagerError::Root { path: "/dev/urandom".into(), source })?;
        let token = ApiToken::new(wish.name, api_token_hash(&secret), grant, now());
        let storage = self.store.blocking();
        // Two programs that are asked at the same moment must not both find the name free.
        let _lock = locked(&self.folder)?;
        let holds = |other: &ApiToken| other.name == token.name && !other.grant.has_expired(now());
        if storage.api_tokens()?.iter().any(holds) {
            return Err(ManagerError::SameName(token.name));
        }
        if !storage.add_api_token(&token)? {
            return Err(ManagerError::TooManyTokens);
        }
        let subject = format!("{} {}, {}", token.id, token.name, token.grant);
        let actor = actor.name.clone();
        storage.record(&Audit { at: now(), actor, action: "API token made", subject })?;
        Ok((secret, token))
    }

    /// `false` if there is no such token.
    pub(crate) fn remove_api_token(&self, actor: &Actor, id: &str) -> Result<bool, ManagerError> {
        let storage = self.store.blocking();
        let Some(token) = storage.api_tokens()?.into_iter().find(|token| token.id == id) else {
            return Ok(false);
        };
        actor.grant.may_give(&token.grant)?;
        if actor.token.as_deref() == Some(id) {
            return Err(AccessError::Itself.into());
        }
        let removed = storage.remove_api_token(id)?;
        if removed {
            let (actor, subject) = (actor.name.clone(), format!("{id} {}", token.name));
            storage.record(&Audit { at: now(), actor, action: "API token removed", subject })?;
        }
        Ok(removed)
    }
}

/// A new API token of the manager whose folder `config` names, whether it runs or not.
pub fn mint_api_token(config: &Config, wish: ApiTokenWish) -> Result<String, ManagerError> {
    let root = Root::of_command(config)?;
    // Who is quicker than the manager's first start must not be the reason that nobody gets a token that may do everything.
    root.first_api_token(&config.root)?;
    let (secret, _) = root.mint_api_token(&Actor::command_line(), wish)?;
    Ok(secret)
}

/// A line of headings, and one for each API token: id, name, role, scopes with commas between, and until when. No cell but
/// the last has a space in it.
pub fn list_api_tokens(config: &Config) -> Result<Vec<String>, ManagerError> {
    let tokens = Root::of_command(config)?.store.blocking().api_tokens()?;
    let mut rows = vec![["ID", "NAME", "ROLE", "SCOPES", "UNTIL"].map(str::to_owned)];
    rows.extend(tokens.into_iter().map(cells));
    let widths =
        [0, 1, 2, 3].map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or_default());
    let line = |[id, name, role, scopes, until]: [String; 5]| {
        let [a, b, c, d] = widths;
        format!("{id:<a$}  {name:<b$}  {role:<c$}  {scopes:<d$}  {until}")
    };
    Ok(rows.into_iter().map(line).collect())
}

fn cells(token: ApiToken) -> [String; 5] {
    let until = match token.grant.expires_at {
        Some(end) if token.grant.has_expired(now()) => format!("expired {}", rfc3339(end)),
        Some(end) => rfc3339(end),
        None => "for ever".to_owned(),
    };
    let scopes: Vec<&str> = token.grant.scopes.iter().map(|scope| scope.as_str()).collect();
    let scopes = if scopes.is_empty() { "all".to_owned() } else { scopes.join(",") };
    [token.id, token.name, token.grant.role.as_str().to_owned(), scopes, until]
}

/// Takes an API token away; an error if there is none of this id.
pub fn remove_api_token(config: &Config, id: &str) -> Result<(), ManagerError> {
    if !Root::of_command(config)?.remove_api_token(&Actor::command_line(), id)? {
        return Err(ManagerError::Token("there is no API token of this id: `api-token list` shows them"));
    }
    Ok(())
}

/// A new join token of the manager whose folder `config` names, whether it runs or not.
pub fn mint_token(config: &Config, role: Role, life: Duration, uses: u32) -> Result<JoinToken, ManagerError> {
    Root::of_command(config)?.mint_token("command line", role, life, uses)
}

/// From now on a join token may give this member's name to somebody else, whether the manager runs or not.
/// One that may be attending still is released with `force` only.
pub fn release(config: &Config, role: Role, node: &NodeName, force: bool) -> Result<(), ManagerError> {
    let root = Root::of_command(config)?;
    let storage = root.store.blocking();
    let known = storage.member(role, node)?;
    if let Some(known) = known.filter(|_| !force)
        && let Some(seconds) = names::seen_just_now(known.last_seen, now())
    {
        return Err(ManagerError::StillThere { role, node: node.clone(), seconds, address: known.address });
    }
    if !storage.release(role, node)? {
        return Err(ManagerError::NoMember { role, node: node.clone() });
    }
    let (actor, subject) = ("command line".to_owned(), format!("{role} {node}"));
    storage.record(&Audit { at: now(), actor, action: "name released", subject })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(folder: &Path) -> Config {
        Config { root: folder.join("manager"), ..Config::default() }
    }

    fn wish(name: &str) -> ApiTokenWish {
        ApiTokenWish {
            name: name.to_owned(),
            role: ApiRole::Reader,
            scopes: BTreeSet::new(),
            life: Duration::from_secs(60),
        }
    }

    #[test]
    fn first_api_token_is_made_also_where_another_was_added_before() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        Root::open(&config).unwrap();
        mint_api_token(&config, wish("ci")).unwrap();
        let root = Root::open(&config).unwrap();
        let first = root.first_api_token(&config.root).unwrap().expect("there is a first token");
        let known = root.store.blocking().api_token(&api_token_hash(&first)).unwrap().unwrap();
        assert_eq!((known.name.as_str(), known.grant), ("first", Grant::whole()));
        assert_eq!(root.store.blocking().api_tokens().unwrap().len(), 2);
    }

    #[test]
    fn file_of_the_first_api_token_may_be_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        let root = Root::open(&config).unwrap();
        assert!(root.first_api_token(&config.root).unwrap().is_some());
        std::fs::write(config.root.join("api-token"), b"dart\xe5r").unwrap();
        assert_eq!(root.first_api_token(&config.root).unwrap(), None);
    }

    #[test]
    fn no_two_api_tokens_that_count_have_one_name() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        Root::open(&config).unwrap();
        mint_api_token(&config, wish("ci")).unwrap();
        let error = mint_api_token(&config, wish("ci")).unwrap_err();
        assert!(matches!(&error, ManagerError::SameName(name) if name == "ci"), "{error}");
        let root = Root::open(&config).unwrap();
        let ended = Grant { role: ApiRole::Reader, scopes: BTreeSet::new(), expires_at: Some(1) };
        root.store.blocking().add_api_token(&ApiToken::new("old".to_owned(), [9; 32], ended, 0)).unwrap();
        mint_api_token(&config, wish("old")).unwrap();
    }

    #[test]
    fn list_of_api_tokens_has_a_heading_and_columns_without_spaces() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        Root::open(&config).unwrap();
        let scopes = [ApiScope::Nodes, ApiScope::Preheats].into_iter().collect();
        mint_api_token(&config, ApiTokenWish { scopes, ..wish("ci") }).unwrap();
        let lines = list_api_tokens(&config).unwrap();
        let words =
            |line: &str| line.split_whitespace().skip(1).take(3).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(
            lines.iter().map(|line| words(line)).collect::<Vec<_>>(),
            [["NAME", "ROLE", "SCOPES"], ["first", "admin", "all"], ["ci", "reader", "preheats,nodes"],]
        );
        assert!(lines[1].ends_with("for ever"), "{lines:?}");
        let starts: Vec<_> =
            ["ROLE", "admin", "reader"].iter().zip(&lines).map(|(word, line)| line.find(word)).collect();
        assert_eq!(starts, vec![starts[0]; 3], "{lines:?}");
    }
}
