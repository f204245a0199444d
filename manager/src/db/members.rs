//! Members in SQLite, and the certificates that they were given.

use darter_types::{NodeName, Role};
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};

use super::sqlite::{node, role};
use super::{Certified, MemberRecord, Sighting, StorageError};

pub(super) fn certify(transaction: &Transaction<'_>, certified: &Certified) -> Result<(), StorageError> {
    let Certified { member, serial, until } = certified;
    transaction.execute(
        "INSERT INTO members (role, node, serial, certified_until) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (role, node) DO UPDATE
         SET serial = excluded.serial, certified_until = excluded.certified_until",
        params![member.role.as_str(), member.node.as_str(), serial, until],
    )?;
    Ok(())
}

pub(super) fn see(transaction: &Transaction<'_>, sightings: &[Sighting]) -> Result<(), StorageError> {
    let mut upsert = transaction.prepare_cached(
        "INSERT INTO members (role, node, address, zone, version, last_seen) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
         ON CONFLICT (role, node) DO UPDATE SET address = excluded.address, zone = excluded.zone,
         version = excluded.version, last_seen = excluded.last_seen",
    )?;
    for Sighting { role, node, address, zone, version, at } in sightings {
        upsert.execute(params![role.as_str(), node.as_str(), address, zone, version, at])?;
    }
    Ok(())
}

pub(super) fn all(connection: &Connection) -> Result<Vec<MemberRecord>, StorageError> {
    let mut select = connection.prepare_cached("SELECT * FROM members ORDER BY role, node")?;
    let rows = select.query_and_then([], record)?;
    rows.collect()
}

pub(super) fn one(
    connection: &Connection,
    role: Role,
    node: &NodeName,
) -> Result<Option<MemberRecord>, StorageError> {
    let mut select = connection.prepare_cached("SELECT * FROM members WHERE role = ?1 AND node = ?2")?;
    let found = select.query_and_then([role.as_str(), node.as_str()], record)?.next();
    found.transpose()
}

pub(super) fn release(
    transaction: &Transaction<'_>,
    role: Role,
    node: &NodeName,
) -> Result<bool, StorageError> {
    let update = "UPDATE members SET certified_until = 0 WHERE role = ?1 AND node = ?2";
    Ok(transaction.execute(update, [role.as_str(), node.as_str()])? == 1)
}

pub(super) fn is_revoked(connection: &Connection, role: Role, node: &NodeName) -> Result<bool, StorageError> {
    let mut select =
        connection.prepare_cached("SELECT revoked FROM members WHERE role = ?1 AND node = ?2")?;
    let found = select.query_row([role.as_str(), node.as_str()], |row| row.get(0)).optional()?;
    Ok(found.unwrap_or(false))
}

pub(super) fn revoke(
    transaction: &Transaction<'_>,
    role: Role,
    node: &NodeName,
) -> Result<bool, StorageError> {
    let update = "UPDATE members SET revoked = 1 WHERE role = ?1 AND node = ?2";
    Ok(transaction.execute(update, [role.as_str(), node.as_str()])? == 1)
}

fn record(row: &Row<'_>) -> Result<MemberRecord, StorageError> {
    Ok(MemberRecord {
        role: role(&row.get::<_, String>("role")?)?,
        node: node(&row.get::<_, String>("node")?)?,
        address: row.get("address")?,
        zone: row.get("zone")?,
        version: row.get("version")?,
        last_seen: row.get("last_seen")?,
        serial: row.get("serial")?,
        certified_until: row.get("certified_until")?,
        revoked: row.get("revoked")?,
    })
}
