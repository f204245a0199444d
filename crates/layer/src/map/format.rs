//! The map's bytes: header, table of sections, sections. `docs/formats.md` draws them.

use std::io::Read;

use darter_types::{FORMAT_VERSION, Hash, PieceHash, RootHash};

use super::builder::ENTRIES_MAX;
use super::rows::Rows;
use super::{EncodedMap, LayerMap, MapError, Summary};
use crate::PIECE_LEN;
use crate::recipe::{FinishedRecipe, RECIPE_MAX};
use crate::wire::{Cursor, put};

const MAGIC: &[u8; 8] = b"DARTERLM";
const HEADER_LEN: usize = 16;
const ROW_LEN: usize = 48;
/// More sections than this no version has.
const SECTIONS_MAX: u32 = 64;
/// A section of the core, uncompressed.
pub(crate) const SECTION_MAX: u64 = 1 << 30;
const LEVEL: i32 = 9;
/// The largest window that any level up to 19 uses; a larger one is refused, it would only cost memory.
const WINDOW_LOG_MAX: u32 = 23;

const SUMMARY: u16 = 1;
const ENTRIES: u16 = 2;
const XATTRS: u16 = 3;
const PIECES: u16 = 4;
const TAR: u16 = 5;

/// A reader that does not know the section may skip it.
const OPTIONAL: u16 = 1;
/// The section is not in the core, but a file of its own.
const APART: u16 = 2;

/// What the root hash covers of a section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SectionRow {
    id: u16,
    flags: u16,
    plain_len: u64,
    hash: Hash,
}

impl SectionRow {
    fn of(id: u16, plain: &[u8]) -> Self {
        Self { id, flags: 0, plain_len: plain.len() as u64, hash: hash(plain) }
    }

    fn encode(&self) -> [u8; ROW_LEN] {
        let mut row = [0; ROW_LEN];
        row[..2].copy_from_slice(&self.id.to_le_bytes());
        row[2..4].copy_from_slice(&self.flags.to_le_bytes());
        row[8..16].copy_from_slice(&self.plain_len.to_le_bytes());
        row[16..].copy_from_slice(self.hash.as_bytes());
        row
    }

    fn decode(row: &[u8; ROW_LEN]) -> Result<Self, MapError> {
        if row[4..8] != [0; 4] {
            return Err(MapError::Invalid("reserved bytes that are not zero"));
        }
        let [a, b, c, d] = [row[0], row[1], row[2], row[3]];
        Ok(Self {
            id: u16::from_le_bytes([a, b]),
            flags: u16::from_le_bytes([c, d]),
            plain_len: u64_at(row, 8),
            hash: Hash::from_bytes(*row[16..].first_chunk().expect("a row has 32 bytes there")),
        })
    }
}

/// The table of sections, which together with the header is what the root hash is of.
#[derive(Debug)]
pub(super) struct Table(Vec<SectionRow>);

impl Table {
    pub(super) fn tar(&self) -> (Hash, u64) {
        let row = self.0.iter().find(|row| row.id == TAR).expect("every map has a row for its recipe");
        (row.hash, row.plain_len)
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(FORMAT_VERSION.to_le_bytes());
        out.extend((self.0.len() as u32).to_le_bytes());
        self.0.iter().for_each(|row| out.extend(row.encode()));
        out
    }

    fn decode(core: &[u8]) -> Result<Self, MapError> {
        let header: &[u8; HEADER_LEN] = core.first_chunk().ok_or(MapError::Short)?;
        if !header.starts_with(MAGIC) {
            return Err(MapError::Magic);
        }
        let number =
            |at: usize| u32::from_le_bytes(*header[at..].first_chunk().expect("the header has 16 bytes"));
        if number(8) != FORMAT_VERSION {
            return Err(MapError::Version(number(8)));
        }
        if number(12) > SECTIONS_MAX {
            return Err(MapError::Invalid("too many sections"));
        }
        let rows = core[HEADER_LEN..].get(..number(12) as usize * ROW_LEN).ok_or(MapError::Short)?;
        let rows = rows
            .chunks_exact(ROW_LEN)
            .map(|row| SectionRow::decode(row.first_chunk().expect("chunks have the length of a row")));
        let table = Self(rows.collect::<Result<_, _>>()?);
        table.check()?;
        Ok(table)
    }

    fn check(&self) -> Result<(), MapError> {
        if !self.0.is_sorted_by(|a, b| a.id < b.id) {
            return Err(MapError::Invalid("sections out of order"));
        }
        for row in &self.0 {
            let known = (SUMMARY..=TAR).contains(&row.id);
            let flags = if row.id == TAR { OPTIONAL | APART } else { 0 };
            if !known && row.flags & OPTIONAL == 0 {
                return Err(MapError::UnknownSection(row.id));
            }
            if known && row.flags != flags || row.flags & !(OPTIONAL | APART) != 0 {
                return Err(MapError::Invalid("a section with the wrong flags"));
            }
            if row.plain_len > if row.id == TAR { RECIPE_MAX } else { SECTION_MAX } {
                return Err(MapError::Invalid("a section that is too long"));
            }
        }
        let complete = (SUMMARY..=TAR).all(|id| self.0.iter().any(|row| row.id == id));
        if complete { Ok(()) } else { Err(MapError::Invalid("a section is missing")) }
    }

    fn root(&self) -> RootHash {
        RootHash(hash(&self.encode()))
    }
}

/// The sections of a map that is being made.
pub(super) struct Sections {
    pub(super) summary: Summary,
    pub(super) entries: Vec<u8>,
    pub(super) xattrs: Vec<u8>,
    /// How many sets of attributes there are.
    pub(super) sets: u32,
    pub(super) hashes: Vec<PieceHash>,
    pub(super) ends: Vec<u64>,
}

pub(super) fn assemble(sections: Sections, recipe: FinishedRecipe) -> LayerMap {
    let Sections { summary, entries, xattrs, sets, hashes, ends } = sections;
    let tar = SectionRow { id: TAR, flags: OPTIONAL | APART, plain_len: recipe.plain_len, hash: recipe.hash };
    let table = Table(vec![
        SectionRow::of(SUMMARY, &encode_summary(&summary)),
        SectionRow::of(ENTRIES, &entries),
        SectionRow::of(XATTRS, &xattrs),
        SectionRow::of(PIECES, &encode_pieces(&hashes, &ends)),
        tar,
    ]);
    let xattr_sets = xattr_sets(&xattrs, sets).expect("the builder writes whole sets");
    let root = table.root();
    LayerMap { table, root, summary, entries, xattrs, xattr_sets, hashes, ends, tar: recipe.stored }
}

pub(super) fn encode(map: &mut LayerMap) -> EncodedMap {
    let mut core = map.table.encode();
    let mut payload = Vec::new();
    for row in &map.table.0 {
        let start = payload.len();
        match row.id {
            SUMMARY => compress(&encode_summary(&map.summary), &mut payload),
            ENTRIES => compress(&map.entries, &mut payload),
            XATTRS => compress(&map.xattrs, &mut payload),
            PIECES => compress(&encode_pieces(&map.hashes, &map.ends), &mut payload),
            _ => {}
        }
        core.extend(((payload.len() - start) as u64).to_le_bytes());
    }
    core.extend(payload);
    EncodedMap { core, tar: std::mem::take(&mut map.tar) }
}

pub(super) fn decode_signed(core: &[u8], root: RootHash) -> Result<LayerMap, MapError> {
    if Table::decode(core)?.root() != root {
        return Err(MapError::Invalid("it is not the one that was signed"));
    }
    decode(core)
}

pub(super) fn decode(core: &[u8]) -> Result<LayerMap, MapError> {
    let table = Table::decode(core)?;
    let stored = stored_sections(&table, core)?;
    let section = |id: u16| {
        let (row, bytes) = stored.iter().find(|(row, _)| row.id == id).expect("the table was checked");
        decompress(row, bytes)
    };
    let summary = decode_summary(&section(SUMMARY)?)?;
    let (hashes, ends) = decode_pieces(&section(PIECES)?)?;
    let entries = section(ENTRIES)?;
    let sets = check_rows(&entries, &summary, ends.last().copied().unwrap_or(0))?;
    let xattrs = section(XATTRS)?;
    let xattr_sets = xattr_sets(&xattrs, sets)?;
    let root = table.root();
    Ok(LayerMap { table, root, summary, entries, xattrs, xattr_sets, hashes, ends, tar: Vec::new() })
}

/// What the entries say about the summary and about `content`, the bytes of all pieces; how many sets of attributes they have.
fn check_rows(entries: &[u8], summary: &Summary, content: u64) -> Result<u32, MapError> {
    let mut rows = Rows::new(entries);
    let (mut count, mut sets) = (0, 0);
    while let Some(row) = rows.next()? {
        match row.xattrs {
            Some(set) if set > sets => return Err(MapError::Invalid("sets of attributes out of order")),
            Some(set) if set == sets => sets += 1,
            Some(_) | None => {}
        }
        count += 1;
    }
    if count != summary.entries || count > ENTRIES_MAX {
        return Err(MapError::Invalid("a wrong number of entries"));
    }
    if rows.content() != content || summary.content_size != content {
        return Err(MapError::Invalid("pieces that are not the files' content"));
    }
    Ok(sets)
}

/// The stored bytes of each section that is in the core.
fn stored_sections<'a>(table: &Table, core: &'a [u8]) -> Result<Vec<(SectionRow, &'a [u8])>, MapError> {
    let lengths = HEADER_LEN + table.0.len() * ROW_LEN;
    let mut payload = Cursor::new(core.get(lengths + table.0.len() * 8..).ok_or(MapError::Short)?);
    let mut stored = Vec::with_capacity(table.0.len());
    for (i, row) in table.0.iter().enumerate() {
        let len = u64_at(core, lengths + i * 8);
        if row.flags & APART != 0 && len != 0 {
            return Err(MapError::Invalid("a section in the core that should be apart"));
        }
        stored.push((*row, payload.take(len)?));
    }
    if payload.is_empty() { Ok(stored) } else { Err(MapError::Invalid("bytes behind the last section")) }
}

fn compress(plain: &[u8], out: &mut Vec<u8>) {
    out.extend(zstd::bulk::compress(plain, LEVEL).expect("compressing in memory does not fail"));
}

fn decompress(row: &SectionRow, stored: &[u8]) -> Result<Vec<u8>, MapError> {
    let damaged = |_| MapError::Damaged(row.id);
    let mut decoder = zstd::stream::read::Decoder::with_buffer(stored).map_err(damaged)?;
    decoder.window_log_max(WINDOW_LOG_MAX).map_err(damaged)?;
    let mut plain = Vec::new();
    decoder.take(row.plain_len + 1).read_to_end(&mut plain).map_err(damaged)?;
    if plain.len() as u64 != row.plain_len || hash(&plain) != row.hash {
        return Err(MapError::Damaged(row.id));
    }
    plain.shrink_to_fit();
    Ok(plain)
}

fn encode_summary(summary: &Summary) -> Vec<u8> {
    let numbers = [summary.entries, summary.content_size, summary.tar_size, summary.unpacked_size];
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn decode_summary(plain: &[u8]) -> Result<Summary, MapError> {
    if plain.len() != 32 {
        return Err(MapError::Damaged(SUMMARY));
    }
    let number = |i: usize| u64_at(plain, i * 8);
    Ok(Summary { entries: number(0), content_size: number(1), tar_size: number(2), unpacked_size: number(3) })
}

/// The number of pieces, all hashes, then all lengths: so the lengths compress.
fn encode_pieces(hashes: &[PieceHash], ends: &[u64]) -> Vec<u8> {
    let mut out = Vec::with_capacity(hashes.len() * 36);
    put(&mut out, hashes.len() as u64);
    hashes.iter().for_each(|hash| out.extend(hash.as_bytes()));
    let mut start = 0;
    for end in ends {
        put(&mut out, end - start);
        start = *end;
    }
    out
}

fn decode_pieces(plain: &[u8]) -> Result<(Vec<PieceHash>, Vec<u64>), MapError> {
    let mut cursor = Cursor::new(plain);
    let count = u64::from(cursor.number_u32()?);
    let hashes = cursor.take(count * 32)?;
    let hashes =
        hashes.chunks_exact(32).map(|hash| PieceHash::from_slice(hash).expect("chunks have 32 bytes"));
    let mut ends = Vec::new();
    let mut end = 0u64;
    for _ in 0..count {
        let len = cursor.number()?;
        if len == 0 || len > PIECE_LEN as u64 {
            return Err(MapError::Invalid("a piece that is empty or too long"));
        }
        end += len;
        ends.push(end);
    }
    if cursor.is_empty() { Ok((hashes.collect(), ends)) } else { Err(MapError::Damaged(PIECES)) }
}

/// Where each set starts. There are `count`, as many as the entries have: no more memory than the section of entries took.
fn xattr_sets(plain: &[u8], count: u32) -> Result<Vec<u32>, MapError> {
    let mut cursor = Cursor::new(plain);
    let mut sets = Vec::with_capacity(count as usize);
    for _ in 0..count {
        if cursor.is_empty() {
            return Err(MapError::Invalid("a row with attributes that are not there"));
        }
        sets.push((plain.len() - cursor.len()) as u32);
        let attributes = cursor.number()?;
        if attributes == 0 {
            return Err(MapError::Invalid("a set of no attributes"));
        }
        for _ in 0..attributes {
            cursor.bytes()?;
            cursor.bytes()?;
        }
    }
    if cursor.is_empty() { Ok(sets) } else { Err(MapError::Invalid("attributes that no entry has")) }
}

fn hash(plain: &[u8]) -> Hash {
    Hash::from_bytes(*blake3::hash(plain).as_bytes())
}

/// The caller has checked that eight bytes are there.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("eight bytes were checked to be there"))
}
