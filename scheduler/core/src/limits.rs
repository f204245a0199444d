//! Every bound of the core, and what happens when it is reached.

/// Parents that a child is told for one task.
pub const MAX_PARENTS: usize = 8;
/// A child with fewer parents than this is told when there are more.
pub const ENOUGH_PARENTS: usize = 4;
/// Of a child's parents this many, at most, are chosen for the spans that the others lack.
pub const COVERING_PARENTS: usize = 2;
/// So many holders of the child's zone, and so many of all zones, are looked at for one child.
pub const MAX_CONSIDERED: usize = 32;

/// Peers connected at the same time. One more is refused, and asks another scheduler.
pub const MAX_PEERS: usize = 150_000;
/// Tasks known. For one more the node that holds the most loses some that nobody has open. If there are none, the task is not
/// remembered: who opens it is told no parents, and helps itself.
pub const MAX_TASKS: usize = 250_000;
/// Holders remembered of one task. One more is not used as a parent.
pub const MAX_HOLDERS: usize = 16_384;
/// Tasks that one peer holds, as far as the scheduler remembers.
pub const MAX_HELD: usize = 65_536;
/// Bytes that a peer's holdings may take together. One more is not used as a parent. Ten thousand layers of a gigabyte take a
/// sixth of it; without it a peer could take half a gigabyte by naming large layers.
pub const MAX_HELD_BYTES: usize = 16 << 20;
/// What a holding takes besides its spans.
pub const HOLDING_BYTES: usize = 200;
/// Holdings that the largest node loses at a time when there are too many tasks, and how often that happens at most: it looks
/// at all peers.
pub const ROOM_HOLDINGS: usize = 4_096;
pub const ROOM_EVERY_MS: u64 = 1_000;
/// Tasks that one peer has open. One more is answered with no parents.
pub const MAX_OPEN: usize = 4_096;
/// Sources remembered of one task. One more replaces one that proved impossible, or is not used.
pub const MAX_SOURCES: usize = 16;
/// Spans of one layer (256 GiB of content). A peer that names more is refused.
pub const MAX_SPANS: u32 = 65_536;
/// Sources remembered as impossible, accused parents, or avoided parents, in one place. The earliest gives way.
pub const MAX_REMEMBERED: usize = 256;
/// Children looked at in one tick. The others' turn comes with the next one.
pub const MAX_TOLD_PER_TICK: usize = 2_048;

/// A seed that has not started within this time loses the order to another.
pub const START_MS: u64 = 30_000;
/// A seed that has not said a word about a layer for this long is given the order again, and has to confirm it.
pub const SILENT_MS: u64 = 600_000;
/// A seed that failed a task is not asked again for this long.
pub const FAILED_MS: u64 = 60_000;
/// A source that proved impossible is not ordered again for this long: its owner may have mended it.
pub const IMPOSSIBLE_MS: u64 = 300_000;
/// A slow or unreachable parent is kept from the child that says so for this long.
pub const AVOID_MS: u64 = 30_000;
/// A parent that was seen sending wrong bytes comes last everywhere for this long.
pub const SUSPECT_MS: u64 = 600_000;
/// So many children of a task must have seen wrong bytes from a parent before nobody in the task is told it any more.
/// One alone could be the liar.
pub const WITNESSES: usize = 2;
