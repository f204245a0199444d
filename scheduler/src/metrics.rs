//! The scheduler's numbers: `docs/metrics.md` tells what each means.

use std::sync::Arc;

use darter_daemon::numbers::{Counter, Registry, Sample, gauge, single};
use darter_scheduler_core::Counts;
use parking_lot::Mutex;

/// What the driver counts. The core's own counts are copied here now and then, so that asking disturbs nobody.
#[derive(Default)]
pub(crate) struct Metrics {
    pub(crate) events: Counter,
    pub(crate) parents: Counter,
    pub(crate) orders: Counter,
    pub(crate) rejected: Counter,
    pub(crate) counts: Mutex<Counts>,
}

impl Metrics {
    pub(crate) fn register(self: &Arc<Self>, registry: &mut Registry) {
        let plain = [
            ("darter_scheduler_events", "What peers told, and ticks of the clock", &self.events),
            ("darter_scheduler_parents_sent", "Lists of parents that were sent to peers", &self.parents),
            ("darter_scheduler_orders", "Layers that a seed was told to make", &self.orders),
            ("darter_scheduler_rejected", "Peers that were sent away", &self.rejected),
        ];
        for (name, help, counter) in plain {
            registry.register(name, help, counter.clone());
        }
        let metrics = self.clone();
        gauge(registry, "darter_scheduler_peers", "Peers that are connected, by role", move || {
            let Counts { peers, seeds, .. } = *metrics.counts.lock();
            vec![role("node", peers.saturating_sub(seeds)), role("seed", seeds)]
        });
        self.count(registry, "darter_scheduler_layers", "Layers that it knows of", |counts| counts.tasks);
        self.count(
            registry,
            "darter_scheduler_open_layers",
            "Layers that peers use, once for each peer",
            |counts| counts.open,
        );
        self.count(registry, "darter_scheduler_making", "Layers that seeds are making", |counts| {
            counts.making
        });
    }

    fn count(
        self: &Arc<Self>,
        registry: &mut Registry,
        name: &'static str,
        help: &'static str,
        field: fn(&Counts) -> usize,
    ) {
        let metrics = self.clone();
        gauge(registry, name, help, move || single(field(&metrics.counts.lock()) as f64));
    }
}

fn role(role: &str, count: usize) -> Sample {
    (vec![("role", role.to_owned())], count as f64)
}
