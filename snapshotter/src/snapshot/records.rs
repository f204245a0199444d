//! What must survive a crash, in one SQLite file `<root>/records.db`: snapshots, chains of lazy layers, numbers of inodes,
//! and why images were decided as they were.
//!
//! Every row is a JSON body with a checksum; the other columns only find it. A file that is damaged, as a whole or in one
//! row, is moved aside at the start and a fresh one begun: a wrong row could show a container wrong files. Transactions
//! are short, and nothing but the disk is waited for within one.

mod damage;
mod decisions;
mod rows;

use std::io;
use std::path::{Path, PathBuf};

use darter_daemon::database;
use darter_types::ChainId;
use parking_lot::Mutex;
use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use rows::{Chain, ChainLayer, DecidedLayer, Decision, Row, Source};

use super::reserve::Reserve;
use crate::fs::{NUMBER_LIMIT, NumberKey, Numbers};
use crate::fuse::Live;

/// Counts changes of the tables that an earlier program would not survive; a file of a later version is refused, not touched.
const VERSION: u32 = 1;

const SCHEMA: &str = "
CREATE TABLE snapshots (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, parent INTEGER,
                        chain INTEGER, body TEXT NOT NULL, sum BLOB NOT NULL);
CREATE INDEX snapshots_parent ON snapshots (parent);
CREATE INDEX snapshots_chain ON snapshots (chain);
CREATE TABLE chains (dir INTEGER PRIMARY KEY AUTOINCREMENT, chain_id TEXT NOT NULL UNIQUE,
                     body TEXT NOT NULL, sum BLOB NOT NULL);
CREATE TABLE numbers (number INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL UNIQUE, sum BLOB NOT NULL);
CREATE TABLE decisions (image TEXT PRIMARY KEY, decided INTEGER NOT NULL, body TEXT NOT NULL, sum BLOB NOT NULL);
";

/// Came later; a program that doesn't know it leaves it alone.
const MOUNTS: &str =
    "CREATE TABLE IF NOT EXISTS mounts (name TEXT PRIMARY KEY, body TEXT NOT NULL, sum BLOB NOT NULL)";

#[derive(Debug, thiserror::Error)]
pub enum RecordsError {
    #[error("{}: {error}", path.display())]
    File { path: PathBuf, error: io::Error },
    #[error("{}: written by a later version of the program (state {found}, this one knows {VERSION})", path.display())]
    Later { path: PathBuf, found: u32 },
    #[error("damaged: {0}")]
    Damaged(String),
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
}

/// The file, open. One connection: what it does is short.
pub struct Records {
    db: Mutex<Connection>,
    reserve: Reserve,
}

/// A transaction, as the closures of [`Records::read`] and [`Records::write`] see it.
pub struct Tx<'a>(Transaction<'a>);

impl RecordsError {
    pub(super) fn is_full(&self) -> bool {
        let RecordsError::Sqlite(error) = self else { return false };
        error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull)
    }
}

type Result<T> = std::result::Result<T, RecordsError>;

impl Records {
    /// Opens the records below `root`. The flag says that nothing is known of what was there before: there were none, or
    /// damaged ones, which now lie beside them.
    pub fn open(root: &Path) -> Result<(Records, bool)> {
        let path = root.join("records.db");
        match Self::open_checked(&path) {
            Ok(opened) => Ok(opened),
            Err(error) if damage::is_damage(&error) => {
                let aside = damage::move_aside(&path)?;
                tracing::error!(%error, moved_to = %aside.display(),
                    "the records of snapshots were damaged; starting with none: remove and pull the images again");
                Ok((Self::open_checked(&path)?.0, true))
            }
            Err(error) => Err(error),
        }
    }

    /// The flag says that they are new.
    fn open_checked(path: &Path) -> Result<(Records, bool)> {
        let reserve = Reserve::new(path.parent().expect("a file in a directory"));
        reserve.see_to();
        let db = Connection::open(path)?;
        db.pragma_update(None, "journal_mode", "WAL")?;
        db.pragma_update(None, "synchronous", "FULL")?;
        let found = damage::version(&db, path)?;
        // Before anything is written: by a wrong header that would make it worse.
        damage::check(&db, path)?;
        if found == 0 {
            let mark = database::mark(VERSION);
            let versions = format!("PRAGMA user_version = {VERSION}; PRAGMA application_id = {mark};");
            db.execute_batch(&format!("BEGIN; {SCHEMA} {versions} COMMIT;"))?;
        }
        db.execute_batch(MOUNTS)?;
        damage::check_writing(&db)?;
        let records = Records { db: Mutex::new(db), reserve };
        records.read(|tx| tx.check_all())?;
        damage::mark(&records.db.lock());
        Ok((records, found == 0))
    }

    pub fn read<T, E: From<RecordsError>>(
        &self,
        work: impl FnOnce(&Tx<'_>) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        self.transaction(TransactionBehavior::Deferred, work)
    }

    /// What `work` did is on disk when this returns `Ok`; nothing of it happened if `work` fails.
    pub fn write<T, E: From<RecordsError>>(
        &self,
        work: impl FnOnce(&Tx<'_>) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        self.reserve.see_to();
        self.transaction(TransactionBehavior::Immediate, work)
    }

    fn transaction<T, E: From<RecordsError>>(
        &self,
        behavior: TransactionBehavior,
        work: impl FnOnce(&Tx<'_>) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        let mut db = self.db.lock();
        let tx = Tx(db.transaction_with_behavior(behavior).map_err(RecordsError::from)?);
        let out = work(&tx)?;
        tx.0.commit().map_err(RecordsError::from)?;
        Ok(out)
    }
}

impl Records {
    /// The kernel may know it longer than the log of what was written is whole: it goes into the database itself.
    fn new_number(&self, key: &[u8]) -> Result<i64> {
        let number = self.write(|tx| tx.number(key))?;
        let checkpoint = |row: &rusqlite::Row<'_>| row.get::<_, i64>(0);
        if let Err(error) = self.db.lock().query_row("PRAGMA wal_checkpoint(PASSIVE)", [], checkpoint) {
            tracing::warn!(%error, "the log of the records is not written back yet");
        }
        Ok(number)
    }
}

fn checksum(parts: &[&[u8]]) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
    }
    hasher.finalize().as_bytes()[..8].to_vec()
}

fn seal<T: Serialize>(key: &str, value: &T) -> (String, Vec<u8>) {
    let body = serde_json::to_string(value).expect("a row has only text keys");
    let sum = checksum(&[key.as_bytes(), body.as_bytes()]);
    (body, sum)
}

fn unseal<T: DeserializeOwned>(key: &str, body: &str, sum: &[u8]) -> Result<T> {
    if checksum(&[key.as_bytes(), body.as_bytes()]) != sum {
        return Err(RecordsError::Damaged(format!("the row of {key} doesn't match its checksum")));
    }
    serde_json::from_str(body).map_err(|error| RecordsError::Damaged(format!("the row of {key}: {error}")))
}

fn number_sum(number: i64, key: &[u8]) -> Vec<u8> {
    checksum(&[&number.to_le_bytes(), key])
}

fn checked_number(number: i64, key: &[u8], sum: &[u8]) -> Result<i64> {
    match number_sum(number, key) == sum {
        true => Ok(number),
        false => Err(RecordsError::Damaged(format!("number {number} doesn't match its checksum"))),
    }
}

impl Tx<'_> {
    fn rows<T: DeserializeOwned>(&self, sql: &str, args: impl rusqlite::Params) -> Result<Vec<T>> {
        let mut statement = self.0.prepare_cached(sql)?;
        let mut rows = statement.query(args)?;
        let mut out = Vec::new();
        while let Some(row) = rows.next()? {
            let (key, body, sum): (String, String, Vec<u8>) = (row.get(0)?, row.get(1)?, row.get(2)?);
            out.push(unseal(&key, &body, &sum)?);
        }
        Ok(out)
    }

    fn row<T: DeserializeOwned>(&self, sql: &str, args: impl rusqlite::Params) -> Result<Option<T>> {
        Ok(self.rows(sql, args)?.pop())
    }

    /// The row of that key. Its checksum is compared for the key that was asked for: should an index name the wrong row, none is shown.
    fn row_of<T: DeserializeOwned>(&self, key: &str, sql: &str) -> Result<Option<T>> {
        let mut statement = self.0.prepare_cached(sql)?;
        let found = statement.query_row([key], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
        found.map(|(body, sum): (String, Vec<u8>)| unseal(key, &body, &sum)).transpose()
    }

    fn check_all(&self) -> Result<()> {
        let snapshots: Vec<Row> = self.snapshots()?;
        for row in &snapshots {
            let parent = row.parent.map(|id| snapshots.binary_search_by_key(&id, |other| other.id));
            if matches!(parent, Some(Err(_))) {
                return Err(RecordsError::Damaged(format!("the parent of {:?} is missing", row.name)));
            }
        }
        self.chains()?;
        self.decisions()?;
        self.mounts()?;
        let mut statement = self.0.prepare("SELECT number, key, sum FROM numbers")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let key: Vec<u8> = row.get(1)?;
            checked_number(row.get(0)?, &key, &row.get::<_, Vec<u8>>(2)?)?;
        }
        Ok(())
    }

    /// All snapshots, by id: parents before children.
    pub fn snapshots(&self) -> Result<Vec<Row>> {
        self.rows("SELECT name, body, sum FROM snapshots ORDER BY id", [])
    }

    pub fn snapshot(&self, name: &str) -> Result<Option<Row>> {
        self.row_of(name, "SELECT body, sum FROM snapshots WHERE name = ?1")
    }

    pub fn snapshot_by_id(&self, id: i64) -> Result<Option<Row>> {
        self.row("SELECT name, body, sum FROM snapshots WHERE id = ?1", [id])
    }

    /// The snapshots that show this chain.
    pub fn snapshots_of_chain(&self, dir: u32) -> Result<Vec<Row>> {
        self.rows("SELECT name, body, sum FROM snapshots WHERE chain = ?1 ORDER BY id", [dir])
    }

    pub fn has_children(&self, id: i64) -> Result<bool> {
        let sql = "SELECT 1 FROM snapshots WHERE parent = ?1 LIMIT 1";
        Ok(self.0.query_row(sql, [id], |_| Ok(())).optional()?.is_some())
    }

    /// Records a new snapshot and gives it the next id, which was never used before.
    pub fn insert_snapshot(&self, row: &mut Row) -> Result<()> {
        self.0.execute(
            "INSERT INTO snapshots (name, parent, chain, body, sum) VALUES (?1, ?2, ?3, '', x'')",
            params![row.name, row.parent, row.chain],
        )?;
        row.id = self.0.last_insert_rowid();
        self.save_snapshot(row)
    }

    pub fn save_snapshot(&self, row: &Row) -> Result<()> {
        let (body, sum) = seal(&row.name, row);
        self.0.execute(
            "UPDATE snapshots SET name = ?2, parent = ?3, chain = ?4, body = ?5, sum = ?6 WHERE id = ?1",
            params![row.id, row.name, row.parent, row.chain, body, sum],
        )?;
        Ok(())
    }

    pub fn delete_snapshot(&self, id: i64) -> Result<()> {
        self.0.execute("DELETE FROM snapshots WHERE id = ?1", [id])?;
        Ok(())
    }

    pub fn chains(&self) -> Result<Vec<Chain>> {
        self.rows("SELECT chain_id, body, sum FROM chains ORDER BY dir", [])
    }

    pub fn chain(&self, dir: u32) -> Result<Option<Chain>> {
        self.row("SELECT chain_id, body, sum FROM chains WHERE dir = ?1", [dir])
    }

    /// The chain of the namespace with this chain ID; if there is none, `layers` are recorded as one, under a number never used before.
    pub fn chain_for(&self, namespace: &str, chain_id: ChainId, layers: &[ChainLayer]) -> Result<Chain> {
        let key = format!("{namespace} {chain_id}");
        let found: Option<Chain> = self.row_of(&key, "SELECT body, sum FROM chains WHERE chain_id = ?1")?;
        let mut chain = match found {
            Some(mut chain) => {
                chain.add_sources(layers);
                chain
            }
            None => {
                self.0.execute("INSERT INTO chains (chain_id, body, sum) VALUES (?1, '', x'')", [&key])?;
                Chain { dir: 0, chain_id, namespace: namespace.to_owned(), layers: layers.to_vec() }
            }
        };
        if chain.dir == 0 {
            let dir = self.0.last_insert_rowid();
            chain.dir = dir.try_into().map_err(|_| RecordsError::Damaged(format!("chain number {dir}")))?;
        }
        let (body, sum) = seal(&key, &chain);
        self.0
            .execute("UPDATE chains SET body = ?2, sum = ?3 WHERE dir = ?1", params![chain.dir, body, sum])?;
        Ok(chain)
    }

    pub fn delete_chain(&self, dir: u32) -> Result<()> {
        self.0.execute("DELETE FROM chains WHERE dir = ?1", [dir])?;
        Ok(())
    }

    fn mounts(&self) -> Result<Vec<Live>> {
        self.rows("SELECT name, body, sum FROM mounts", [])
    }

    /// The mount that an earlier process left under this name. It stands in the records whose inode numbers it shows, so that
    /// nobody goes on with it whose numbers mean something else.
    pub fn mount(&self, name: &str) -> Result<Option<Live>> {
        self.row_of(name, "SELECT body, sum FROM mounts WHERE name = ?1")
    }

    pub fn save_mount(&self, name: &str, live: &Live) -> Result<()> {
        let (body, sum) = seal(name, live);
        let sql = "INSERT OR REPLACE INTO mounts (name, body, sum) VALUES (?1, ?2, ?3)";
        self.0.execute(sql, params![name, body, sum])?;
        Ok(())
    }

    fn known_number(&self, key: &[u8]) -> Result<Option<i64>> {
        // The index alone would answer for the number; the checksum stands in the table.
        let mut statement = self.0.prepare_cached("SELECT number, sum FROM numbers WHERE key = ?1")?;
        let found = statement.query_row([key], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
        found.map(|(number, sum): (i64, Vec<u8>)| checked_number(number, key, &sum)).transpose()
    }

    fn number(&self, key: &[u8]) -> Result<i64> {
        if let Some(number) = self.known_number(key)? {
            return Ok(number);
        }
        self.0.execute("INSERT INTO numbers (key, sum) VALUES (?1, x'')", [key])?;
        let number = self.0.last_insert_rowid();
        let sum = number_sum(number, key);
        self.0.execute("UPDATE numbers SET sum = ?2 WHERE number = ?1", params![number, sum])?;
        Ok(number)
    }
}

impl Numbers for Records {
    fn number(&self, key: &NumberKey) -> io::Result<u32> {
        let bytes = number_key(key);
        let known = self.read(|tx| tx.known_number(&bytes)).map_err(io::Error::other)?;
        let number = match known {
            Some(number) => number,
            None => self.new_number(&bytes).map_err(io::Error::other)?,
        };
        u32::try_from(number)
            .ok()
            .filter(|number| *number < NUMBER_LIMIT)
            .ok_or_else(|| io::Error::other("the numbers for layers and trees are used up"))
    }
}

fn number_key(key: &NumberKey) -> Vec<u8> {
    let (tag, hash) = match key {
        NumberKey::Layer { root, base } => (u8::from(*base), root.as_bytes()),
        NumberKey::Tree(hash) => (2, hash.as_bytes()),
    };
    [&[tag], &hash[..]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Kind;
    use darter_types::{Hash, RootHash};
    use std::os::unix::fs::FileExt;

    fn row(name: &str) -> Row {
        Row::new(name, Kind::Active, None, Default::default(), 7)
    }

    #[test]
    fn numbers_are_sequential_and_survive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let layer = |byte, base| NumberKey::Layer { root: RootHash(Hash::from_bytes([byte; 32])), base };
        {
            let (records, _) = Records::open(dir.path()).unwrap();
            assert_eq!(records.number(&layer(1, false)).unwrap(), 1);
            assert_eq!(records.number(&layer(1, true)).unwrap(), 2);
            assert_eq!(records.number(&layer(1, false)).unwrap(), 1);
        }
        let (records, damaged) = Records::open(dir.path()).unwrap();
        assert!(!damaged);
        assert_eq!(records.number(&layer(1, true)).unwrap(), 2);
        assert_eq!(records.number(&NumberKey::Tree(Hash::from_bytes([1; 32]))).unwrap(), 3);
    }

    #[test]
    fn ids_are_never_used_again() {
        let dir = tempfile::tempdir().unwrap();
        let (records, _) = Records::open(dir.path()).unwrap();
        let mut a = row("a");
        records.write(|tx| tx.insert_snapshot(&mut a)).unwrap();
        records.write(|tx| tx.delete_snapshot(a.id)).unwrap();
        let mut b = row("b");
        records.write(|tx| tx.insert_snapshot(&mut b)).unwrap();
        assert!(b.id > a.id);
    }

    #[test]
    fn a_failed_transaction_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (records, _) = Records::open(dir.path()).unwrap();
        let failed: Result<()> = records.write(|tx| {
            tx.insert_snapshot(&mut row("a"))?;
            Err(RecordsError::Damaged("on purpose".into()))
        });
        assert!(failed.is_err());
        assert!(records.read(|tx| tx.snapshot("a")).unwrap().is_none());
    }

    #[test]
    fn a_flipped_bit_in_a_row_is_found_at_the_start() {
        let dir = tempfile::tempdir().unwrap();
        {
            let (records, _) = Records::open(dir.path()).unwrap();
            records.write(|tx| tx.insert_snapshot(&mut row("some-name-to-find"))).unwrap();
            records.db.lock().pragma_update(None, "wal_checkpoint", "TRUNCATE").ok();
        }
        let path = dir.path().join("records.db");
        let bytes = std::fs::read(&path).unwrap();
        let at = bytes.windows(8).position(|window| window == b"\"active\"").unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(b"b", at as u64 + 1).unwrap();
        let (records, damaged) = Records::open(dir.path()).unwrap();
        assert!(damaged);
        assert!(records.read(|tx| tx.snapshots()).unwrap().is_empty());
    }

    #[test]
    fn a_number_survives_the_loss_of_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let (records, is_new) = Records::open(dir.path()).unwrap();
        assert!(is_new);
        let key = |n: u8| NumberKey::Tree(Hash::from_bytes([n; 32]));
        assert_eq!(records.number(&key(1)).unwrap(), 1);
        // What a killed process leaves, but for the log.
        let left = tempfile::tempdir().unwrap();
        std::fs::copy(dir.path().join("records.db"), left.path().join("records.db")).unwrap();
        let (records, is_new) = Records::open(left.path()).unwrap();
        assert!(!is_new);
        assert_eq!(records.number(&key(2)).unwrap(), 2, "the first number is given out for ever");
    }

    #[test]
    fn a_file_that_is_no_database_is_moved_aside() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("records.db"), vec![b'x'; 10_000]).unwrap();
        let (_, damaged) = Records::open(dir.path()).unwrap();
        assert!(damaged);
        let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(names.iter().any(|name| name.to_string_lossy().contains("damaged")), "{names:?}");
    }
}
