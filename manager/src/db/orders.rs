//! Orders to preheat in SQLite: with their parts, the layers of those, and the numbers that Harbor knows them by.

use darter_identity::attend::PreheatLayer;
use darter_types::{BlobDigest, DiffId, NodeName};
use rusqlite::{Connection, Row, Transaction, params};

use super::sqlite::{damaged, node, role};
use super::{JobRecord, StorageError};
use crate::core::job::{Part, State};
use crate::core::order::{Preheat, Scope};

/// Finished orders that are remembered; the oldest go first.
const PREHEATS_MAX: u32 = 10_000;

pub(super) fn put(transaction: &Transaction<'_>, preheat: &Preheat) -> Result<(), StorageError> {
    put_order(transaction, preheat)?;
    preheat.parts.iter().enumerate().try_for_each(|(at, part)| write_part(transaction, &preheat.id, at, part))
}

pub(super) fn put_parts(
    transaction: &Transaction<'_>,
    preheat: &Preheat,
    parts: &[usize],
) -> Result<(), StorageError> {
    put_order(transaction, preheat)?;
    parts.iter().try_for_each(|at| write_part(transaction, &preheat.id, *at, &preheat.parts[*at]))
}

pub(super) fn one(connection: &Connection, id: &str) -> Result<Option<Preheat>, StorageError> {
    let found = with_layers(connection, "SELECT * FROM preheats WHERE id = ?1", [id])?;
    Ok(found.into_iter().next())
}

pub(super) fn newest(connection: &Connection, limit: usize) -> Result<Vec<Preheat>, StorageError> {
    let found = orders(connection, "SELECT * FROM preheats ORDER BY rowid DESC LIMIT ?1", [limit])?;
    // Of those that can't be read nothing is said here: a console lists orders all day.
    let read = found.into_iter().map(|(_, order)| order);
    read.filter(|order| !matches!(order, Err(StorageError::Damaged(_)))).collect()
}

pub(super) fn count_open(connection: &Connection) -> Result<u64, StorageError> {
    let select = "SELECT count(*) FROM preheats WHERE state IN ('pending', 'running')";
    Ok(connection.query_row(select, [], |row| row.get(0))?)
}

pub(super) fn unfinished(connection: &Connection) -> Result<Vec<Preheat>, StorageError> {
    let select = "SELECT * FROM preheats WHERE state IN ('pending', 'running') ORDER BY rowid";
    with_layers(connection, select, [])
}

pub(super) fn add_job(transaction: &Transaction<'_>, job: &JobRecord) -> Result<i64, StorageError> {
    let shown = serde_json::to_string(&job.shown).expect("arguments can be written");
    transaction.execute(
        "INSERT INTO jobs (preheat, bio, user_id, shown) VALUES (?1, ?2, ?3, ?4)",
        params![job.preheat, job.bio, job.user_id, shown],
    )?;
    Ok(transaction.last_insert_rowid())
}

pub(super) fn job(
    connection: &Connection,
    number: i64,
) -> Result<Option<(JobRecord, Preheat)>, StorageError> {
    let mut select = connection.prepare_cached("SELECT * FROM jobs WHERE number = ?1")?;
    let mut rows = select.query_and_then([number], job_record)?;
    let Some(job) = rows.next().transpose()? else { return Ok(None) };
    // Each has its order, which may be one that this build can't read.
    Ok(one(connection, &job.preheat)?.map(|preheat| (job, preheat)))
}

fn state(row: &Row<'_>) -> Result<State, StorageError> {
    let state: String = row.get("state")?;
    State::ALL.into_iter().find(|known| known.as_str() == state).ok_or_else(|| damaged(state))
}

/// All peers, in words that a build from before them knows: none takes an order for members of which it names none. What an
/// order is for is only told; its parts say who has it.
fn scope_text(scope: &Scope) -> String {
    let nobody = || Scope::Members { seeds: Vec::new(), nodes: Vec::new() };
    let text = match scope {
        Scope::AllPeers => serde_json::to_string(&nobody()),
        known => serde_json::to_string(known),
    };
    text.expect("a scope can be written")
}

fn scope(text: &str) -> Result<Scope, StorageError> {
    match serde_json::from_str(text).map_err(damaged)? {
        Scope::Members { seeds, nodes } if seeds.is_empty() && nodes.is_empty() => Ok(Scope::AllPeers),
        known => Ok(known),
    }
}

fn preheat(row: &Row<'_>) -> Result<Preheat, StorageError> {
    Ok(Preheat {
        id: row.get("id")?,
        platform: row.get("platform")?,
        scope: scope(&row.get::<_, String>("scope")?)?,
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

fn job_record(row: &Row<'_>) -> Result<JobRecord, StorageError> {
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

/// An order as far as it can be read, behind its id.
type Found = (String, Result<Preheat, StorageError>);

/// Orders that `select` finds, with their parts.
fn orders(
    connection: &Connection,
    select: &str,
    given: impl rusqlite::Params,
) -> Result<Vec<Found>, StorageError> {
    let mut select = connection.prepare_cached(select)?;
    let rows = select
        .query_and_then(given, |row| Ok::<_, StorageError>((row.get::<_, String>("id")?, preheat(row))))?;
    let mut found: Vec<Found> = rows.collect::<Result<_, _>>()?;
    for (id, order) in &mut found {
        if let Ok(preheat) = order {
            match parts(connection, id) {
                Ok(parts) => preheat.parts = parts,
                Err(error) => *order = Err(error),
            }
        }
    }
    Ok(found)
}

/// The same with the layers of the parts, but for the orders that this build can't read.
fn with_layers(
    connection: &Connection,
    select: &str,
    given: impl rusqlite::Params,
) -> Result<Vec<Preheat>, StorageError> {
    let filled = |(id, order): Found| {
        let order = order.and_then(|mut preheat| {
            add_layers(connection, &mut preheat)?;
            Ok(preheat)
        });
        known(&id, order)
    };
    orders(connection, select, given)?.into_iter().map(filled).filter_map(Result::transpose).collect()
}

/// `None` of an order with a word that this build doesn't know, as a later one may have written: it is left to that one, and
/// nothing else in the file is worse for it.
fn known(id: &str, order: Result<Preheat, StorageError>) -> Result<Option<Preheat>, StorageError> {
    match order {
        Err(StorageError::Damaged(reason)) => {
            tracing::warn!(id, reason, "an order to preheat can't be read, and is left out");
            Ok(None)
        }
        order => order.map(Some),
    }
}

fn put_order(transaction: &Transaction<'_>, preheat: &Preheat) -> Result<(), StorageError> {
    let scope = scope_text(&preheat.scope);
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
