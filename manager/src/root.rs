//! The manager's folder: `manager.db`, `ca.pem`, `api-token`. `darter-manager token` works on it while the manager runs.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use darter_identity::{Authority, JoinToken};
use darter_types::{NodeName, Role};
use sha2::{Digest, Sha256};

use crate::core::tokens::TokenRecord;
use crate::db::{Audit, Sqlite, Store};
use crate::{Config, ManagerError};

/// A token that lived for ever would be a password.
const TOKEN_LIFE_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// The opened folder.
pub(crate) struct Root {
    pub(crate) authority: Arc<Authority>,
    pub(crate) store: Store,
}

/// Seconds since the epoch.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// How API tokens are stored and looked up.
pub(crate) fn api_token_hash(token: &str) -> [u8; 32] {
    Sha256::digest(token).into()
}

impl Root {
    /// Opens the folder, and makes it, the CA and the database when they are not there yet.
    pub(crate) fn open(config: &Config) -> Result<Self, ManagerError> {
        let at = |source| ManagerError::Root { path: config.root.clone(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(&config.root).map_err(at)?;
        // Two programs that start together on an empty folder must not make a CA each.
        let lock = File::create(config.root.join("lock")).map_err(at)?;
        lock.lock().map_err(at)?;
        let (ca, database) = (config.root.join("ca.pem"), config.root.join("manager.db"));
        // Another CA would lock every member out, one after the other.
        if database.exists() && !ca.exists() {
            return Err(ManagerError::NoCa { ca, database });
        }
        let authority = Arc::new(Authority::open(&ca, config.cluster()?)?);
        let store = Store::new(Arc::new(Sqlite::open(&database)?));
        Ok(Self { authority, store })
    }

    /// The API token in `api-token`, made when the database has none at all. `None` if the file was taken away since.
    pub(crate) fn first_api_token(&self, root: &Path) -> Result<Option<String>, ManagerError> {
        let path = root.join("api-token");
        let at = |source| ManagerError::Root { path: path.clone(), source };
        if self.store.blocking().has_api_tokens()? {
            return match std::fs::read_to_string(&path) {
                Ok(text) => Ok(Some(text.trim().to_owned())),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(at(error)),
            };
        }
        let mut secret = [0; 32];
        aws_lc_rs::rand::fill(&mut secret).map_err(|_| at(io::Error::other("no random bytes")))?;
        let token = hex::encode(secret);
        // The file first: a token that is in the database alone could never be used.
        darter_identity::write_private(&path, format!("{token}\n").as_bytes()).map_err(at)?;
        self.store.blocking().add_api_token("first", &api_token_hash(&token), now())?;
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

/// A new join token of the manager whose folder `config` names, whether it runs or not.
pub fn mint_token(config: &Config, role: Role, life: Duration, uses: u32) -> Result<JoinToken, ManagerError> {
    Root::open(config)?.mint_token("command line", role, life, uses)
}

/// From now on a join token may give this member's name to somebody else, whether the manager runs or not.
pub fn release(config: &Config, role: Role, node: &NodeName) -> Result<(), ManagerError> {
    let root = Root::open(config)?;
    let storage = root.store.blocking();
    if !storage.release(role, node)? {
        return Err(ManagerError::NoMember { role, node: node.clone() });
    }
    let (actor, subject) = ("command line".to_owned(), format!("{role} {node}"));
    storage.record(&Audit { at: now(), actor, action: "name released", subject })?;
    Ok(())
}
