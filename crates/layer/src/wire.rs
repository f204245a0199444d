//! The numbers of the map's sections: unsigned LEB128, and zigzag for those that may be negative.
//!
//! A [`Cursor`] never reads past its end and never allocates more than the bytes that it has.

use crate::map::MapError;

pub(crate) fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

pub(crate) fn put_signed(out: &mut Vec<u8>, value: i64) {
    put(out, ((value << 1) ^ (value >> 63)) as u64);
}

/// A length, then so many bytes.
pub(crate) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// A place in a section that is being read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// Bytes that are left.
    pub(crate) fn len(&self) -> usize {
        self.rest.len()
    }

    pub(crate) fn byte(&mut self) -> Result<u8, MapError> {
        let (first, rest) = self.rest.split_first().ok_or(MapError::Short)?;
        self.rest = rest;
        Ok(*first)
    }

    pub(crate) fn number(&mut self) -> Result<u64, MapError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let part = u64::from(byte & 0x7f);
            if part << shift >> shift != part {
                return Err(MapError::Invalid("a number of more than 64 bits"));
            }
            value |= part << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(MapError::Invalid("a number of more than 64 bits"))
    }

    pub(crate) fn signed(&mut self) -> Result<i64, MapError> {
        let value = self.number()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    pub(crate) fn number_u32(&mut self) -> Result<u32, MapError> {
        u32::try_from(self.number()?).map_err(|_| MapError::Invalid("a number of more than 32 bits"))
    }

    pub(crate) fn take(&mut self, len: u64) -> Result<&'a [u8], MapError> {
        let len = usize::try_from(len).ok().filter(|len| *len <= self.rest.len()).ok_or(MapError::Short)?;
        let (taken, rest) = self.rest.split_at(len);
        self.rest = rest;
        Ok(taken)
    }

    pub(crate) fn bytes(&mut self) -> Result<&'a [u8], MapError> {
        let len = self.number()?;
        self.take(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip() {
        for value in [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX] {
            let mut out = Vec::new();
            put(&mut out, value);
            assert_eq!(Cursor::new(&out).number().unwrap(), value);
        }
        for value in [0, -1, 1, i64::MIN, i64::MAX] {
            let mut out = Vec::new();
            put_signed(&mut out, value);
            assert_eq!(Cursor::new(&out).signed().unwrap(), value);
        }
    }

    #[test]
    fn too_long_numbers_and_short_sections_are_errors() {
        assert!(Cursor::new(&[0xff; 10]).number().is_err());
        assert!(Cursor::new(&[0x80]).number().is_err());
        assert!(Cursor::new(&[5, 1, 2]).bytes().is_err());
    }
}
