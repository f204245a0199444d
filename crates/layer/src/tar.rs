//! Reading a tar stream as containerd does, that is as Go's `archive/tar` does, oddities included.
//!
//! The reader gives each entry's header and then its data, and hands every other byte of the stream to a [`Recipe`], so
//! that the stream can be put together again. It never holds more of the stream than one extended header.

mod header;
mod pax;
mod sparse;
#[cfg(test)]
mod tests;

use std::io::{self, BufRead};

pub use header::Time;
use header::{BLOCK, RawHeader, string};
use pax::Records;

use crate::path;
use crate::recipe::Recipe;

/// What Go allows an extended header to have.
const SPECIAL_MAX: usize = 1 << 20;

/// Why a stream is no tar that containerd takes; its words where it has some.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TarError {
    #[error("archive/tar: invalid tar header")]
    Header,
    #[error("archive/tar: header field too long")]
    FieldTooLong,
    #[error("archive/tar: sparse map too long")]
    SparseTooLong,
    #[error("archive/tar: sparse file references non-existent data")]
    SparseMissing,
    #[error("archive/tar: sparse file contains unreferenced data")]
    SparseUnreferenced,
    #[error("unhandled tar header type {0}")]
    Unhandled(u8),
    #[error("unexpected EOF")]
    UnexpectedEof,
    #[error("the layer exceeds what the map can hold: {0}")]
    TooLarge(&'static str),
}

/// Why reading stopped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error(transparent)]
    Read(#[from] io::Error),
    #[error(transparent)]
    Tar(#[from] TarError),
}

/// What an entry is. The numbers stand in the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum EntryKind {
    File = 0,
    Hardlink = 1,
    Symlink = 2,
    Char = 3,
    Block = 4,
    Directory = 5,
    Fifo = 6,
    /// A global extended header. It says nothing, but containerd makes the parents of its name.
    Global = 7,
}

/// A run of data in a sparse file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where in the file.
    pub offset: u64,
    pub len: u64,
}

/// An entry with all its extended headers merged in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: EntryKind,
    pub(crate) name: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Time,
    pub(crate) atime: Option<Time>,
    pub(crate) major: u32,
    pub(crate) minor: u32,
    /// Size of the file with its holes.
    pub(crate) size: u64,
    /// Bytes of the stream that are its data.
    pub(crate) data_len: u64,
    pub(crate) segments: Option<Vec<Segment>>,
    /// In order of their names.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// How much of a block was there.
enum Filled {
    Full,
    Part,
    Nothing,
}

pub(crate) struct TarReader<R> {
    input: R,
    recipe: Recipe,
    /// Bytes of the current entry's data that were not read yet.
    data: u64,
    padding: usize,
}

/// Headers that change the entry behind them.
#[derive(Default)]
struct Pending {
    records: Option<Records>,
    long_name: Vec<u8>,
    long_link: Vec<u8>,
}

impl<R: BufRead> TarReader<R> {
    pub(crate) fn new(input: R, recipe: Recipe) -> Self {
        Self { input, recipe, data: 0, padding: 0 }
    }

    /// The next entry; `None` at the end of the archive. The data of the one before must have been read.
    pub(crate) fn next(&mut self) -> Result<Option<Header>, ReadError> {
        assert_eq!(self.data, 0, "the data of an entry is read before the next entry");
        let mut pending = Pending::default();
        loop {
            let Some(mut raw) = self.header()? else { return Ok(None) };
            self.set_data(&raw)?;
            match raw.type_flag {
                b'x' => pending.records = Some(Records::parse(&self.special()?)?),
                b'g' => {
                    // Go ignores mistakes in these records.
                    let _ = Records::parse(&self.special()?)?.merge_into(&mut raw);
                    return finish(raw, EntryKind::Global, None, 0, None).map(Some);
                }
                b'L' => pending.long_name = string(&self.special()?).to_vec(),
                b'K' => pending.long_link = string(&self.special()?).to_vec(),
                _ => return self.entry(raw, pending).map(Some),
            }
        }
    }

    /// The next bytes of the current entry's data, empty when all were read. Followed by [`Self::consume`].
    pub(crate) fn data(&mut self) -> Result<&[u8], ReadError> {
        if self.data == 0 {
            return Ok(&[]);
        }
        let buf = self.input.fill_buf()?;
        if buf.is_empty() {
            return Err(TarError::UnexpectedEof.into());
        }
        let len = usize::try_from(self.data).map_or(buf.len(), |left| left.min(buf.len()));
        Ok(&buf[..len])
    }

    pub(crate) fn consume(&mut self, len: usize) {
        self.input.consume(len);
        self.data -= len as u64;
    }

    /// Reads what follows the end of the archive: it counts in the diff ID, and for nothing else.
    pub(crate) fn finish(mut self) -> Result<Recipe, ReadError> {
        let mut block = [0; BLOCK];
        loop {
            let len = read_up_to(&mut self.input, &mut block)?;
            self.recipe.trailing(&block[..len])?;
            if len < BLOCK {
                return Ok(self.recipe);
            }
        }
    }

    fn entry(&mut self, mut raw: RawHeader, pending: Pending) -> Result<Header, ReadError> {
        let records = pending.records.unwrap_or_default();
        records.merge_into(&mut raw)?;
        if !pending.long_name.is_empty() {
            raw.name = pending.long_name;
        }
        if !pending.long_link.is_empty() {
            raw.link = pending.long_link;
        }
        let kind = kind(&raw)?;
        if kind == EntryKind::Directory {
            raw.type_flag = b'5';
        }
        self.set_data(&raw)?;
        let segments = self.sparse(&mut raw, kind, &records)?;
        if kind == EntryKind::File {
            self.recipe.content(self.data)?;
        }
        finish(raw, kind, Some(&records), self.data, segments)
    }

    fn sparse(
        &mut self,
        raw: &mut RawHeader,
        kind: EntryKind,
        records: &Records,
    ) -> Result<Option<Vec<Segment>>, ReadError> {
        let Some(version) = sparse::version(records) else { return Ok(None) };
        if !records.get(pax::SPARSE_NAME).is_empty() {
            raw.name = records.get(pax::SPARSE_NAME).to_vec();
        }
        raw.size = sparse::real_size(records)?.unwrap_or(raw.size);
        let map = match version {
            sparse::Version::Zero => sparse::from_records(records)?,
            sparse::Version::One => self.sparse_map()?,
        };
        if kind != EntryKind::File {
            return Err(TarError::Header.into());
        }
        Ok(Some(sparse::segments(&map, raw.size, self.data)?))
    }

    fn sparse_map(&mut self) -> Result<Vec<(i64, i64)>, ReadError> {
        let mut failed = None;
        let map = sparse::from_data(|block| {
            let result = if self.data < BLOCK as u64 {
                Err(TarError::UnexpectedEof.into())
            } else {
                self.exact(block)
            };
            result.map_err(|error| {
                failed = Some(error);
                TarError::UnexpectedEof
            })?;
            self.data -= BLOCK as u64;
            Ok(())
        });
        failed.map_or_else(|| map.map_err(ReadError::from), Err)
    }

    /// The next header block; `None` at the end of the archive or of the stream.
    fn header(&mut self) -> Result<Option<RawHeader>, ReadError> {
        let mut block = [0; BLOCK];
        let padding = std::mem::take(&mut self.padding);
        if !matches!(self.block(&mut block[..padding])?, Filled::Full) {
            return Ok(None);
        }
        for zeros_before in [false, true] {
            match self.block(&mut block)? {
                Filled::Nothing => return Ok(None),
                Filled::Part => return Err(TarError::UnexpectedEof.into()),
                Filled::Full => {}
            }
            match (block.iter().all(|byte| *byte == 0), zeros_before) {
                (false, false) => return Ok(Some(RawHeader::parse(&block)?)),
                (false, true) => return Err(TarError::Header.into()),
                (true, false) => {}
                (true, true) => return Ok(None),
            }
        }
        Ok(None)
    }

    fn set_data(&mut self, raw: &RawHeader) -> Result<(), TarError> {
        let size = u64::try_from(if has_no_data(raw.type_flag) { 0 } else { raw.size })
            .map_err(|_| TarError::Header)?;
        self.data = size;
        self.padding = (size.wrapping_neg() % BLOCK as u64) as usize;
        Ok(())
    }

    /// The body of an extended header.
    fn special(&mut self) -> Result<Vec<u8>, ReadError> {
        let len = usize::try_from(self.data)
            .ok()
            .filter(|len| *len <= SPECIAL_MAX)
            .ok_or(TarError::FieldTooLong)?;
        let mut body = vec![0; len];
        self.exact(&mut body)?;
        self.data = 0;
        Ok(body)
    }

    fn exact(&mut self, bytes: &mut [u8]) -> Result<(), ReadError> {
        match self.block(bytes)? {
            Filled::Full => Ok(()),
            Filled::Part | Filled::Nothing => Err(TarError::UnexpectedEof.into()),
        }
    }

    /// Reads into the recipe as well.
    fn block(&mut self, bytes: &mut [u8]) -> Result<Filled, ReadError> {
        let len = read_up_to(&mut self.input, bytes)?;
        self.recipe.literal(&bytes[..len])?;
        Ok(if len == bytes.len() {
            Filled::Full
        } else if len > 0 {
            Filled::Part
        } else {
            Filled::Nothing
        })
    }
}

fn read_up_to(input: &mut impl BufRead, bytes: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < bytes.len() {
        match input.read(&mut bytes[len..]) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

/// Links, devices, directories and pipes have no data, whatever their size says.
fn has_no_data(type_flag: u8) -> bool {
    (b'1'..=b'6').contains(&type_flag)
}

fn kind(raw: &RawHeader) -> Result<EntryKind, TarError> {
    Ok(match raw.type_flag {
        // Old archives mark a directory by a slash alone.
        0 if raw.name.ends_with(b"/") => EntryKind::Directory,
        0 | b'0' => EntryKind::File,
        b'1' => EntryKind::Hardlink,
        b'2' => EntryKind::Symlink,
        b'3' => EntryKind::Char,
        b'4' => EntryKind::Block,
        b'5' => EntryKind::Directory,
        b'6' => EntryKind::Fifo,
        // Sparse files of the old kind have headers of their own behind the first, which nobody needs to read.
        other if other != b'S' && path::has_no_type(&raw.name) => EntryKind::File,
        other => return Err(TarError::Unhandled(other)),
    })
}

fn finish(
    raw: RawHeader,
    kind: EntryKind,
    records: Option<&Records>,
    data_len: u64,
    segments: Option<Vec<Segment>>,
) -> Result<Header, ReadError> {
    let xattrs =
        records.into_iter().flat_map(Records::xattrs).map(|(key, value)| (key.to_vec(), value.to_vec()));
    let size = if kind == EntryKind::File { raw.size } else { 0 };
    Ok(Header {
        kind,
        mode: (raw.mode & 0o7777) as u16,
        // The kernel takes the low 32 bits of what Go hands it.
        uid: raw.uid as u32,
        gid: raw.gid as u32,
        mtime: raw.mtime,
        atime: raw.atime,
        major: raw.major as u32,
        minor: raw.minor as u32,
        size: u64::try_from(size).map_err(|_| TarError::Header)?,
        data_len,
        segments,
        xattrs: xattrs.collect(),
        name: raw.name,
        link: if matches!(kind, EntryKind::Hardlink | EntryKind::Symlink) { raw.link } else { Vec::new() },
    })
}

impl From<crate::recipe::TooMuch> for ReadError {
    fn from(error: crate::recipe::TooMuch) -> Self {
        ReadError::Tar(TarError::TooLarge(error.0))
    }
}
