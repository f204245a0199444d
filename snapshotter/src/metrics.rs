//! The node daemon's numbers beside those of its peer: `docs/metrics.md` tells what each means.

use std::sync::Arc;

use darter_daemon::numbers::{Counter, Registry, counter};

use crate::fs::FileSystem;

/// What is counted while it happens.
#[derive(Default)]
pub struct Metrics {
    /// Layers that containerd was told to leave to us, and to fetch itself.
    pub lazy: Counter,
    pub plain: Counter,
    pub demoted: Counter,
    pub demotions_failed: Counter,
}

pub(crate) fn register(metrics: &Arc<Metrics>, fs: &Arc<FileSystem>, registry: &mut Registry) {
    let fs = fs.clone();
    counter(registry, "darter_fuse_requests", "What the kernel asked for", move || {
        let all = fs.stats().all().into_iter();
        all.map(|(operation, count)| (vec![("operation", operation.to_owned())], count as f64)).collect()
    });
    let [lazy, plain] = [metrics.lazy.clone(), metrics.plain.clone()];
    counter(
        registry,
        "darter_snapshotter_layers",
        "Layers that containerd asked for, by how they were answered",
        move || both("answer", [("lazy", &lazy), ("plain", &plain)]),
    );
    let [done, failed] = [metrics.demoted.clone(), metrics.demotions_failed.clone()];
    counter(
        registry,
        "darter_snapshotter_demotions",
        "Lazy layers that containerd had to unpack after all",
        move || both("result", [("done", &done), ("failed", &failed)]),
    );
}

fn both(label: &'static str, counters: [(&str, &Counter); 2]) -> Vec<darter_daemon::numbers::Sample> {
    counters
        .into_iter()
        .map(|(value, counter)| (vec![(label, value.to_owned())], counter.get() as f64))
        .collect()
}
