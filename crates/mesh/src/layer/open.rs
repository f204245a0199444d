//! The state of an open layer, shared by its handles and the tasks that work for it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use darter_daemon::tasks::alone;
use darter_daemon::traces::Trail;
use darter_layer::LayerMap;
use darter_proto::v1::{ParentFault, Parents};
use darter_registry::Credential;
use darter_types::{LayerSource, LayerTask, PIECES_PER_SPAN, PieceHash, PieceIndex, RateKind, Registry};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::LayerRequest;
use super::fetch::Flights;
use super::givers::Givers;
use super::renew::Renewals;
use super::standing::Standings;
use crate::bits::Bits;
use crate::error::LayerError;
use crate::make::{LINGERS, LINGERS_FOR_ORDER, Wish};
use crate::parents::LinkError;
use crate::shared::Shared;
use crate::shelf::Shelved;
use crate::start::Start;
use crate::status::{LayerStatus, Progress, Stage};

/// How long the wait for a layer's map holds the background up: a layer that nobody can give must not do so for ever.
const MAP_WAIT_COUNTS: Duration = Duration::from_secs(300);

/// Before a seed is asked again to make what it may have lost.
const REMAKE_REST: Duration = Duration::from_secs(20);

/// Sources remembered of one layer. One more takes the place of the oldest one of the registry that has most.
const SOURCES_MAX: usize = 8;

/// Before a layer's work goes on that panicked over what somebody said.
const BROKEN_REST: Duration = Duration::from_secs(10);

/// Whether the map is known.
#[derive(Debug, Clone)]
pub(crate) enum Found {
    /// `rounds` in which nobody could give or make it, and why the last one failed.
    Searching {
        rounds: u32,
        last: String,
    },
    Ready(Arc<LayerMap>),
    Impossible(String),
}

/// Another peer, as a scheduler or the manager names it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Peer {
    pub node: String,
    pub address: String,
    pub is_seed: bool,
}

/// Whom the scheduler has told this layer to ask.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Peers {
    pub parents: Vec<Peer>,
    pub seed: Option<Peer>,
}

impl Peers {
    /// Without ourselves.
    pub(crate) fn from_wire(parents: &Parents, own_address: &str) -> Self {
        let peer = |parent: &darter_proto::v1::Parent| Peer {
            node: parent.node.clone(),
            address: parent.address.clone(),
            is_seed: parent.is_seed,
        };
        let others = parents.parents.iter().filter(|parent| parent.address != own_address);
        let seed = parents.seed.as_ref().filter(|seed| seed.address != own_address);
        Self {
            parents: others.map(peer).collect(),
            seed: seed.map(|seed| Peer { is_seed: true, ..peer(seed) }),
        }
    }
}

struct Asking {
    /// Oldest first.
    sources: Vec<LayerSource>,
    /// Sources that were ever added.
    added: usize,
    credentials: HashMap<Registry, Credential>,
    /// The repository that is known to be let in; until then it is the first.
    named: Option<String>,
}

impl Asking {
    fn new(request: LayerRequest) -> Self {
        let first = request.sources.first().map(|source| source.repository.registry.clone());
        let credentials = first.into_iter().zip(request.credential).collect();
        let mut asking =
            Self { added: request.sources.len(), sources: request.sources, credentials, named: None };
        asking.make_room();
        asking
    }

    /// Who names many repositories of one registry keeps out nobody else, and who waits may name its source again.
    fn make_room(&mut self) {
        while self.sources.len() > SOURCES_MAX {
            let registry = |source: &LayerSource| source.repository.registry.clone();
            let of_same = |source: &LayerSource| {
                self.sources.iter().filter(|other| registry(other) == registry(source)).count()
            };
            let counts: Vec<_> = self.sources.iter().map(of_same).collect();
            let most = counts.iter().max().expect("there are many");
            let oldest = counts.iter().position(|count| count == most).expect("one of them is the most");
            self.sources.remove(oldest);
        }
    }
}

pub(crate) struct Open {
    pub shared: Arc<Shared>,
    pub task: LayerTask,
    pub since: Instant,
    asking: Mutex<Asking>,
    pub(super) renewals: Renewals,
    pub found: watch::Sender<Found>,
    pub progress: watch::Sender<Progress>,
    /// `None` until a scheduler has answered.
    pub peers: watch::Sender<Option<Peers>>,
    pub standings: Standings,
    pub(super) flights: Flights,
    pub(super) have: Mutex<Bits>,
    from: Mutex<BTreeMap<String, u64>>,
    givers: Mutex<Givers>,
    /// Who gave the pieces that were kept without a look at them, until they are read.
    pub(crate) unproven: Mutex<HashMap<u32, Peer>>,
    /// Whether schedulers know that we want it.
    joined: AtomicBool,
    begun: AtomicBool,
    /// Somebody opened it who wants to read it: not only an order to preheat.
    pub(super) is_wanted: AtomicBool,
    pub filling: AtomicBool,
    pub verified: AtomicBool,
    pub start: Start,
    /// Somebody waits for a piece, and nobody gives it.
    stuck: AtomicBool,
    /// When a seed was last asked to make it again; locked while one is.
    remade: tokio::sync::Mutex<Option<Instant>>,
    /// More sources are known, so a new round makes sense.
    pub more_sources: Notify,
    /// Cancelled when nobody has the layer open any more.
    pub stop: CancellationToken,
}

impl Open {
    pub(super) fn new(shared: &Arc<Shared>, request: LayerRequest) -> Arc<Self> {
        Arc::new(Self {
            shared: shared.clone(),
            task: request.task,
            since: Instant::now(),
            asking: Mutex::new(Asking::new(request)),
            renewals: Renewals::default(),
            found: watch::Sender::new(Found::Searching { rounds: 0, last: String::new() }),
            progress: watch::Sender::new(Progress::default()),
            peers: watch::Sender::new(None),
            standings: Standings::default(),
            flights: Flights::default(),
            have: Mutex::default(),
            from: Mutex::default(),
            givers: Mutex::default(),
            unproven: Mutex::default(),
            joined: AtomicBool::new(false),
            begun: AtomicBool::new(false),
            is_wanted: AtomicBool::new(false),
            filling: AtomicBool::new(false),
            verified: AtomicBool::new(false),
            start: Start::default(),
            stuck: AtomicBool::new(false),
            remade: tokio::sync::Mutex::default(),
            more_sources: Notify::new(),
            stop: CancellationToken::new(),
        })
    }

    /// Somebody else opened it: there may be more sources, and fresher credentials. A layer that was impossible is tried
    /// again if there is a new source: the failure was that of the others.
    pub(super) fn add(&self, request: LayerRequest) {
        let more = Asking::new(request);
        let mut asking = self.asking.lock();
        asking.credentials.extend(more.credentials);
        let fresh: Vec<_> =
            more.sources.into_iter().filter(|source| !asking.sources.contains(source)).collect();
        if fresh.is_empty() {
            return;
        }
        asking.added += fresh.len();
        asking.sources.extend(fresh);
        asking.make_room();
        drop(asking);
        self.found.send_if_modified(|found| {
            let was_impossible = matches!(found, Found::Impossible(_));
            if was_impossible {
                *found = Found::Searching { rounds: 0, last: String::new() };
                self.begun.store(false, Ordering::Release);
            }
            was_impossible
        });
        self.more_sources.notify_one();
        if self.joined.load(Ordering::Acquire) {
            self.shared.control.open(self.task, &self.sources());
        }
    }

    pub(super) fn begin(self: &Arc<Self>) {
        if !self.begun.swap(true, Ordering::AcqRel) {
            let (open, trail) = (self.clone(), Trail::current());
            self.shared.tasks.spawn_until_stop("search map", async move {
                let stop = open.stop.clone();
                let search = again_if_broken("search map", || super::search::run(open.clone()));
                stop.run_until_cancelled(trail.over(search)).await;
            });
        }
    }

    pub(super) fn close(&self) {
        self.stop.cancel();
        let mut layers = self.shared.layers.lock();
        // Somebody may have opened it anew in the meantime.
        if layers.get(&self.task).is_some_and(|handle| handle.strong_count() == 0) {
            layers.remove(&self.task);
            // Under the lock: who opens it now must come after.
            self.shared.control.close(self.task);
        }
    }

    /// Those first whose registry has answered before: the others may be guesses.
    pub(crate) fn sources(&self) -> Vec<LayerSource> {
        let mut sources = self.asking.lock().sources.clone();
        sources.sort_by_key(|source| !self.shared.origin.has_answered(&source.repository.registry));
        sources
    }

    pub(crate) fn wish(&self) -> Wish {
        let sources = self.sources();
        let lingers = if self.is_wanted.load(Ordering::Relaxed) { LINGERS } else { LINGERS_FOR_ORDER };
        Wish { task: self.task, sources, credentials: self.asking.lock().credentials.clone(), lingers }
    }

    /// What a registry is read with from now on, unless somebody has brought another credential since it refused `refused`.
    pub(super) fn replace_credential(
        &self,
        registry: &Registry,
        refused: Option<&Credential>,
        found: Option<Credential>,
    ) {
        let credentials = &mut self.asking.lock().credentials;
        if credentials.get(registry) != refused {
            return;
        }
        match found {
            Some(found) => drop(credentials.insert(registry.clone(), found)),
            None => drop(credentials.remove(registry)),
        }
    }

    /// The wish with only the registry of the repository that is let in.
    pub(crate) fn wish_named(&self) -> Wish {
        let named = self.repository();
        let wish = self.wish();
        let has = |part: &Wish| part.sources.iter().any(|source| source.repository.to_string() == named);
        wish.by_registry().into_iter().find(has).unwrap_or(wish)
    }

    /// The repository by which others judge whether we may read.
    pub(crate) fn repository(&self) -> String {
        let asking = self.asking.lock();
        let first = || asking.sources.first().map(|source| source.repository.to_string());
        asking.named.clone().or_else(first).unwrap_or_default()
    }

    /// Takes the first of our repositories that those who gave the map let in.
    pub(super) fn name_repository(&self, shelved: &Shelved) {
        let mut asking = self.asking.lock();
        let names = asking.sources.iter().map(|source| source.repository.to_string());
        let named = names.into_iter().find(|name| shelved.allows(name));
        asking.named = named;
    }

    /// How long it is open.
    pub(crate) fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// Lets the schedulers know that we want the layer, and keeps connections to its parents.
    pub(crate) fn join_mesh(self: &Arc<Self>) {
        if !self.joined.swap(true, Ordering::AcqRel) {
            self.shared.control.open(self.task, &self.sources());
            let open = self.clone();
            self.shared.tasks.spawn_until_stop("parents", async move {
                let stop = open.stop.clone();
                let keeping = again_if_broken("parents", || super::standing::keep(open.clone()));
                stop.run_until_cancelled(keeping).await;
            });
        }
    }

    /// The reverse, when all of it is here.
    pub(super) fn leave_mesh(&self) {
        self.shared.control.close(self.task);
        self.joined.store(false, Ordering::Release);
    }

    /// A scheduler's answer.
    pub(crate) fn hear(&self, peers: Peers) {
        self.peers.send_if_modified(|known| {
            let is_news = known.as_ref() != Some(&peers);
            *known = Some(peers);
            is_news
        });
    }

    pub(super) async fn map(&self) -> Result<Arc<LayerMap>, LayerError> {
        // Who waits for a map starts a container: the background leaves link and processors to the maker and to that.
        let counts = self.map_now().is_none() && self.since.elapsed() < MAP_WAIT_COUNTS;
        let _waiting = counts.then(|| self.shared.demand.wait());
        let mut found = self.found.subscribe();
        let rounds_before = match &*found.borrow_and_update() {
            Found::Searching { rounds, .. } => *rounds,
            Found::Ready(_) | Found::Impossible(_) => 0,
        };
        loop {
            match &*found.borrow_and_update() {
                Found::Ready(map) => return Ok(map.clone()),
                Found::Impossible(reason) => return Err(LayerError::impossible(reason)),
                Found::Searching { rounds, last } if *rounds > rounds_before => {
                    return Err(LayerError::unavailable(last));
                }
                Found::Searching { .. } => {}
            }
            if found.changed().await.is_err() {
                return Err(LayerError::unavailable("the layer was closed"));
            }
        }
    }

    pub(crate) fn map_now(&self) -> Option<Arc<LayerMap>> {
        match &*self.found.borrow() {
            Found::Ready(map) => Some(map.clone()),
            Found::Searching { .. } | Found::Impossible(_) => None,
        }
    }

    pub(crate) fn is_searching(&self) -> bool {
        matches!(&*self.found.borrow(), Found::Searching { .. })
    }

    /// The map is known and may be used.
    pub(crate) fn ready(&self, map: LayerMap) {
        let map = Arc::new(map);
        self.look_what_is_here(&map);
        self.progress.send_modify(|progress| progress.stage = Stage::Ready);
        self.found.send_replace(Found::Ready(map));
    }

    /// Which pieces are in the store.
    pub(super) fn look_what_is_here(&self, map: &LayerMap) {
        let store = &self.shared.store;
        let held = Bits::from_fn(map.piece_count(), |index| store.has(&map.piece(PieceIndex(index)).hash));
        *self.have.lock() = held;
    }

    /// How many sources were added until now.
    pub(super) fn sources_added(&self) -> usize {
        self.asking.lock().added
    }

    /// Pieces had to go. They are fetched again as they are read; all of them, if it is filled again.
    pub(crate) fn went(&self, map: &LayerMap) {
        self.look_what_is_here(map);
        self.filling.store(false, Ordering::Release);
    }

    /// It can't be had of the sources that were added first. False if there are more by now: the verdict is not about them.
    pub(super) fn give_up_on(&self, added: usize, reason: &str) -> bool {
        // Held so that a source that is being added either counts here, or finds the layer impossible.
        let asking = self.asking.lock();
        let are_all = asking.added == added;
        if are_all {
            self.give_up(reason);
        }
        are_all
    }

    /// It can't be had, and waiting would not help.
    pub(crate) fn give_up(&self, reason: &str) {
        tracing::warn!(task = %self.task, reason, "a layer is impossible");
        self.progress.send_modify(|progress| {
            progress.stage = Stage::Impossible;
            reason.clone_into(&mut progress.by);
        });
        self.found.send_replace(Found::Impossible(reason.to_owned()));
    }

    /// Notes that a piece is here, and tells the scheduler when that completes a span. It may have been found wrong since it was
    /// stored, and then it isn't here.
    pub(crate) fn arrived(&self, index: u32, hash: &PieceHash) {
        let spans = {
            let mut have = self.have.lock();
            // With the bits locked, so that whoever finds it gone after this look takes the bit back.
            if !self.shared.store.has(hash) {
                return;
            }
            have.set(index);
            let span = index / PIECES_PER_SPAN;
            let range = span * PIECES_PER_SPAN..((span + 1) * PIECES_PER_SPAN).min(have.len());
            range.clone().all(|piece| have.get(piece)).then(|| have.runs(PIECES_PER_SPAN))
        };
        if let Some(spans) = spans {
            self.shared.control.hold(self.task, self.has_proof(), &spans);
        }
    }

    /// Others take a map only with a seed's word.
    fn has_proof(&self) -> bool {
        self.shared.shelf.get(&self.shared.store, self.task).is_some_and(|shelved| shelved.proof.is_some())
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.map_now().is_some() && self.have.lock().is_full()
    }

    /// Pieces that are not here.
    pub(crate) fn missing(&self) -> Vec<u32> {
        let have = self.have.lock();
        (0..have.len()).filter(|index| !have.get(*index)).collect()
    }

    /// Whether pieces that somebody waits for come. It is told when that changes.
    pub(super) fn set_stuck(&self, stuck: bool) {
        if self.stuck.swap(stuck, Ordering::Relaxed) == stuck {
            return;
        }
        let missing = self.missing().len();
        match stuck {
            true => {
                tracing::warn!(task = %self.task, missing, "a piece is waited for, and nobody in reach has it")
            }
            false => tracing::info!(task = %self.task, missing, "pieces come again"),
        }
    }

    /// Has a seed make again what it may have lost, once for all who wait. Whether it is worth asking the parents again.
    pub(super) async fn remake(self: &Arc<Self>) -> bool {
        let mut remade = self.remade.lock().await;
        if remade.is_some_and(|at| at.elapsed() < REMAKE_REST) {
            return true;
        }
        let is_whole = super::search::remake(self).await;
        *remade = is_whole.then(Instant::now);
        is_whole
    }

    /// `origin` stands for the registry, whose bytes are counted where they are read.
    pub(crate) fn count_from(&self, node: &str, bytes: u64) {
        if node != "origin" {
            self.shared.metrics.from_peers.inc_by(bytes);
        }
        *self.from.lock().entry(node.to_owned()).or_default() += bytes;
    }

    /// The peer has given a map, or a section of one. It doesn't wait for the limit, but pieces wait for it.
    pub(super) fn count_map(&self, node: &str, bytes: u64) {
        self.shared.limits.of(RateKind::Download).spend(bytes);
        self.count_from(node, bytes);
    }

    /// The peer has given a piece, whose bytes as they came were so many.
    pub(super) fn count_piece(&self, index: u32, node: &str, bytes: u64) {
        self.count_from(node, bytes);
        self.givers.lock().note(index, node);
    }

    /// The peer has sent something else as the piece: it is passed over, and whoever chooses parents hears of it.
    pub(super) fn accuse(&self, peer: &Peer, index: u32) {
        tracing::warn!(parent = peer.node, piece = index, "a parent sent wrong bytes and is passed over");
        self.shared.metrics.wrong.inc();
        self.shared.links.accuse(&peer.address);
        self.standings.failed(&peer.address, index, LinkError::Protocol);
        self.shared.control.report(self.task, &peer.node, ParentFault::WrongBytes);
    }

    pub(crate) fn giver(&self, index: u32) -> Option<String> {
        self.givers.lock().of(index)
    }

    pub(crate) fn status(&self) -> LayerStatus {
        let have = self.have.lock();
        LayerStatus {
            task: self.task,
            pieces: have.len(),
            have: have.count(),
            from: self.from.lock().clone(),
            progress: self.progress.borrow().clone(),
            verified: self.verified.load(Ordering::Relaxed),
            stuck: self.stuck.load(Ordering::Relaxed),
        }
    }
}

/// A panic over what one peer said costs some time, not the layer.
async fn again_if_broken<F: Future<Output = ()>>(name: &'static str, work: impl Fn() -> F) {
    while alone(name, work()).await.is_err() {
        tokio::time::sleep(BROKEN_REST).await;
    }
}
