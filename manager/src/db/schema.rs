//! The tables, version by version. A step that was released is never changed; a change is a step of its own.

use darter_daemon::database::{self, Version};
use rusqlite::Connection;

use super::StorageError;

const STEPS: &[&str] = &[FIRST, API_TOKENS, PARTS, JOBS, CERTIFIED, LIMITS, NODE_PARTS];

const FIRST: &str = "
    CREATE TABLE join_tokens (
        id          TEXT PRIMARY KEY,
        secret_hash BLOB NOT NULL,
        role        TEXT NOT NULL,
        expires_at  INTEGER NOT NULL,
        uses_left   INTEGER NOT NULL CHECK (uses_left >= 0)
    ) STRICT;
    CREATE TABLE api_tokens (
        hash       BLOB PRIMARY KEY,
        name       TEXT NOT NULL,
        created_at INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE members (
        role      TEXT NOT NULL,
        node      TEXT NOT NULL,
        address   TEXT NOT NULL DEFAULT '',
        zone      TEXT NOT NULL DEFAULT '',
        version   TEXT NOT NULL DEFAULT '',
        last_seen INTEGER,
        serial    TEXT NOT NULL DEFAULT '',
        revoked   INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (role, node)
    ) STRICT;
    CREATE TABLE preheats (
        id         TEXT PRIMARY KEY,
        image      TEXT NOT NULL,
        platform   TEXT,
        private    INTEGER NOT NULL,
        state      TEXT NOT NULL,
        seed       TEXT,
        error      TEXT,
        created_at INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE preheat_layers (
        preheat  TEXT NOT NULL REFERENCES preheats (id) ON DELETE CASCADE,
        position INTEGER NOT NULL,
        diff_id  BLOB NOT NULL,
        blob     BLOB NOT NULL,
        size     INTEGER NOT NULL,
        read     INTEGER NOT NULL,
        done     INTEGER NOT NULL,
        error    TEXT,
        PRIMARY KEY (preheat, position)
    ) STRICT;
    CREATE INDEX preheats_by_state ON preheats (state);
    CREATE TABLE audit (
        at      INTEGER NOT NULL,
        actor   TEXT NOT NULL,
        action  TEXT NOT NULL,
        subject TEXT NOT NULL
    ) STRICT;
";

/// Tokens of before may do everything, for ever, as they could.
const API_TOKENS: &str = "
    ALTER TABLE api_tokens ADD COLUMN role TEXT NOT NULL DEFAULT 'admin';
    ALTER TABLE api_tokens ADD COLUMN scopes TEXT NOT NULL DEFAULT '';
    ALTER TABLE api_tokens ADD COLUMN expires_at INTEGER;
";

/// Orders have parts, and parts layers. An order of before has one part.
const PARTS: &str = r#"
    ALTER TABLE preheats ADD COLUMN scope TEXT NOT NULL DEFAULT '"one-seed"';
    ALTER TABLE preheats ADD COLUMN timeout_seconds INTEGER NOT NULL DEFAULT 3600;
    ALTER TABLE preheats ADD COLUMN ended_at INTEGER;
    CREATE TABLE preheat_parts (
        preheat TEXT NOT NULL REFERENCES preheats (id) ON DELETE CASCADE,
        part    INTEGER NOT NULL,
        image   TEXT NOT NULL,
        pinned  TEXT,
        state   TEXT NOT NULL,
        seed    TEXT,
        error   TEXT,
        PRIMARY KEY (preheat, part)
    ) STRICT;
    INSERT INTO preheat_parts SELECT id, 0, image, NULL, state, seed, error FROM preheats;
    CREATE TABLE part_layers (
        preheat  TEXT NOT NULL,
        part     INTEGER NOT NULL,
        position INTEGER NOT NULL,
        diff_id  BLOB NOT NULL,
        blob     BLOB NOT NULL,
        size     INTEGER NOT NULL,
        read     INTEGER NOT NULL,
        done     INTEGER NOT NULL,
        error    TEXT,
        PRIMARY KEY (preheat, part, position),
        FOREIGN KEY (preheat, part) REFERENCES preheat_parts (preheat, part) ON DELETE CASCADE
    ) STRICT;
    INSERT INTO part_layers SELECT preheat, 0, position, diff_id, blob, size, read, done, error FROM preheat_layers;
    DROP TABLE preheat_layers;
    ALTER TABLE preheats DROP COLUMN image;
    ALTER TABLE preheats DROP COLUMN seed;
"#;

/// Numbers are never given twice: who asks for an old job must not be shown another.
const JOBS: &str = "
    CREATE TABLE jobs (
        number  INTEGER PRIMARY KEY AUTOINCREMENT,
        preheat TEXT NOT NULL REFERENCES preheats (id) ON DELETE CASCADE,
        bio     TEXT NOT NULL,
        user_id INTEGER,
        shown   TEXT NOT NULL
    ) STRICT;
    CREATE INDEX jobs_by_preheat ON jobs (preheat);
";

/// Until when the newest certificate of a member lives, as far as that is known.
const CERTIFIED: &str = "
    ALTER TABLE members ADD COLUMN certified_until INTEGER NOT NULL DEFAULT 0;
";

/// Bytes per second. Those for all members have an empty role and name.
const LIMITS: &str = "
    CREATE TABLE limits (
        role TEXT NOT NULL,
        node TEXT NOT NULL,
        kind TEXT NOT NULL,
        rate INTEGER NOT NULL CHECK (rate >= 0),
        PRIMARY KEY (role, node, kind)
    ) STRICT;
";

/// Parts are for nodes, too, whose name is in the column `seed` then. They are told where a seed found the layers.
const NODE_PARTS: &str = "
    ALTER TABLE preheat_parts ADD COLUMN role TEXT NOT NULL DEFAULT 'seed';
    ALTER TABLE preheat_parts ADD COLUMN repository TEXT;
    ALTER TABLE preheats ADD COLUMN away TEXT NOT NULL DEFAULT '[]';
";

fn newest() -> u32 {
    u32::try_from(STEPS.len()).expect("there are few steps")
}

/// The steps that the database has taken; an error if a later program has it, or if its header can't be.
pub(super) fn version(connection: &Connection) -> Result<u32, StorageError> {
    let number = |pragma: &str| connection.query_row(&format!("PRAGMA {pragma}"), [], |row| row.get(0));
    let known = newest();
    match database::version(number("user_version")?, number("application_id")?, known) {
        Version::Known(found) => Ok(found),
        Version::Later(found) => Err(StorageError::Newer { found, known }),
        Version::Damaged => {
            Err(StorageError::Damaged("the two versions in its header don't agree".to_owned()))
        }
    }
}

/// Brings the database to the newest version, each step whole or not at all.
pub(super) fn migrate(connection: &mut Connection) -> Result<(), StorageError> {
    // Taken for writing at once, so that two programs that start together don't take the same step.
    let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    for step in &STEPS[version(&transaction)? as usize..] {
        transaction.execute_batch(step)?;
    }
    transaction.pragma_update(None, "user_version", newest())?;
    transaction.pragma_update(None, "application_id", database::mark(newest()))?;
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_migration_changes_nothing() {
        let mut connection = Connection::open_in_memory().unwrap();
        migrate(&mut connection).unwrap();
        migrate(&mut connection).unwrap();
    }

    #[test]
    fn token_of_the_first_schema_still_does_everything() {
        let mut connection = Connection::open_in_memory().unwrap();
        connection.execute_batch(FIRST).unwrap();
        connection.pragma_update(None, "user_version", 1).unwrap();
        connection.execute("INSERT INTO api_tokens VALUES (x'00', 'first', 5)", []).unwrap();
        migrate(&mut connection).unwrap();
        let token: (String, String, Option<u64>) = connection
            .query_row("SELECT role, scopes, expires_at FROM api_tokens", [], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?))
            })
            .unwrap();
        assert_eq!(token, ("admin".to_owned(), String::new(), None));
    }

    #[test]
    fn order_of_the_first_schema_is_kept_with_its_layers() {
        let mut connection = Connection::open_in_memory().unwrap();
        connection.pragma_update(None, "foreign_keys", true).unwrap();
        connection.execute_batch(FIRST).unwrap();
        connection.pragma_update(None, "user_version", 1).unwrap();
        let rows = "INSERT INTO preheats VALUES ('p', 'r.example/a', NULL, 0, 'failed', 'seed-1', 'no', 5);
            INSERT INTO preheat_layers VALUES ('p', 0, x'00', x'01', 10, 3, 0, NULL);
            INSERT INTO preheat_layers VALUES ('p', 1, x'02', x'03', 20, 20, 1, NULL);";
        connection.execute_batch(rows).unwrap();
        migrate(&mut connection).unwrap();
        let select = "SELECT p.scope, q.image, q.role || ' ' || q.seed, q.error, sum(l.size), sum(l.read) FROM preheats p
            JOIN preheat_parts q ON q.preheat = p.id JOIN part_layers l ON l.preheat = p.id AND l.part = q.part";
        let found: (String, String, String, String, u64, u64) = connection
            .query_row(select, [], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?, row.get(5)?))
            })
            .unwrap();
        let words = ["\"one-seed\"", "r.example/a", "seed seed-1", "no"].map(str::to_owned);
        let [scope, image, seed, error] = words;
        assert_eq!(found, (scope, image, seed, error, 30, 23));
    }

    /// By a bit of its version it seems to have taken fewer steps than it has.
    #[test]
    fn step_that_was_taken_already_is_damage() {
        for found in 1..newest() {
            let mut connection = Connection::open_in_memory().unwrap();
            migrate(&mut connection).unwrap();
            connection.pragma_update(None, "user_version", found).unwrap();
            connection.pragma_update(None, "application_id", 0).unwrap();
            let error = migrate(&mut connection).unwrap_err();
            assert!(crate::db::aside::is_damage(&error), "{found}: {error}");
        }
    }

    #[test]
    fn database_of_a_later_version_is_left_alone() {
        let mut connection = Connection::open_in_memory().unwrap();
        connection.pragma_update(None, "user_version", 99).unwrap();
        connection.pragma_update(None, "application_id", database::mark(99)).unwrap();
        assert!(matches!(migrate(&mut connection), Err(StorageError::Newer { found: 99, .. })));
    }
}
