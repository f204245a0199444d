//! What every process tells of itself, under the names that Prometheus' own clients use.

use std::fs;

use crate::numbers::{Registry, counter, gauge, single};

/// Clock ticks a second in `/proc/self/stat`: a constant of Linux' interface (`USER_HZ`).
const TICKS: f64 = 100.0;

/// The fields of `/proc/self/stat` that are told, see proc_pid_stat(5).
struct Stat {
    cpu_seconds: f64,
    resident_bytes: f64,
    /// Since the machine's start.
    started_seconds: f64,
}

pub(crate) fn register(registry: &mut Registry) {
    gauge(registry, "darter_build_info", "Always 1; its label tells the version", || {
        vec![(vec![("version", env!("CARGO_PKG_VERSION").to_owned())], 1.0)]
    });
    counter(
        registry,
        "darter_broken_tasks",
        "Work on one layer, piece or connection that panicked, and ended by itself",
        || single(crate::tasks::broken() as f64),
    );
    counter(registry, "process_cpu_seconds", "Processor time, user and system", || {
        read(|stat| stat.cpu_seconds)
    });
    gauge(registry, "process_resident_memory_bytes", "Memory that is resident", || {
        read(|stat| stat.resident_bytes)
    });
    gauge(registry, "process_start_time_seconds", "When the process began, since 1970", || {
        read(|stat| stat.started_seconds + booted().unwrap_or_default())
    });
    gauge(registry, "process_open_fds", "Open file descriptors", || {
        single(fs::read_dir("/proc/self/fd").map_or(0, Iterator::count) as f64)
    });
}

fn read(field: fn(&Stat) -> f64) -> Vec<crate::numbers::Sample> {
    let text = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    parse(&text).map(|stat| single(field(&stat))).unwrap_or_default()
}

/// The second field is the program's name, which may hold anything; the others follow its last bracket.
fn parse(text: &str) -> Option<Stat> {
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<f64>().ok();
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()?? as f64;
    Some(Stat {
        cpu_seconds: (number(14)? + number(15)?) / TICKS,
        resident_bytes: number(24)? * page,
        started_seconds: number(22)? / TICKS,
    })
}

/// When the machine began, in seconds since 1970.
fn booted() -> Option<f64> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    text.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_brackets_and_blanks_are_read_over() {
        let mut fields = vec!["0"; 50];
        (fields[11], fields[12], fields[19], fields[21]) = ("150", "50", "700", "3");
        let stat = parse(&format!("12 (a) b) {}", fields.join(" "))).unwrap();
        assert_eq!((stat.cpu_seconds, stat.started_seconds), (2.0, 7.0));
        assert!(stat.resident_bytes >= 3.0 * 4096.0);
        assert!(parse("nonsense").is_none());
    }

    #[test]
    fn this_process_can_be_read() {
        assert!(read(|stat| stat.resident_bytes)[0].1 > 0.0);
        assert!(booted().unwrap() > 1e9);
    }
}
