//! A thread's share of the processors.
#![allow(unsafe_code)] // `setpriority` and `getpriority` have no safe wrapper.

/// The lowest share: some processor time when all processors are wanted by others, all of it when none is.
const LAST: libc::c_int = 19;

/// From now on the calling thread leaves the processors to others that want them. There is no way back without rights, so
/// it must be a thread that does only such work.
pub fn step_back() {
    // SAFETY: it takes three numbers; 0 is the calling thread.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, LAST) } != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "a thread keeps its share of the processors");
    }
}

/// The calling thread's niceness: -20 takes most, 19 least.
pub fn niceness() -> i32 {
    // SAFETY: it takes two numbers; 0 is the calling thread.
    unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_thread_that_steps_back_does() {
        let before = niceness();
        std::thread::spawn(|| {
            step_back();
            assert_eq!(niceness(), LAST);
        })
        .join()
        .unwrap();
        assert_eq!(niceness(), before);
    }
}
