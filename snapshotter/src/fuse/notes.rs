//! Requests that are being answered, noted where the next process finds them: for kernels that don't send them again (before
//! 6.9).
//!
//! The notes are a file in memory (`memfd_create(2)`), which whoever keeps the mount keeps as well. Each thread has a buffer in it
//! into which the kernel puts requests, so that there is no moment at which one is in this process alone. One that isn't
//! answered at once is copied to a slot, where it stays until it is. What is found here after a crash may have been answered
//! already; then the kernel doesn't know it any more, and a second answer goes nowhere.
//!
//! Shared memory takes unsafe code: another process could change it, but the only one that has it reads nothing.
#![allow(unsafe_code)]

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;

/// Requests that may be noted at the same time. One more is lost if the process is killed.
const SLOTS: usize = 8192;
/// The longest request that makes sense on a read-only mount: a look-up of a name of 255 bytes.
const SLOT_SIZE: usize = 512;
/// Threads that may take requests.
const BUFFERS: usize = 8;
const BUFFER_SIZE: usize = 72 * 1024;

const PAGE: usize = 4096;
const BUFFERS_START: usize = PAGE + SLOTS * SLOT_SIZE;
const SIZE: usize = BUFFERS_START + BUFFERS * BUFFER_SIZE;
/// The first bytes: a name, a version, and the numbers above.
const HEAD: [u32; 6] =
    [u32::from_le_bytes(*b"DRTN"), 1, SLOTS as u32, SLOT_SIZE as u32, BUFFERS as u32, BUFFER_SIZE as u32];

/// A place for a request that isn't answered yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot(usize);

/// See the module's head.
pub(super) struct Notes {
    file: File,
    start: NonNull<u8>,
    free: Mutex<Vec<usize>>,
    taken: [AtomicBool; BUFFERS],
}

// SAFETY: slots and buffers are handed out once at a time, and whoever has one doesn't touch the others.
unsafe impl Send for Notes {}
// SAFETY: as above.
unsafe impl Sync for Notes {}

impl Notes {
    pub(super) fn new() -> io::Result<Notes> {
        // SAFETY: the name is a string that ends, and what is returned is new.
        let file = unsafe {
            let number = libc::memfd_create(c"darter-notes".as_ptr(), libc::MFD_CLOEXEC);
            if number < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(number)
        };
        let file = File::from(file);
        file.set_len(SIZE as u64)?;
        file.write_all_at(&head(), 0)?;
        Self::map(file)
    }

    /// The notes of an earlier process. An error if that one had another idea of them.
    pub(super) fn open(descriptor: OwnedFd) -> io::Result<Notes> {
        let (file, mut found) = (File::from(descriptor), head());
        file.read_exact_at(&mut found, 0)?;
        match found == head() && file.metadata()?.len() == SIZE as u64 {
            true => Self::map(file),
            false => Err(io::Error::new(io::ErrorKind::InvalidData, "the notes are of another version")),
        }
    }

    fn map(file: File) -> io::Result<Notes> {
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, of a file that has this length and keeps it.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), SIZE, rights, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        let notes = Notes { file, start, free: Mutex::default(), taken: Default::default() };
        *notes.free.lock() =
            (0..SLOTS).rev().filter(|slot| notes.length(*slot).load(Ordering::Acquire) == 0).collect();
        Ok(notes)
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// How many bytes of the request in a slot count; 0 where there is none.
    fn length(&self, slot: usize) -> &AtomicU32 {
        // SAFETY: within the mapping, at a multiple of 4, and never seen as anything else.
        unsafe { AtomicU32::from_ptr(self.start.add(PAGE + slot * SLOT_SIZE).as_ptr().cast()) }
    }

    fn body(&self, slot: usize) -> NonNull<u8> {
        // SAFETY: within the mapping.
        unsafe { self.start.add(PAGE + slot * SLOT_SIZE + 4) }
    }

    /// `None` if there is no room for it.
    pub(super) fn enter(&self, message: &[u8]) -> Option<Slot> {
        if message.len() > SLOT_SIZE - 4 {
            return None;
        }
        let slot = self.free.lock().pop()?;
        // SAFETY: the slot has this much room and is nobody else's.
        unsafe { self.body(slot).as_ptr().copy_from_nonoverlapping(message.as_ptr(), message.len()) };
        self.length(slot).store(message.len() as u32, Ordering::Release);
        Some(Slot(slot))
    }

    pub(super) fn leave(&self, slot: Slot) {
        self.length(slot.0).store(0, Ordering::Release);
        self.free.lock().push(slot.0);
    }

    /// A buffer for a thread that takes requests, for as long as the notes are there. `None` if all have one.
    #[allow(clippy::mut_from_ref, reason = "each buffer is given out once")]
    pub(super) fn buffer(&self) -> Option<&mut [u8]> {
        let index = self.taken.iter().position(|taken| !taken.swap(true, Ordering::AcqRel))?;
        // SAFETY: within the mapping, and given to nobody else.
        unsafe {
            let start = self.start.add(BUFFERS_START + index * BUFFER_SIZE).as_ptr();
            Some(std::slice::from_raw_parts_mut(start, BUFFER_SIZE))
        }
    }

    /// What an earlier process has noted: the slots, to be left when their requests have been entered anew, and the requests, each
    /// once. To be called before anybody has a buffer.
    pub(super) fn left(&self) -> io::Result<(Vec<Slot>, Vec<Vec<u8>>)> {
        let mut bytes = vec![0; SIZE];
        self.file.read_exact_at(&mut bytes, 0)?;
        let used: Vec<usize> =
            (0..SLOTS).filter(|slot| self.length(*slot).load(Ordering::Acquire) > 0).collect();
        let slots = used.iter().map(|slot| {
            let length = self.length(*slot).load(Ordering::Acquire) as usize;
            &bytes[PAGE + slot * SLOT_SIZE + 4..][..length.min(SLOT_SIZE - 4)]
        });
        let buffers = (0..BUFFERS).map(|index| &bytes[BUFFERS_START + index * BUFFER_SIZE..][..BUFFER_SIZE]);
        let mut known = HashSet::new();
        let requests = slots.chain(buffers).filter_map(whole);
        let once = requests.filter(|(unique, _)| known.insert(*unique)).map(|(_, message)| message.to_vec());
        Ok((used.iter().map(|slot| Slot(*slot)).collect(), once.collect()))
    }
}

impl Drop for Notes {
    fn drop(&mut self) {
        // SAFETY: it was mapped so, and whoever had a part of it has borrowed this.
        unsafe { libc::munmap(self.start.as_ptr().cast(), SIZE) };
    }
}

fn head() -> Vec<u8> {
    HEAD.iter().flat_map(|number| number.to_ne_bytes()).collect()
}

/// The request at the start of `bytes`, as long as it says that it is, and its unique number.
fn whole(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let unique = u64::from_ne_bytes(*bytes.get(8..)?.first_chunk()?);
    (unique != 0).then_some(())?;
    Some((unique, bytes.get(..length)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Length, opcode, unique number.
    fn request(unique: u64) -> Vec<u8> {
        [&40u32.to_ne_bytes()[..], &1u32.to_ne_bytes(), &unique.to_ne_bytes(), &[0; 24]].concat()
    }

    fn reopened(notes: &Notes) -> Notes {
        Notes::open(notes.descriptor().try_clone_to_owned().unwrap()).unwrap()
    }

    #[test]
    fn what_was_not_answered_is_found_once() {
        let notes = Notes::new().unwrap();
        let answered = notes.enter(&request(2)).unwrap();
        notes.enter(&request(4)).unwrap();
        notes.leave(answered);
        let buffer = notes.buffer().unwrap();
        buffer[..40].copy_from_slice(&request(6));
        notes.buffer().unwrap()[..40].copy_from_slice(&request(4));
        let next = reopened(&notes);
        let (slots, requests) = next.left().unwrap();
        assert_eq!((slots.len(), requests), (1, vec![request(4), request(6)]));
    }

    #[test]
    fn a_used_slot_is_not_given_again() {
        let notes = Notes::new().unwrap();
        let slots: HashSet<usize> =
            (1..=SLOTS as u64).map(|unique| notes.enter(&request(unique)).unwrap().0).collect();
        assert_eq!(slots.len(), SLOTS);
        assert_eq!(notes.enter(&request(1)), None);
        assert_eq!(reopened(&notes).enter(&request(1)), None);
        notes.leave(Slot(5));
        assert_eq!(reopened(&notes).enter(&request(1)), Some(Slot(5)));
    }

    #[test]
    fn notes_of_another_version_and_requests_too_long_are_refused() {
        let notes = Notes::new().unwrap();
        assert_eq!(notes.enter(&[1; SLOT_SIZE]), None);
        notes.file.write_all_at(&[2], 4).unwrap();
        assert!(Notes::open(notes.descriptor().try_clone_to_owned().unwrap()).is_err());
    }

    #[test]
    fn there_is_a_buffer_for_each_thread() {
        let notes = Notes::new().unwrap();
        assert_eq!((0..BUFFERS).filter(|_| notes.buffer().is_some()).count(), BUFFERS);
        assert!(notes.buffer().is_none());
    }
}
