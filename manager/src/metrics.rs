//! The manager's numbers: `docs/metrics.md` tells what each means.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use darter_daemon::numbers::{Counter, Registry, counter, gauge, single};
use darter_types::Role;
use parking_lot::Mutex;

use crate::core::liveness::is_alive;
use crate::db::Store;
use crate::roster::Roster;

/// What is counted while it happens.
#[derive(Default)]
pub(crate) struct Metrics {
    pub(crate) certificates: Counter,
    /// Answers of the REST API, by status.
    answers: Mutex<BTreeMap<u16, u64>>,
}

/// Counts an answer of the REST API.
pub(crate) async fn count(State(metrics): State<Arc<Metrics>>, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    *metrics.answers.lock().entry(response.status().as_u16()).or_default() += 1;
    response
}

impl Metrics {
    /// Those on members and preheats are read from the database when somebody asks.
    pub(crate) fn register(self: &Arc<Self>, store: &Store, roster: &Roster, registry: &mut Registry) {
        registry.register(
            "darter_manager_certificates_issued",
            "Certificates that members were given, the first and later ones",
            self.certificates.clone(),
        );
        let metrics = self.clone();
        counter(registry, "darter_manager_http_requests", "Answers of the REST API, by status", move || {
            let answers = metrics.answers.lock();
            answers
                .iter()
                .map(|(status, count)| (vec![("status", status.to_string())], *count as f64))
                .collect()
        });
        let members = (store.clone(), roster.clone());
        gauge(
            registry,
            "darter_manager_members",
            "Members that have joined and were not revoked",
            move || {
                let (store, roster) = &members;
                let silences = roster.silences();
                let mut counts: BTreeMap<(Role, bool), f64> = BTreeMap::new();
                for record in
                    store.blocking().members().unwrap_or_default().into_iter().filter(|one| !one.revoked)
                {
                    let alive = is_alive(silences.get(&(record.role, record.node)).copied());
                    *counts.entry((record.role, alive)).or_default() += 1.0;
                }
                let labels = |role: Role, alive| {
                    vec![
                        ("role", role.as_str().to_owned()),
                        ("alive", if alive { "yes" } else { "no" }.to_owned()),
                    ]
                };
                counts.into_iter().map(|((role, alive), count)| (labels(role, alive), count)).collect()
            },
        );
        let store = store.clone();
        gauge(registry, "darter_manager_preheats_open", "Preheats that wait or are under way", move || {
            single(store.blocking().open_preheats().map_or(f64::NAN, |open| open as f64))
        });
    }
}
