//! Making a layer's map and pieces from the origin: once at a time for a layer, however many want it.

mod pack;
mod run;
mod stream;
mod turns;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use darter_daemon::tasks::alone;
use darter_proto::v1::MakeState as WireState;
use darter_registry::Credential;
use darter_types::{LayerSource, LayerTask, Registry};
use parking_lot::Mutex;
use tokio::sync::watch;

pub(crate) use run::verify_blob;
use turns::Turns;

use crate::shared::Shared;

/// Layers that are made at the same time. Two keep both processors busy where one waits for its registry; the others
/// wait, and those who ask for them are told so.
const MAKES_MAX: usize = 3;

/// How long a blob that can't be made into this layer is not read again for it.
const IMPOSSIBLE_FOR: Duration = Duration::from_secs(60);

/// Failures remembered; at more all are forgotten.
const FAILURES_MAX: usize = 4096;

/// How often one caller joins a flight that others began and that fails for their sources.
const JOINS_MAX: usize = 4;

/// Why a layer was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Fault {
    /// The blob's own fault: nobody could make this layer of it.
    #[error("{0}")]
    Impossible(String),
    /// The registry wants other credentials. Somebody else may have them.
    #[error("{0}")]
    Denied(String),
    /// It may work later or for another peer.
    #[error("{0}")]
    Failed(String),
}

/// How far a flight is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Flight {
    Running { read: u64, size: u64 },
    Done,
    Failed(Fault),
}

type Failures = HashMap<(LayerTask, LayerSource), (Instant, Fault)>;

pub(crate) struct Makes {
    flights: Mutex<HashMap<LayerTask, watch::Receiver<Flight>>>,
    failures: Mutex<Failures>,
    turns: Turns,
}

impl Default for Makes {
    fn default() -> Self {
        Self { flights: Mutex::default(), failures: Mutex::default(), turns: Turns::new(MAKES_MAX) }
    }
}

/// What somebody wants made, and of what.
#[derive(Clone)]
pub(crate) struct Wish {
    pub task: LayerTask,
    pub sources: Vec<LayerSource>,
    /// Each goes to no other registry than the one that it was given for.
    pub credentials: HashMap<Registry, Credential>,
}

impl Wish {
    /// The wish for each registry by itself, in the order of the sources: a request to a seed has room for one credential.
    pub(crate) fn by_registry(&self) -> Vec<Wish> {
        let mut wishes: Vec<Wish> = Vec::new();
        for source in &self.sources {
            let registry = &source.repository.registry;
            let same = |wish: &&mut Wish| wish.sources[0].repository.registry == *registry;
            match wishes.iter_mut().find(same) {
                Some(wish) => wish.sources.push(source.clone()),
                None => {
                    let credential = self.credentials.get(registry).cloned();
                    let credentials =
                        credential.map(|credential| (registry.clone(), credential)).into_iter().collect();
                    wishes.push(Wish { task: self.task, sources: vec![source.clone()], credentials });
                }
            }
        }
        wishes
    }

    pub(crate) fn credential_for(&self, source: &LayerSource) -> Option<&Credential> {
        self.credentials.get(&source.repository.registry)
    }
}

impl Makes {
    /// The layers that are being made, or wait for their turn.
    pub(crate) fn under_way(&self) -> HashSet<LayerTask> {
        self.flights.lock().keys().copied().collect()
    }

    fn remembered(&self, task: LayerTask, source: &LayerSource) -> Option<Fault> {
        let failures = self.failures.lock();
        let (at, fault) = failures.get(&(task, source.clone()))?;
        (at.elapsed() < IMPOSSIBLE_FOR).then(|| fault.clone())
    }

    fn remember(&self, task: LayerTask, source: &LayerSource, fault: &Fault) {
        let mut failures = self.failures.lock();
        if failures.len() >= FAILURES_MAX {
            failures.clear();
        }
        failures.insert((task, source.clone()), (Instant::now(), fault.clone()));
    }
}

/// Makes the layer, or joins those who are at it. When this returns `Ok` the proven map and all pieces are in the store.
/// `progress` is told what is read. The work goes on when the caller stops waiting.
pub(crate) async fn make(
    shared: &Arc<Shared>,
    wish: &Wish,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<(), Fault> {
    let mut last = Fault::Failed("nobody made it".to_owned());
    for _ in 0..JOINS_MAX {
        let (mut flight, mine) = join(shared, wish);
        match follow(&mut flight, progress).await {
            Ok(()) => return Ok(()),
            Err(fault) if mine => return Err(fault),
            // It failed for the sources and credentials of others.
            Err(fault) => last = fault,
        }
    }
    Err(last)
}

async fn follow(
    flight: &mut watch::Receiver<Flight>,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<(), Fault> {
    loop {
        let now = flight.borrow_and_update().clone();
        match now {
            Flight::Running { read, size } => progress(read, size),
            Flight::Done => return Ok(()),
            Flight::Failed(fault) => return Err(fault),
        }
        if flight.changed().await.is_err() {
            return Err(Fault::Failed("the maker was stopped".to_owned()));
        }
    }
}

/// The flight for the wish's task, and whether it was begun for this wish.
fn join(shared: &Arc<Shared>, wish: &Wish) -> (watch::Receiver<Flight>, bool) {
    let mut flights = shared.makes.flights.lock();
    if let Some(flight) = flights.get(&wish.task)
        && matches!(*flight.borrow(), Flight::Running { .. })
        && flight.has_changed().is_ok()
    {
        return (flight.clone(), false);
    }
    let size = wish.sources.first().map_or(0, |source| source.size);
    let (sender, receiver) = watch::channel(Flight::Running { read: 0, size });
    flights.insert(wish.task, receiver.clone());
    drop(flights);
    let (owner, wish) = (shared.clone(), wish.clone());
    shared.tasks.spawn_until_stop("make", async move {
        let flown = alone("make", fly(&owner, &wish, &sender)).await;
        let outcome = flown.unwrap_or_else(|broken| Err(Fault::Failed(broken.to_string())));
        owner.makes.flights.lock().remove(&wish.task);
        let counted = if outcome.is_ok() { &owner.metrics.made } else { &owner.metrics.not_made };
        counted.inc();
        sender.send_replace(outcome.map_or_else(Flight::Failed, |()| Flight::Done));
    });
    (receiver, true)
}

async fn fly(shared: &Arc<Shared>, wish: &Wish, flight: &watch::Sender<Flight>) -> Result<(), Fault> {
    let _turn = shared.makes.turns.wait(wish.sources.first().map_or(0, |source| source.size)).await;
    say(shared, wish.task, WireState::Started, String::new());
    let outcome = of_any_source(shared, wish, flight).await;
    match &outcome {
        Ok(()) => say(shared, wish.task, WireState::Done, String::new()),
        Err(Fault::Impossible(reason)) => say(shared, wish.task, WireState::Impossible, reason.clone()),
        // An order brings no credentials. The child that has them comes and asks for it here, where it was sent.
        Err(Fault::Denied(_)) if wish.credentials.is_empty() => {}
        Err(Fault::Denied(reason) | Fault::Failed(reason)) => {
            say(shared, wish.task, WireState::Failed, reason.clone());
        }
    }
    outcome
}

fn say(shared: &Shared, task: LayerTask, state: WireState, reason: String) {
    if shared.is_seed() {
        shared.control.make_update(task, state, reason);
    }
}

/// Answers an order for a layer that there is no room for.
pub(crate) fn no_room(shared: &Shared, task: LayerTask) {
    say(shared, task, WireState::Failed, "no room for what nobody waits for".to_owned());
}

/// Answers an order for a layer that is here.
pub(crate) fn already_made(shared: &Shared, task: LayerTask) {
    say(shared, task, WireState::Done, String::new());
}

async fn of_any_source(
    shared: &Arc<Shared>,
    wish: &Wish,
    flight: &watch::Sender<Flight>,
) -> Result<(), Fault> {
    let mut faults = Faults::default();
    for source in &wish.sources {
        let fault = match shared.makes.remembered(wish.task, source) {
            Some(fault) => fault,
            None => {
                match run::of_source(shared, wish.task, source, wish.credential_for(source), flight).await {
                    Ok(()) => return Ok(()),
                    Err(fault) => fault,
                }
            }
        };
        tracing::info!(task = %wish.task, repository = %source.repository, %fault, "a layer was not made of this blob");
        if matches!(fault, Fault::Impossible(_)) {
            shared.makes.remember(wish.task, source, &fault);
        }
        faults.add(shared, source, fault);
    }
    Err(faults.last_word())
}

/// Why none of several sources would do. Registries that have never answered count only where there is no other.
#[derive(Default)]
pub(crate) struct Faults {
    worst: Option<Fault>,
    guess: Option<Fault>,
}

impl Faults {
    pub(crate) fn add(&mut self, shared: &Shared, source: &LayerSource, fault: Fault) {
        let has_answered = shared.origin.has_answered(&source.repository.registry);
        let weighed = if has_answered { &mut self.worst } else { &mut self.guess };
        *weighed = Some(weigh(weighed.take(), fault));
    }

    pub(crate) fn last_word(self) -> Fault {
        let nobody = || Fault::Impossible("no source of the layer is known".to_owned());
        self.worst.or(self.guess).unwrap_or_else(nobody)
    }
}

/// Of two faults the one that leaves more hope: only if every source is impossible, the layer is.
fn weigh(before: Option<Fault>, fault: Fault) -> Fault {
    let hope = |fault: &Fault| match fault {
        Fault::Impossible(_) => 0,
        Fault::Denied(_) => 1,
        Fault::Failed(_) => 2,
    };
    match before {
        Some(before) if hope(&before) >= hope(&fault) => before,
        _ => fault,
    }
}
