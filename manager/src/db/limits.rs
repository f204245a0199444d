//! Limits in SQLite: a row for each that is set. Those for all members have an empty role and name.

use darter_types::{NodeName, RateKind, Rates, Role};
use rusqlite::{Connection, Transaction, params};

use super::StorageError;
use super::sqlite::damaged;
use crate::core::limits::{Table, Whose};

/// Puts these in place of those before.
pub(super) fn set(transaction: &Transaction<'_>, whose: &Whose, rates: &Rates) -> Result<(), StorageError> {
    let (role, node) = match whose {
        Whose::Cluster => ("", ""),
        Whose::Member(role, node) => (role.as_str(), node.as_str()),
    };
    transaction.execute("DELETE FROM limits WHERE role = ?1 AND node = ?2", [role, node])?;
    for kind in RateKind::ALL {
        if let Some(rate) = rates.get(kind) {
            let values = params![role, node, kind.as_str(), rate];
            transaction.execute("INSERT INTO limits VALUES (?1, ?2, ?3, ?4)", values)?;
        }
    }
    Ok(())
}

pub(super) fn all(connection: &Connection) -> Result<Table, StorageError> {
    let mut select = connection.prepare_cached("SELECT role, node, kind, rate FROM limits")?;
    let mut rows = select.query([])?;
    let mut table = Table::default();
    while let Some(row) = rows.next()? {
        let (role, node, kind): (String, String, String) = (row.get(0)?, row.get(1)?, row.get(2)?);
        let rates = match role.as_str() {
            "" => &mut table.cluster,
            _ => {
                let member: (Role, NodeName) =
                    (role.parse().map_err(damaged)?, node.parse().map_err(damaged)?);
                table.members.entry(member).or_default()
            }
        };
        rates.set(kind.parse::<RateKind>().map_err(damaged)?, Some(row.get(3)?));
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::db::schema::migrate;

    #[test]
    fn limits_are_replaced_as_a_whole() {
        let mut connection = Connection::open_in_memory().unwrap();
        migrate(&mut connection).unwrap();
        let seed: NodeName = "s".parse().unwrap();
        let whose = Whose::Member(Role::Seed, seed.clone());
        let rates = |kind| Rates::default().with(kind, Some(200_000));
        let transaction = connection.transaction().unwrap();
        set(&transaction, &Whose::Cluster, &rates(RateKind::Upload)).unwrap();
        set(&transaction, &whose, &rates(RateKind::Upload)).unwrap();
        set(&transaction, &whose, &rates(RateKind::Registry)).unwrap();
        transaction.commit().unwrap();
        let table = all(&connection).unwrap();
        assert_eq!(table.cluster, rates(RateKind::Upload));
        assert_eq!(table.of(Role::Seed, &seed), rates(RateKind::Registry));
        assert!(table.of(Role::Node, &seed).is_empty());
    }
}
