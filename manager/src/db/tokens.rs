//! Join tokens and API tokens in SQLite.

use rusqlite::{Connection, Row, Transaction, params};

use super::StorageError;
use super::sqlite::{damaged, role};
use crate::core::access::{ApiScope, ApiToken, Grant, TOKENS_MAX};
use crate::core::tokens::TokenRecord;

pub(super) fn add_join(transaction: &Transaction<'_>, token: &TokenRecord) -> Result<(), StorageError> {
    transaction.execute(
        "INSERT INTO join_tokens VALUES (?1, ?2, ?3, ?4, ?5)",
        params![token.id, token.secret_hash, token.role.as_str(), token.expires_at, token.uses_left],
    )?;
    Ok(())
}

pub(super) fn join(connection: &Connection, id: &str) -> Result<Option<TokenRecord>, StorageError> {
    let mut select = connection.prepare_cached("SELECT * FROM join_tokens WHERE id = ?1")?;
    let mut rows = select.query_and_then([id], token)?;
    rows.next().transpose()
}

pub(super) fn take_use(transaction: &Transaction<'_>, id: &str, now: u64) -> Result<bool, StorageError> {
    let taken = transaction.execute(
        "UPDATE join_tokens SET uses_left = uses_left - 1 WHERE id = ?1 AND uses_left > 0 AND expires_at > ?2",
        params![id, now],
    )?;
    Ok(taken == 1)
}

pub(super) fn add_api(transaction: &Transaction<'_>, token: &ApiToken) -> Result<bool, StorageError> {
    let ApiToken { name, hash, grant, created_at, .. } = token;
    let count: usize = transaction.query_row("SELECT count(*) FROM api_tokens", [], |row| row.get(0))?;
    if count >= TOKENS_MAX {
        return Ok(false);
    }
    transaction.execute(
        "INSERT INTO api_tokens (hash, name, created_at, role, scopes, expires_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![hash, name, created_at, grant.role.as_str(), scopes_text(grant), grant.expires_at],
    )?;
    Ok(true)
}

pub(super) fn api(connection: &Connection, hash: &[u8; 32]) -> Result<Option<ApiToken>, StorageError> {
    let mut select = connection.prepare_cached("SELECT * FROM api_tokens WHERE hash = ?1")?;
    let mut rows = select.query_and_then([hash], api_token)?;
    rows.next().transpose()
}

pub(super) fn all_api(connection: &Connection) -> Result<Vec<ApiToken>, StorageError> {
    let mut select = connection.prepare_cached("SELECT * FROM api_tokens ORDER BY created_at, rowid")?;
    let rows = select.query_and_then([], api_token)?;
    rows.collect()
}

pub(super) fn remove_api(transaction: &Transaction<'_>, id: &str) -> Result<bool, StorageError> {
    Ok(transaction.execute("DELETE FROM api_tokens WHERE lower(hex(substr(hash, 1, 8))) = ?1", [id])? > 0)
}

pub(super) fn has_api(connection: &Connection) -> Result<bool, StorageError> {
    Ok(connection.query_row("SELECT EXISTS (SELECT 1 FROM api_tokens)", [], |row| row.get(0))?)
}

fn hash(bytes: &[u8]) -> Result<[u8; 32], StorageError> {
    bytes.try_into().map_err(|_| damaged("a hash of another length"))
}

fn token(row: &Row<'_>) -> Result<TokenRecord, StorageError> {
    Ok(TokenRecord {
        id: row.get("id")?,
        secret_hash: hash(&row.get::<_, Vec<u8>>("secret_hash")?)?,
        role: role(&row.get::<_, String>("role")?)?,
        expires_at: row.get("expires_at")?,
        uses_left: row.get("uses_left")?,
    })
}

fn api_token(row: &Row<'_>) -> Result<ApiToken, StorageError> {
    let scopes: String = row.get("scopes")?;
    let scopes = scopes.split_whitespace().map(|scope| scope.parse::<ApiScope>().map_err(damaged));
    let grant = Grant {
        role: row.get::<_, String>("role")?.parse().map_err(damaged)?,
        scopes: scopes.collect::<Result<_, _>>()?,
        expires_at: row.get("expires_at")?,
    };
    let hash = hash(&row.get::<_, Vec<u8>>("hash")?)?;
    Ok(ApiToken::new(row.get("name")?, hash, grant, row.get("created_at")?))
}

fn scopes_text(grant: &Grant) -> String {
    grant.scopes.iter().map(|scope| scope.as_str()).collect::<Vec<_>>().join(" ")
}
