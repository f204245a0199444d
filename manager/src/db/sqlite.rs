//! Storage in one SQLite file: write-ahead log, one connection. The statements stand in a file for each kind of record.

use std::path::Path;
use std::time::Duration;

use darter_types::{NodeName, Rates, Role};
use parking_lot::Mutex;
use rusqlite::{Connection, Transaction, params};

use super::{
    Audit, Certified, JobRecord, MemberRecord, Sighting, Storage, StorageError, aside, limits, members,
    orders, schema, tokens,
};
use crate::core::access::ApiToken;
use crate::core::limits::{Table, Whose};
use crate::core::order::Preheat;
use crate::core::tokens::TokenRecord;

/// `darter-manager token` writes to the same file while the manager runs.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

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
        schema::version(&connection)?;
        aside::check(&connection)?;
        schema::migrate(&mut connection)?;
        aside::check_start(&connection)?;
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

pub(super) fn role(text: &str) -> Result<Role, StorageError> {
    text.parse().map_err(damaged)
}

pub(super) fn node(text: &str) -> Result<NodeName, StorageError> {
    text.parse().map_err(damaged)
}

impl Storage for Sqlite {
    fn add_join_token(&self, token: &TokenRecord) -> Result<(), StorageError> {
        self.write(|t| tokens::add_join(t, token))
    }

    fn join_token(&self, id: &str) -> Result<Option<TokenRecord>, StorageError> {
        tokens::join(&self.0.lock(), id)
    }

    fn take_use(&self, id: &str, now: u64) -> Result<bool, StorageError> {
        self.write(|t| tokens::take_use(t, id, now))
    }

    fn add_api_token(&self, token: &ApiToken) -> Result<bool, StorageError> {
        self.write(|t| tokens::add_api(t, token))
    }

    fn api_token(&self, hash: &[u8; 32]) -> Result<Option<ApiToken>, StorageError> {
        tokens::api(&self.0.lock(), hash)
    }

    fn api_tokens(&self) -> Result<Vec<ApiToken>, StorageError> {
        tokens::all_api(&self.0.lock())
    }

    fn remove_api_token(&self, id: &str) -> Result<bool, StorageError> {
        self.write(|t| tokens::remove_api(t, id))
    }

    fn has_api_tokens(&self) -> Result<bool, StorageError> {
        tokens::has_api(&self.0.lock())
    }

    fn record_certificate(&self, certified: &Certified) -> Result<(), StorageError> {
        self.write(|t| members::certify(t, certified))
    }

    fn record_sightings(&self, sightings: &[Sighting]) -> Result<(), StorageError> {
        self.write(|t| members::see(t, sightings))
    }

    fn members(&self) -> Result<Vec<MemberRecord>, StorageError> {
        members::all(&self.0.lock())
    }

    fn member(&self, role: Role, node: &NodeName) -> Result<Option<MemberRecord>, StorageError> {
        members::one(&self.0.lock(), role, node)
    }

    fn release(&self, role: Role, node: &NodeName) -> Result<bool, StorageError> {
        self.write(|t| members::release(t, role, node))
    }

    fn is_revoked(&self, role: Role, node: &NodeName) -> Result<bool, StorageError> {
        members::is_revoked(&self.0.lock(), role, node)
    }

    fn revoke(&self, role: Role, node: &NodeName) -> Result<bool, StorageError> {
        self.write(|t| members::revoke(t, role, node))
    }

    fn set_limits(&self, whose: &Whose, rates: &Rates) -> Result<(), StorageError> {
        self.write(|t| limits::set(t, whose, rates))
    }

    fn limits(&self) -> Result<Table, StorageError> {
        limits::all(&self.0.lock())
    }

    fn put_preheat(&self, preheat: &Preheat) -> Result<(), StorageError> {
        self.write(|t| orders::put(t, preheat))
    }

    fn put_parts(&self, preheat: &Preheat, parts: &[usize]) -> Result<(), StorageError> {
        self.write(|t| orders::put_parts(t, preheat, parts))
    }

    fn preheat(&self, id: &str) -> Result<Option<Preheat>, StorageError> {
        orders::one(&self.0.lock(), id)
    }

    fn preheats(&self, limit: usize) -> Result<Vec<Preheat>, StorageError> {
        orders::newest(&self.0.lock(), limit)
    }

    fn open_preheats(&self) -> Result<u64, StorageError> {
        orders::count_open(&self.0.lock())
    }

    fn unfinished_preheats(&self) -> Result<Vec<Preheat>, StorageError> {
        orders::unfinished(&self.0.lock())
    }

    fn add_job(&self, job: &JobRecord) -> Result<i64, StorageError> {
        self.write(|t| orders::add_job(t, job))
    }

    fn job(&self, number: i64) -> Result<Option<(JobRecord, Preheat)>, StorageError> {
        orders::job(&self.0.lock(), number)
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
    use darter_identity::attend::PreheatLayer;
    use darter_types::{BlobDigest, DiffId};

    use super::*;
    use crate::core::access::{ApiRole, ApiScope, Grant, TOKENS_MAX};
    use crate::core::job::{Part, State};
    use crate::core::order::Scope;

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
    fn order_for_all_peers_is_written_in_words_of_builds_from_before_them() {
        let storage = storage();
        let preheat = Preheat { scope: Scope::AllPeers, ..a_preheat() };
        storage.put_preheat(&preheat).unwrap();
        let text: String =
            storage.0.lock().query_row("SELECT scope FROM preheats", [], |row| row.get(0)).unwrap();
        assert_eq!(text, r#"{"members":{"seeds":[],"nodes":[]}}"#);
        assert_eq!(storage.preheat("p").unwrap(), Some(preheat));
    }

    #[test]
    fn order_in_words_of_a_later_build_is_left_out_and_the_rest_of_the_file_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("manager.db");
        let storage = Sqlite::open(&path).unwrap();
        let known = Preheat { id: "known".to_owned(), ..a_preheat() };
        let shown = r#"{"type":"image","url":"u","platform":"","scope":"","ips":[],"count":0,"percentage":0,"timeout":1}"#;
        let number = |preheat: &str| {
            let (bio, shown) = (String::new(), serde_json::from_str(shown).unwrap());
            let job = JobRecord { number: 0, preheat: preheat.to_owned(), bio, user_id: None, shown };
            storage.add_job(&job).unwrap()
        };
        storage.put_preheat(&a_preheat()).unwrap();
        storage.put_preheat(&known).unwrap();
        let (left_out, kept) = (number("p"), number("known"));
        for change in [
            r#"UPDATE preheats SET scope = '"some-later-scope"' WHERE id = 'p'"#,
            r#"UPDATE preheats SET scope = '"one-seed"' WHERE id = 'p';
               UPDATE preheat_parts SET role = 'some-later-role' WHERE preheat = 'p' AND part = 1"#,
        ] {
            storage.0.lock().execute_batch(change).unwrap();
            let again = Sqlite::open(&path).unwrap();
            assert_eq!(again.unfinished_preheats().unwrap(), std::slice::from_ref(&known), "{change}");
            assert_eq!(again.preheats(5).unwrap().len(), 1);
            assert_eq!(again.preheat("p").unwrap(), None);
            assert!(again.job(left_out).unwrap().is_none() && again.job(kept).unwrap().is_some());
        }
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
