//! What tells a damaged file of records from a whole one when it is opened, and where a damaged one goes.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use darter_daemon::database::{self, Version};
use nix::unistd::{AccessFlags, access};
use rusqlite::{Connection, MAIN_DB};

use super::{RecordsError, Result, VERSION};

/// The version of the file, 0 for a new one.
pub(super) fn version(db: &Connection, path: &Path) -> Result<u32> {
    let number = |name| db.pragma_query_value(None, name, |row| row.get(0));
    match database::version(number("user_version")?, number("application_id")?, VERSION) {
        Version::Known(found) => Ok(found),
        Version::Later(found) => Err(RecordsError::Later { path: path.to_owned(), found }),
        Version::Damaged => {
            Err(RecordsError::Damaged("the two versions in its header don't agree".to_owned()))
        }
    }
}

/// Writes the version a second time into a file of which all is known to be right: an earlier build didn't, or that place was damaged.
/// What fails here, for want of room, is done at the next start.
pub(super) fn mark(db: &Connection) {
    let wanted = database::mark(VERSION);
    let found = db.pragma_query_value(None, "application_id", |row| row.get::<_, i32>(0));
    if found.is_ok_and(|found| found != wanted)
        && let Err(error) = db.pragma_update(None, "application_id", wanted)
    {
        tracing::debug!(%error, "the version of the records stands in one place only");
    }
}

/// Reads all of it once, and compares each index with its table: what is found by an index would be wrong without a word.
pub(super) fn check(db: &Connection, path: &Path) -> Result<()> {
    if db.is_readonly(MAIN_DB)? && access(path, AccessFlags::W_OK).is_ok() {
        return Err(RecordsError::Damaged("its header says that it can't be written".to_owned()));
    }
    let words: String = db.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
    if words == "ok" { Ok(()) } else { Err(RecordsError::Damaged(words)) }
}

/// Whether each table would take a row: those that count theirs lean on a table of SQLite's own, which is else not looked at.
pub(super) fn check_writing(db: &Connection) -> Result<()> {
    for table in ["snapshots", "chains", "numbers"] {
        db.prepare(&format!("INSERT INTO {table} DEFAULT VALUES"))?;
    }
    Ok(())
}

/// Whether the file itself is at fault, not whoever opens it.
pub(super) fn is_damage(error: &RecordsError) -> bool {
    use rusqlite::Error::{FromSqlConversionFailure, IntegralValueOutOfRange, InvalidColumnType, Utf8Error};
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase, TooBig};
    match error {
        RecordsError::Damaged(_) => true,
        RecordsError::Sqlite(
            FromSqlConversionFailure(..)
            | IntegralValueOutOfRange(..)
            | InvalidColumnType(..)
            | Utf8Error(..),
        ) => true,
        RecordsError::Sqlite(error) => {
            matches!(error.sqlite_error_code(), Some(DatabaseCorrupt | NotADatabase | TooBig))
                || database::tells_damage(&error.to_string())
        }
        RecordsError::File { .. } | RecordsError::Later { .. } => false,
    }
}

pub(super) fn move_aside(path: &Path) -> Result<PathBuf> {
    let failed = |error| RecordsError::File { path: path.to_owned(), error };
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs());
    let aside = path.with_extension(format!("db.damaged-{seconds}"));
    std::fs::rename(path, &aside).map_err(failed)?;
    for companion in ["-wal", "-shm"] {
        let mut name = path.as_os_str().to_owned();
        name.push(companion);
        match std::fs::remove_file(&name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
    }
    Ok(aside)
}

#[cfg(test)]
mod tests {
    use super::super::{Records, Row, number_key};
    use super::*;
    use crate::fs::{NumberKey, Numbers};
    use crate::snapshot::Kind;
    use darter_types::Hash;
    use rusqlite::ffi::ErrorCode;

    /// Of the layer that gets this number.
    fn key(number: u8) -> NumberKey {
        NumberKey::Tree(Hash::from_bytes([b'a' + number; 32]))
    }

    fn row(name: &str) -> Row {
        Row::new(name, Kind::Active, None, Default::default(), 7)
    }

    fn file(dir: &Path) -> PathBuf {
        dir.join("records.db")
    }

    /// A snapshot and three numbers, as the file that a stopped daemon leaves. The reserve isn't there: it would be made anew each time.
    fn whole() -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let (records, _) = Records::open(dir.path()).unwrap();
        records.write(|tx| tx.insert_snapshot(&mut row("some-snapshot"))).unwrap();
        (1..=3).for_each(|n| assert_eq!(records.number(&key(n)).unwrap(), u32::from(n)));
        drop(records);
        assert!(!file(dir.path()).with_extension("db-wal").exists(), "all is in the file itself");
        std::fs::read(file(dir.path())).unwrap()
    }

    /// The daemon starts with these bytes and can write; what it knows then is all that there was, or nothing.
    fn starts_with(bytes: &[u8], what: &str) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(file(dir.path()), bytes).unwrap();
        let (records, is_new) = Records::open(dir.path()).unwrap_or_else(|error| panic!("{what}: {error}"));
        let known = records.read(|tx| tx.snapshot("some-snapshot")).unwrap();
        assert_eq!(known.is_none(), is_new, "{what}");
        if is_new {
            assert!(records.read(|tx| tx.snapshots()).unwrap().is_empty(), "{what}");
        } else {
            (1..=3).for_each(|n| assert_eq!(records.number(&key(n)).unwrap(), u32::from(n), "{what}"));
        }
        let written = records.write(|tx| tx.insert_snapshot(&mut row("another")));
        written.unwrap_or_else(|error| panic!("{what}: {error}"));
        drop(records);
        let (records, is_new) = Records::open(dir.path()).unwrap();
        assert!(!is_new, "{what}: it was made anew, and is damaged again");
        assert!(records.read(|tx| tx.snapshot("another")).unwrap().is_some(), "{what}");
    }

    #[test]
    fn no_flipped_bit_of_the_header_keeps_the_daemon_from_starting_or_writing() {
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

    #[test]
    fn no_flipped_bit_of_an_index_gives_a_layer_another_number() {
        let whole = whole();
        let name = number_key(&key(2));
        let found = whole.windows(name.len()).enumerate().filter(|(_, window)| *window == name);
        let places: Vec<usize> = found.map(|(at, _)| at).collect();
        assert!(places.len() >= 2, "it stands in the table, and in its index");
        for at in places {
            // Before the key are the lengths; behind it is the number in the index, in the table the checksum.
            for byte in at - 6..at + name.len() + 2 {
                let mut bytes = whole.clone();
                bytes[byte] ^= 1;
                starts_with(&bytes, &format!("byte {byte}, with a key at {at}"));
            }
        }
    }

    #[test]
    fn an_index_that_is_damaged_while_the_daemon_runs_gives_no_number() {
        let dir = tempfile::tempdir().unwrap();
        let (records, _) = Records::open(dir.path()).unwrap();
        (1..=2).for_each(|n| assert_eq!(records.number(&key(n)).unwrap(), u32::from(n)));
        // The table's rows change places under the index, as if the index named the wrong ones.
        let swap =
            "UPDATE numbers SET number = 9 WHERE number = 1; UPDATE numbers SET number = 1 WHERE number = 2;";
        records.db.lock().execute_batch(swap).unwrap();
        for n in 1..=2 {
            let words = records.number(&key(n)).unwrap_err().to_string();
            assert!(words.contains("doesn't match its checksum"), "{words}");
        }
    }

    #[test]
    fn records_of_an_earlier_build_are_kept_and_marked() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(file(dir.path()), whole()).unwrap();
        let application_id = |db: &Connection| -> i32 {
            db.pragma_query_value(None, "application_id", |row| row.get(0)).unwrap()
        };
        let db = Connection::open(file(dir.path())).unwrap();
        assert_eq!(application_id(&db), database::mark(VERSION));
        db.pragma_update(None, "application_id", 0).unwrap();
        drop(db);
        let (records, is_new) = Records::open(dir.path()).unwrap();
        assert!(!is_new);
        assert!(records.read(|tx| tx.snapshot("some-snapshot")).unwrap().is_some());
        assert_eq!(application_id(&records.db.lock()), database::mark(VERSION));
    }

    #[test]
    fn a_later_version_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        drop(Records::open(dir.path()).unwrap());
        let db = Connection::open(file(dir.path())).unwrap();
        db.pragma_update(None, "user_version", VERSION + 1).unwrap();
        db.pragma_update(None, "application_id", database::mark(VERSION + 1)).unwrap();
        drop(db);
        assert!(matches!(Records::open(dir.path()), Err(RecordsError::Later { .. })));
        let files = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        assert!(!files.into_iter().any(|name| name.to_string_lossy().contains("damaged")));
    }

    #[test]
    fn a_full_disk_is_no_damage() {
        let full = rusqlite::ffi::Error { code: ErrorCode::DiskFull, extended_code: 13 };
        let full = rusqlite::Error::SqliteFailure(full, Some("database or disk is full".to_owned()));
        assert!(!is_damage(&RecordsError::Sqlite(full)));
    }
}
