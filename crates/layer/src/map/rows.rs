//! The section `entries`: one row an entry, each saying how it differs from the one before.

use super::MapError;
use crate::tar::{EntryKind, Header, Segment, Time};
use crate::wire::{Cursor, put, put_bytes, put_signed};

const KIND_MASK: u8 = 0x0f;
/// Mode and owner are those of the row before.
const SAME_OWNER: u8 = 0x10;
/// The modification time is that of the row before.
const SAME_TIME: u8 = 0x20;
const HAS_XATTRS: u8 = 0x40;
const HAS_EXTRAS: u8 = 0x80;

const EXTRA_ATIME: u64 = 1;
const EXTRA_SPARSE: u64 = 2;

/// All names of a layer together, written out.
pub(crate) const NAMES_MAX: u64 = 1 << 30;
/// Of one file. What an archive says in front of a file's data, a megabyte at most, has a quarter of that.
const SEGMENTS_MAX: u64 = 1 << 20;

/// An entry, but for its name, which the [`Rows`] have.
#[derive(Debug, Clone)]
pub(crate) struct Row<'a> {
    pub(crate) kind: EntryKind,
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Time,
    pub(crate) atime: Option<Time>,
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) link: &'a [u8],
    pub(crate) size: u64,
    pub(crate) data_len: u64,
    /// Where the entry's data starts in the content stream.
    pub(crate) content: u64,
    pub(crate) segments: Option<Vec<Segment>>,
    pub(crate) xattrs: Option<u32>,
}

/// What a row may refer to.
#[derive(Debug, Default)]
struct Before {
    name: Vec<u8>,
    owner: (u16, u32, u32),
    mtime: Time,
}

#[derive(Default)]
pub(crate) struct RowWriter {
    before: Before,
    pub(crate) names: u64,
    pub(crate) out: Vec<u8>,
}

impl RowWriter {
    pub(crate) fn push(&mut self, header: &Header, xattrs: Option<u32>) {
        let owner = (header.mode, header.uid, header.gid);
        let extras = extras(header);
        let mut head = header.kind as u8;
        head |= if owner == self.before.owner { SAME_OWNER } else { 0 };
        head |= if header.mtime == self.before.mtime { SAME_TIME } else { 0 };
        head |= if xattrs.is_some() { HAS_XATTRS } else { 0 };
        head |= if extras != 0 { HAS_EXTRAS } else { 0 };
        self.out.push(head);
        if head & SAME_OWNER == 0 {
            put(&mut self.out, u64::from(owner.0));
            put(&mut self.out, u64::from(owner.1));
            put(&mut self.out, u64::from(owner.2));
        }
        if head & SAME_TIME == 0 {
            put_time(&mut self.out, header.mtime, self.before.mtime);
        }
        self.put_name(&header.name);
        self.put_kind(header);
        if let Some(set) = xattrs {
            put(&mut self.out, u64::from(set));
        }
        if extras != 0 {
            self.put_extras(header, extras);
        }
        (self.before.owner, self.before.mtime) = (owner, header.mtime);
    }

    fn put_name(&mut self, name: &[u8]) {
        let shared = name.iter().zip(&self.before.name).take_while(|(a, b)| a == b).count();
        put(&mut self.out, shared as u64);
        put_bytes(&mut self.out, &name[shared..]);
        self.before.name.truncate(shared);
        self.before.name.extend_from_slice(&name[shared..]);
        self.names += name.len() as u64;
    }

    fn put_kind(&mut self, header: &Header) {
        match header.kind {
            EntryKind::File => put(&mut self.out, header.data_len),
            EntryKind::Hardlink | EntryKind::Symlink => put_bytes(&mut self.out, &header.link),
            EntryKind::Char | EntryKind::Block => {
                put(&mut self.out, u64::from(header.major));
                put(&mut self.out, u64::from(header.minor));
            }
            EntryKind::Directory | EntryKind::Fifo | EntryKind::Global => {}
        }
    }

    fn put_extras(&mut self, header: &Header, extras: u64) {
        put(&mut self.out, extras);
        if let Some(atime) = header.atime {
            put_time(&mut self.out, atime, header.mtime);
        }
        if let Some(segments) = &header.segments {
            put(&mut self.out, header.size);
            put(&mut self.out, segments.len() as u64);
            let mut end = 0;
            for segment in segments {
                put(&mut self.out, segment.offset - end);
                put(&mut self.out, segment.len);
                end = segment.offset + segment.len;
            }
        }
    }
}

fn extras(header: &Header) -> u64 {
    let atime = if header.atime.is_some() { EXTRA_ATIME } else { 0 };
    atime | if header.segments.is_some() { EXTRA_SPARSE } else { 0 }
}

fn put_time(out: &mut Vec<u8>, time: Time, before: Time) {
    put_signed(out, time.seconds.wrapping_sub(before.seconds));
    put(out, u64::from(time.nanos));
}

/// Runs through the section.
pub(crate) struct Rows<'a> {
    cursor: Cursor<'a>,
    before: Before,
    content: u64,
    names: u64,
}

impl<'a> Rows<'a> {
    pub(crate) fn new(section: &'a [u8]) -> Self {
        Self { cursor: Cursor::new(section), before: Before::default(), content: 0, names: 0 }
    }

    /// The name of the row that [`Self::next`] gave last, as the archive has it.
    pub(crate) fn name(&self) -> &[u8] {
        &self.before.name
    }

    /// Bytes of the content stream that the rows so far have.
    pub(crate) fn content(&self) -> u64 {
        self.content
    }

    pub(crate) fn next(&mut self) -> Result<Option<Row<'a>>, MapError> {
        if self.cursor.is_empty() {
            return Ok(None);
        }
        let head = self.cursor.byte()?;
        let kind = kind(head & KIND_MASK)?;
        if head & SAME_OWNER == 0 {
            self.before.owner = self.owner()?;
        }
        if head & SAME_TIME == 0 {
            self.before.mtime = self.time(self.before.mtime)?;
        }
        self.read_name()?;
        let mut row = self.row(kind)?;
        if head & HAS_XATTRS != 0 {
            row.xattrs = Some(self.cursor.number_u32()?);
        }
        if head & HAS_EXTRAS != 0 {
            self.extras(&mut row)?;
        }
        Ok(Some(row))
    }

    fn owner(&mut self) -> Result<(u16, u32, u32), MapError> {
        let mode = self.cursor.number()?;
        if mode > 0o7777 {
            return Err(MapError::Invalid("a mode with more than twelve bits"));
        }
        Ok((mode as u16, self.cursor.number_u32()?, self.cursor.number_u32()?))
    }

    fn time(&mut self, before: Time) -> Result<Time, MapError> {
        let seconds = before.seconds.wrapping_add(self.cursor.signed()?);
        let nanos = self.cursor.number_u32()?;
        if nanos >= 1_000_000_000 {
            return Err(MapError::Invalid("a second of more than 1,000,000,000 ns"));
        }
        Ok(Time { seconds, nanos })
    }

    fn read_name(&mut self) -> Result<(), MapError> {
        let shared = self.cursor.number()?;
        if shared > self.before.name.len() as u64 {
            return Err(MapError::Invalid("a name that shares more than there is"));
        }
        self.before.name.truncate(shared as usize);
        self.before.name.extend_from_slice(self.cursor.bytes()?);
        self.names += self.before.name.len() as u64;
        if self.names > NAMES_MAX {
            Err(MapError::Invalid("names that are too long together"))
        } else {
            Ok(())
        }
    }

    fn row(&mut self, kind: EntryKind) -> Result<Row<'a>, MapError> {
        let (mode, uid, gid) = self.before.owner;
        let mut row = Row {
            kind,
            mode,
            uid,
            gid,
            mtime: self.before.mtime,
            atime: None,
            major: 0,
            minor: 0,
            link: &[],
            size: 0,
            data_len: 0,
            content: self.content,
            segments: None,
            xattrs: None,
        };
        match kind {
            EntryKind::File => {
                row.data_len = self.cursor.number()?;
                row.size = row.data_len;
                let end = self.content.checked_add(row.data_len).filter(|end| *end <= i64::MAX as u64);
                self.content = end.ok_or(MapError::Invalid("more content than can be counted"))?;
            }
            EntryKind::Hardlink | EntryKind::Symlink => row.link = self.cursor.bytes()?,
            EntryKind::Char | EntryKind::Block => {
                (row.major, row.minor) = (self.cursor.number_u32()?, self.cursor.number_u32()?);
            }
            EntryKind::Directory | EntryKind::Fifo | EntryKind::Global => {}
        }
        Ok(row)
    }

    fn extras(&mut self, row: &mut Row<'a>) -> Result<(), MapError> {
        let extras = self.cursor.number()?;
        if extras & !(EXTRA_ATIME | EXTRA_SPARSE) != 0 {
            return Err(MapError::Invalid("a row with unknown extras"));
        }
        if extras & EXTRA_ATIME != 0 {
            row.atime = Some(self.time(row.mtime)?);
        }
        if extras & EXTRA_SPARSE != 0 {
            if row.kind != EntryKind::File {
                return Err(MapError::Invalid("holes in what is no file"));
            }
            row.size = self.cursor.number()?;
            row.segments = Some(self.segments(row)?);
        }
        Ok(())
    }

    fn segments(&mut self, row: &Row) -> Result<Vec<Segment>, MapError> {
        let count = self.cursor.number()?;
        if count > SEGMENTS_MAX {
            return Err(MapError::Invalid("a file with too many segments"));
        }
        let mut segments = Vec::new();
        let (mut end, mut data) = (0u64, 0u64);
        for _ in 0..count {
            let (gap, len) = (self.cursor.number()?, self.cursor.number()?);
            let offset = end.checked_add(gap);
            let next =
                offset.and_then(|offset| offset.checked_add(len)).filter(|next| *next <= row.size && len > 0);
            let (Some(offset), Some(next)) = (offset, next) else {
                return Err(MapError::Invalid("a segment outside its file"));
            };
            segments.push(Segment { offset, len });
            data += len;
            end = next;
        }
        if data != row.data_len || row.size > i64::MAX as u64 {
            return Err(MapError::Invalid("segments that are not the file's data"));
        }
        Ok(segments)
    }
}

fn kind(number: u8) -> Result<EntryKind, MapError> {
    use EntryKind::{Block, Char, Directory, Fifo, File, Global, Hardlink, Symlink};
    let kinds = [File, Hardlink, Symlink, Char, Block, Directory, Fifo, Global];
    kinds.get(usize::from(number)).copied().ok_or(MapError::Invalid("an entry of an unknown kind"))
}
