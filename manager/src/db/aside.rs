//! A database that is damaged: put aside, so that the manager starts without it.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use darter_daemon::database;
use nix::unistd::{AccessFlags, access};
use rusqlite::{Connection, MAIN_DB};

use super::sqlite::damaged;
use super::{StorageError, limits, orders, schema, tokens};

/// Reads all of it once, and compares each index with its table. Before anything is written, which a wrong header would make worse.
pub(super) fn check(connection: &Connection) -> Result<(), StorageError> {
    let is_ours = connection.path().is_some_and(|path| access(path, AccessFlags::W_OK).is_ok());
    if connection.is_readonly(MAIN_DB)? && is_ours {
        return Err(StorageError::Damaged("its header says that it can't be written".to_owned()));
    }
    let words: String = connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
    if words == "ok" { Ok(()) } else { Err(StorageError::Damaged(words)) }
}

/// Reads what the manager can't start without, from tables that are those of this version.
pub(super) fn check_start(connection: &Connection) -> Result<(), StorageError> {
    let mut right = Connection::open_in_memory()?;
    schema::migrate(&mut right)?;
    if let Some((table, column)) = columns(&right)?.difference(&columns(connection)?).next() {
        return Err(damaged(format_args!("no column {column} in {table}")));
    }
    // Its numbers are counted in a table of SQLite's own, which is else not looked at.
    connection.prepare("INSERT INTO jobs DEFAULT VALUES")?;
    tokens::has_api(connection)?;
    limits::all(connection)?;
    orders::unfinished(connection).map(drop)
}

/// Each column behind its table's name.
fn columns(connection: &Connection) -> rusqlite::Result<BTreeSet<(String, String)>> {
    let sql = "SELECT kept.name, found.name FROM sqlite_schema kept JOIN pragma_table_info(kept.name) found
               WHERE kept.type = 'table'";
    let mut select = connection.prepare(sql)?;
    let rows = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    rows.collect()
}

/// Whether the file itself is at fault, not whoever opens it.
pub(super) fn is_damage(error: &StorageError) -> bool {
    use rusqlite::Error::{FromSqlConversionFailure, IntegralValueOutOfRange, InvalidColumnType, Utf8Error};
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase, TooBig};
    match error {
        StorageError::Damaged(_) => true,
        StorageError::Sqlite(
            FromSqlConversionFailure(..)
            | IntegralValueOutOfRange(..)
            | InvalidColumnType(..)
            | Utf8Error(..),
        ) => true,
        StorageError::Sqlite(error) => {
            matches!(error.sqlite_error_code(), Some(DatabaseCorrupt | NotADatabase | TooBig))
                || database::tells_damage(&error.to_string())
        }
        StorageError::Newer { .. } => false,
    }
}

/// Renames the file to `<name>.damaged-<seconds since 1970>`, and removes what belongs to it.
pub(super) fn put(path: &Path) -> io::Result<PathBuf> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let aside = path.with_added_extension(format!("damaged-{seconds}"));
    std::fs::rename(path, &aside)?;
    for companion in ["-wal", "-shm"] {
        let mut name = path.as_os_str().to_owned();
        name.push(companion);
        match std::fs::remove_file(&name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(aside)
}

#[cfg(test)]
mod tests {
    use darter_types::{RateKind, Rates, Role};

    use super::*;
    use crate::core::limits::Whose;
    use crate::core::tokens::TokenRecord;
    use crate::db::{Sqlite, Storage};

    const ID: &str = "some-token";

    fn token(id: &str) -> TokenRecord {
        TokenRecord {
            id: id.to_owned(),
            secret_hash: [7; 32],
            role: Role::Seed,
            expires_at: 100,
            uses_left: 3,
        }
    }

    fn file(folder: &Path) -> PathBuf {
        folder.join("manager.db")
    }

    fn was_put_aside(folder: &Path) -> bool {
        let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        names.into_iter().any(|name| name.to_string_lossy().contains("damaged-"))
    }

    /// With a token and a limit, as a manager that was stopped leaves it.
    fn whole() -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let storage = Sqlite::open(&file(folder.path())).unwrap();
        storage.add_join_token(&token(ID)).unwrap();
        let rates = Rates::default().with(RateKind::Upload, Some(200_000));
        storage.set_limits(&Whose::Cluster, &rates).unwrap();
        drop(storage);
        std::fs::read(file(folder.path())).unwrap()
    }

    /// A manager starts with these bytes and can write; it knows all that there was, or nothing.
    fn starts_with(bytes: &[u8], what: &str) {
        let folder = tempfile::tempdir().unwrap();
        let path = file(folder.path());
        std::fs::write(&path, bytes).unwrap();
        let storage = Sqlite::open(&path).unwrap_or_else(|error| panic!("{what}: {error}"));
        let known = storage.join_token(ID).unwrap_or_else(|error| panic!("{what}: {error}"));
        let kept = (!was_put_aside(folder.path())).then(|| token(ID));
        assert_eq!(known, kept, "{what}");
        storage.add_join_token(&token("u")).unwrap_or_else(|error| panic!("{what}: {error}"));
        drop(storage);
        let again = Sqlite::open(&path).unwrap();
        assert_eq!(again.join_token("u").unwrap(), Some(token("u")), "{what}");
    }

    #[test]
    fn no_flipped_bit_of_the_header_keeps_the_manager_from_starting_or_writing() {
        let whole = whole();
        for byte in 0..100 {
            // Each bit of what decides anything: page size, versions of the format and ours; of the rest, whose bits are alike, some.
            let decides = [16..20, 44..48, 56..64, 68..72].iter().any(|range| range.contains(&byte));
            for bit in (0..8).filter(|bit| decides || [0, 5].contains(bit)) {
                let mut bytes = whole.clone();
                bytes[byte] ^= 1 << bit;
                starts_with(&bytes, &format!("bit {bit} of byte {byte}"));
            }
        }
    }

    /// Wherever `text` stands, its byte `at` is another.
    fn with_another(whole: &[u8], text: &[u8], at: usize, mask: u8) -> Vec<u8> {
        let mut bytes = whole.to_vec();
        let found = whole.windows(text.len()).enumerate().filter(|(_, window)| *window == text);
        let places: Vec<usize> = found.map(|(at, _)| at).collect();
        assert!(!places.is_empty(), "there is no {}", String::from_utf8_lossy(text));
        places.into_iter().for_each(|place| bytes[place + at] ^= mask);
        bytes
    }

    #[test]
    fn what_the_start_reads_is_damaged_and_the_manager_starts() {
        let whole = whole();
        for (text, at, mask) in [
            // The kind of a limit.
            (&b"upload"[..], 0, 1),
            (b"upload", 0, 0x80),
            // A column's name, no word any more.
            (b"certified_until", 3, 0x80),
            // SQLite's own table, which it looks for by these very letters.
            (b"CREATE TABLE sqlite_sequence", 13, 0x20),
        ] {
            starts_with(&with_another(&whole, text, at, mask), &format!("{mask:#x} in {text:?}"));
        }
    }

    #[test]
    fn database_of_an_earlier_build_is_kept_and_marked() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(file(folder.path()), whole()).unwrap();
        let mark = |connection: &Connection| -> i32 {
            connection.query_row("PRAGMA application_id", [], |row| row.get(0)).unwrap()
        };
        let connection = Connection::open(file(folder.path())).unwrap();
        let right = mark(&connection);
        assert_ne!(right, 0);
        connection.pragma_update(None, "application_id", 0).unwrap();
        drop(connection);
        assert!(Sqlite::open(&file(folder.path())).unwrap().join_token(ID).unwrap().is_some());
        assert_eq!(mark(&Connection::open(file(folder.path())).unwrap()), right);
        assert!(!was_put_aside(folder.path()));
    }

    #[test]
    fn row_is_not_found_by_an_index_that_names_another() {
        let whole = whole();
        let id = ID.as_bytes();
        let found = whole.windows(id.len()).enumerate().filter(|(_, window)| *window == id);
        let places: Vec<usize> = found.map(|(at, _)| at).collect();
        assert!(places.len() >= 2, "it stands in the table, and in its index");
        for at in places {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            starts_with(&bytes, &format!("byte {at}"));
        }
    }
}
