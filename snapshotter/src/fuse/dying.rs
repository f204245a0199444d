//! Whether a thread that waits in the kernel is about to die.
//!
//! The kernel calls a request off at any signal, also at one that its process handles or ignores; Go's runtime sends such to
//! itself all the time. What is fatal it turns into SIGKILL for every thread of the process, which then shows as pending.

const SIGKILL: u32 = 9;

/// True also for a thread that can't be seen from here, since nobody could tell later.
pub(super) fn is_dying(thread: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status"));
    thread == 0 || status.map_or(true, |status| has_sigkill(&status))
}

/// Its own signals and those of its whole process, each as a mask in hexadecimal.
fn has_sigkill(status: &str) -> bool {
    let pending = status.lines().filter_map(|line| match line.split_once(':')? {
        ("SigPnd" | "ShdPnd", mask) => u64::from_str_radix(mask.trim(), 16).ok(),
        _ => None,
    });
    pending.fold(0, |all, mask| all | mask) & (1 << (SIGKILL - 1)) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sigkill_counts() {
        let status = |own, shared| format!("Name:\tx\nSigQ:\t0/9\nSigPnd:\t{own}\nShdPnd:\t{shared}\n");
        assert!(has_sigkill(&status("0000000000000100", "0000000000000000")));
        assert!(has_sigkill(&status("0000000000000000", "0000000000000100")));
        // SIGURG and SIGTERM.
        assert!(!has_sigkill(&status("0000000000404000", "0000000000004000")));
        assert!(!has_sigkill("SigPnd:\tgarbage\n"));
    }

    #[test]
    fn a_thread_that_lives_is_not_dying_and_one_that_nobody_sees_is() {
        assert!(!is_dying(nix::unistd::gettid().as_raw() as u32));
        assert!(is_dying(0));
        assert!(is_dying(u32::MAX));
    }
}
