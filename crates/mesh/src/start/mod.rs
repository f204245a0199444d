//! What starts of containers read of a layer first: noted here, told to the seed, had of whoever gives the map, fetched in that
//! order before anything asks.
//!
//! ```text
//! a container reads ── record ── (calm) ── share ── beside the map here, and to a seed ── merged with what was known
//! a map comes, with an order ── ahead ── pieces of all layers of the image, as the earlier starts wanted them ── line
//! ```
//! An order is a hint. It says which pieces are fetched before they are asked for and when, nothing else: who may read, what
//! is right and who is asked is decided as ever, and what a wrong one wastes is bounded ([`order`]). Containers that wait
//! for something else go first ([`ahead`]).

mod ahead;
mod line;
mod order;
mod pack;
mod record;
mod share;

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use darter_layer::LayerMap;
use darter_types::PieceIndex;
use parking_lot::Mutex;

use crate::bits::Bits;
use crate::layer::Open;
use crate::shared::DemandClock;

pub(crate) use ahead::run;
#[cfg(test)]
pub(crate) use order::BYTES_MAX;
pub(crate) use order::Order;
pub(crate) use record::Recorder;
pub(crate) use share::{known, take};

/// What a layer that is open knows of starts.
#[derive(Default)]
pub(crate) struct Start {
    pub recorder: Recorder,
    /// A container was made of it.
    has_begun: AtomicBool,
    expected: OnceLock<Expected>,
}

struct Expected {
    order: Order,
    pieces: Bits,
}

impl Start {
    /// What earlier starts read, as the map's giver or our own disk says. The first time counts.
    pub(crate) fn expect(&self, map: &LayerMap, order: Order) {
        let order = order.within(|piece| map.piece(PieceIndex(piece)).plain_len);
        let mut pieces = Bits::new(map.piece_count());
        order.reads().iter().for_each(|read| pieces.set(read.piece));
        // It is set once, before the map is shown to anybody.
        let _ = self.expected.set(Expected { order, pieces });
    }

    fn order(&self) -> Option<&Order> {
        self.expected.get().map(|expected| &expected.order)
    }

    /// Whether an earlier start read the piece.
    pub(crate) fn is_expected(&self, piece: u32) -> bool {
        self.expected.get().is_some_and(|expected| expected.pieces.get(piece))
    }
}

/// The pieces that are to be fetched in the order of earlier starts, of all layers of this peer.
#[derive(Default)]
pub(crate) struct Starts {
    queue: ahead::Queue,
    line: line::Line,
    packing: pack::Packing,
    /// Containers that wait for a piece that no order names.
    pub strangers: DemandClock,
    /// Held while what is known of a layer's starts is changed on the disk.
    keeping: Mutex<()>,
}

impl Starts {
    /// Fetches what earlier starts read of the layer, whose map is there.
    pub(crate) fn fetch(&self, open: &Arc<Open>) {
        self.queue.add(open);
    }

    /// A container is being made of layers whose pieces are in the line.
    pub(crate) fn begin(&self, open: &Open) {
        if !open.start.has_begun.swap(true, Ordering::Relaxed) {
            self.line.begin(&open.shared);
        }
    }

    /// Whether a piece that comes now will be read so soon that it shall stay in memory.
    pub(crate) fn is_near(&self, open: &Open, piece: u32) -> bool {
        self.line.is_near(open.task, piece)
    }

    /// Whether some of it is still on its way.
    pub(crate) fn is_busy(&self) -> bool {
        self.queue.is_busy()
    }
}
