//! Room for pieces: buffers that are used again, so that the next piece neither waits for the kernel's memory nor leaves a
//! hole in a heap.

use std::ops::{Deref, DerefMut};

use bytes::Bytes;
use parking_lot::Mutex;

/// What fits into a buffer that is used again: the longest piece that the layer format cuts, and what a frame puts before it.
const ROOM: usize = (256 + 4) << 10;
/// Shorter bytes are allocated as they come: a buffer for them would be mostly empty, and may be kept for long.
const SMALL: usize = 96 << 10;
/// Free buffers that are kept (2 MiB); one more goes back to the allocator.
const FREE_MAX: usize = 8;

static FREE: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// Bytes that are being put together, and then shared by [`Room::freeze`].
#[derive(Debug)]
pub struct Room(Vec<u8>);

impl Room {
    /// Empty, with room for `len` bytes.
    pub fn for_len(len: usize) -> Self {
        if len <= SMALL || len > ROOM {
            return Self(Vec::with_capacity(len));
        }
        let free = FREE.lock().pop();
        Self(free.unwrap_or_else(|| Vec::with_capacity(ROOM)))
    }

    /// A copy of these bytes.
    pub fn holding(bytes: &[u8]) -> Self {
        let mut room = Self::for_len(bytes.len());
        room.extend_from_slice(bytes);
        room
    }

    /// The bytes, to be shared. When the last one who has them is gone, the buffer is free again.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if self.0.capacity() != ROOM {
            return;
        }
        let mut free = FREE.lock();
        if free.len() < FREE_MAX {
            let mut buffer = std::mem::take(&mut self.0);
            buffer.clear();
            free.push(buffer);
        }
    }
}

impl Deref for Room {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.0
    }
}

impl DerefMut for Room {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.0
    }
}

impl AsRef<[u8]> for Room {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_empty_when_it_is_used_again() {
        for round in 0..3 * FREE_MAX {
            let mut room = Room::for_len(SMALL + 1);
            assert!(room.is_empty() && room.capacity() == ROOM, "round {round}");
            room.resize(ROOM, 7);
            let bytes = room.freeze();
            assert_eq!(bytes.slice(5..).len(), ROOM - 5);
        }
        assert!(FREE.lock().len() <= FREE_MAX);
    }

    #[test]
    fn what_is_small_or_too_long_gets_what_it_needs() {
        assert_eq!(Room::holding(b"abc").freeze(), &b"abc"[..]);
        assert!(Room::for_len(ROOM + 1).capacity() > ROOM);
        assert_eq!(Room::for_len(0).capacity(), 0);
    }
}
