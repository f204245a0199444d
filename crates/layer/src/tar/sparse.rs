//! GNU's sparse files in PAX archives, formats 0.0, 0.1 and 1.0: where the data lies in the file.

use super::header::{BLOCK, Block};
use super::pax::{self, Records, decimal};
use super::{Segment, TarError};

/// What Go allows a map in front of the data to have.
const MAP_MAX: usize = 1 << 20;

pub(crate) enum Version {
    /// The map is in the extended header.
    Zero,
    /// The map stands in front of the data.
    One,
}

pub(crate) fn version(records: &Records) -> Option<Version> {
    match (records.get(pax::SPARSE_MAJOR), records.get(pax::SPARSE_MINOR)) {
        (b"0", b"0" | b"1") => Some(Version::Zero),
        (b"1", b"0") => Some(Version::One),
        (b"", b"") if !records.get(pax::SPARSE_MAP).is_empty() => Some(Version::Zero),
        _ => None,
    }
}

/// The size of the file with its holes, if the records have it.
pub(crate) fn real_size(records: &Records) -> Result<Option<i64>, TarError> {
    let keys = [pax::SPARSE_SIZE, pax::SPARSE_REAL_SIZE];
    keys.map(|key| records.get(key)).into_iter().find(|text| !text.is_empty()).map(decimal).transpose()
}

pub(crate) fn from_records(records: &Records) -> Result<Vec<(i64, i64)>, TarError> {
    let count = decimal(records.get(pax::SPARSE_NUM_BLOCKS))?;
    let text = records.get(pax::SPARSE_MAP);
    let numbers: Vec<&[u8]> =
        if text.is_empty() { Vec::new() } else { text.split(|byte| *byte == b',').collect() };
    if usize::try_from(count).ok().and_then(|count| count.checked_mul(2)) != Some(numbers.len()) {
        return Err(TarError::Header);
    }
    numbers.chunks_exact(2).map(|pair| Ok((decimal(pair[0])?, decimal(pair[1])?))).collect()
}

/// Reads whole blocks with `next` until the map, whose numbers end in a newline each, is complete.
pub(crate) fn from_data(
    mut next: impl FnMut(&mut Block) -> Result<(), TarError>,
) -> Result<Vec<(i64, i64)>, TarError> {
    let mut text = Vec::new();
    let mut need = 1;
    let mut count = None;
    loop {
        while text.iter().filter(|byte| **byte == b'\n').count() < need {
            if text.len() + BLOCK > MAP_MAX {
                return Err(TarError::SparseTooLong);
            }
            let mut block = [0; BLOCK];
            next(&mut block)?;
            text.extend_from_slice(&block);
        }
        let mut lines = text.split(|byte| *byte == b'\n');
        let first = decimal(lines.next().unwrap_or(&[]))?;
        if count.is_some() {
            return (0..need / 2).map(|_| pair(&mut lines)).collect();
        }
        let entries = usize::try_from(first).map_err(|_| TarError::Header)?;
        // More newlines than the longest map has bytes are never found: this bounds the loop above too.
        need =
            entries.checked_mul(2).and_then(|n| n.checked_add(1)).ok_or(TarError::Header)?.min(MAP_MAX + 1);
        count = Some(entries);
    }
}

fn pair<'a>(lines: &mut impl Iterator<Item = &'a [u8]>) -> Result<(i64, i64), TarError> {
    let mut line = || lines.next().ok_or(TarError::Header).and_then(decimal);
    Ok((line()?, line()?))
}

/// The data as segments: in order, without overlap, within `size`, `data_len` bytes in all.
pub(crate) fn segments(map: &[(i64, i64)], size: i64, data_len: u64) -> Result<Vec<Segment>, TarError> {
    let mut segments: Vec<Segment> = Vec::new();
    let mut end = 0;
    let mut data = 0u64;
    for &(offset, len) in map {
        let next = offset.checked_add(len).filter(|next| len >= 0 && offset >= end && *next <= size);
        end = next.ok_or(TarError::Header)?;
        if len > 0 {
            segments.push(Segment { offset: offset as u64, len: len as u64 });
            data += len as u64;
        }
    }
    match data.cmp(&data_len) {
        _ if size < 0 => Err(TarError::Header),
        std::cmp::Ordering::Less => Err(TarError::SparseUnreferenced),
        std::cmp::Ordering::Greater => Err(TarError::SparseMissing),
        std::cmp::Ordering::Equal => Ok(segments),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &[u8]) -> Result<Vec<(i64, i64)>, TarError> {
        let mut blocks = text.chunks(BLOCK);
        from_data(|block| {
            let part = blocks.next().ok_or(TarError::UnexpectedEof)?;
            block[..part.len()].copy_from_slice(part);
            Ok(())
        })
    }

    #[test]
    fn map_in_front_of_the_data_is_read_to_its_last_newline() {
        assert_eq!(read(b"2\n0\n5\n10\n3\n").unwrap(), [(0, 5), (10, 3)]);
        assert_eq!(read(b"0\n").unwrap(), []);
        assert!(read(b"x\n").is_err());
        assert!(read(b"-1\n").is_err());
        assert!(read(b"9999999999999999\n0\n").is_err());
    }

    #[test]
    fn segments_must_be_in_order_and_match_the_data() {
        assert_eq!(segments(&[(0, 5), (7, 0), (10, 3)], 20, 8).unwrap().len(), 2);
        assert!(segments(&[(5, 5), (0, 3)], 20, 8).is_err());
        assert!(segments(&[(0, 21)], 20, 21).is_err());
        assert_eq!(segments(&[(0, 5)], 20, 6), Err(TarError::SparseUnreferenced));
        assert_eq!(segments(&[(0, 5)], 20, 4), Err(TarError::SparseMissing));
    }
}
