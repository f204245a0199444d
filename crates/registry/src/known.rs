//! What is known of registries by their having answered or not.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use darter_types::Registry;
use parking_lot::Mutex;

/// Registries remembered for having answered, and for being out of reach; at more all are forgotten.
const KNOWN_MAX: usize = 1024;

/// How long a registry is not asked that has never answered and to which no connection could be made in time. An image has
/// many layers: they need not all find out by themselves.
const OUT_OF_REACH_FOR: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(crate) struct Known {
    answered: Mutex<HashSet<Registry>>,
    out_of_reach: Mutex<HashMap<Registry, Instant>>,
}

impl Known {
    pub fn has_answered(&self, registry: &Registry) -> bool {
        self.answered.lock().contains(registry)
    }

    pub fn answered(&self, registry: &Registry) {
        let mut answered = self.answered.lock();
        if !answered.contains(registry) {
            if answered.len() >= KNOWN_MAX {
                answered.clear();
            }
            answered.insert(registry.clone());
        }
    }

    /// No connection could be made for as long as one may take.
    pub fn lost(&self, registry: &Registry) {
        let mut lost = self.out_of_reach.lock();
        if lost.len() >= KNOWN_MAX {
            lost.clear();
        }
        lost.insert(registry.clone(), Instant::now());
    }

    pub fn is_out_of_reach(&self, registry: &Registry) -> bool {
        let mut lost = self.out_of_reach.lock();
        let is_fresh = lost.get(registry).is_some_and(|at| at.elapsed() < OUT_OF_REACH_FOR);
        if !is_fresh {
            lost.remove(registry);
        }
        is_fresh
    }
}
