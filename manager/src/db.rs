//! What the manager remembers, behind one trait: SQLite today, something that several managers share one day.
//!
//! Calls block for a short time: async code goes through [`Store`].

mod aside;
mod limits;
mod members;
mod orders;
mod schema;
mod sqlite;
mod tokens;

use std::sync::Arc;

use darter_identity::Member;
use darter_types::{NodeName, Rates, Role};

use crate::core::access::ApiToken;
use crate::core::harbor::Shown;
use crate::core::limits::{Table, Whose};
use crate::core::order::Preheat;
use crate::core::tokens::TokenRecord;

pub(crate) use sqlite::Sqlite;

#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error("the database: {0}")]
    Sqlite(#[from] rusqlite::Error),
    #[error(
        "the database was made by a later version of darter-manager (schema {found}, this one knows {known}): upgrade"
    )]
    Newer { found: u32, known: u32 },
    #[error("the database holds what it can't: {0}")]
    Damaged(String),
}

/// A member that joined, alive or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MemberRecord {
    pub(crate) role: Role,
    pub(crate) node: NodeName,
    pub(crate) address: String,
    pub(crate) zone: String,
    pub(crate) version: String,
    /// Seconds since the epoch; `None` if it never attended.
    pub(crate) last_seen: Option<u64>,
    /// Of its newest certificate, in hexadecimal.
    pub(crate) serial: String,
    /// When that ends, in seconds since the epoch; 0 if the name was released, or if that was not written down.
    pub(crate) certified_until: u64,
    pub(crate) revoked: bool,
}

/// A member's certificate, as it is recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Certified {
    pub(crate) member: Member,
    pub(crate) serial: String,
    /// Seconds since the epoch.
    pub(crate) until: u64,
}

/// Where a member is, by its own word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sighting {
    pub(crate) role: Role,
    pub(crate) node: NodeName,
    pub(crate) address: String,
    pub(crate) zone: String,
    pub(crate) version: String,
    pub(crate) at: u64,
}

/// A preheat that was ordered as Harbor does it: such orders have numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct JobRecord {
    pub(crate) number: i64,
    pub(crate) preheat: String,
    pub(crate) bio: String,
    pub(crate) user_id: Option<u32>,
    pub(crate) shown: Shown,
}

/// One line of the audit log: who did what to what. It never holds a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Audit {
    pub(crate) at: u64,
    pub(crate) actor: String,
    pub(crate) action: &'static str,
    pub(crate) subject: String,
}

pub(crate) trait Storage: Send + Sync + 'static {
    fn add_join_token(&self, token: &TokenRecord) -> Result<(), StorageError>;
    fn join_token(&self, id: &str) -> Result<Option<TokenRecord>, StorageError>;
    /// Takes one use of a token that has not expired at `now`; `false` if there was none left to take.
    fn take_use(&self, id: &str, now: u64) -> Result<bool, StorageError>;

    /// `false` if there are [`TOKENS_MAX`](crate::core::access::TOKENS_MAX) already.
    fn add_api_token(&self, token: &ApiToken) -> Result<bool, StorageError>;
    /// The API token with this hash, expired or not.
    fn api_token(&self, hash: &[u8; 32]) -> Result<Option<ApiToken>, StorageError>;
    /// All of them, the oldest first.
    fn api_tokens(&self) -> Result<Vec<ApiToken>, StorageError>;
    /// `false` if there is no such token.
    fn remove_api_token(&self, id: &str) -> Result<bool, StorageError>;
    fn has_api_tokens(&self) -> Result<bool, StorageError>;

    fn record_certificate(&self, certified: &Certified) -> Result<(), StorageError>;
    fn record_sightings(&self, sightings: &[Sighting]) -> Result<(), StorageError>;
    fn members(&self) -> Result<Vec<MemberRecord>, StorageError>;
    fn member(&self, role: Role, node: &NodeName) -> Result<Option<MemberRecord>, StorageError>;
    /// From now on the member's certificate keeps nobody from taking its name; `false` if there is no such member.
    fn release(&self, role: Role, node: &NodeName) -> Result<bool, StorageError>;
    fn is_revoked(&self, role: Role, node: &NodeName) -> Result<bool, StorageError>;
    /// `false` if there is no such member.
    fn revoke(&self, role: Role, node: &NodeName) -> Result<bool, StorageError>;

    /// Puts these limits in place of those before.
    fn set_limits(&self, whose: &Whose, rates: &Rates) -> Result<(), StorageError>;
    fn limits(&self) -> Result<Table, StorageError>;

    /// Writes an order with all its parts, new or not.
    fn put_preheat(&self, preheat: &Preheat) -> Result<(), StorageError>;
    /// Writes how far an order is, and of its parts these.
    fn put_parts(&self, preheat: &Preheat, parts: &[usize]) -> Result<(), StorageError>;
    fn preheat(&self, id: &str) -> Result<Option<Preheat>, StorageError>;
    /// The newest `limit` orders, newest first, without layers.
    fn preheats(&self, limit: usize) -> Result<Vec<Preheat>, StorageError>;
    /// How many orders are not over.
    fn open_preheats(&self) -> Result<u64, StorageError>;
    fn unfinished_preheats(&self) -> Result<Vec<Preheat>, StorageError>;

    /// Returns its number; the one in the record is not looked at.
    fn add_job(&self, job: &JobRecord) -> Result<i64, StorageError>;
    /// A job and what became of its order.
    fn job(&self, number: i64) -> Result<Option<(JobRecord, Preheat)>, StorageError>;

    fn record(&self, audit: &Audit) -> Result<(), StorageError>;
    /// A look at the database: whether the manager can work.
    fn healthy(&self) -> Result<(), StorageError>;
}

/// Storage for async code: each call runs on a thread for blocking work.
#[derive(Clone)]
pub(crate) struct Store(Arc<dyn Storage>);

impl Store {
    pub(crate) fn new(storage: Arc<dyn Storage>) -> Self {
        Self(storage)
    }

    pub(crate) async fn call<T, F>(&self, work: F) -> Result<T, StorageError>
    where
        T: Send + 'static,
        F: FnOnce(&dyn Storage) -> Result<T, StorageError> + Send + 'static,
    {
        let storage = self.0.clone();
        let done = tokio::task::spawn_blocking(move || work(storage.as_ref())).await;
        done.expect("storage does not panic, and its thread is not cancelled")
    }

    /// For callers that are not async.
    pub(crate) fn blocking(&self) -> &dyn Storage {
        self.0.as_ref()
    }
}
