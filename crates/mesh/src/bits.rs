//! A row of bits, lowest bit of the first byte first, as the wire has it.

/// Which of a number of things are there.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Bits {
    bytes: Vec<u8>,
    len: u32,
}

impl Bits {
    pub(crate) fn new(len: u32) -> Self {
        Self { bytes: vec![0; (len as usize).div_ceil(8)], len }
    }

    /// The bits for which `is_set` says so.
    pub(crate) fn from_fn(len: u32, is_set: impl Fn(u32) -> bool) -> Self {
        let mut bits = Self::new(len);
        (0..len).filter(|at| is_set(*at)).for_each(|at| bits.set(at));
        bits
    }

    /// `None` unless there are just as many bytes as `len` bits take.
    pub(crate) fn from_bytes(len: u32, bytes: &[u8]) -> Option<Self> {
        (bytes.len() == (len as usize).div_ceil(8)).then(|| Self { bytes: bytes.to_vec(), len })
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    pub(crate) fn get(&self, at: u32) -> bool {
        at < self.len && self.bytes[at as usize / 8] & (1 << (at % 8)) != 0
    }

    pub(crate) fn set(&mut self, at: u32) {
        if at < self.len {
            self.bytes[at as usize / 8] |= 1 << (at % 8);
        }
    }

    pub(crate) fn clear(&mut self, at: u32) {
        if at < self.len {
            self.bytes[at as usize / 8] &= !(1 << (at % 8));
        }
    }

    /// How many are set.
    pub(crate) fn count(&self) -> u32 {
        (0..self.len).filter(|at| self.get(*at)).count() as u32
    }

    pub(crate) fn is_full(&self) -> bool {
        self.count() == self.len
    }

    /// One bit for each run of `run` bits: whether all of them are set.
    pub(crate) fn runs(&self, run: u32) -> Bits {
        let whole = |at: u32| (at * run..((at + 1) * run).min(self.len)).all(|bit| self.get(bit));
        Bits::from_fn(self.len.div_ceil(run), whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_run_may_be_short() {
        let bits = Bits::from_fn(18, |at| at >= 16);
        assert_eq!(bits.runs(16).as_bytes(), [0b10]);
        assert_eq!((bits.count(), bits.is_full()), (2, false));
        assert!(Bits::from_fn(18, |_| true).is_full());
    }

    #[test]
    fn bits_outside_are_not_set() {
        let mut bits = Bits::new(3);
        bits.set(3);
        assert_eq!(bits.count(), 0);
        assert_eq!(Bits::from_bytes(9, &[0]), None);
        assert!(!Bits::from_bytes(3, &[0xff]).unwrap().get(4));
    }
}
