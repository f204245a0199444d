//! Inode numbers: which layer or tree a number stands for, and how an inode number is put together.
//!
//! An inode number is `(number << 32) | (position + 2)`. `number` stands for a layer (everything but directories; the
//! position is the entry in its map) or for the directories of one mounted tree (the position is the directory's
//! ordinal). It is written down by [`Numbers`] and never used again for anything else, so an inode number means the same
//! file after a restart and in every later version. The same layer in two images gives the same inode, hence one page cache.
//!
//! Number 0 is reserved: inode 1 is the mount's root, `1000 + dir` the root of the tree that is shown as `<dir>`.

use std::collections::HashMap;
use std::io;

use darter_types::{Hash, RootHash};
use parking_lot::Mutex;

/// What a number can stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NumberKey {
    /// The entries of a layer. The lowest layer of an image shows the same map differently, so it counts as another.
    Layer { root: RootHash, base: bool },
    /// The directories of the tree that one `<dir>` shows ([`tree_key`]).
    Tree(Hash),
}

/// Numbers are below this, so that the top four bits of an inode number stay zero: overlayfs needs them for `xino`.
pub const NUMBER_LIMIT: u32 = 1 << 28;

/// Gives out numbers and remembers them.
pub trait Numbers: Send + Sync + 'static {
    /// The number of `key`: from 1, in the order of first asking, below [`NUMBER_LIMIT`], the same for ever, never reused.
    /// It is safely stored when this returns. May wait for the disk.
    fn number(&self, key: &NumberKey) -> io::Result<u32>;
}

/// Numbers that are forgotten at the end: for tests.
#[derive(Default)]
pub struct MemoryNumbers(Mutex<HashMap<NumberKey, u32>>);

impl Numbers for MemoryNumbers {
    fn number(&self, key: &NumberKey) -> io::Result<u32> {
        let mut numbers = self.0.lock();
        let next = numbers.len() as u32 + 1;
        Ok(*numbers.entry(*key).or_insert(next))
    }
}

/// The key under which the directories of a tree are numbered when it is shown as `<dir>`.
///
/// The tree alone would not do: a directory has one place in the kernel's memory, so two `<dir>`s that show the same tree
/// need directories of their own, or a look-up in one would move the directory away from the other.
pub fn tree_key(fingerprint: &Hash, dir: u32) -> NumberKey {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"darter directory numbers 1\0");
    hasher.update(fingerprint.as_bytes());
    hasher.update(&dir.to_le_bytes());
    NumberKey::Tree(Hash::from_bytes(*hasher.finalize().as_bytes()))
}

/// The inode number of the mount's root (FUSE fixes it).
pub const ROOT_INO: u64 = 1;
const FIRST_DIR_INO: u64 = 1000;
const FIRST_POSITION: u32 = 2;

/// An inode number, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ino {
    /// The mount's root.
    Root,
    /// The root of the tree that is shown as `<dir>`.
    Dir(u32),
    /// An entry of a layer, or a directory of a tree.
    Numbered { number: u32, position: u32 },
}

impl Ino {
    /// `None` for a number that was never given out.
    pub fn decode(ino: u64) -> Option<Ino> {
        let (number, low) = ((ino >> 32) as u32, ino as u32);
        match (number, low) {
            (0, 1) => Some(Ino::Root),
            (0, _) => ino.checked_sub(FIRST_DIR_INO).map(|dir| Ino::Dir(dir as u32)),
            (NUMBER_LIMIT.., _) => None,
            _ => Some(Ino::Numbered { number, position: low.checked_sub(FIRST_POSITION)? }),
        }
    }

    pub fn encode(self) -> u64 {
        match self {
            Ino::Root => ROOT_INO,
            Ino::Dir(dir) => FIRST_DIR_INO + u64::from(dir),
            Ino::Numbered { number, position } => {
                u64::from(number) << 32 | (u64::from(position) + u64::from(FIRST_POSITION))
            }
        }
    }
}

/// The largest `<dir>` that has an inode number of its own.
pub const DIR_MAX: u32 = u32::MAX - FIRST_DIR_INO as u32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inode_numbers_are_frozen() {
        assert_eq!(Ino::Root.encode(), 1);
        assert_eq!(Ino::Dir(7).encode(), 1007);
        assert_eq!(Ino::Numbered { number: 3, position: 5 }.encode(), 0x0000_0003_0000_0007);
        let golden = "5c7c55899e559bbdfe6e514ec92b06e139a299481a2e77d69259c1de76821328";
        let key = tree_key(&Hash::from_bytes([7; 32]), 9);
        assert_eq!(key, NumberKey::Tree(golden.parse().unwrap()));
    }

    #[test]
    fn encoding_round_trips() {
        let numbered = |number, position| Ino::Numbered { number, position };
        let all = [
            Ino::Root,
            Ino::Dir(0),
            Ino::Dir(DIR_MAX),
            numbered(1, 0),
            numbered(NUMBER_LIMIT - 1, u32::MAX - 2),
        ];
        for ino in all {
            assert_eq!(Ino::decode(ino.encode()), Some(ino));
            assert_eq!(ino.encode() >> 60, 0, "the top bits belong to overlayfs");
        }
    }

    #[test]
    fn strange_numbers_are_nothing() {
        for ino in [0, 2, 999, 1 << 32, (1 << 32) + 1, u64::MAX] {
            assert_eq!(Ino::decode(ino), None, "{ino}");
        }
    }

    #[test]
    fn the_same_tree_in_two_directories_has_two_keys() {
        let tree = Hash::from_bytes([1; 32]);
        assert_ne!(tree_key(&tree, 1), tree_key(&tree, 2));
        assert_eq!(tree_key(&tree, 1), tree_key(&tree, 1));
    }
}
