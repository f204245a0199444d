//! The numbers of a peer: `docs/metrics.md` tells what each means.

use std::sync::Arc;
use std::time::Instant;

use darter_daemon::numbers::{Counter, Histogram, Registry, Sample, counter, gauge, single};

use crate::limits::RateStatus;
use crate::load::Resource;
use crate::mesh::Mesh;
use crate::shared::Shared;
use crate::status::{LayerStatus, Stage};

/// Seconds: from a piece in the same rack to a registry that is asked again and again.
const WAITS: [f64; 10] = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0];

/// What is counted while it happens. All else is read when somebody asks.
pub(crate) struct Metrics {
    pub from_peers: Counter,
    pub from_registries: Counter,
    pub sent_bytes: Counter,
    pub sent_pieces: Counter,
    /// Pieces that were not sent because no upload slot was free.
    pub busy: Counter,
    pub wrong: Counter,
    pub made: Counter,
    pub not_made: Counter,
    waits: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            from_peers: Counter::default(),
            from_registries: Counter::default(),
            sent_bytes: Counter::default(),
            sent_pieces: Counter::default(),
            busy: Counter::default(),
            wrong: Counter::default(),
            made: Counter::default(),
            not_made: Counter::default(),
            waits: Histogram::new(WAITS),
        }
    }
}

impl Metrics {
    /// A container has waited for a piece since then.
    pub(crate) fn waited(&self, since: Instant) {
        self.waits.observe(since.elapsed().as_secs_f64());
    }
}

pub(crate) fn register(mesh: &Mesh, shared: &Arc<Shared>, registry: &mut Registry) {
    let metrics = &shared.metrics;
    registry.register(
        "darter_mesh_read_wait_seconds",
        "How long containers waited for pieces that were not on this machine",
        metrics.waits.clone(),
    );
    let plain = [
        ("darter_mesh_sent_bytes", "Bytes of pieces that were sent to other peers", &metrics.sent_bytes),
        ("darter_mesh_sent_pieces", "Pieces that were sent to other peers", &metrics.sent_pieces),
        ("darter_mesh_busy_answers", "Pieces that were refused for want of an upload slot", &metrics.busy),
        (
            "darter_mesh_wrong_pieces",
            "Pieces that came with wrong bytes; their senders are passed over",
            &metrics.wrong,
        ),
    ];
    for (name, help, counter) in plain {
        registry.register(name, help, counter.clone());
    }
    let (peers, registries) = (metrics.from_peers.clone(), metrics.from_registries.clone());
    counter(
        registry,
        "darter_mesh_received_bytes",
        "Bytes that came over the network, by where they came from",
        move || vec![labelled("from", "peer", peers.get()), labelled("from", "registry", registries.get())],
    );
    let (made, not_made) = (metrics.made.clone(), metrics.not_made.clone());
    counter(
        registry,
        "darter_mesh_layers_made",
        "Layers read from a registry and made into maps and pieces",
        move || vec![labelled("result", "made", made.get()), labelled("result", "failed", not_made.get())],
    );
    darter_daemon::traces::register(registry);
    read_states(mesh, registry);
    read_store(shared, registry);
    read_limits(mesh, shared, registry);
}

fn read_states(mesh: &Mesh, registry: &mut Registry) {
    let states = mesh.clone();
    gauge(
        registry,
        "darter_mesh_layers",
        "Layers that are in use, by how much of them is on this machine",
        move || {
            let layers = states.statuses();
            let count =
                |state: &str| layers.iter().filter(|layer| self::state(layer) == state).count() as u64;
            STATES.iter().map(|state| labelled("state", state, count(state))).collect()
        },
    );
    let schedulers = mesh.clone();
    gauge(registry, "darter_mesh_schedulers", "Schedulers that the manager has named", move || {
        let all = schedulers.schedulers();
        let connected = all.iter().filter(|scheduler| scheduler.connected).count();
        let away = all.len() - connected;
        vec![labelled("connected", "yes", connected as u64), labelled("connected", "no", away as u64)]
    });
}

fn read_store(shared: &Arc<Shared>, registry: &mut Registry) {
    let store = shared.store.clone();
    gauge(registry, "darter_store_bytes", "Bytes of the pieces on this machine's disk", move || {
        single(store.stats().bytes as f64)
    });
    let store = shared.store.clone();
    gauge(registry, "darter_store_pieces", "Pieces on this machine's disk", move || {
        single(store.stats().pieces as f64)
    });
    let store = shared.store.clone();
    counter(
        registry,
        "darter_store_evicted_bytes",
        "Bytes of pieces that had to go for want of room",
        move || single(store.stats().evicted as f64),
    );
    let store = shared.store.clone();
    counter(
        registry,
        "darter_store_damaged",
        "Pieces and maps that did not have their hash any more, and were dropped",
        move || single(store.stats().damaged as f64),
    );
}

fn read_limits(mesh: &Mesh, shared: &Arc<Shared>, registry: &mut Registry) {
    let limits = mesh.clone();
    gauge(
        registry,
        "darter_mesh_limit_bytes",
        "Bytes per second that this host may move of a kind, 0 without a limit, and who has set that",
        move || {
            let labels =
                |kind: &str, set_by: &str| vec![("kind", kind.to_owned()), ("set_by", set_by.to_owned())];
            let told =
                |limit: RateStatus| (labels(limit.kind.as_str(), limit.set_by.as_str()), limit.rate as f64);
            limits.rates().map(told).into()
        },
    );
    let owner = shared.clone();
    counter(
        registry,
        "darter_mesh_background_bytes",
        "Bytes that came from peers and that no container had asked for",
        move || single(owner.load.brought_bytes() as f64),
    );
    let owner = shared.clone();
    gauge(
        registry,
        "darter_mesh_background_yields",
        "1 while the background stands back for what keeps the host busy",
        move || {
            let now = owner.load.yields_to();
            Resource::ALL.map(|to| labelled("to", to.as_str(), u64::from(now.is(to)))).into()
        },
    );
    let owner = shared.clone();
    counter(
        registry,
        "darter_mesh_background_yielded_seconds",
        "How long the background has stood back for what kept the host busy",
        move || {
            let yielded =
                |to: Resource| (vec![("to", to.as_str().to_owned())], owner.load.yielded_seconds(to));
            Resource::ALL.map(yielded).into()
        },
    );
}

const STATES: [&str; 5] = ["complete", "partial", "waiting", "making", "impossible"];

fn state(layer: &LayerStatus) -> &'static str {
    match layer.progress.stage {
        Stage::Impossible => "impossible",
        Stage::Making | Stage::MakingHere => "making",
        Stage::Ready if layer.have == layer.pieces => "complete",
        Stage::Ready => "partial",
        Stage::Searching | Stage::Waiting => "waiting",
    }
}

fn labelled(label: &'static str, value: &str, count: u64) -> Sample {
    (vec![(label, value.to_owned())], count as f64)
}
