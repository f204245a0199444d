//! Reading pieces: memory, disk, parents, and as a last resort the origin.
//!
//! A piece that is being fetched is one [`Flight`], however many wait for it, and goes on when all of them have gone.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use darter_daemon::backoff::random_fraction;
use darter_daemon::tasks::alone;
use darter_daemon::traces::{Step, Trail};
use darter_layer::{LayerMap, PieceInfo};
use darter_store::{StoreError, StoredPiece};
use darter_types::{PieceIndex, RateKind};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::Priority;
use super::fare::Fare;
use super::open::{Found, Open, Peer};
use super::standing::Choice;
use crate::error::LayerError;
use crate::parents::{Link, LinkError};
use crate::shared::holding;

/// How long a read goes on over parents that fail before its caller is told that nobody has the piece now.
const READ_DEADLINE: Duration = Duration::from_secs(120);
/// A piece that nobody gives for so long holds up no longer what nobody waits for, on the whole peer.
const DEMAND_COUNTS: Duration = if cfg!(test) { Duration::from_secs(1) } else { Duration::from_secs(10) };
/// Not a single byte from a parent for so long, and the piece is asked of another.
const DEMAND_PATIENCE: Duration = Duration::from_secs(2);
const BACKGROUND_PATIENCE: Duration = Duration::from_secs(10);
/// A demand piece that takes longer than the mean answer by this factor is asked of a second parent as well.
const HEDGE_TIMES: u32 = 4;
const HEDGE_MIN: Duration = Duration::from_millis(250);
const HEDGE_MAX: Duration = Duration::from_secs(2);
/// Parents that one piece is asked of at the same time.
const ATTEMPTS_MAX: usize = 2;
/// How long nobody must have had the piece before this peer turns to the origin: where there is a mesh it may recover.
const ORIGIN_AFTER: Duration = Duration::from_secs(6);
const ORIGIN_SPREAD: Duration = Duration::from_secs(6);
const ORIGIN_AFTER_ALONE: Duration = Duration::from_millis(500);
/// How long nobody must have had it before people are told.
const STUCK_AFTER: Duration = Duration::from_secs(3);
/// How long to wait for a change among the parents before looking again.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

type Outcome = Option<Result<Bytes, LayerError>>;

/// A piece that is on its way.
pub(super) struct Flight {
    outcome: watch::Sender<Outcome>,
    priority: watch::Sender<Priority>,
    /// Of the first who wants it followed.
    trail: Mutex<Trail>,
    /// Cancelled when the piece is stored, or will not be.
    ended: CancellationToken,
}

pub(super) type Flights = Mutex<HashMap<u32, Arc<Flight>>>;

/// A request to one parent, ended.
struct Attempt {
    peer: Peer,
    result: Result<StoredPiece, LinkError>,
}

impl Flight {
    fn new(priority: Priority) -> Self {
        let (outcome, priority) = (watch::Sender::new(None), watch::Sender::new(priority));
        Self { outcome, priority, trail: Mutex::new(Trail::current()), ended: CancellationToken::new() }
    }

    fn trail(&self) -> Trail {
        *self.trail.lock()
    }

    async fn outcome(&self) -> Result<Bytes, LayerError> {
        let mut outcome = self.outcome.subscribe();
        let ended = outcome.wait_for(Option::is_some).await;
        let ended = ended.map_err(|_| LayerError::unavailable("the layer was closed"))?;
        ended.clone().expect("it was waited for")
    }
}

impl Open {
    pub(crate) async fn read(
        self: &Arc<Self>,
        index: PieceIndex,
        priority: Priority,
    ) -> Result<Bytes, LayerError> {
        let map = self.map().await?;
        if index.0 >= map.piece_count() {
            return Err(LayerError::impossible(format!("the layer has no piece {}", index.0)));
        }
        let hash = map.piece(index).hash;
        if let Some(bytes) = self.shared.cache.get(&hash) {
            return Ok(bytes);
        }
        if self.shared.store.has(&hash) {
            let open = self.clone();
            if let Some(bytes) = self.shared.work.run(move || open.read_local(index)).await {
                return Ok(bytes);
            }
        }
        if priority != Priority::Demand {
            return self.flight(&map, index, priority).0.outcome().await;
        }
        let (waiting, since) = (self.shared.demand.wait(), Instant::now());
        let is_stranger = !self.start.is_expected(index.0);
        let stranger = is_stranger.then(|| self.shared.starts.strangers.wait());
        let mut step = Step::here("piece").with("darter.piece", || index.0);
        step.say("darter.layer", || self.task.diff_id.to_string());
        let (flight, _) = step.trail().over_now(|| self.flight(&map, index, priority));
        let outcome = holding((waiting, stranger), DEMAND_COUNTS, flight.outcome()).await;
        self.shared.metrics.waited(since);
        match &outcome {
            Ok(bytes) => step.say("darter.bytes", || bytes.len()),
            Err(error) => step.fail(error),
        }
        outcome
    }

    /// Brings the piece into the store, for nobody. False if it was there, or on its way for somebody else.
    pub(crate) async fn keep(
        self: &Arc<Self>,
        index: PieceIndex,
        priority: Priority,
    ) -> Result<bool, LayerError> {
        let map = self.map().await?;
        let hash = map.piece(index).hash;
        let mut is_ours = false;
        if !self.shared.store.has(&hash) {
            let (flight, is_begun) = self.flight(&map, index, priority);
            is_ours = is_begun;
            flight.outcome().await?;
            flight.ended.cancelled().await;
        }
        if self.shared.store.has(&hash) {
            self.arrived(index.0, &hash);
            return Ok(is_ours);
        }
        Err(LayerError::unavailable("a piece could not be stored"))
    }

    /// The piece's flight, and whether it begins now because there is none. One that was begun in the background becomes urgent
    /// for a container.
    fn flight(
        self: &Arc<Self>,
        map: &Arc<LayerMap>,
        index: PieceIndex,
        priority: Priority,
    ) -> (Arc<Flight>, bool) {
        let mut flights = self.flights.lock();
        if let Some(flight) = flights.get(&index.0) {
            flight.priority.send_if_modified(|known| {
                let is_more = priority > *known;
                *known = priority.max(*known);
                is_more
            });
            let mut trail = flight.trail.lock();
            *trail = if trail.is_followed() { *trail } else { Trail::current() };
            drop(trail);
            return (flight.clone(), false);
        }
        let flight = Arc::new(Flight::new(priority));
        flights.insert(index.0, flight.clone());
        drop(flights);
        let (open, info, begun) = (self.clone(), map.piece(index), flight.clone());
        // A layer that counts as complete has no parents to ask.
        self.missed(index.0, &info.hash);
        self.join_mesh();
        self.shared.tasks.spawn_until_stop("piece", async move {
            let stop = open.stop.clone();
            let flying = alone("piece", fly(&open, index.0, info, &begun));
            let outcome = match stop.run_until_cancelled(flying).await {
                Some(fetched) => {
                    fetched.unwrap_or_else(|broken| Err(LayerError::unavailable(broken.to_string())))
                }
                None => Err(LayerError::unavailable("the layer was closed")),
            };
            land(&mut open.flights.lock(), index.0, &begun);
            begun.outcome.send_if_modified(|known| {
                // Who waits was told before the piece was stored.
                let is_first = known.is_none();
                known.get_or_insert(outcome);
                is_first
            });
            begun.ended.cancel();
        });
        (flight, true)
    }

    pub(crate) fn want(self: &Arc<Self>, first: PieceIndex, count: u32) {
        let Some(map) = self.map_now() else { return };
        // What was read a moment ago was expected, and so is what follows, if it is needed.
        if self.shared.starts.is_busy()
            && first.0.checked_sub(1).is_some_and(|last| self.start.is_expected(last))
        {
            return;
        }
        for index in (first.0..map.piece_count()).take(count as usize) {
            if self.shared.store.has(&map.piece(PieceIndex(index)).hash)
                || self.flights.lock().contains_key(&index)
            {
                continue;
            }
            let Ok(permit) = self.shared.read_ahead.clone().try_acquire_owned() else { return };
            let open = self.clone();
            self.shared.tasks.spawn_alone("read ahead", async move {
                let _permit = permit;
                let stop = open.stop.clone();
                // Whoever needs it will ask for it, and see the error.
                stop.run_until_cancelled(open.keep(PieceIndex(index), Priority::Ahead)).await;
            });
        }
    }
}

async fn fly(open: &Arc<Open>, index: u32, info: PieceInfo, flight: &Flight) -> Result<Bytes, LayerError> {
    let (limit, priority) = (open.shared.limits.of(RateKind::Download), flight.priority.subscribe());
    let fare = Fare::pay(limit, info.plain_len.into(), priority).await;
    match timeout(READ_DEADLINE, Chase::new(open, index, info, flight, fare).run()).await {
        Ok(outcome) => outcome,
        Err(_) => {
            Err(LayerError::unavailable(format!("no peer gave piece {index} of {} in time", open.task)))
        }
    }
}

/// The attempts to get one piece.
struct Chase<'a> {
    open: &'a Arc<Open>,
    index: u32,
    info: PieceInfo,
    flight: &'a Flight,
    fare: Fare<'a>,
    /// Parents that failed since all were last tried.
    tried: HashSet<String>,
    nobody_since: Option<Instant>,
    origin_after: Duration,
    has_asked_seeds: bool,
}

impl<'a> Chase<'a> {
    fn new(open: &'a Arc<Open>, index: u32, info: PieceInfo, flight: &'a Flight, fare: Fare<'a>) -> Self {
        let members = open.shared.members.borrow();
        let is_alone = members.seeds.is_empty() && members.schedulers.is_empty();
        let patient = ORIGIN_AFTER + ORIGIN_SPREAD.mul_f64(random_fraction());
        let origin_after = if is_alone || open.shared.is_seed() { ORIGIN_AFTER_ALONE } else { patient };
        drop(members);
        Self {
            open,
            index,
            info,
            flight,
            fare,
            tried: HashSet::new(),
            nobody_since: None,
            origin_after,
            has_asked_seeds: false,
        }
    }

    fn priority(&self) -> Priority {
        *self.flight.priority.borrow()
    }

    async fn run(mut self) -> Result<Bytes, LayerError> {
        let mut attempts = FuturesUnordered::new();
        let mut urgent = self.flight.priority.subscribe();
        let mut hedge_at = Instant::now();
        loop {
            if attempts.is_empty() || (attempts.len() < ATTEMPTS_MAX && self.may_hedge(hedge_at)) {
                let changed = self.open.standings.changed.notified();
                match self.open.standings.choose(self.index, &self.tried) {
                    Choice::Ask { peer, link, slot } => {
                        self.nobody_since = None;
                        self.tried.insert(peer.address.clone());
                        hedge_at = Instant::now() + hedge_delay(&link);
                        let asked = (self.open.clone(), self.index);
                        attempts.push(attempt(asked, self.priority(), peer, link, slot, self.flight.trail()));
                    }
                    Choice::Busy | Choice::Nobody if !attempts.is_empty() => {
                        hedge_at = Instant::now() + LOOK_AGAIN;
                    }
                    Choice::Busy => drop(timeout(LOOK_AGAIN, changed).await),
                    Choice::Nobody => {
                        let waiting = timeout(LOOK_AGAIN, changed);
                        drop(waiting.await);
                        if let Some(bytes) = self.nobody().await? {
                            return Ok(bytes);
                        }
                    }
                }
                continue;
            }
            tokio::select! {
                Some(attempt) = attempts.next() => {
                    if let Some(bytes) = self.judge(attempt).await {
                        return Ok(bytes);
                    }
                }
                () = sleep_until(hedge_at.into()), if attempts.len() < ATTEMPTS_MAX => {}
                _ = urgent.changed() => {}
            }
        }
    }

    fn may_hedge(&self, at: Instant) -> bool {
        self.priority() == Priority::Demand && Instant::now() >= at
    }

    /// Nobody who was not tried has the piece.
    async fn nobody(&mut self) -> Result<Option<Bytes>, LayerError> {
        // Those who failed may do better now.
        self.tried.clear();
        if let Found::Impossible(reason) = &*self.open.found.borrow() {
            return Err(LayerError::impossible(reason));
        }
        let since = *self.nobody_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= STUCK_AFTER {
            self.open.set_stuck(true);
            if !self.has_asked_seeds && !self.open.shared.is_seed() {
                self.has_asked_seeds = true;
                if self.open.remake().await {
                    // Who has what is found out anew.
                    self.nobody_since = None;
                    return Ok(None);
                }
            }
        }
        if since.elapsed() < self.origin_after {
            return Ok(None);
        }
        self.refill().await
    }

    /// The last resort: the layer is made here, which brings all its pieces.
    async fn refill(&mut self) -> Result<Option<Bytes>, LayerError> {
        tracing::info!(task = %self.open.task, piece = self.index, "no peer has a piece; the layer is read from its origin");
        let read = Mutex::new(0);
        let told = |now, _| *read.lock() = now;
        let made = self.flight.trail().over(self.open.make_here(&told)).await;
        self.nobody_since = None;
        match made {
            Ok(()) => {
                self.open.set_stuck(false);
                self.open.count_from("origin", read.into_inner());
                if let Some(map) = self.open.map_now() {
                    self.open.look_what_is_here(&map);
                }
                let (open, index) = (self.open.clone(), self.index);
                let found = self.open.shared.work.run(move || open.read_local(PieceIndex(index))).await;
                match found {
                    Some(bytes) => Ok(Some(bytes)),
                    // A true map of the layer has no such piece.
                    None => Err(self.lie()),
                }
            }
            Err(fault) => {
                tracing::debug!(task = %self.open.task, reason = %fault, "the origin does not give the layer either");
                sleep(LOOK_AGAIN).await;
                Ok(None)
            }
        }
    }

    fn lie(&self) -> LayerError {
        let reason = "the layer, read from its origin, does not have the pieces that its map names";
        self.open.give_up(reason);
        LayerError::impossible(reason)
    }

    /// What came of one attempt: the checked piece, or the parent's fault is noted.
    async fn judge(&mut self, attempt: Attempt) -> Option<Bytes> {
        let Attempt { peer, result } = attempt;
        if let Ok(piece) = &result {
            self.fare.came(piece.bytes.len() as u64);
        }
        let shared = &self.open.shared;
        let fault = match result {
            Ok(piece) => match self.check(&peer, piece).await {
                Some(bytes) => return Some(bytes),
                None => {
                    self.open.accuse(&peer, self.index);
                    None
                }
            },
            Err(error) => {
                tracing::debug!(parent = peer.node, piece = self.index, %error, "a parent did not give a piece");
                self.open.standings.failed(&peer.address, self.index, error)
            }
        };
        if let Some(fault) = fault {
            shared.control.report(self.open.task, &peer.node, fault);
        }
        None
    }

    /// Decodes and checks, tells those who wait, then stores. A full disk is no reason to let anybody wait.
    async fn check(&self, peer: &Peer, piece: StoredPiece) -> Option<Bytes> {
        let (open, info, shared) = (self.open.clone(), self.info, &self.open.shared);
        let (outcome, len) = (self.flight.outcome.clone(), piece.bytes.len() as u64);
        let mut step = self.flight.trail().step("check and keep piece");
        if piece.has_length_of(self.info.plain_len) && self.is_left_alone() {
            step.say("darter.unread", || true);
            return Some(self.keep_unread(peer, piece).await);
        }
        let decoded = match self.priority() {
            Priority::Background => Some(self.decode_calmly(&piece).await?),
            Priority::Recorded | Priority::Ahead | Priority::Demand => None,
        };
        let index = self.index;
        let priority = self.priority();
        let is_soon = priority > Priority::Recorded || shared.starts.is_near(self.open, index);
        let checked = shared.work.run(move || {
            let bytes = match decoded {
                Some(bytes) => bytes,
                None => decode(&piece, &info)?,
            };
            match priority {
                Priority::Demand => open.shared.cache.put(info.hash, bytes.clone()),
                _ if is_soon => open.shared.cache.put_ahead(info.hash, bytes.clone()),
                _ => {}
            }
            outcome.send_replace(Some(Ok(bytes.clone())));
            let stored = open.shared.store.put_stored(&info.hash, &piece);
            Some((bytes, stored))
        });
        let Some((bytes, stored)) = checked.await else {
            step.fail("the bytes are wrong");
            return None;
        };
        self.came(peer, len);
        self.note_stored(stored);
        Some(bytes)
    }

    /// Whether nobody waits for the piece, nor will in the next moments: earlier starts have read it, this one has not come to it
    /// yet. Then it is not in flight any more, and whoever asks for it from now on doesn't wait for this flight.
    fn is_left_alone(&self) -> bool {
        let mut flights = self.open.flights.lock();
        let alone =
            self.priority() == Priority::Recorded && !self.open.shared.starts.is_near(self.open, self.index);
        if alone {
            land(&mut flights, self.index, self.flight);
        }
        alone
    }

    /// Keeps the piece as it came: it is decoded and checked once, when it is about to be read. Who kept the flight company
    /// wanted it stored, nothing more.
    async fn keep_unread(&self, peer: &Peer, piece: StoredPiece) -> Bytes {
        let (open, info, index) = (self.open.clone(), self.info, self.index);
        let (len, giver) = (piece.bytes.len() as u64, peer.clone());
        let keep = move || {
            // Another layer may have kept another's piece of that hash meanwhile: then this giver is none.
            if open.shared.store.put_unchecked(&info.hash, &piece)? {
                open.kept_unread(index, &info.hash, giver);
            }
            Ok(())
        };
        let stored = self.open.shared.work.run(keep).await;
        self.came(peer, len);
        self.note_stored(stored);
        Bytes::new()
    }

    /// The peer has given the piece; its bytes as they came were so many.
    fn came(&self, peer: &Peer, len: u64) {
        let shared = &self.open.shared;
        self.open.set_stuck(false);
        self.open.standings.gave(&peer.address, len);
        self.open.count_piece(self.index, &peer.node, len);
        if self.priority() <= Priority::Recorded {
            // Their limit was charged for the piece as it will be, which is smaller on its way.
            let spared = u64::from(self.info.plain_len).saturating_sub(len);
            shared.limits.of(RateKind::Background).give_back(spared);
        }
        if self.priority() == Priority::Background {
            shared.load.brought(len);
        }
    }

    /// With the processor time that nobody else wants; but as soon as a container waits for the piece, as for others.
    /// Only decoding: whoever stores holds locks, and must not be kept from going on.
    async fn decode_calmly(&self, piece: &StoredPiece) -> Option<Bytes> {
        let (work, info) = (&self.open.shared.work, self.info);
        let (calm, now) = (piece.clone(), piece.clone());
        let mut priority = self.flight.priority.subscribe();
        let urgent = async move { priority.wait_for(|now| *now > Priority::Background).await.map(drop) };
        tokio::select! {
            bytes = work.run_calmly(move || decode(&calm, &info)) => bytes,
            _ = urgent => work.run(move || decode(&now, &info)).await,
        }
    }

    fn note_stored(&self, stored: Result<(), StoreError>) {
        match stored {
            Ok(()) => self.open.arrived(self.index, &self.info.hash),
            Err(error) if error.is_full() => self.open.shared.upkeep.is_full(&error),
            Err(error) => tracing::warn!(task = %self.open.task, %error, "a piece could not be stored"),
        }
    }
}

/// The flight is over; another of the same piece goes on.
fn land(flights: &mut HashMap<u32, Arc<Flight>>, index: u32, flight: &Flight) {
    if flights.get(&index).is_some_and(|known| std::ptr::eq(&**known, flight)) {
        flights.remove(&index);
    }
}

/// The piece's plain bytes, if they are what the map says.
fn decode(piece: &StoredPiece, info: &PieceInfo) -> Option<Bytes> {
    piece.decode(&info.hash).ok().filter(|plain| plain.len() == info.plain_len as usize)
}

fn hedge_delay(link: &Link) -> Duration {
    (link.answer_time() * HEDGE_TIMES).clamp(HEDGE_MIN, HEDGE_MAX)
}

async fn attempt(
    (open, index): (Arc<Open>, u32),
    priority: Priority,
    peer: Peer,
    link: Arc<Link>,
    slot: OwnedSemaphorePermit,
    trail: Trail,
) -> Attempt {
    let mut step = trail.step("ask parent").asking().with("darter.peer", || peer.node.clone());
    let patience = match priority {
        Priority::Demand => DEMAND_PATIENCE,
        Priority::Ahead | Priority::Recorded | Priority::Background => BACKGROUND_PATIENCE,
    };
    let repository = open.repository();
    let result = step.trail().over(link.piece(open.task, &repository, index, patience)).await;
    match &result {
        Ok(piece) => step.say("darter.bytes", || piece.bytes.len()),
        Err(error) => step.fail(error),
    }
    drop(slot);
    open.standings.changed.notify_waiters();
    Attempt { peer, result }
}
