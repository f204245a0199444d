//! Starting and stopping.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use darter_daemon::numbers::Numbers;
use darter_daemon::tasks::Tasks;
use darter_mesh::assemble::{AssembleError, Assembled, Parts, assemble};
use darter_mesh::orders;
use darter_types::Role;

use crate::{Config, preheat};

/// For uploads that are under way when the peer stops.
const GRACE: Duration = Duration::from_secs(3);

/// A peer that runs.
pub struct Handle {
    parts: Parts,
    tasks: Tasks,
}

impl Handle {
    /// What it works with: store, registries, mesh.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// Stops everything that runs on the tasks that it was started with.
    pub async fn stop(self) {
        self.tasks.stop(GRACE).await;
    }
}

/// Joins as `role`, which is a node or a seed, and works until `tasks` stop. Either takes orders to preheat.
pub async fn start(config: &Config, role: Role, tasks: Tasks) -> Result<Handle, AssembleError> {
    let numbers = Numbers::default();
    numbers.serve(config.metrics_listen, &tasks).await;
    let Assembled { identity, parts, attendance } = assemble(config, role, &tasks).await?;
    numbers.add(|registry| parts.mesh.register(registry));
    numbers.ready();
    // There are no snapshots here: what is used is known by that.
    parts.mesh.keep(Arc::new(|| Some(HashSet::new())));
    tracing::info!(member = %identity.member(), listen = %parts.mesh.address(), "the peer is ready");
    if role == Role::Seed {
        let seed = preheat::Seed { mesh: parts.mesh.clone(), registry: parts.registry.clone() };
        preheat::serve(seed, attendance.preheats, attendance.updates, &tasks);
    } else {
        orders::fetch(parts.mesh.clone(), attendance.preheats, attendance.updates, &tasks);
    }
    Ok(Handle { parts, tasks })
}
