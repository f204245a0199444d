//! Making a layer's map and pieces from the origin: once at a time for a layer, however many want it.

mod course;
mod followers;
mod pack;
mod run;
mod stream;
mod turns;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use darter_daemon::tasks::alone;
use darter_daemon::traces::{Step, Trail};
use darter_proto::v1::MakeState as WireState;
use darter_registry::Credential;
use darter_types::{LayerSource, LayerTask, Registry};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use course::{Course, Lately, MAKING};
use followers::{Follower, Followers};
pub(crate) use followers::{LINGERS, LINGERS_FOR_ORDER};
pub(crate) use run::verify_blob;
use turns::{Turn, Turns};

use crate::shared::Shared;

/// Layers that are made at the same time. Two keep both processors busy where one waits for its registry; the others
/// wait, and those who ask for them are told so.
const MAKES_MAX: usize = 3;

/// How long a blob that can't be made into this layer is not read again for it.
const IMPOSSIBLE_FOR: Duration = Duration::from_secs(60);

/// Failures remembered; at more all are forgotten.
const FAILURES_MAX: usize = 4096;

/// How many flights one caller follows: those of others fail for their sources, its own may be slow.
const JOINS_MAX: usize = 6;

/// Why a layer was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Fault {
    /// The blob's own fault: nobody could make this layer of it.
    #[error("{0}")]
    Impossible(String),
    /// Whoever asks with these credentials, or none, is told that there is no such blob. Somebody else may be told otherwise.
    #[error("{0}")]
    Absent(String),
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
    Running {
        read: u64,
        size: u64,
        /// Its registry sends so little that whoever knows another source doesn't wait for it.
        is_slow: bool,
    },
    Done,
    Failed(Fault),
}

/// A flight as it is for those who make it.
struct Pilot {
    now: watch::Sender<Flight>,
    course: Arc<Course>,
}

impl Pilot {
    fn new(size: u64) -> Self {
        let now = watch::Sender::new(Flight::Running { read: 0, size, is_slow: false });
        Self { now, course: Arc::default() }
    }
}

/// A flight that was begun.
struct Begun {
    number: u64,
    flight: watch::Receiver<Flight>,
    course: Arc<Course>,
    /// The source that it reads now.
    reads: Option<LayerSource>,
    /// Cancelled when another flight has made the layer.
    end: CancellationToken,
    followers: Followers,
}

impl Begun {
    fn new(number: u64, sources: &[LayerSource]) -> (Self, Pilot) {
        let pilot = Pilot::new(sources.first().map_or(0, |source| source.size));
        let (flight, course) = (pilot.now.subscribe(), pilot.course.clone());
        let (end, followers) = Default::default();
        (Self { number, flight, course, reads: None, end, followers }, pilot)
    }

    fn is_running(&self) -> bool {
        matches!(*self.flight.borrow(), Flight::Running { .. }) && self.flight.has_changed().is_ok()
    }

    fn is_slow(&self) -> bool {
        matches!(*self.flight.borrow(), Flight::Running { is_slow: true, .. })
    }
}

type Failures = HashMap<(LayerTask, LayerSource), (Instant, Fault)>;

pub(crate) struct Makes {
    /// Of one layer there are several only where all but the newest are slow.
    flights: Mutex<HashMap<LayerTask, Vec<Begun>>>,
    begun: AtomicU64,
    failures: Mutex<Failures>,
    turns: Turns,
    lately: Lately,
}

impl Default for Makes {
    fn default() -> Self {
        Self {
            flights: Mutex::default(),
            begun: AtomicU64::new(0),
            failures: Mutex::default(),
            turns: Turns::new(MAKES_MAX),
            lately: Lately::default(),
        }
    }
}

/// What somebody wants made, and of what.
#[derive(Clone)]
pub(crate) struct Wish {
    pub task: LayerTask,
    pub sources: Vec<LayerSource>,
    /// Each goes to no other registry than the one that it was given for.
    pub credentials: HashMap<Registry, Credential>,
    /// How long the work goes on when nobody waits for it any more.
    pub lingers: Duration,
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
                    let (sources, lingers) = (vec![source.clone()], self.lingers);
                    wishes.push(Wish { task: self.task, sources, credentials, lingers });
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
    /// In the trace of what is done here, how the layer was made that is here, if that was lately.
    pub(crate) fn tell_made(&self, task: LayerTask) {
        let trail = Trail::current();
        if trail.is_followed() {
            self.lately.tell(task, trail);
        }
    }

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

    /// Notes that the flight reads this source; false if another does.
    fn take(&self, task: LayerTask, number: u64, source: &LayerSource) -> bool {
        let mut flights = self.flights.lock();
        let flights = flights.get_mut(&task).map(Vec::as_mut_slice).unwrap_or_default();
        if flights.iter().any(|begun| begun.number != number && begun.reads.as_ref() == Some(source)) {
            return false;
        }
        let own = flights.iter_mut().find(|begun| begun.number == number);
        own.into_iter().for_each(|begun| begun.reads = Some(source.clone()));
        true
    }

    /// Says something of a flight's end if no other is there: the last word is that of the last flight. None can begin
    /// meanwhile, so that what is said of one never follows what the next one says.
    fn unless_others(&self, task: LayerTask, number: u64, say: impl FnOnce()) {
        let flights = self.flights.lock();
        if flights.get(&task).is_none_or(|flights| flights.iter().all(|begun| begun.number == number)) {
            say();
        }
    }

    /// Takes the flight off the list, so that whoever comes now begins another, unless somebody follows it.
    fn desert(&self, task: LayerTask, number: u64) -> bool {
        let mut all = self.flights.lock();
        let flights = all.get_mut(&task).map(Vec::as_mut_slice).unwrap_or_default();
        if flights.iter().any(|begun| begun.number == number && !begun.followers.is_empty()) {
            return false;
        }
        Self::remove(&mut all, task, number, false);
        true
    }

    /// The flight has ended. If it has made the layer, the others need not go on.
    fn end(&self, task: LayerTask, number: u64, is_made: bool) {
        Self::remove(&mut self.flights.lock(), task, number, is_made);
    }

    fn remove(all: &mut HashMap<LayerTask, Vec<Begun>>, task: LayerTask, number: u64, is_made: bool) {
        let Some(flights) = all.get_mut(&task) else { return };
        flights.retain(|begun| begun.number != number);
        if is_made {
            flights.iter().for_each(|begun| begun.end.cancel());
        }
        if flights.is_empty() {
            all.remove(&task);
        }
    }
}

/// Makes the layer, or joins those who are at it. When this returns `Ok` the proven map and all pieces are in the store.
/// `progress` is told what is read. When the caller stops waiting the work goes on for those who wait too, and, as the last of
/// them stops, for as long as the wish lingers.
pub(crate) async fn make(
    shared: &Arc<Shared>,
    wish: &Wish,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<(), Fault> {
    let (mut ours, mut theirs) = (None, Fault::Failed("nobody made it".to_owned()));
    // One that is slow may yet be the only one that makes it, so none is left before the end.
    let mut followed_by_us = Vec::new();
    for _ in 0..JOINS_MAX {
        let Some(joined) = join(shared, wish, ours.is_some()) else { break };
        let Joined { mut flight, follower, course, mine, is_hasty } = joined;
        followed_by_us.push(follower);
        let mut step = Step::here(MAKING).with("darter.joined", || !mine);
        let followed = follow(&mut flight, is_hasty, progress).await;
        course.tell(step.trail());
        if let Some(Err(fault)) = &followed {
            step.fail(fault);
        }
        drop(step);
        match followed {
            Some(Ok(())) => return Ok(()),
            Some(Err(fault)) if mine => ours = Some(fault),
            // A source of ours, but not with our credentials: these are for the next try.
            Some(Err(fault)) if ours.is_some() => return Err(Fault::Failed(fault.to_string())),
            // It failed for the sources and credentials of others.
            Some(Err(fault)) => theirs = fault,
            None => {}
        }
    }
    Err(ours.unwrap_or(theirs))
}

/// What came of the flight; `None` if it is slow and `is_hasty`.
async fn follow(
    flight: &mut watch::Receiver<Flight>,
    is_hasty: bool,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Option<Result<(), Fault>> {
    loop {
        let now = flight.borrow_and_update().clone();
        match now {
            Flight::Running { is_slow: true, .. } if is_hasty => return None,
            Flight::Running { read, size, .. } => progress(read, size),
            Flight::Done => return Some(Ok(())),
            Flight::Failed(fault) => return Some(Err(fault)),
        }
        if flight.changed().await.is_err() {
            return Some(Err(Fault::Failed("the maker was stopped".to_owned())));
        }
    }
}

struct Joined {
    flight: watch::Receiver<Flight>,
    follower: Follower,
    course: Arc<Course>,
    /// It was begun for this wish.
    mine: bool,
    /// The wish may have a source that is not being read: should the flight be slow, that makes sense.
    is_hasty: bool,
}

/// A flight for the wish's task. Where all of them are slow, one is begun with the sources that none of them reads: nobody
/// shall keep a layer from others by naming it with a registry that drips. With `failed`, only flights that read a source of
/// the wish.
fn join(shared: &Arc<Shared>, wish: &Wish, failed: bool) -> Option<Joined> {
    let mut all = shared.makes.flights.lock();
    let flights = all.entry(wish.task).or_default();
    let is_taken = |source: &LayerSource| flights.iter().any(|begun| begun.reads.as_ref() == Some(source));
    let fresh: Vec<_> = wish.sources.iter().filter(|source| !failed && !is_taken(source)).cloned().collect();
    let reads_ours =
        |begun: &&Begun| begun.reads.as_ref().is_some_and(|source| wish.sources.contains(source));
    let mut running = flights.iter().filter(|begun| begun.is_running() && (!failed || reads_ours(begun)));
    let quick = running.clone().find(|begun| !begun.is_slow());
    if let Some(begun) = quick.or_else(|| running.next().filter(|_| fresh.is_empty())) {
        let (flight, course) = (begun.flight.clone(), begun.course.clone());
        let follower = begun.followers.join(wish.lingers);
        return Some(Joined { flight, follower, course, mine: false, is_hasty: !fresh.is_empty() });
    }
    if failed {
        if flights.is_empty() {
            all.remove(&wish.task);
        }
        return None;
    }
    let is_hasty = fresh.len() > 1;
    let (begun, pilot) = Begun::new(shared.makes.begun.fetch_add(1, Ordering::Relaxed), &fresh);
    let (number, end, flight) = (begun.number, begun.end.clone(), begun.flight.clone());
    let (course, followers) = (begun.course.clone(), begun.followers.clone());
    let follower = followers.join(wish.lingers);
    flights.push(begun);
    drop(all);
    let (owner, wish) = (shared.clone(), Wish { sources: fresh, ..wish.clone() });
    shared.tasks.spawn_until_stop("make", async move {
        let flown = tokio::select! {
            flown = alone("make", fly(&owner, number, &wish, &pilot)) => {
                Flown::Ended(flown.unwrap_or_else(|broken| Err(Fault::Failed(broken.to_string()))))
            }
            () = end.cancelled() => Flown::Overtaken,
            () = deserted(&owner.makes, wish.task, number, &followers) => Flown::Deserted,
        };
        let outcome = landed(&owner, &wish, number, &pilot, flown);
        owner.makes.end(wish.task, number, outcome.is_ok());
        pilot.now.send_replace(outcome.map_or_else(Flight::Failed, |()| Flight::Done));
    });
    Some(Joined { flight, follower, course, mine: true, is_hasty })
}

/// How a flight came to its end.
enum Flown {
    Ended(Result<(), Fault>),
    /// Another flight has made the layer.
    Overtaken,
    /// Nobody wants it any more.
    Deserted,
}

/// Returns when nobody follows the flight any more, and nobody can.
async fn deserted(makes: &Makes, task: LayerTask, number: u64, followers: &Followers) {
    loop {
        followers.gone().await;
        if makes.desert(task, number) {
            return;
        }
    }
}

/// What is to be said and noted of it.
fn landed(shared: &Shared, wish: &Wish, number: u64, pilot: &Pilot, flown: Flown) -> Result<(), Fault> {
    match flown {
        Flown::Ended(Ok(())) => {
            shared.metrics.made.inc();
            shared.makes.lately.made(wish.task, pilot.course.clone());
            Ok(())
        }
        Flown::Ended(Err(fault)) => {
            shared.metrics.not_made.inc();
            Err(fault)
        }
        Flown::Overtaken => {
            shared.upkeep.left_orphans();
            Ok(())
        }
        Flown::Deserted => {
            shared.upkeep.left_orphans();
            tracing::info!(task = %wish.task, "a layer is not made any more: nobody wants it");
            let words = "nobody waited for it any more";
            say_last(shared, wish.task, number, WireState::Failed, words.to_owned());
            Err(Fault::Failed(words.to_owned()))
        }
    }
}

async fn fly(shared: &Arc<Shared>, number: u64, wish: &Wish, flight: &Pilot) -> Result<(), Fault> {
    let waiting = flight.course.part("wait for a turn");
    let mut turn = shared.makes.turns.wait(wish.sources.first()).await;
    drop(waiting);
    say(shared, wish.task, WireState::Started, String::new());
    let outcome = of_any_source(shared, number, wish, flight, &mut turn).await;
    match &outcome {
        Ok(()) => say(shared, wish.task, WireState::Done, String::new()),
        Err(Fault::Impossible(reason) | Fault::Absent(reason)) => {
            say_last(shared, wish.task, number, WireState::Impossible, reason.clone());
        }
        // An order brings no credentials. The child that has them comes and asks for it here, where it was sent.
        Err(Fault::Denied(_)) if wish.credentials.is_empty() => {}
        Err(Fault::Denied(reason) | Fault::Failed(reason)) => {
            say_last(shared, wish.task, number, WireState::Failed, reason.clone());
        }
    }
    outcome
}

fn say_last(shared: &Shared, task: LayerTask, number: u64, state: WireState, reason: String) {
    shared.makes.unless_others(task, number, || say(shared, task, state, reason));
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
    number: u64,
    wish: &Wish,
    flight: &Pilot,
    turn: &mut Turn,
) -> Result<(), Fault> {
    let mut faults = Faults::default();
    for source in &wish.sources {
        if !shared.makes.take(wish.task, number, source) {
            continue;
        }
        let fault = match shared.makes.remembered(wish.task, source) {
            Some(fault) => fault,
            None => {
                match run::of_source(shared, wish.task, source, wish.credential_for(source), flight, turn)
                    .await
                {
                    Ok(()) => return Ok(()),
                    Err(fault) => fault,
                }
            }
        };
        tracing::info!(task = %wish.task, repository = %source.repository, %fault, "a layer was not made of this blob");
        // What a registry says to one reader is not remembered for the others.
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
        Fault::Absent(_) => 1,
        Fault::Denied(_) => 2,
        Fault::Failed(_) => 3,
    };
    match before {
        Some(before) if hope(&before) >= hope(&fault) => before,
        _ => fault,
    }
}
