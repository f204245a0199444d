//! One header block: V7, ustar, STAR and GNU, read as Go's `archive/tar` reads them.

use super::TarError;

pub(crate) const BLOCK: usize = 512;
pub(crate) type Block = [u8; BLOCK];

/// A point in time as the archive has it, not yet bounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Time {
    pub seconds: i64,
    /// Below 1,000,000,000.
    pub nanos: u32,
}

impl Time {
    pub(crate) fn from_seconds(seconds: i64) -> Self {
        Self { seconds, nanos: 0 }
    }
}

/// The fields of a header before extended headers are merged in.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct RawHeader {
    pub(crate) type_flag: u8,
    pub(crate) name: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) mode: i64,
    pub(crate) uid: i64,
    pub(crate) gid: i64,
    pub(crate) size: i64,
    pub(crate) mtime: Time,
    pub(crate) atime: Option<Time>,
    pub(crate) major: i64,
    pub(crate) minor: i64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

impl RawHeader {
    pub(crate) fn parse(block: &Block) -> Result<Self, TarError> {
        let format = format(block)?;
        let mut header = Self {
            type_flag: block[156],
            name: string(&block[..100]).to_vec(),
            link: string(&block[157..257]).to_vec(),
            mode: number(&block[100..108])?,
            uid: number(&block[108..116])?,
            gid: number(&block[116..124])?,
            size: number(&block[124..136])?,
            mtime: Time::from_seconds(number(&block[136..148])?),
            ..Self::default()
        };
        if format != Format::V7 {
            header.major = number(&block[329..337])?;
            header.minor = number(&block[337..345])?;
            let prefix = header.rest(block, format)?;
            header.put_before_name(prefix);
        }
        Ok(header)
    }

    /// The part behind the device numbers, which each format has its own way; returns the name's prefix.
    fn rest<'a>(&mut self, block: &'a Block, format: Format) -> Result<&'a [u8], TarError> {
        match format {
            Format::V7 => Ok(&[]),
            Format::Ustar => Ok(string(&block[345..500])),
            Format::Star => {
                self.atime = Some(Time::from_seconds(number(&block[476..488])?));
                number(&block[488..500])?;
                Ok(string(&block[345..476]))
            }
            Format::Gnu => Ok(self.gnu_times(block)),
        }
    }

    /// Old Go programs wrote a prefix where GNU has times: what does not parse as times is a prefix if it is ASCII.
    fn gnu_times<'a>(&mut self, block: &'a Block) -> &'a [u8] {
        let time = |field: &[u8]| if field[0] == 0 { Ok(None) } else { number(field).map(Some) };
        match (time(&block[345..357]), time(&block[357..369])) {
            (Ok(atime), Ok(_)) => {
                self.atime = atime.map(Time::from_seconds);
                &[]
            }
            _ => Some(string(&block[345..500])).filter(|prefix| prefix.is_ascii()).unwrap_or(&[]),
        }
    }

    fn put_before_name(&mut self, prefix: &[u8]) {
        if !prefix.is_empty() {
            self.name = [prefix, b"/", &self.name].concat();
        }
    }
}

fn format(block: &Block) -> Result<Format, TarError> {
    let expected = octal(&block[148..156])?;
    let (unsigned, signed) = checksums(block);
    if expected != unsigned && expected != signed {
        return Err(TarError::Header);
    }
    Ok(match (&block[257..263], &block[263..265], &block[508..]) {
        (b"ustar\0", _, b"tar\0") => Format::Star,
        (b"ustar\0", _, _) => Format::Ustar,
        (b"ustar ", b" \0", _) => Format::Gnu,
        _ => Format::V7,
    })
}

/// POSIX sums unsigned bytes, Sun's tar summed signed ones; both are accepted.
fn checksums(block: &Block) -> (i64, i64) {
    let mut unsigned = 0;
    let mut signed = 0;
    for (i, byte) in block.iter().enumerate() {
        let byte = if (148..156).contains(&i) { b' ' } else { *byte };
        unsigned += i64::from(byte);
        signed += i64::from(byte as i8);
    }
    (unsigned, signed)
}

/// The bytes before the first NUL.
pub(crate) fn string(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or(&[])
}

/// Octal digits, or GNU's base-256 in two's complement when the first bit is set.
pub(crate) fn number(field: &[u8]) -> Result<i64, TarError> {
    if field.first().is_none_or(|first| first & 0x80 == 0) {
        return octal(field);
    }
    let invert = if field[0] & 0x40 != 0 { 0xff } else { 0 };
    let mut value = 0u64;
    for (i, byte) in field.iter().enumerate() {
        let byte = byte ^ invert;
        let byte = if i == 0 { byte & 0x7f } else { byte };
        if value >> 56 > 0 {
            return Err(TarError::Header);
        }
        value = value << 8 | u64::from(byte);
    }
    let value = i64::try_from(value).map_err(|_| TarError::Header)?;
    Ok(if invert == 0 { value } else { !value })
}

/// Spaces and NULs around the digits are padding; no digits are zero.
fn octal(field: &[u8]) -> Result<i64, TarError> {
    let padding = |byte: &u8| *byte == b' ' || *byte == 0;
    let start = field.iter().position(|byte| !padding(byte)).unwrap_or(field.len());
    let end = field.iter().rposition(|byte| !padding(byte)).map_or(start, |last| last + 1);
    let digits = string(&field[start..end]);
    let mut value = 0u64;
    for digit in digits {
        if !(b'0'..=b'7').contains(digit) || value >> 61 != 0 {
            return Err(TarError::Header);
        }
        value = value << 3 | u64::from(digit - b'0');
    }
    Ok(value as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_numbers_may_be_padded_either_way() {
        for field in [&b"0000644\0"[..], b"   644 \0", b"644", b"\x00\x00644\x00"] {
            assert_eq!(number(field).unwrap(), 0o644, "{field:?}");
        }
        assert_eq!(number(b"\0\0\0\0").unwrap(), 0);
        assert!(number(b"0000648\0").is_err());
        assert!(number(b"-644\0").is_err());
    }

    #[test]
    fn base_256_numbers_have_a_sign() {
        assert_eq!(number(&[0x80, 0, 0, 1, 0, 0, 0, 0]).unwrap(), 1 << 32);
        assert_eq!(number(&[0xff; 12]).unwrap(), -1);
        assert!(number(&[0x80, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).is_err());
    }

    #[test]
    fn a_block_with_a_wrong_checksum_is_no_header() {
        let mut block = [0; BLOCK];
        block[0] = b'a';
        assert_eq!(RawHeader::parse(&block), Err(TarError::Header));
    }
}
