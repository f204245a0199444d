//! A set of spans: one bit each.

use crate::limits::MAX_SPANS;

/// Which spans of a layer are there, or are wanted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Spans(Vec<u8>);

impl Spans {
    /// Lowest bit of the first byte first. `None` if there are more bits than a layer may have spans.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let len = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        (len <= MAX_SPANS as usize / 8).then(|| Self(bytes[..len].to_vec()))
    }

    /// The first `count` spans; never more than a layer may have.
    pub fn first(count: u32) -> Self {
        let count = count.min(MAX_SPANS);
        let mut bytes = vec![0xff; count as usize / 8];
        if !count.is_multiple_of(8) {
            bytes.push((1 << (count % 8)) - 1);
        }
        Self(bytes)
    }

    /// Without zero bytes at the end.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Bytes that it takes.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn count(&self) -> u32 {
        self.0.iter().map(|byte| byte.count_ones()).sum()
    }

    /// How many of these are in `other` too.
    pub fn count_common(&self, other: &Spans) -> u32 {
        self.0.iter().zip(&other.0).map(|(a, b)| (a & b).count_ones()).sum()
    }

    pub(crate) fn add(&mut self, other: &Spans) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine |= theirs;
        }
    }

    /// Whether there is a span in here that `covered` lacks; only those that are `wanted` count, unless that is empty.
    pub(crate) fn adds_to(&self, covered: &Spans, wanted: &Spans) -> bool {
        self.0.iter().enumerate().any(|(at, byte)| {
            let new = byte & !covered.0.get(at).copied().unwrap_or(0);
            let useful = if wanted.is_empty() { 0xff } else { wanted.0.get(at).copied().unwrap_or(0) };
            new & useful != 0
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_bytes_at_the_end_make_no_difference() {
        assert_eq!(Spans::from_bytes(&[5, 0, 0]), Spans::from_bytes(&[5]));
        assert!(Spans::from_bytes(&[0; 10]).unwrap().is_empty());
    }

    #[test]
    fn more_spans_than_a_layer_has_are_refused() {
        assert!(Spans::from_bytes(&vec![1; MAX_SPANS as usize / 8 + 1]).is_none());
    }

    #[test]
    fn first_spans_are_counted() {
        for count in [0, 1, 7, 8, 9, 100] {
            assert_eq!(Spans::first(count).count(), count);
        }
    }

    #[test]
    fn only_wanted_new_spans_add() {
        let covered = Spans::first(4);
        let eight = Spans::first(8);
        assert!(eight.adds_to(&covered, &Spans::default()));
        assert!(!eight.adds_to(&covered, &Spans::first(3)));
        assert!(!covered.adds_to(&eight, &Spans::default()));
    }
}
