//! A database that is damaged: put aside, so that the manager starts without it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, ErrorCode};

use super::StorageError;

/// Reads all of it once.
pub(super) fn check(connection: &Connection) -> Result<(), StorageError> {
    let words: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if words == "ok" { Ok(()) } else { Err(StorageError::Damaged(words)) }
}

/// Whether the file itself is at fault, not whoever opens it.
pub(super) fn is_damage(error: &StorageError) -> bool {
    match error {
        StorageError::Damaged(_) => true,
        StorageError::Sqlite(error) => {
            let words = error.to_string();
            matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
                || words.contains("no such")
                || words.contains("already exists")
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
