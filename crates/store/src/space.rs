//! How much room there is, and how much of it a store may take: a quota in bytes, and marks in percent of the file system.
//!
//! Percentages are counted as kubelet counts them for images: of the whole file system, what others than root may still
//! write being free.

use std::path::Path;

use nix::sys::statvfs::statvfs;

use crate::error::StoreError;

/// What goes when the quota is reached: more than what is too much, so that not each piece has to make room for itself.
const QUOTA_SPARE_ONE_IN: u64 = 16;

/// Pieces leave so much to what else has to be written where they lie: records, maps, what others have there. On a small
/// file system it is one part in so many.
const SPARE_MAX: u64 = 8 << 20;
const SPARE_ONE_IN: u64 = 16;

/// What a store may take. Behind the marks nothing is refused that somebody waits for, as long as the disk takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The most bytes of pieces. `None`: what the marks allow.
    pub quota: Option<u64>,
    /// When the file system is this full, in percent, nothing comes that nobody waits for, and old pieces go.
    pub high_percent: u8,
    /// Old pieces go until it is only this full.
    pub low_percent: u8,
}

impl Default for Limits {
    /// Below kubelet's thresholds: it removes images when the file system is 85 % full, until 80 %.
    fn default() -> Self {
        Self { quota: None, high_percent: 80, low_percent: 75 }
    }
}

/// How full a store and its file system are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes of the file system.
    pub total: u64,
    /// Bytes that can still be written to it.
    pub available: u64,
    /// Bytes of the pieces that are held.
    pub used: u64,
}

impl Space {
    pub(crate) fn of(dir: &Path, used: u64) -> Result<Self, StoreError> {
        let found = statvfs(dir).map_err(|error| StoreError::io(dir, error.into()))?;
        let unit = found.fragment_size();
        Ok(Self { total: found.blocks() * unit, available: found.blocks_available() * unit, used })
    }

    /// Bytes that pieces leave free, however many are waited for.
    pub fn spare(&self) -> u64 {
        SPARE_MAX.min(self.total / SPARE_ONE_IN)
    }

    /// Bytes that pieces may take.
    fn for_pieces(&self) -> u64 {
        self.available.saturating_sub(self.spare())
    }

    fn free_at(&self, percent: u8) -> u64 {
        self.total / 100 * u64::from(100 - percent.min(100))
    }
}

impl Limits {
    /// Bytes that may come without anybody waiting for them.
    pub fn growth(&self, space: &Space) -> u64 {
        let by_mark = space.available.saturating_sub(space.free_at(self.high_percent));
        by_mark.min(self.quota_left(space))
    }

    /// Whether the file system is so full that nothing comes but what somebody waits for.
    pub fn is_beyond_mark(&self, space: &Space) -> bool {
        space.available <= space.free_at(self.high_percent)
    }

    fn quota_left(&self, space: &Space) -> u64 {
        self.quota.map_or(u64::MAX, |quota| quota.saturating_sub(space.used))
    }

    pub fn is_over_quota(&self, space: &Space) -> bool {
        self.quota.is_some_and(|quota| space.used > quota - quota / QUOTA_SPARE_ONE_IN)
    }

    /// How many of `needed` bytes of pieces there is no room for, were they written now.
    pub fn missing(&self, space: &Space, needed: u64) -> u64 {
        needed.saturating_sub(space.for_pieces().min(self.quota_left(space)))
    }

    /// Whether `needed` bytes had room if every piece that is held went.
    pub fn could_hold(&self, space: &Space, needed: u64) -> bool {
        self.missing(&Space { available: space.available + space.used, used: 0, ..*space }, needed) == 0
    }

    /// Bytes of old pieces that should go, so that `needed` more have room beside what pieces leave free, and the marks are
    /// kept. 0: all is well.
    pub fn excess(&self, space: &Space, needed: u64) -> u64 {
        let with_spare = if needed == 0 { 0 } else { needed + space.spare() };
        let free = |percent: u8| with_spare.max(space.free_at(percent));
        self.beyond(space, needed, free(self.high_percent), free(self.low_percent))
    }

    /// The same, so that `needed` more may come without anybody waiting for them.
    pub fn excess_to_grow(&self, space: &Space, needed: u64) -> u64 {
        let free = |percent: u8| needed + space.free_at(percent);
        self.beyond(space, needed, free(self.high_percent), free(self.low_percent))
    }

    /// What is beyond, where less than `least` must not be free, and then `wanted` should be.
    fn beyond(&self, space: &Space, needed: u64, least: u64, wanted: u64) -> u64 {
        let by_mark = if space.available < least { wanted.saturating_sub(space.available) } else { 0 };
        let by_quota = match self.quota {
            Some(quota) if space.used + needed > quota => {
                (space.used + needed).saturating_sub(quota - quota / QUOTA_SPARE_ONE_IN)
            }
            Some(_) | None => 0,
        };
        by_mark.max(by_quota).min(space.used)
    }
}

/// Bytes for people.
pub(crate) fn in_words(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} bytes"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(available: u64, used: u64) -> Space {
        Space { total: 1000, available, used }
    }

    const NONE: Limits = Limits { quota: None, high_percent: 80, low_percent: 75 };
    const QUOTA: Limits = Limits { quota: Some(160), ..NONE };

    #[test]
    fn the_background_ends_at_the_high_mark() {
        assert_eq!(NONE.growth(&space(300, 0)), 100);
        assert_eq!(NONE.growth(&space(200, 0)), 0);
        assert_eq!(NONE.growth(&space(0, 500)), 0);
        assert_eq!(QUOTA.growth(&space(900, 100)), 60);
        assert_eq!(QUOTA.growth(&space(900, 200)), 0);
    }

    #[test]
    fn beyond_the_mark_is_where_the_background_ends_for_want_of_disk() {
        assert!(NONE.is_beyond_mark(&space(200, 0)) && !NONE.is_beyond_mark(&space(201, 0)));
        assert!(!QUOTA.is_beyond_mark(&space(900, 200)), "a quota is another matter");
    }

    #[test]
    fn old_pieces_go_between_the_marks() {
        assert_eq!(NONE.excess(&space(200, 600), 0), 0, "the mark is not passed");
        assert_eq!(NONE.excess(&space(199, 600), 0), 51);
        assert_eq!(NONE.excess(&space(100, 20), 0), 20, "more than all that is held can't go");
        assert_eq!(
            NONE.excess(&space(300, 600), 350),
            112,
            "for what is about to come, and what pieces leave free"
        );
        assert_eq!(NONE.excess(&space(300, 600), 238), 0);
        assert_eq!(NONE.excess(&space(300, 600), 239), 1);
    }

    #[test]
    fn what_could_be_held_has_room_once_the_excess_is_gone() {
        const MIB: u64 = 1 << 20;
        let sizes = [0, 1, 4095, MIB, 7 * MIB, 8 * MIB, 9 * MIB, 20 * MIB, 64 * MIB, 150 * MIB, 900 * MIB];
        let quota = |quota| Limits { quota: Some(quota), ..NONE };
        let no_marks = Limits { high_percent: 100, low_percent: 100, ..NONE };
        let mut tried = 0;
        for limits in [Limits::default(), no_marks, quota(100 * MIB), quota(700 * MIB)] {
            for total in [72 * MIB, 256 * MIB, 1024 * MIB, 1 << 40] {
                for (available, used) in sizes.iter().flat_map(|a| sizes.map(|used| (*a, used))) {
                    let before = Space { total, available: available.min(total), used };
                    for needed in sizes.into_iter().filter(|needed| limits.could_hold(&before, *needed)) {
                        let excess = limits.excess(&before, needed);
                        let (available, used) = (before.available + excess, used - excess);
                        let after = Space { available, used, ..before };
                        assert_eq!(limits.missing(&after, needed), 0, "{needed} by {limits:?}: {before:?}");
                        tried += u32::from(limits.missing(&before, needed) > 0);
                    }
                }
            }
        }
        assert!(tried > 500, "room had to be made {tried} times only");
    }

    #[test]
    fn old_pieces_go_before_kubelet_removes_images() {
        let Limits { high_percent, low_percent, .. } = Limits::default();
        assert!(high_percent < 85 && low_percent < high_percent, "{high_percent}, {low_percent}");
    }

    #[test]
    fn the_background_makes_room_below_the_low_mark() {
        assert_eq!(NONE.excess_to_grow(&space(300, 600), 100), 0);
        assert_eq!(NONE.excess_to_grow(&space(300, 600), 150), 100);
        assert_eq!(NONE.growth(&space(400, 500)), 200);
    }

    #[test]
    fn a_quota_leaves_a_sixteenth_free() {
        assert_eq!(QUOTA.excess(&space(900, 160), 0), 0);
        assert_eq!(QUOTA.excess(&space(900, 161), 0), 11);
        assert_eq!(QUOTA.excess(&space(900, 100), 80), 30);
    }

    #[test]
    fn what_is_missing_is_known_before() {
        assert_eq!(space(100, 0).spare(), 62);
        assert_eq!(NONE.missing(&space(100, 0), 68), 30);
        assert_eq!(QUOTA.missing(&space(900, 100), 100), 40);
        assert!(NONE.could_hold(&space(100, 50), 88) && !NONE.could_hold(&space(100, 50), 89));
        assert!(QUOTA.could_hold(&space(900, 100), 160) && !QUOTA.could_hold(&space(900, 100), 161));
    }

    #[test]
    fn bytes_are_told_in_words() {
        assert_eq!([in_words(7), in_words(1_500), in_words(12_345_678)], ["7 bytes", "1.5 kB", "12.3 MB"]);
    }
}
