//! Whether the host's disk or link is busy with other things than the background, which then stands back.
//!
//! There is no task for it: whoever wants to know looks, and once in a second looking means measuring. What is measured is in
//! `measure`, what it means is decided in `judge`.

mod judge;
mod measure;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::options::BackgroundOptions;
use judge::{DISK, Judge, NETWORK};
use measure::{Counters, Host};

/// How often it is measured at most.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// What was measured longer ago says nothing.
const STALE: Duration = Duration::from_secs(5);

/// What the background stands back for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Resource {
    Disk,
    Network,
}

impl Resource {
    pub(crate) const ALL: [Resource; 2] = [Resource::Disk, Resource::Network];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Resource::Disk => "disk",
            Resource::Network => "network",
        }
    }
}

pub(crate) struct Load {
    /// `None`: it is not looked at.
    host: Option<Host>,
    seen: Mutex<Seen>,
    /// Bytes that came in the background.
    background: AtomicU64,
    yielded_ms: [AtomicU64; Resource::ALL.len()],
}

/// Which resources are busy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Busy([bool; Resource::ALL.len()]);

impl Busy {
    pub(crate) fn any(self) -> bool {
        self != Self::default()
    }

    pub(crate) fn is(self, resource: Resource) -> bool {
        self.0[resource as usize]
    }
}

#[derive(Default)]
struct Seen {
    last: Option<(Instant, Counters)>,
    disk: Judge,
    network: Judge,
}

impl Seen {
    fn busy(&self) -> Busy {
        Busy([self.disk.is_busy(), self.network.is_busy()])
    }

    fn hear(&mut self, now: Instant, counters: Counters, host: &Host) {
        let before = self.last.replace((now, counters)).filter(|(at, _)| now - *at < STALE);
        let Some((at, before)) = before else {
            (self.disk, self.network) = Default::default();
            return;
        };
        let shares = measure::shares(&before, &counters, now - at, host.link_rate());
        let was = self.busy();
        self.disk = self.disk.next(shares.disk, DISK);
        self.network = self.network.next(shares.network, NETWORK);
        if self.busy() != was {
            tracing::debug!(yields_to = ?self.busy(), ?shares, "the background looks at the host's load");
        }
    }
}

impl Load {
    /// Of the disk that `store` is on, and of the link to which `address` (`host:port`) belongs.
    pub(crate) fn new(options: &BackgroundOptions, store: &Path, address: &str) -> Self {
        Self {
            host: options.yields.then(|| Host::find(store, address, options.link_rate)),
            seen: Mutex::default(),
            background: AtomicU64::new(0),
            yielded_ms: Default::default(),
        }
    }

    /// What is busy now. It may read some small files of the kernel's.
    pub(crate) fn look(&self) -> Busy {
        let Some(host) = &self.host else { return Busy::default() };
        let (now, mut seen) = (Instant::now(), self.seen.lock());
        if seen.last.is_none_or(|(at, _)| now - at >= LOOK_EVERY) {
            seen.hear(now, host.counters(self.background.load(Ordering::Relaxed)), host);
        }
        seen.busy()
    }

    /// What was busy when the background looked last, if that is not long ago.
    pub(crate) fn yields_to(&self) -> Busy {
        let seen = self.seen.lock();
        let is_fresh = seen.last.is_some_and(|(at, _)| at.elapsed() < STALE);
        if is_fresh { seen.busy() } else { Busy::default() }
    }

    pub(crate) fn brought(&self, bytes: u64) {
        self.background.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn brought_bytes(&self) -> u64 {
        self.background.load(Ordering::Relaxed)
    }

    /// The background has stood back for so long.
    pub(crate) fn yielded(&self, to: Busy, time: Duration) {
        for resource in Resource::ALL.into_iter().filter(|resource| to.is(*resource)) {
            self.yielded_ms[resource as usize].fetch_add(time.as_millis() as u64, Ordering::Relaxed);
        }
    }

    pub(crate) fn yielded_seconds(&self, to: Resource) -> f64 {
        self.yielded_ms[to as usize].load(Ordering::Relaxed) as f64 / 1e3
    }
}
