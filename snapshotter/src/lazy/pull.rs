//! A pull as a trace follows it: from the first Prepare of one of the image's layers to the maps of all of them, and on to
//! the mounts.

use std::sync::{Arc, Weak};

use darter_daemon::traces::{Step, Trail};
use parking_lot::Mutex;

/// The pull of an image, for all that belongs to it.
#[derive(Debug, Clone, Default)]
pub(super) struct Pull {
    trail: Trail,
    step: Weak<Mutex<Step>>,
}

/// It lasts as long as somebody holds it.
pub(super) type Held = Arc<Mutex<Step>>;

impl Pull {
    /// One that begins with the question about this layer.
    pub fn begin(namespace: &str, layer: &dyn std::fmt::Display) -> (Pull, Held) {
        let mut step = Step::of_pull("pull");
        step.say("darter.namespace", || namespace);
        step.say("darter.chain", || layer.to_string());
        let (trail, held) = (step.trail(), Arc::new(Mutex::new(step)));
        (Pull { trail, step: Arc::downgrade(&held) }, held)
    }

    /// Also after its end: a mount comes when it comes.
    pub fn trail(&self) -> Trail {
        self.trail
    }

    /// `None` if it has ended.
    pub fn hold(&self) -> Option<Held> {
        self.step.upgrade()
    }
}
