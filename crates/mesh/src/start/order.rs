//! An order: pieces of a layer as starts first read them, merged over many starts.

use std::collections::HashMap;

use darter_proto::v1::StartOrder;
use darter_types::RootHash;

use crate::bits::Bits;

/// Pieces in one order. What a start reads after that, it reads as it needs it.
pub(crate) const PIECES_MAX: usize = 2048;

/// Bytes of plain pieces that one order may make a peer fetch. A wrong order wastes no more than this, of a layer that the peer
/// would fetch in the background as a whole.
pub(crate) const BYTES_MAX: u64 = 64 << 20;

/// A piece that a start reads for the first time is forgotten when so many later ones have not read it;
const VOTES_FIRST: u8 = 2;
/// each that reads it adds one, up to this.
const VOTES_MAX: u8 = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Read {
    pub piece: u32,
    /// Milliseconds after the first read of the container's tree.
    pub at_ms: u32,
    votes: u8,
}

/// Each piece once, at times that never fall.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Order(Vec<Read>);

impl Order {
    /// What one start has read: pieces, and when.
    pub(crate) fn of_start(reads: impl IntoIterator<Item = (u32, u32)>) -> Self {
        let read = |(piece, at_ms)| Read { piece, at_ms, votes: VOTES_FIRST };
        Self::sorted(reads.into_iter().map(read).collect())
    }

    /// As if one start had read it: nobody's word counts more.
    pub(super) fn as_one_start(&self) -> Self {
        Self::of_start(self.0.iter().map(|read| (read.piece, read.at_ms)))
    }

    fn sorted(mut reads: Vec<Read>) -> Self {
        reads.sort_by_key(|read| read.at_ms);
        reads.truncate(PIECES_MAX);
        Self(reads)
    }

    /// `None` if it is not an order of this map, which has so many pieces.
    pub(crate) fn from_wire(order: &StartOrder, root: RootHash, pieces: u32) -> Option<Self> {
        let count = order.pieces.len();
        let is_whole = count <= PIECES_MAX && order.at_ms.len() == count && order.votes.len() == count;
        if !is_whole || order.root != root.as_bytes() || !order.at_ms.is_sorted() {
            return None;
        }
        let mut seen = Bits::new(pieces);
        let mut reads = Vec::with_capacity(count);
        for ((&piece, &at_ms), &votes) in order.pieces.iter().zip(&order.at_ms).zip(&order.votes) {
            if piece >= pieces || seen.get(piece) {
                return None;
            }
            seen.set(piece);
            let votes = u8::try_from(votes).unwrap_or(VOTES_MAX).clamp(1, VOTES_MAX);
            reads.push(Read { piece, at_ms, votes });
        }
        Some(Self(reads))
    }

    pub(crate) fn to_wire(&self, root: RootHash) -> StartOrder {
        StartOrder {
            root: root.as_bytes().to_vec(),
            pieces: self.0.iter().map(|read| read.piece).collect(),
            at_ms: self.0.iter().map(|read| read.at_ms).collect(),
            votes: self.0.iter().map(|read| u32::from(read.votes)).collect(),
        }
    }

    pub(crate) fn reads(&self) -> &[Read] {
        &self.0
    }

    /// Its beginning, as far as it makes nobody fetch more than [`BYTES_MAX`].
    pub(crate) fn within(mut self, length: impl Fn(u32) -> u32) -> Self {
        let mut bytes = 0;
        let fits = self.0.iter().position(|read| {
            bytes += u64::from(length(read.piece));
            bytes > BYTES_MAX
        });
        self.0.truncate(fits.unwrap_or(self.0.len()));
        self
    }

    /// Adds what the newest start has read, in its order; what several starts in a row have not read is forgotten.
    pub(crate) fn merge(&mut self, newest: &Order) {
        let mut before: HashMap<u32, Read> = self.0.drain(..).map(|read| (read.piece, read)).collect();
        let mut reads = Vec::with_capacity(newest.0.len() + before.len());
        for read in &newest.0 {
            let known = before.remove(&read.piece);
            let votes = known.map_or(VOTES_FIRST, |known| (known.votes + 1).min(VOTES_MAX));
            reads.push(Read { votes, ..*read });
        }
        let kept = before.into_values().filter(|read| read.votes > 1);
        reads.extend(kept.map(|read| Read { votes: read.votes - 1, ..read }));
        // The newest keeps its own order where times are equal.
        let own = newest.0.len();
        reads[own..].sort_by_key(|read| read.piece);
        *self = Self::sorted(reads);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> RootHash {
        RootHash::from_bytes([7; 32])
    }

    fn pieces(order: &Order) -> Vec<u32> {
        order.reads().iter().map(|read| read.piece).collect()
    }

    #[test]
    fn orders_round_trip_and_keep_their_order() {
        let order = Order::of_start([(9, 30), (4, 10), (5, 10)]);
        assert_eq!(pieces(&order), [4, 5, 9]);
        assert_eq!(Order::from_wire(&order.to_wire(root()), root(), 10), Some(order));
    }

    #[test]
    fn what_is_no_order_of_this_map_is_none() {
        let good = Order::of_start([(4, 10), (9, 30)]).to_wire(root());
        assert!(Order::from_wire(&good, root(), 9).is_none(), "a piece that the map does not have");
        assert!(Order::from_wire(&good, RootHash::from_bytes([8; 32]), 10).is_none(), "another map's");
        let twice = StartOrder { pieces: vec![4, 4], ..good.clone() };
        let falling = StartOrder { at_ms: vec![30, 10], ..good.clone() };
        let uneven = StartOrder { votes: vec![1], ..good.clone() };
        let many = PIECES_MAX + 1;
        let long = StartOrder {
            pieces: (0..many as u32).collect(),
            at_ms: vec![0; many],
            votes: vec![1; many],
            ..good
        };
        for bad in [twice, falling, uneven, long] {
            assert!(Order::from_wire(&bad, root(), 10_000).is_none());
        }
    }

    #[test]
    fn newest_start_gives_the_order_and_what_is_not_read_again_is_forgotten() {
        let mut order = Order::of_start([(1, 0), (2, 10), (3, 20)]);
        order.merge(&Order::of_start([(3, 0), (1, 5)]));
        assert_eq!(pieces(&order), [3, 1, 2]);
        order.merge(&Order::of_start([(3, 0), (1, 5)]));
        assert_eq!(pieces(&order), [3, 1], "2 was not read twice");
    }

    #[test]
    fn two_commands_of_one_image_that_take_turns_are_both_remembered() {
        let (one, other) = (Order::of_start([(1, 0), (2, 1)]), Order::of_start([(1, 0), (3, 1)]));
        let mut order = one.clone();
        for _ in 0..5 {
            order.merge(&other);
            assert!(pieces(&order).contains(&2));
            order.merge(&one);
            assert!(pieces(&order).contains(&3));
        }
    }

    #[test]
    fn an_order_makes_nobody_fetch_more_than_its_bound() {
        let order = Order::of_start((0..PIECES_MAX as u32).map(|piece| (piece, piece)));
        let length = 1 << 18;
        let within = order.within(|_| length);
        assert_eq!(within.reads().len() as u64 * u64::from(length), BYTES_MAX);
    }
}
