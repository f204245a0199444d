//! What a process costs, from /proc.

use std::fs;
use std::time::Duration;

/// The kernel's clock tick for `stat`, fixed at 100 for user space.
const TICKS_PER_SECOND: u64 = 100;

/// Resident memory in bytes; zero when the process is gone.
pub fn resident(pid: u32) -> u64 {
    status(pid, "VmRSS:").unwrap_or(0) * 1024
}

/// Resident memory that is the process's own: without mapped files, which the kernel can drop.
pub fn resident_anonymous(pid: u32) -> u64 {
    status(pid, "RssAnon:").unwrap_or(0) * 1024
}

fn status(pid: u32, field: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix(field))?.split_whitespace().next()?.parse().ok()
}

/// Processor time of the process and of its children that it has waited for.
pub fn processor_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: u64 =
        fields.split_whitespace().skip(11).take(4).filter_map(|field| field.parse::<u64>().ok()).sum();
    Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND)
}

/// All processors' busy time since boot, for telling whether others used the machine meanwhile.
pub fn machine_busy() -> Duration {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields: Vec<u64> =
        stat.lines().next().unwrap_or("").split_whitespace().skip(1).filter_map(|f| f.parse().ok()).collect();
    // user, nice, system, then irq and softirq behind idle and iowait; steal is somebody else's.
    let busy: u64 = [0, 1, 2, 5, 6].iter().filter_map(|at| fields.get(*at)).sum();
    Duration::from_millis(busy * 1000 / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory_and_the_machine_has_worked() {
        assert!(resident(std::process::id()) > 100_000);
        assert!(machine_busy() > Duration::ZERO);
    }
}
