//! What a read pays for traces where nothing is followed: no memory is taken.

// Counting is what it is for: each call goes to the system's allocator as it is.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;

use darter_daemon::traces::{Step, Trail};
use futures_util::FutureExt;

struct Counting;

thread_local! {
    static TAKEN: Cell<u64> = const { Cell::new(0) };
}

unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        TAKEN.set(TAKEN.get() + 1);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_read_that_nobody_follows_takes_no_memory() {
    assert_eq!(size_of::<Step>(), size_of::<usize>());
    let before = TAKEN.get();
    for _ in 0..1000 {
        let mut read = black_box(Step::of_read("read").answering());
        read.say("darter.inode", || "made only where somebody follows it".to_owned());
        let inside = read.trail().over(async { Step::here("piece").with("darter.piece", || 7u32) });
        let piece = inside.now_or_never().expect("it waits for nothing");
        assert!(!piece.trail().step("ask parent").is_followed());
        assert!(!black_box(Step::for_member(Trail::NONE, "upload")).is_followed());
    }
    assert_eq!(TAKEN.get(), before);
    black_box(Box::new(1));
    assert!(TAKEN.get() > before, "nothing is counted");
}
