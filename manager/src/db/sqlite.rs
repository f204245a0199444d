//! Storage in one SQLite file: write-ahead log, one connection.

use std::path::Path;
use std::time::Duration;

use darter_identity::attend::PreheatLayer;
use darter_types::{BlobDigest, DiffId, NodeName, Rates, Role};
use parking_lot::Mutex;
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};

use super::{
    Audit, Certified, JobRecord, MemberRecord, Sighting, Storage, StorageError, aside, limits, schema,
};
use crate::core::access::{ApiScope, ApiToken, Grant, TOKENS_MAX};
use crate::core::job::{Part, State};
use crate::core::limits::{Table, Whose};
use crate::core::order::{Preheat, Scope};
use crate::core::tokens::TokenRecord;

/// `darter-manager token` writes to the same file while the manager runs.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Finished orders that are remembered; the oldest go first.
const PREHEATS_MAX: u32 = 10_000;

/// Lines of the audit log; the oldest go first.
const AUDIT_MAX: u32 = 100_000;

pub(crate) struct Sqlite(Mutex<Connection>);

impl Sqlite {
    /// What is damaged is put aside, and a new one begun: without a manager nobody could join or be renewed.
    pub(crate) fn open(path: &Path) -> Result<Self, StorageError> {
        let open = || Self::prepare(Connection::open(path)?);
        let error = match open() {
            Err(error) if aside::is_damage(&error) => error,
            opened => return opened,
        };
        let moved_to = aside::put(path).map_err(damaged)?;
        tracing::error!(%error, moved_to = %moved_to.display(),
            "the database was damaged; starting with an empty one: tokens, orders and who was revoked are forgotten");
        open()
    }

    fn prepare(mut connection: Connection) -> Result<Self, StorageError> {
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        connection.pragma_update(None, "foreign_keys", true)?;
        schema::migrate(&mut connection)?;
        aside::check(&connection)?;
        Ok(Self(Mutex::new(connection)))
    }

    fn write<T>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> Result<T, StorageError>,
    ) -> Result<T, StorageError> {
        let mut connection = self.0.lock();
        let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let result = work(&transaction)?;
        transaction.commit()?;
        Ok(result)
    }
}

pub(super) fn damaged(error: impl std::fmt::Display) -> StorageError {
    StorageError::Damaged(error.to_string())
}

fn role(text: &str) -> Result<Role, StorageError> {
    text.parse().map_err(damaged)
}

fn node(text: &str) -> Result<NodeName, StorageError> {
    text.parse().map_err(damaged)
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

fn member(row: &Row<'_>) -> Result<MemberRecord, StorageError> {
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

fn state(row: &Row<'_>) -> Result<State, StorageError> {
    let state: String = row.get("state")?;
    State::ALL.into_iter().find(|known| known.as_str() == state).ok_or_else(|| damaged(state))
}

fn preheat(row: &Row<'_>) -> Result<Preheat, StorageError> {
    Ok(Preheat {
        id: row.get("id")?,
        platform: row.get("platform")?,
        scope: serde_json::from_str::<Scope>(&row.get::<_, String>("scope")?).map_err(damaged)?,
        timeout_seconds: row.get("timeout_seconds")?,
        private: row.get("private")?,
        state: state(row)?,
        error: row.get("error")?,
        created_at: row.get("created_at")?,
        ended_at: row.get("ended_at")?,
        away: serde_json::from_str(&row.get::<_, String>("away")?).map_err(damaged)?,
        parts: Vec::new(),
    })
}

fn part(row: &Row<'_>) -> Result<Part, StorageError> {
    let named = |column| Ok::<_, StorageError>(row.get::<_, Option<String>>(column)?);
    Ok(Part {
        image: row.get("image")?,
        pinned: named("pinned")?.as_deref().map(node).transpose()?,
        state: state(row)?,
        member: named("seed")?.as_deref().map(node).transpose()?,
        error: row.get("error")?,
        layers: Vec::new(),
        role: role(&row.get::<_, String>("role")?)?,
        repository: named("repository")?.map(|text| text.parse()).transpose().map_err(damaged)?,
    })
}

fn job(row: &Row<'_>) -> Result<JobRecord, StorageError> {
    Ok(JobRecord {
        number: row.get("number")?,
        preheat: row.get("preheat")?,
        bio: row.get("bio")?,
        user_id: row.get("user_id")?,
        shown: serde_json::from_str(&row.get::<_, String>("shown")?).map_err(damaged)?,
    })
}

fn layer(row: &Row<'_>) -> Result<PreheatLayer, StorageError> {
    Ok(PreheatLayer {
        diff_id: DiffId::from_slice(&row.get::<_, Vec<u8>>("diff_id")?).map_err(damaged)?,
        blob: BlobDigest::from_slice(&row.get::<_, Vec<u8>>("blob")?).map_err(damaged)?,
        size: row.get("size")?,
        read: row.get("read")?,
        done: row.get("done")?,
        error: row.get("error")?,
    })
}

fn parts(connection: &Connection, id: &str) -> Result<Vec<Part>, StorageError> {
    let mut select =
        connection.prepare_cached("SELECT * FROM preheat_parts WHERE preheat = ?1 ORDER BY part")?;
    let rows = select.query_and_then([id], part)?;
    rows.collect()
}

/// Fills in the layers of an order's parts.
fn add_layers(connection: &Connection, preheat: &mut Preheat) -> Result<(), StorageError> {
    let mut select =
        connection.prepare_cached("SELECT * FROM part_layers WHERE preheat = ?1 ORDER BY part, position")?;
    let rows = select.query_and_then([&preheat.id], |row| {
        Ok::<_, StorageError>((row.get::<_, usize>("part")?, layer(row)?))
    })?;
    for row in rows {
        let (part, layer) = row?;
        preheat.parts.get_mut(part).ok_or_else(|| damaged("a layer of no part"))?.layers.push(layer);
    }
    Ok(())
}

/// Orders that `select` finds, with their parts.
fn orders(
    connection: &Connection,
    select: &str,
    given: impl rusqlite::Params,
) -> Result<Vec<Preheat>, StorageError> {
    let mut select = connection.prepare_cached(select)?;
    let rows = select.query_and_then(given, preheat)?;
    let mut found: Vec<Preheat> = rows.collect::<Result<_, _>>()?;
    for preheat in &mut found {
        preheat.parts = parts(connection, &preheat.id)?;
    }
    Ok(found)
}

fn put_order(transaction: &Transaction<'_>, preheat: &Preheat) -> Result<(), StorageError> {
    let scope = serde_json::to_string(&preheat.scope).expect("a scope can be written");
    let away = serde_json::to_string(&preheat.away).expect("names can be written");
    transaction.execute(
        "INSERT INTO preheats (id, platform, scope, timeout_seconds, private, state, error, created_at, ended_at, away)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)
         ON CONFLICT (id) DO UPDATE SET state = excluded.state, error = excluded.error, ended_at = excluded.ended_at",
        params![
            preheat.id,
            preheat.platform,
            scope,
            preheat.timeout_seconds,
            preheat.private,
            preheat.state.as_str(),
            preheat.error,
            preheat.created_at,
            preheat.ended_at,
            away
        ],
    )?;
    if preheat.state.is_over() {
        transaction.execute(
            "DELETE FROM preheats WHERE state IN ('succeeded', 'failed', 'cancelled') AND rowid <=
             (SELECT rowid FROM preheats ORDER BY rowid DESC LIMIT 1 OFFSET ?1)",
            [PREHEATS_MAX],
        )?;
    }
    Ok(())
}

fn write_part(transaction: &Transaction<'_>, id: &str, at: usize, part: &Part) -> Result<(), StorageError> {
    let (pinned, member) =
        (part.pinned.as_ref().map(NodeName::as_str), part.member.as_ref().map(NodeName::as_str));
    let repository = part.repository.as_ref().map(ToString::to_string);
    transaction.execute(
        "INSERT INTO preheat_parts (preheat, part, image, pinned, state, seed, error, role, repository)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9) ON CONFLICT (preheat, part)
         DO UPDATE SET state = excluded.state, seed = excluded.seed, error = excluded.error,
         repository = excluded.repository",
        params![
            id,
            at,
            part.image,
            pinned,
            part.state.as_str(),
            member,
            part.error,
            part.role.as_str(),
            repository
        ],
    )?;
    transaction.execute("DELETE FROM part_layers WHERE preheat = ?1 AND part = ?2", params![id, at])?;
    let mut insert =
        transaction.prepare_cached("INSERT INTO part_layers VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)")?;
    for (position, layer) in part.layers.iter().enumerate() {
        let (diff_id, blob) = (layer.diff_id.as_bytes(), layer.blob.as_bytes());
        insert.execute(params![
            id,
            at,
            position,
            diff_id,
            blob,
            layer.size,
            layer.read,
            layer.done,
            layer.error
        ])?;
    }
    Ok(())
}

impl Storage for Sqlite {
    fn add_join_token(&self, token: &TokenRecord) -> Result<(), StorageError> {
        self.write(|t| {
            t.execute(
                "INSERT INTO join_tokens VALUES (?1, ?2, ?3, ?4, ?5)",
                params![token.id, token.secret_hash, token.role.as_str(), token.expires_at, token.uses_left],
            )?;
            Ok(())
        })
    }

    fn join_token(&self, id: &str) -> Result<Option<TokenRecord>, StorageError> {
        let connection = self.0.lock();
        let mut select = connection.prepare_cached("SELECT * FROM join_tokens WHERE id = ?1")?;
        let mut rows = select.query_and_then([id], token)?;
        rows.next().transpose()
    }

    fn take_use(&self, id: &str, now: u64) -> Result<bool, StorageError> {
        self.write(|t| {
            let taken = t.execute(
                "UPDATE join_tokens SET uses_left = uses_left - 1 WHERE id = ?1 AND uses_left > 0 AND expires_at > ?2",
                params![id, now],
            )?;
            Ok(taken == 1)
        })
    }

    fn add_api_token(&self, token: &ApiToken) -> Result<bool, StorageError> {
        let ApiToken { name, hash, grant, created_at, .. } = token;
        self.write(|t| {
            let count: usize = t.query_row("SELECT count(*) FROM api_tokens", [], |row| row.get(0))?;
            if count >= TOKENS_MAX {
                return Ok(false);
            }
            t.execute(
                "INSERT INTO api_tokens (hash, name, created_at, role, scopes, expires_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                params![hash, name, created_at, grant.role.as_str(), scopes_text(grant), grant.expires_at],
            )?;
            Ok(true)
        })
    }

    fn api_token(&self, hash: &[u8; 32]) -> Result<Option<ApiToken>, StorageError> {
        let connection = self.0.lock();
        let mut select = connection.prepare_cached("SELECT * FROM api_tokens WHERE hash = ?1")?;
        let mut rows = select.query_and_then([hash], api_token)?;
        rows.next().transpose()
    }

    fn api_tokens(&self) -> Result<Vec<ApiToken>, StorageError> {
        let connection = self.0.lock();
        let mut select = connection.prepare_cached("SELECT * FROM api_tokens ORDER BY created_at, rowid")?;
        let rows = select.query_and_then([], api_token)?;
        rows.collect()
    }

    fn remove_api_token(&self, id: &str) -> Result<bool, StorageError> {
        self.write(|t| {
            Ok(t.execute("DELETE FROM api_tokens WHERE lower(hex(substr(hash, 1, 8))) = ?1", [id])? > 0)
        })
    }

    fn has_api_tokens(&self) -> Result<bool, StorageError> {
        let connection = self.0.lock();
        Ok(connection.query_row("SELECT EXISTS (SELECT 1 FROM api_tokens)", [], |row| row.get(0))?)
    }

    fn record_certificate(&self, certified: &Certified) -> Result<(), StorageError> {
        let Certified { member, serial, until } = certified;
        self.write(|t| {
            t.execute(
                "INSERT INTO members (role, node, serial, certified_until) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (role, node) DO UPDATE
                 SET serial = excluded.serial, certified_until = excluded.certified_until",
                params![member.role.as_str(), member.node.as_str(), serial, until],
            )?;
            Ok(())
        })
    }

    fn record_sightings(&self, sightings: &[Sighting]) -> Result<(), StorageError> {
        self.write(|t| {
            let mut upsert = t.prepare_cached(
                "INSERT INTO members (role, node, address, zone, version, last_seen) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
                 ON CONFLICT (role, node) DO UPDATE SET address = excluded.address, zone = excluded.zone,
                 version = excluded.version, last_seen = excluded.last_seen",
            )?;
            for Sighting { role, node, address, zone, version, at } in sightings {
                upsert.execute(params![role.as_str(), node.as_str(), address, zone, version, at])?;
            }
            Ok(())
        })
    }

    fn members(&self) -> Result<Vec<MemberRecord>, StorageError> {
        let connection = self.0.lock();
        let mut select = connection.prepare_cached("SELECT * FROM members ORDER BY role, node")?;
        let rows = select.query_and_then([], member)?;
        rows.collect()
    }

    fn member(&self, role: Role, node: &NodeName) -> Result<Option<MemberRecord>, StorageError> {
        let connection = self.0.lock();
        let mut select = connection.prepare_cached("SELECT * FROM members WHERE role = ?1 AND node = ?2")?;
        let found = select.query_and_then([role.as_str(), node.as_str()], member)?.next();
        found.transpose()
    }

    fn release(&self, role: Role, node: &NodeName) -> Result<bool, StorageError> {
        self.write(|t| {
            let update = "UPDATE members SET certified_until = 0 WHERE role = ?1 AND node = ?2";
            Ok(t.execute(update, [role.as_str(), node.as_str()])? == 1)
        })
    }

    fn is_revoked(&self, role: Role, node: &NodeName) -> Result<bool, StorageError> {
        let connection = self.0.lock();
        let mut select =
            connection.prepare_cached("SELECT revoked FROM members WHERE role = ?1 AND node = ?2")?;
        let found = select.query_row([role.as_str(), node.as_str()], |row| row.get(0)).optional()?;
        Ok(found.unwrap_or(false))
    }

    fn revoke(&self, role: Role, node: &NodeName) -> Result<bool, StorageError> {
        self.write(|t| {
            let update = "UPDATE members SET revoked = 1 WHERE role = ?1 AND node = ?2";
            Ok(t.execute(update, [role.as_str(), node.as_str()])? == 1)
        })
    }

    fn set_limits(&self, whose: &Whose, rates: &Rates) -> Result<(), StorageError> {
        self.write(|t| limits::set(t, whose, rates))
    }

    fn limits(&self) -> Result<Table, StorageError> {
        limits::all(&self.0.lock())
    }

    fn put_preheat(&self, preheat: &Preheat) -> Result<(), StorageError> {
        self.write(|t| {
            put_order(t, preheat)?;
            preheat.parts.iter().enumerate().try_for_each(|(at, part)| write_part(t, &preheat.id, at, part))
        })
    }

    fn put_parts(&self, preheat: &Preheat, parts: &[usize]) -> Result<(), StorageError> {
        self.write(|t| {
            put_order(t, preheat)?;
            parts.iter().try_for_each(|at| write_part(t, &preheat.id, *at, &preheat.parts[*at]))
        })
    }

    fn preheat(&self, id: &str) -> Result<Option<Preheat>, StorageError> {
        let connection = self.0.lock();
        let mut found = orders(&connection, "SELECT * FROM preheats WHERE id = ?1", [id])?;
        let Some(mut found) = found.pop() else { return Ok(None) };
        add_layers(&connection, &mut found)?;
        Ok(Some(found))
    }

    fn preheats(&self, limit: usize) -> Result<Vec<Preheat>, StorageError> {
        orders(&self.0.lock(), "SELECT * FROM preheats ORDER BY rowid DESC LIMIT ?1", [limit])
    }

    fn open_preheats(&self) -> Result<u64, StorageError> {
        let select = "SELECT count(*) FROM preheats WHERE state IN ('pending', 'running')";
        Ok(self.0.lock().query_row(select, [], |row| row.get(0))?)
    }

    fn unfinished_preheats(&self) -> Result<Vec<Preheat>, StorageError> {
        let select = "SELECT * FROM preheats WHERE state IN ('pending', 'running') ORDER BY rowid";
        let connection = self.0.lock();
        let mut found = orders(&connection, select, [])?;
        found.iter_mut().try_for_each(|preheat| add_layers(&connection, preheat))?;
        Ok(found)
    }

    fn add_job(&self, job: &JobRecord) -> Result<i64, StorageError> {
        let shown = serde_json::to_string(&job.shown).expect("arguments can be written");
        self.write(|t| {
            t.execute(
                "INSERT INTO jobs (preheat, bio, user_id, shown) VALUES (?1, ?2, ?3, ?4)",
                params![job.preheat, job.bio, job.user_id, shown],
            )?;
            Ok(t.last_insert_rowid())
        })
    }

    fn job(&self, number: i64) -> Result<Option<(JobRecord, Preheat)>, StorageError> {
        let connection = self.0.lock();
        let mut select = connection.prepare_cached("SELECT * FROM jobs WHERE number = ?1")?;
        let mut rows = select.query_and_then([number], job)?;
        let Some(job) = rows.next().transpose()? else { return Ok(None) };
        let mut found = orders(&connection, "SELECT * FROM preheats WHERE id = ?1", [&job.preheat])?;
        let mut preheat = found.pop().ok_or_else(|| damaged("a job without its order"))?;
        add_layers(&connection, &mut preheat)?;
        Ok(Some((job, preheat)))
    }

    fn record(&self, audit: &Audit) -> Result<(), StorageError> {
        self.write(|t| {
            let Audit { at, actor, action, subject } = audit;
            t.execute("INSERT INTO audit VALUES (?1, ?2, ?3, ?4)", params![at, actor, action, subject])?;
            let oldest = t.last_insert_rowid() - i64::from(AUDIT_MAX);
            t.execute("DELETE FROM audit WHERE rowid <= ?1", [oldest])?;
            Ok(())
        })
    }

    fn healthy(&self) -> Result<(), StorageError> {
        self.has_api_tokens().map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::access::ApiRole;

    fn storage() -> Sqlite {
        Sqlite::prepare(Connection::open_in_memory().unwrap()).unwrap()
    }

    #[test]
    fn a_damaged_database_is_put_aside_and_another_begun() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("manager.db");
        Sqlite::open(&path).unwrap().add_join_token(&a_token(1)).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for (round, len) in [100, whole.len() / 2, whole.len()].into_iter().enumerate() {
            let mut bytes = whole[..len].to_vec();
            bytes.iter_mut().skip(20).step_by(37).for_each(|byte| *byte ^= 0x55);
            std::fs::write(&path, bytes).unwrap();
            assert!(Sqlite::open(&path).unwrap().join_token("t").unwrap().is_none(), "round {round}");
        }
        let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        assert!(names.into_iter().any(|name| name.to_string_lossy().contains("damaged-")));
    }

    fn a_token(uses_left: u32) -> TokenRecord {
        TokenRecord { id: "t".to_owned(), secret_hash: [7; 32], role: Role::Seed, expires_at: 100, uses_left }
    }

    fn a_preheat() -> Preheat {
        let digest = darter_types::Digest::of(b"layer");
        let layer = PreheatLayer {
            diff_id: DiffId(digest),
            blob: BlobDigest(digest),
            size: 10,
            read: 3,
            done: false,
            error: Some("slow".to_owned()),
        };
        let part = Part {
            state: State::Running,
            member: Some("seed-1".parse().unwrap()),
            layers: vec![layer.clone(), layer],
            repository: Some("https://r.example/a".parse().unwrap()),
            ..Part::new("r.example/a:1".to_owned(), Role::Seed, None)
        };
        let pinned = Part::new("r.example/a:1".to_owned(), Role::Node, Some("node-2".parse().unwrap()));
        Preheat {
            id: "p".to_owned(),
            platform: Some("linux/amd64".to_owned()),
            scope: Scope::Percent(50),
            timeout_seconds: 60,
            private: true,
            state: State::Running,
            error: None,
            created_at: 5,
            ended_at: None,
            away: vec!["node-3".to_owned()],
            parts: vec![part, pinned],
        }
    }

    #[test]
    fn use_of_a_token_is_taken_as_often_as_there_are_uses() {
        let storage = storage();
        storage.add_join_token(&a_token(2)).unwrap();
        let taken: Vec<bool> = (0..3).map(|_| storage.take_use("t", 99).unwrap()).collect();
        assert_eq!(taken, [true, true, false]);
        assert_eq!(storage.join_token("t").unwrap().unwrap(), a_token(0));
        assert_eq!(storage.join_token("other").unwrap(), None);
    }

    #[test]
    fn use_of_an_expired_token_is_not_taken() {
        let storage = storage();
        storage.add_join_token(&a_token(1)).unwrap();
        assert!(!storage.take_use("t", 100).unwrap());
    }

    #[test]
    fn uses_are_not_taken_twice_by_two_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db");
        Sqlite::open(&path).unwrap().add_join_token(&a_token(10)).unwrap();
        let takers: Vec<_> = (0..4)
            .map(|_| {
                let storage = Sqlite::open(&path).unwrap();
                std::thread::spawn(move || (0..10).filter(|_| storage.take_use("t", 1).unwrap()).count())
            })
            .collect();
        assert_eq!(takers.into_iter().map(|taker| taker.join().unwrap()).sum::<usize>(), 10);
    }

    #[test]
    fn preheat_round_trips_with_its_parts_and_layers() {
        let storage = storage();
        let mut preheat = a_preheat();
        storage.put_preheat(&preheat).unwrap();
        assert_eq!(storage.preheat("p").unwrap().unwrap(), preheat);
        preheat.parts[0].layers.pop();
        preheat.parts[0].error = Some("no".to_owned());
        preheat.error = Some("no".to_owned());
        storage.put_parts(&preheat, &[0]).unwrap();
        assert_eq!(storage.preheat("p").unwrap().unwrap(), preheat);
        assert_eq!(storage.unfinished_preheats().unwrap(), [preheat.clone()]);
        assert_eq!(storage.open_preheats().unwrap(), 1);
        preheat.state = State::Cancelled;
        preheat.ended_at = Some(9);
        storage.put_preheat(&preheat).unwrap();
        assert!(storage.unfinished_preheats().unwrap().is_empty());
        let listed = storage.preheats(5).unwrap();
        assert_eq!((listed.len(), listed[0].parts.len(), listed[0].ended_at), (1, 2, Some(9)));
    }

    #[test]
    fn revoked_member_stays_revoked_when_it_is_seen() {
        let storage = storage();
        let name: NodeName = "node-1".parse().unwrap();
        assert!(!storage.revoke(Role::Node, &name).unwrap());
        let sighting = Sighting {
            role: Role::Node,
            node: name.clone(),
            address: "n:1".to_owned(),
            zone: String::new(),
            version: "1".to_owned(),
            at: 7,
        };
        storage.record_sightings(std::slice::from_ref(&sighting)).unwrap();
        assert!(storage.revoke(Role::Node, &name).unwrap());
        storage.record_sightings(&[sighting]).unwrap();
        assert!(storage.is_revoked(Role::Node, &name).unwrap());
        assert!(!storage.is_revoked(Role::Seed, &name).unwrap());
        assert_eq!(storage.members().unwrap()[0].last_seen, Some(7));
    }

    fn an_api_token(number: u8, grant: Grant) -> ApiToken {
        ApiToken::new(format!("token-{number}"), [number; 32], grant, 0)
    }

    #[test]
    fn api_token_is_found_by_its_hash_only() {
        let storage = storage();
        assert!(!storage.has_api_tokens().unwrap());
        let scopes = [ApiScope::Nodes, ApiScope::Preheats].into_iter().collect();
        let token = an_api_token(1, Grant::new(ApiRole::Operator, scopes, 60, 5).unwrap());
        assert!(storage.add_api_token(&token).unwrap());
        assert_eq!(storage.api_token(&[1; 32]).unwrap(), Some(token));
        assert_eq!(storage.api_token(&[2; 32]).unwrap(), None);
    }

    #[test]
    fn removed_api_token_is_gone_and_no_other() {
        let storage = storage();
        let tokens = [an_api_token(1, Grant::whole()), an_api_token(0xab, Grant::whole())];
        tokens.iter().for_each(|token| assert!(storage.add_api_token(token).unwrap()));
        assert_eq!(storage.api_tokens().unwrap(), tokens);
        assert!(storage.remove_api_token(&tokens[1].id).unwrap());
        assert!(!storage.remove_api_token(&tokens[1].id).unwrap());
        assert_eq!(storage.api_tokens().unwrap(), tokens[..1]);
    }

    #[test]
    fn api_tokens_are_not_made_without_end() {
        let storage = storage();
        for number in 0..=TOKENS_MAX {
            let mut hash = [0; 32];
            hash[..8].copy_from_slice(&number.to_le_bytes());
            let token = ApiToken::new("n".to_owned(), hash, Grant::whole(), 0);
            assert_eq!(storage.add_api_token(&token).unwrap(), number < TOKENS_MAX);
        }
    }
}
