//! A map being made, entry by entry.

use std::collections::HashMap;

use super::format::{self, Sections};
use super::rows::{NAMES_MAX, RowWriter};
use super::{LayerMap, Summary};
use crate::cut::Cut;
use crate::recipe::FinishedRecipe;
use crate::tar::{EntryKind, Header, TarError};
use crate::wire::{put, put_bytes};

/// Entries of a layer. Leaves room in 32 bits for the numbers that inodes are made of.
pub(crate) const ENTRIES_MAX: u64 = 1 << 28;

/// What the entries and their extended attributes take in memory while the map is made. A map with more than ten million
/// entries fits; what doesn't is containerd's to unpack. Several maps are made at a time.
const MAKING_MAX: usize = 512 << 20;
/// A set of extended attributes besides its bytes.
const SET: usize = 96;

#[derive(Default)]
pub(crate) struct MapBuilder {
    rows: RowWriter,
    summary: Summary,
    xattrs: Vec<u8>,
    /// Each set of extended attributes as it stands in its section, and its number.
    sets: HashMap<Vec<u8>, u32>,
}

impl MapBuilder {
    pub(crate) fn push(&mut self, header: &Header) -> Result<(), TarError> {
        let xattrs = (!header.xattrs.is_empty()).then(|| self.xattr_set(&header.xattrs));
        self.rows.push(header, xattrs);
        self.summary.entries += 1;
        self.summary.content_size = self
            .summary
            .content_size
            .checked_add(header.data_len)
            .ok_or(TarError::TooLarge("bytes of content"))?;
        self.summary.unpacked_size = self.summary.unpacked_size.saturating_add(unpacked(header));
        self.check_limits()
    }

    pub(crate) fn finish(mut self, cuts: &[Cut], recipe: FinishedRecipe) -> LayerMap {
        self.summary.tar_size = recipe.tar_size;
        let mut start = 0;
        let ends = cuts.iter().map(|cut| {
            start += u64::from(cut.len);
            start
        });
        let sections = Sections {
            summary: self.summary,
            entries: self.rows.out,
            xattrs: self.xattrs,
            sets: self.sets.len() as u32,
            ends: ends.collect(),
            hashes: cuts.iter().map(|cut| cut.hash).collect(),
        };
        format::assemble(sections, recipe)
    }

    fn xattr_set(&mut self, pairs: &[(Vec<u8>, Vec<u8>)]) -> u32 {
        let mut set = Vec::new();
        put(&mut set, pairs.len() as u64);
        for (name, value) in pairs {
            put_bytes(&mut set, name);
            put_bytes(&mut set, value);
        }
        let next = self.sets.len() as u32;
        *self.sets.entry(set).or_insert_with_key(|set| {
            self.xattrs.extend_from_slice(set);
            next
        })
    }

    /// The sets are held twice: in the section, and to find them again.
    fn memory(&self) -> usize {
        self.rows.out.len() + 2 * self.xattrs.len() + SET * self.sets.len()
    }

    fn check_limits(&self) -> Result<(), TarError> {
        if self.summary.entries > ENTRIES_MAX {
            Err(TarError::TooLarge("entries"))
        } else if self.rows.names > NAMES_MAX {
            Err(TarError::TooLarge("bytes of names"))
        } else if self.memory() > MAKING_MAX {
            Err(TarError::TooLarge("bytes of entries and extended attributes"))
        } else {
            Ok(())
        }
    }
}

fn unpacked(header: &Header) -> u64 {
    const UNIT: u64 = 4096;
    match header.kind {
        EntryKind::File => header.size.div_ceil(UNIT) * UNIT,
        EntryKind::Directory => UNIT,
        _ => 0,
    }
}
