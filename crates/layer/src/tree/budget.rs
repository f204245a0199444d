//! What one merge may take: memory, and steps.
//!
//! An image of a few kilobytes can stand for millions of directories, or have the same names walked over and over. Where
//! containerd unpacks, the disk's quota and a process that can be ended stand against that; in a merge it is this. It counts
//! over all layers of a chain together, and nothing is given back: what a layer makes and removes again counts as well.

use std::cell::Cell;

use super::Node;
use super::upper::Inode;
use crate::Segment;

pub(super) const TOO_LARGE: &str = "the merged layers take more memory than a tree may";
pub(super) const TOO_MUCH_WORK: &str = "the merged layers take more steps than a tree may";

/// More than this is taken for this much: with it, inodes and names still have numbers of 32 bits.
const MEMORY_MAX: u64 = 64 << 30;
/// An inode while it is merged and in the tree, with what a directory has besides.
const INODE: usize = size_of::<Inode>() + size_of::<Node>() + 32;
/// A name: its record, its slot in the index, its place in the tree, and what sorts it into there.
const NAME: usize = 112;
/// A pair of extended attributes: two boxes and their overhead.
const PAIR: usize = 64;
/// A step is about as long as looking up one name; so many bytes are copied or compared meanwhile.
const STEP: usize = 64;

/// Counts down while a tree is merged.
#[derive(Debug)]
pub(super) struct Budget {
    memory: Cell<u64>,
    steps: Cell<u64>,
    /// Bytes that the names may still have together: a name's place among them is a number of 32 bits.
    names: Cell<u64>,
}

type Taken = Result<(), &'static str>;

impl Budget {
    /// `memory` in bytes; there is a step for each of them, which gives the default about a minute of one core.
    pub(super) fn new(memory: u64) -> Self {
        let memory = memory.min(MEMORY_MAX);
        Self { memory: Cell::new(memory), steps: Cell::new(memory), names: Cell::new(u32::MAX.into()) }
    }

    pub(super) fn inode(&self) -> Taken {
        self.bytes(INODE)
    }

    pub(super) fn name(&self, name: &[u8]) -> Taken {
        take(&self.names, name.len(), TOO_LARGE)?;
        // Once for the layer, once for the tree.
        self.bytes(NAME + 2 * name.len())
    }

    pub(super) fn xattr(&self, name: &[u8], value: &[u8]) -> Taken {
        self.bytes(PAIR + name.len() + value.len())
    }

    pub(super) fn segments(&self, segments: &[Segment]) -> Taken {
        self.bytes(size_of_val(segments))
    }

    pub(super) fn bytes(&self, bytes: usize) -> Taken {
        take(&self.memory, bytes, TOO_LARGE)
    }

    pub(super) fn step(&self) -> Taken {
        take(&self.steps, 1, TOO_MUCH_WORK)
    }

    /// For work on a path as text, as opposed to walking it.
    pub(super) fn text(&self, text: &[u8]) -> Taken {
        take(&self.steps, 1 + text.len() / STEP, TOO_MUCH_WORK)
    }
}

fn take(left: &Cell<u64>, amount: usize, why: &'static str) -> Taken {
    left.set(left.get().checked_sub(amount as u64).ok_or(why)?);
    Ok(())
}
