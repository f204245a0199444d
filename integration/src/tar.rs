//! Writes tar streams byte by byte, odd ones included.
//!
//! A builder's library would refuse half of what the tests need: entries twice, links to nothing, names that are
//! not UTF-8, checksums of V7 archives. Here an entry becomes exactly the header that it asks for. PAX records are added
//! where the plain header can't hold a value.

use std::io::{self, Read, Write};

const BLOCK: usize = 512;

/// What an entry's data is.
#[derive(Clone, Debug, Default)]
pub enum Data {
    #[default]
    None,
    Bytes(Vec<u8>),
    Zeros(u64),
    File(std::path::PathBuf, u64),
}

impl Data {
    pub fn len(&self) -> u64 {
        match self {
            Data::None => 0,
            Data::Bytes(bytes) => bytes.len() as u64,
            Data::Zeros(n) | Data::File(_, n) => *n,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How a name too long for the plain header is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LongNames {
    #[default]
    Pax,
    Gnu,
    /// In the ustar prefix, where a slash allows the split; else PAX.
    Prefix,
}

/// One entry. Build it with [`Entry::new`] or the short forms, then change what matters.
#[derive(Clone, Debug)]
pub struct Entry {
    pub kind: u8,
    pub name: Vec<u8>,
    pub link: Vec<u8>,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    /// Seconds and nanoseconds; nanoseconds need a PAX record.
    pub mtime: (i64, u32),
    pub device: (u32, u32),
    pub data: Data,
    /// Written as PAX `SCHILY.xattr.NAME`.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Further PAX records, as they are.
    pub pax: Vec<(Vec<u8>, Vec<u8>)>,
    pub long_names: LongNames,
    /// No magic: what tar wrote before POSIX.
    pub v7: bool,
}

/// The time that entries get which don't say otherwise.
pub const SOME_TIME: i64 = 1_600_000_000;

impl Entry {
    pub fn new(kind: u8, name: impl AsRef<[u8]>) -> Self {
        Self {
            kind,
            name: name.as_ref().to_vec(),
            link: Vec::new(),
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: (SOME_TIME, 0),
            device: (0, 0),
            data: Data::None,
            xattrs: Vec::new(),
            pax: Vec::new(),
            long_names: LongNames::Pax,
            v7: false,
        }
    }

    pub fn file(name: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Self {
        Self::new(b'0', name).data(Data::Bytes(data.as_ref().to_vec()))
    }

    pub fn dir(name: impl AsRef<[u8]>) -> Self {
        Self::new(b'5', name).mode(0o755)
    }

    pub fn symlink(name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self::new(b'2', name).mode(0o777).link(target)
    }

    pub fn hard_link(name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self::new(b'1', name).link(target)
    }

    pub fn fifo(name: impl AsRef<[u8]>) -> Self {
        Self::new(b'6', name)
    }

    pub fn char_device(name: impl AsRef<[u8]>, major: u32, minor: u32) -> Self {
        Self { device: (major, minor), ..Self::new(b'3', name) }
    }

    pub fn block_device(name: impl AsRef<[u8]>, major: u32, minor: u32) -> Self {
        Self { device: (major, minor), ..Self::new(b'4', name) }
    }

    /// The whiteout that hides `name` of the layers below.
    pub fn whiteout(name: &str) -> Self {
        let (dir, base) = name.rsplit_once('/').map_or(("", name), |(dir, base)| (dir, base));
        let slash = if dir.is_empty() { "" } else { "/" };
        Self::file(format!("{dir}{slash}.wh.{base}"), "").mode(0)
    }

    /// Hides everything that the layers below have in `dir`.
    pub fn opaque(dir: &str) -> Self {
        let slash = if dir.is_empty() { "" } else { "/" };
        Self::file(format!("{dir}{slash}.wh..wh..opq"), "").mode(0)
    }

    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    pub fn owner(mut self, uid: u64, gid: u64) -> Self {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    pub fn mtime(mut self, seconds: i64, nanoseconds: u32) -> Self {
        self.mtime = (seconds, nanoseconds);
        self
    }

    pub fn link(mut self, target: impl AsRef<[u8]>) -> Self {
        self.link = target.as_ref().to_vec();
        self
    }

    pub fn data(mut self, data: Data) -> Self {
        self.data = data;
        self
    }

    pub fn xattr(mut self, name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Self {
        self.xattrs.push((name.as_ref().to_vec(), value.as_ref().to_vec()));
        self
    }

    pub fn pax(mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Self {
        self.pax.push((key.as_ref().to_vec(), value.as_ref().to_vec()));
        self
    }

    pub fn long_names(mut self, how: LongNames) -> Self {
        self.long_names = how;
        self
    }

    pub fn v7(mut self) -> Self {
        self.v7 = true;
        self
    }
}

/// Writes entries, and what ends an archive.
pub struct Writer<W: Write> {
    out: W,
}

impl<W: Write> Writer<W> {
    pub fn new(out: W) -> Self {
        Self { out }
    }

    pub fn entry(&mut self, entry: &Entry) -> io::Result<()> {
        let records = pax_records(entry);
        if !records.is_empty() {
            self.pax(b'x', &records)?;
        }
        if entry.long_names == LongNames::Gnu {
            self.gnu_long(b'L', &entry.name)?;
            self.gnu_long(b'K', &entry.link)?;
        }
        self.out.write_all(&header(entry))?;
        self.data(&entry.data)
    }

    /// A PAX header of its own: `x` for the next entry, `g` for all that follow.
    pub fn pax(&mut self, kind: u8, records: &[(Vec<u8>, Vec<u8>)]) -> io::Result<()> {
        let body: Vec<u8> = records.iter().flat_map(|(key, value)| pax_line(key, value)).collect();
        let head = Entry::new(kind, "PaxHeaders/entry").data(Data::Bytes(body));
        self.out.write_all(&header(&head))?;
        self.data(&head.data)
    }

    /// Bytes as they are, for what no entry describes.
    pub fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)
    }

    /// The two zero blocks at the end.
    pub fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&[0; 2 * BLOCK])?;
        Ok(self.out)
    }

    /// Without an end: what some builders leave.
    pub fn unfinished(self) -> W {
        self.out
    }

    fn gnu_long(&mut self, kind: u8, name: &[u8]) -> io::Result<()> {
        if name.len() <= 100 {
            return Ok(());
        }
        let mut body = name.to_vec();
        body.push(0);
        let head = Entry::new(kind, "././@LongLink").data(Data::Bytes(body));
        self.out.write_all(&header(&head))?;
        self.data(&head.data)
    }

    fn data(&mut self, data: &Data) -> io::Result<()> {
        match data {
            Data::None => return Ok(()),
            Data::Bytes(bytes) => self.out.write_all(bytes)?,
            Data::Zeros(n) => copy_exactly(&mut io::repeat(0), &mut self.out, *n)?,
            Data::File(path, n) => copy_exactly(&mut std::fs::File::open(path)?, &mut self.out, *n)?,
        }
        let rest = (data.len() % BLOCK as u64) as usize;
        let padding = if rest == 0 { 0 } else { BLOCK - rest };
        self.out.write_all(&[0; BLOCK][..padding])
    }
}

fn copy_exactly(from: &mut impl Read, to: &mut impl Write, n: u64) -> io::Result<()> {
    let mut buffer = vec![0; 128 * 1024];
    let mut left = n;
    while left > 0 {
        let want = left.min(buffer.len() as u64) as usize;
        from.read_exact(&mut buffer[..want])?;
        to.write_all(&buffer[..want])?;
        left -= want as u64;
    }
    Ok(())
}

/// `LENGTH KEY=VALUE\n`, where the length counts itself.
fn pax_line(key: &[u8], value: &[u8]) -> Vec<u8> {
    let bare = key.len() + value.len() + 3;
    let mut length = bare + bare.to_string().len();
    if bare + length.to_string().len() != length {
        length = bare + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

fn pax_records(entry: &Entry) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut records = entry.pax.clone();
    let mut add = |key: &str, value: Vec<u8>| records.push((key.as_bytes().to_vec(), value));
    if entry.long_names != LongNames::Gnu {
        if entry.name.len() > 100 && split_prefix(entry).is_none() {
            add("path", entry.name.clone());
        }
        if entry.link.len() > 100 {
            add("linkpath", entry.link.clone());
        }
    }
    if entry.mtime.1 != 0 || entry.mtime.0 < 0 {
        add("mtime", pax_time(entry.mtime).into_bytes());
    }
    for (key, value) in [("uid", entry.uid), ("gid", entry.gid)] {
        if value > 0o7777777 {
            add(key, value.to_string().into_bytes());
        }
    }
    if entry.data.len() > 0o77777777777 {
        add("size", entry.data.len().to_string().into_bytes());
    }
    for (name, value) in &entry.xattrs {
        records.push(([b"SCHILY.xattr.".as_slice(), name].concat(), value.clone()));
    }
    records
}

/// A decimal fraction; before 1970 the fraction counts towards zero, as PAX has it.
fn pax_time((seconds, nanoseconds): (i64, u32)) -> String {
    if seconds >= 0 || nanoseconds == 0 {
        return format!("{seconds}.{nanoseconds:09}");
    }
    format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanoseconds)
}

fn split_prefix(entry: &Entry) -> Option<(&[u8], &[u8])> {
    if entry.long_names != LongNames::Prefix || entry.name.len() <= 100 {
        return None;
    }
    (entry.name.len() - 101..entry.name.len().min(156))
        .filter(|&at| entry.name[at] == b'/')
        .map(|at| (&entry.name[..at], &entry.name[at + 1..]))
        .find(|(prefix, name)| prefix.len() <= 155 && !name.is_empty() && name.len() <= 100)
}

fn header(entry: &Entry) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    let (prefix, name) = split_prefix(entry).unwrap_or((b"", &entry.name));
    text(&mut block[0..100], name);
    octal(&mut block[100..108], u64::from(entry.mode));
    octal(&mut block[108..116], entry.uid);
    octal(&mut block[116..124], entry.gid);
    octal(&mut block[124..136], entry.data.len());
    octal(&mut block[136..148], entry.mtime.0.max(0) as u64);
    block[156] = entry.kind;
    text(&mut block[157..257], &entry.link);
    if !entry.v7 {
        block[257..265].copy_from_slice(b"ustar\x0000");
        octal(&mut block[329..337], u64::from(entry.device.0));
        octal(&mut block[337..345], u64::from(entry.device.1));
        text(&mut block[345..500], prefix);
    }
    checksum(&mut block);
    block
}

/// Sets the sum of all bytes, the field itself counted as spaces.
pub fn checksum(block: &mut [u8; BLOCK]) {
    block[148..156].copy_from_slice(b"        ");
    let sum: u64 = block.iter().map(|b| u64::from(*b)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
}

fn text(field: &mut [u8], value: &[u8]) {
    let n = value.len().min(field.len());
    field[..n].copy_from_slice(&value[..n]);
}

/// Octal digits and a NUL; what doesn't fit stands in a PAX record, and here as zero.
fn octal(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    let text = format!("{value:0digits$o}");
    let text = if text.len() > digits { "0".repeat(digits) } else { text };
    field[..digits].copy_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pax_length_counts_itself() {
        assert_eq!(pax_line(b"path", b"x"), b"9 path=x\n");
        for n in [80, 88, 89, 90, 91, 92, 984, 985, 986, 987, 990] {
            let line = pax_line(b"k", &vec![b'v'; n]);
            let stated: usize =
                String::from_utf8_lossy(&line).split(' ').next().expect("a length").parse().expect("digits");
            assert_eq!(stated, line.len());
        }
    }

    #[test]
    fn times_before_1970_count_towards_zero() {
        assert_eq!(pax_time((-2, 750_000_000)), "-1.250000000");
        assert_eq!(pax_time((5, 1)), "5.000000001");
    }

    #[test]
    fn an_archive_is_whole_blocks() {
        let mut writer = Writer::new(Vec::new());
        writer.entry(&Entry::file("a".repeat(200), "abc")).expect("memory");
        assert_eq!(writer.finish().expect("memory").len() % BLOCK, 0);
    }
}
