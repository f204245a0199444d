//! A thread's share of the processors.
#![allow(unsafe_code)] // `setpriority`, `getpriority` and `sched_setattr` have no safe wrapper.

use std::time::Duration;

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

/// How long a thread works at a time that others wait for at each step: the least that the kernel takes.
const TURN: Duration = Duration::from_micros(100);

/// From now on the calling thread is woken sooner, for shorter turns: it has little to do at a time, and somebody waits for each
/// of its answers. Its share of the processors stays what it was. Kernels before 6.12 do nothing.
pub fn answer_soon() {
    // SAFETY: all zeros is a valid value of these numbers.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    attributes.size = size_of::<libc::sched_attr>() as u32;
    attributes.sched_policy = libc::SCHED_OTHER as u32;
    attributes.sched_nice = niceness();
    attributes.sched_runtime = TURN.as_nanos() as u64;
    // SAFETY: the kernel reads as many bytes as `size` says; 0 is the calling thread.
    if unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "a thread is woken as late as others");
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
