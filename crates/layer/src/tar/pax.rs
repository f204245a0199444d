//! PAX extended headers: records of `<length> <key>=<value>\n`, and what they change in a header.

use std::collections::BTreeMap;

use super::TarError;
use super::header::{RawHeader, Time};

pub(crate) const XATTR: &[u8] = b"SCHILY.xattr.";
pub(crate) const SPARSE_NUM_BLOCKS: &[u8] = b"GNU.sparse.numblocks";
const SPARSE_OFFSET: &[u8] = b"GNU.sparse.offset";
const SPARSE_NUM_BYTES: &[u8] = b"GNU.sparse.numbytes";
pub(crate) const SPARSE_MAP: &[u8] = b"GNU.sparse.map";
pub(crate) const SPARSE_NAME: &[u8] = b"GNU.sparse.name";
pub(crate) const SPARSE_MAJOR: &[u8] = b"GNU.sparse.major";
pub(crate) const SPARSE_MINOR: &[u8] = b"GNU.sparse.minor";
pub(crate) const SPARSE_SIZE: &[u8] = b"GNU.sparse.size";
pub(crate) const SPARSE_REAL_SIZE: &[u8] = b"GNU.sparse.realsize";

#[derive(Debug, Default)]
pub(crate) struct Records(BTreeMap<Vec<u8>, Vec<u8>>);

impl Records {
    /// Sparse format 0.0 repeats two keys; they become the one key of format 0.1, as Go does it.
    pub(crate) fn parse(mut text: &[u8]) -> Result<Self, TarError> {
        let mut records = BTreeMap::new();
        let mut sparse: Vec<&[u8]> = Vec::new();
        while !text.is_empty() {
            let (key, value, rest) = record(text)?;
            text = rest;
            if key == SPARSE_OFFSET || key == SPARSE_NUM_BYTES {
                let expected = if sparse.len().is_multiple_of(2) { SPARSE_OFFSET } else { SPARSE_NUM_BYTES };
                if key != expected || value.contains(&b',') {
                    return Err(TarError::Header);
                }
                sparse.push(value);
            } else {
                records.insert(key.to_vec(), value.to_vec());
            }
        }
        if !sparse.is_empty() {
            records.insert(SPARSE_MAP.to_vec(), sparse.join(&b","[..]));
        }
        Ok(Self(records))
    }

    /// Empty when the key is missing.
    pub(crate) fn get(&self, key: &[u8]) -> &[u8] {
        self.0.get(key).map_or(&[], Vec::as_slice)
    }

    /// Names without the `SCHILY.xattr.` before them, in order.
    pub(crate) fn xattrs(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.0.iter().filter_map(|(key, value)| Some((key.strip_prefix(XATTR)?, value.as_slice())))
    }

    /// An empty value leaves the field as the header has it.
    pub(crate) fn merge_into(&self, header: &mut RawHeader) -> Result<(), TarError> {
        for (key, value) in self.0.iter().filter(|(_, value)| !value.is_empty()) {
            match key.as_slice() {
                b"path" => header.name = value.clone(),
                b"linkpath" => header.link = value.clone(),
                b"uid" => header.uid = decimal(value)?,
                b"gid" => header.gid = decimal(value)?,
                b"size" => header.size = decimal(value)?,
                b"mtime" => header.mtime = time(value)?,
                b"atime" => header.atime = Some(time(value)?),
                b"ctime" => drop(time(value)?),
                _ => {}
            }
        }
        Ok(())
    }
}

fn record(text: &[u8]) -> Result<(&[u8], &[u8], &[u8]), TarError> {
    let space = text.iter().position(|byte| *byte == b' ').ok_or(TarError::Header)?;
    let len = usize::try_from(decimal(&text[..space])?).map_err(|_| TarError::Header)?;
    if len < 5 || len > text.len() || len <= space + 1 {
        return Err(TarError::Header);
    }
    let (record, rest) = text.split_at(len);
    let body = record[space + 1..].strip_suffix(b"\n").ok_or(TarError::Header)?;
    let equals = body.iter().position(|byte| *byte == b'=').ok_or(TarError::Header)?;
    let (key, value) = (&body[..equals], &body[equals + 1..]);
    let text_value = matches!(key, b"path" | b"linkpath" | b"uname" | b"gname");
    if key.is_empty() || key.contains(&0) || text_value && value.contains(&0) {
        return Err(TarError::Header);
    }
    Ok((key, value, rest))
}

pub(crate) fn decimal(text: &[u8]) -> Result<i64, TarError> {
    std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()).ok_or(TarError::Header)
}

/// Seconds, and a fraction of which nine digits count.
fn time(text: &[u8]) -> Result<Time, TarError> {
    let dot = text.iter().position(|byte| *byte == b'.');
    let (whole, fraction) = dot.map_or((text, &[][..]), |dot| (&text[..dot], &text[dot + 1..]));
    let seconds = decimal(whole)?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(TarError::Header);
    }
    let digit = |i: usize| u32::from(fraction.get(i).map_or(0, |digit| digit - b'0'));
    let nanos = (0..9).fold(0, |nanos, i| nanos * 10 + digit(i));
    if nanos > 0 && whole.starts_with(b"-") {
        return Ok(Time { seconds: seconds.wrapping_sub(1), nanos: 1_000_000_000 - nanos });
    }
    Ok(Time { seconds, nanos })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_counted_in_bytes() {
        let records = Records::parse(b"11 path=ab\n12 path=abc\n").unwrap();
        assert_eq!(records.get(b"path"), b"abc");
        for bad in [
            &b"10 path=ab\n"[..],
            b"12 path=ab\n",
            b"x path=ab\n",
            b"11 path:ab\n",
            b"5 =\n\n",
            b"11 path=a\0\n",
        ] {
            assert!(Records::parse(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn values_may_hold_any_byte_where_no_name_is_meant() {
        let records = Records::parse(b"27 SCHILY.xattr.user.a=\0=\n\n").unwrap();
        assert_eq!(records.xattrs().collect::<Vec<_>>(), [(&b"user.a"[..], &b"\0=\n"[..])]);
    }

    #[test]
    fn fractions_of_negative_times_count_downwards() {
        assert_eq!(time(b"5.25").unwrap(), Time { seconds: 5, nanos: 250_000_000 });
        assert_eq!(time(b"-5.25").unwrap(), Time { seconds: -6, nanos: 750_000_000 });
        assert_eq!(time(b"1.1234567899").unwrap().nanos, 123_456_789);
        assert!(time(b"1.5x").is_err());
    }

    #[test]
    fn sparse_format_0_0_becomes_0_1() {
        let text = b"24 GNU.sparse.offset=10\n25 GNU.sparse.numbytes=5\n";
        assert_eq!(Records::parse(text).map(|r| r.get(SPARSE_MAP).to_vec()).unwrap(), b"10,5");
        assert!(Records::parse(b"25 GNU.sparse.numbytes=5\n").is_err());
    }
}
