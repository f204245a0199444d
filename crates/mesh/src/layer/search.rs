//! The search for a layer's map: in the store, at parents, at a seed, at other seeds, and last of all at the origin.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use darter_daemon::backoff::{Backoff, random_fraction};
use darter_daemon::traces::Step;
use darter_identity::followed;
use darter_layer::{LayerMap, is_tar_section};
use darter_proto::v1::map_part::Part;
use darter_proto::v1::{MapHead, MapPart, MapRequest, StartOrder};
use darter_store::StoredMap;
use darter_types::{LayerSource, PROTOCOL_VERSION, RootHash};
use prost::Message;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{sleep, timeout};
use tonic::{Code, Status, Streaming};

use super::open::{Found, Open, Peer, Peers};
use crate::make::{Fault, Wish};
use crate::note::Note;
use crate::origin;
use crate::proof::{self, Word};
use crate::reach;
use crate::rendezvous;
use crate::serve::{ABSENT, DENIED, VERDICT};
use crate::start::{self, Order};
use crate::status::Stage;

/// How long a scheduler may take to name parents before the seeds are asked without it.
const SCHEDULER_PATIENCE: Duration = Duration::from_secs(1);
/// Parents that are asked for the map before the seed is.
const PARENTS_ASKED: usize = 3;
/// A parent has the map, or says at once that it has not.
const PARENT_PATIENCE: Duration = Duration::from_secs(2);
/// A seed that makes a map says twice a second how far it is. One that says nothing for so long is given up.
const SEED_PATIENCE: Duration = Duration::from_secs(15);
/// The longest map that is taken from a seed: 16 million files.
const MAP_LEN_MAX: u64 = 1 << 30;
/// And from a node: the bytes are checked only when all have come.
const MAP_OF_NODE_LEN_MAX: u64 = 64 << 20;
/// Maps longer than this come a few at a time.
const LARGE_MAP: u64 = 4 << 20;
/// What is sent more slowly than so many bytes a second, after a first moment, is given up.
pub(crate) const SLOWEST: u64 = 64 << 10;

/// Nodes that have no seed at all go to the origin themselves, spread over this time.
const ALONE_SPREAD: Duration = Duration::from_secs(2);
/// Where there are seeds or schedulers and all of them fail, they wait longer: it may pass, and the registry must not be
/// asked by all at once.
const TROUBLE_MIN: Duration = Duration::from_secs(2);
const TROUBLE_SPREAD: Duration = Duration::from_secs(8);

const ROUND_MIN: Duration = Duration::from_secs(1);
const ROUND_MAX: Duration = Duration::from_secs(30);

/// What came of asking one peer.
enum Asked {
    Map(Box<LayerMap>),
    /// A seed's word that nobody can make it of our sources.
    Impossible(String),
    No(String),
    /// The scheduler has named others in the meantime.
    Again,
}

pub(super) async fn run(open: Arc<Open>) {
    let mut step = Step::here("find map").with("darter.layer", || open.task.diff_id.to_string());
    let trail = step.trail();
    if let Some(map) = trail.over(stored(&open)).await {
        step.say("darter.from", || "disk");
        open.ready(map);
        return;
    }
    open.join_mesh();
    let mut backoff = Backoff::new(ROUND_MIN, ROUND_MAX);
    let mut asked = HashSet::new();
    loop {
        let asked_of = open.sources_added();
        match trail.over(round(&open, &mut asked)).await {
            Asked::Map(map) => {
                tracing::debug!(task = %open.task, after = ?open.age(), "a map is here");
                step.say("darter.pieces", || map.piece_count());
                open.start.recorder.begin(map.piece_count());
                return open.ready(*map);
            }
            Asked::Impossible(reason) => {
                if open.give_up_on(asked_of, &reason) {
                    step.fail(reason);
                    return;
                }
                asked.clear();
                continue;
            }
            Asked::Again => continue,
            Asked::No(reason) => {
                tracing::info!(task = %open.task, reason, "nobody could give or make a layer; it is tried again");
                set_stage(&open, Stage::Waiting, &reason);
                open.found.send_modify(|found| {
                    if let Found::Searching { rounds, last } = found {
                        *rounds += 1;
                        *last = reason;
                    }
                });
            }
        }
        asked.clear();
        tokio::select! {
            () = sleep(backoff.next()) => {}
            () = open.more_sources.notified() => {}
        }
    }
}

fn set_stage(open: &Open, stage: Stage, by: &str) {
    open.progress.send_modify(|progress| {
        progress.stage = stage;
        by.clone_into(&mut progress.by);
    });
}

/// The map from the store. One that nobody vouches for, and that was not made here, is not used.
async fn stored(open: &Arc<Open>) -> Option<LayerMap> {
    let open = open.clone();
    let shared = open.shared.clone();
    shared.work.run(move || load(&open)).await
}

fn load(open: &Open) -> Option<LayerMap> {
    let shared = &open.shared;
    let loaded = shared.shelf.load(&shared.store, open.task)?;
    let root = loaded.map.root_hash();
    let verified = loaded.shelved.note().verified;
    if shared.store.quarantined(open.task, root).is_some() {
        return None;
    }
    if loaded.shelved.note().is_empty() {
        tracing::warn!(task = %open.task, "it is not noted who may read the stored map: it is asked for anew");
        return None;
    }
    if !verified
        && let Err(error) = proof::verify(&shared.identity, open.task, root, loaded.shelved.proof.as_ref())
    {
        tracing::warn!(task = %open.task, %error, "the stored map is not used");
        return None;
    }
    open.verified.store(verified, Ordering::Relaxed);
    if let Some(order) = start::known(shared, open.task, root, loaded.map.piece_count()) {
        open.start.expect(&loaded.map, order);
    }
    open.name_repository(&loaded.shelved);
    Some(loaded.map)
}

/// Asks everybody once, in order; `asked` are the addresses.
async fn round(open: &Arc<Open>, asked: &mut HashSet<String>) -> Asked {
    set_stage(open, Stage::Searching, "");
    let peers = scheduler_word(open).await;
    let (parents, seed) = (peers.parents.len(), peers.seed.is_some());
    tracing::debug!(task = %open.task, after = ?open.age(), parents, seed, "parents are named");
    let mut reasons = Vec::new();
    for parent in peers.parents.iter().filter(|parent| !parent.is_seed).take(PARENTS_ASKED) {
        match ask(open, parent, false).await {
            Asked::No(reason) => reasons.push(reason),
            // Only a seed's word is taken for "impossible".
            Asked::Impossible(reason) => reasons.push(reason),
            found => return found,
        }
    }
    let seeds = seeds(open, &peers);
    for seed in &seeds {
        match ask(open, seed, !open.shared.is_seed()).await {
            Asked::No(reason) => reasons.push(reason),
            Asked::Impossible(reason) if open.shared.is_seed() => reasons.push(reason),
            found => return found,
        }
    }
    asked.extend(peers.parents.iter().chain(&seeds).map(|peer| peer.address.clone()));
    // Also one that can't be reached: it may be back soon.
    let has_mesh = {
        let members = open.shared.members.borrow();
        !members.seeds.is_empty() || !members.schedulers.is_empty()
    };
    match from_origin(open, asked, has_mesh).await {
        Asked::No(reason) => {
            reasons.push(reason);
            Asked::No(reasons.join("; "))
        }
        found => found,
    }
}

/// Whom the scheduler names, if one is there and answers soon.
async fn scheduler_word(open: &Open) -> Peers {
    let mut peers = open.peers.subscribe();
    if open.shared.control.has_scheduler(open.task) {
        let _ = timeout(SCHEDULER_PATIENCE, peers.wait_for(Option::is_some)).await;
    }
    peers.borrow_and_update().clone().unwrap_or_default()
}

/// The seeds to turn to, by what the scheduler has said.
pub(crate) fn seeds_now(open: &Open) -> Vec<Peer> {
    let peers = open.peers.borrow().clone().unwrap_or_default();
    seeds(open, &peers)
}

/// The scheduler's seed first, then all that the manager named, in the same order for every node; those that can be reached.
fn seeds(open: &Open, peers: &Peers) -> Vec<Peer> {
    let named = peers.seed.iter().chain(peers.parents.iter().filter(|parent| parent.is_seed)).cloned();
    let mut seeds: Vec<Peer> = Vec::new();
    let members = open.shared.members.borrow().seeds.clone();
    let known = rendezvous::order(open.task, &members).into_iter().map(|member| Peer {
        node: member.node.to_string(),
        address: member.address,
        is_seed: true,
    });
    for seed in named.chain(known) {
        let is_new = seeds.iter().all(|other| other.address != seed.address);
        let is_there = seed.address != open.shared.address && !open.shared.reach.is_away(&seed.address);
        if is_new && is_there {
            seeds.push(seed);
        }
    }
    seeds
}

/// A seed is asked once for each registry. Only if it says of all of them that they can't give the layer, that is so;
/// one that has never answered this peer does not count where another has.
async fn ask(open: &Arc<Open>, peer: &Peer, make: bool) -> Asked {
    let mut wishes = if peer.is_seed { open.wish().by_registry() } else { vec![open.wish()] };
    let answers = |source: &LayerSource| open.shared.origin.has_answered(&source.repository.registry);
    if wishes.iter().any(|wish| wish.sources.iter().any(answers)) {
        wishes.retain(|wish| wish.sources.iter().any(answers));
    }
    let mut answer = None;
    for wish in wishes {
        match ask_with(open, peer, &wish, make).await {
            Asked::Impossible(reason) => drop(answer.get_or_insert(Asked::Impossible(reason))),
            Asked::No(reason) => answer = Some(Asked::No(reason)),
            found => return found,
        }
    }
    answer.unwrap_or_else(|| Asked::No("no source of the layer is known".to_owned()))
}

async fn ask_with(open: &Arc<Open>, peer: &Peer, wish: &Wish, make: bool) -> Asked {
    let mut step = Step::here("ask for map").asking().with("darter.peer", || peer.node.clone());
    let trail = step.trail();
    let fetched = trail.over(fetch(open, peer, wish, make)).await;
    if let Err(status) = &fetched {
        step.fail(status.message());
    }
    match fetched {
        Ok(fetched) => {
            step.say("darter.bytes", || fetched.core.len());
            trail.over(take(open, peer, fetched)).await
        }
        Err(status) if peer.is_seed && is_verdict(open, wish, &status) => {
            Asked::Impossible(status.message().to_owned())
        }
        Err(status) => {
            if peer.is_seed && is_unreached(&status) {
                reach::lost(&open.shared, &peer.address);
            }
            Asked::No(format!("{}: {}", peer.node, status.message()))
        }
    }
}

/// Our own side's word that there is no connection; what the peer itself says has no cause here.
fn is_unreached(status: &Status) -> bool {
    status.code() == Code::Unavailable && std::error::Error::source(status).is_some()
}

/// A map as it came, for which a seed vouches by its root hash.
struct Fetched {
    root: RootHash,
    proof: Vec<u8>,
    note: Note,
    start: Option<StartOrder>,
    core: Vec<u8>,
    _large: Option<OwnedSemaphorePermit>,
}

/// The map as the peer gives it; asked for with other credentials where a registry refused a seed these.
async fn fetch(open: &Arc<Open>, peer: &Peer, wish: &Wish, make: bool) -> Result<Fetched, Status> {
    match fetch_with(open, peer, wish, make).await {
        Err(status) if peer.is_seed && says(&status, DENIED) => match open.renewed(wish).await {
            Some(wish) => fetch_with(open, peer, &wish, make).await,
            None => Err(status),
        },
        fetched => fetched,
    }
}

fn says(status: &Status, verdict: &str) -> bool {
    status.metadata().get(VERDICT).is_some_and(|said| said == verdict)
}

/// Whether it is a seed's last word. What registries have said to the seed is none where a mirror may say something else to us: seeds
/// show mirrors nothing, and we show them what a pull brought.
fn is_verdict(open: &Open, wish: &Wish, status: &Status) -> bool {
    // It may have been renewed since the wish was made.
    let now = open.wish();
    let opens = |source: &LayerSource| {
        let credential = now.credential_for(source);
        credential.is_some_and(|given| open.shared.origin.opens_mirrors(&source.repository, given))
    };
    let is_of_reader = says(status, DENIED) || says(status, ABSENT);
    status.metadata().contains_key(VERDICT) && !(is_of_reader && wish.sources.iter().any(opens))
}

async fn fetch_with(open: &Arc<Open>, peer: &Peer, wish: &Wish, make: bool) -> Result<Fetched, Status> {
    let mut request = request(open, wish, peer.is_seed).await;
    request.make = make;
    let patience = patience(peer);
    let mut client = open.shared.peer_client(&peer.address, peer.is_seed);
    let response = timeout(patience, client.get_map(followed(request))).await.map_err(|_| silent())??;
    let mut parts = response.into_inner();
    loop {
        match next(&mut parts, patience).await? {
            Part::Progress(made) => open.progress.send_modify(|progress| {
                (progress.read, progress.size, progress.stage) = (made.read, made.size, Stage::Making);
                peer.node.clone_into(&mut progress.by);
            }),
            Part::Head(mut head) => {
                let (length, start) = (head.length, head.start.take());
                let (root, proof, note) = vouched(open, peer, head).await?;
                let large = large(open, peer, length).await?;
                let core = collect(&mut parts, length, peer).await?;
                open.count_map(&peer.node, length);
                return Ok(Fetched { root, proof, note, start, core, _large: large });
            }
            Part::Data(_) => return Err(Status::internal("the map has no head")),
        }
    }
}

fn patience(peer: &Peer) -> Duration {
    if peer.is_seed { SEED_PATIENCE } else { PARENT_PATIENCE }
}

/// Checks what comes before the map itself: whether a seed vouches for it, and what is to be believed of who may read.
async fn vouched(open: &Arc<Open>, peer: &Peer, head: MapHead) -> Result<(RootHash, Vec<u8>, Note), Status> {
    let (owner, is_seed) = (open.clone(), peer.is_seed);
    let checked = open.shared.work.run(move || check_head(&owner, is_seed, &head)).await;
    checked.map_err(|reason| {
        tracing::warn!(task = %open.task, peer = peer.node, reason, "a map is not taken");
        Status::data_loss(reason)
    })
}

fn check_head(open: &Open, is_seed: bool, head: &MapHead) -> Result<(RootHash, Vec<u8>, Note), String> {
    let shared = &open.shared;
    let root = RootHash::from_slice(&head.root).map_err(|error| error.to_string())?;
    let word = proof::verify(&shared.identity, open.task, root, head.proof.as_ref());
    let Word { mut note, .. } = word.map_err(|error| error.to_string())?;
    if let Some(reason) = shared.store.quarantined(open.task, root) {
        return Err(format!("this map is in quarantine: {reason}"));
    }
    let told = Note::from_wire(head.access.as_ref());
    if is_seed {
        note.merge(&told);
    } else if !shared.is_seed() {
        // A seed lets others in by its note; it takes no node's word.
        note.merge(&told.about(&open.sources()));
    }
    Ok((root, head.proof.as_ref().map(Message::encode_to_vec).unwrap_or_default(), note))
}

/// A place for a large map. A seed is waited for, a node is not: it may send nothing.
async fn large(open: &Open, peer: &Peer, length: u64) -> Result<Option<OwnedSemaphorePermit>, Status> {
    if length <= LARGE_MAP {
        return Ok(None);
    }
    let places = open.shared.large_maps.clone();
    if peer.is_seed {
        return Ok(places.acquire_owned().await.ok());
    }
    let place = places.try_acquire_owned();
    place.map(Some).map_err(|_| Status::resource_exhausted("other large maps are coming"))
}

fn silent() -> Status {
    Status::deadline_exceeded("it did not answer in time")
}

/// The request for the map. Only a seed is sent the credential, of as little use as the registry can make it.
async fn request(open: &Open, wish: &Wish, is_seed: bool) -> MapRequest {
    let mut credential = None;
    let first = wish.sources.first().filter(|_| is_seed);
    if let Some((first, given)) = first.and_then(|first| Some((first, wish.credential_for(first)?))) {
        let token = open.shared.origin.token(&first.repository, given).await;
        credential = token.unwrap_or_else(|error| {
            tracing::debug!(%error, "no token for a seed, it is sent what the registry takes");
            Some(given.clone())
        });
    }
    MapRequest {
        protocol: PROTOCOL_VERSION,
        diff_id: open.task.diff_id.as_bytes().to_vec(),
        format: open.task.format,
        sources: wish.sources.iter().map(Into::into).collect(),
        credential: credential.as_ref().map(origin::credential_to_wire),
        tar_section: false,
        make: false,
    }
}

async fn next(parts: &mut Streaming<MapPart>, patience: Duration) -> Result<Part, Status> {
    let part = timeout(patience, parts.message()).await.map_err(|_| silent())??;
    part.and_then(|part| part.part).ok_or_else(|| Status::new(Code::Unavailable, "the answer ended early"))
}

/// The bytes that follow a head. All of them must come within a time that any link can keep.
async fn collect(parts: &mut Streaming<MapPart>, length: u64, peer: &Peer) -> Result<Vec<u8>, Status> {
    let longest = if peer.is_seed { MAP_LEN_MAX } else { MAP_OF_NODE_LEN_MAX };
    if length > longest {
        return Err(Status::out_of_range("the map is longer than it may be"));
    }
    let patience = patience(peer);
    let in_all = patience + Duration::from_secs(length / SLOWEST);
    timeout(in_all, collect_all(parts, length as usize, patience)).await.map_err(|_| silent())?
}

async fn collect_all(
    parts: &mut Streaming<MapPart>,
    length: usize,
    patience: Duration,
) -> Result<Vec<u8>, Status> {
    let mut data = Vec::new();
    while data.len() < length {
        let Part::Data(more) = next(parts, patience).await? else {
            return Err(Status::internal("the map is interrupted"));
        };
        if more.is_empty() || data.len() + more.len() > length {
            return Err(Status::internal("the map has another length than announced"));
        }
        data.extend_from_slice(&more);
    }
    Ok(data)
}

/// Checks a map that came from elsewhere, and keeps it.
async fn take(open: &Arc<Open>, peer: &Peer, fetched: Fetched) -> Asked {
    let (owner, from) = (open.clone(), peer.node.clone());
    let _step = Step::here("check and keep map");
    let kept = open.shared.work.run(move || check_and_keep(&owner, fetched)).await;
    match kept {
        Ok(map) => Asked::Map(Box::new(map)),
        Err(reason) => {
            tracing::warn!(task = %open.task, peer = from, reason, "a map is not taken");
            Asked::No(format!("{from}: {reason}"))
        }
    }
}

fn check_and_keep(open: &Open, fetched: Fetched) -> Result<LayerMap, String> {
    let shared = &open.shared;
    let Fetched { root, proof, note, start, core, _large } = fetched;
    let map = LayerMap::decode_signed(&core, root).map_err(|error| error.to_string())?;
    if let Some(order) = &start {
        expect(open, &map, order);
    }
    let (core, access) = (core.into(), note.encode());
    let stored = StoredMap { task: open.task, root, core, tar: None, proof, access };
    match shared.shelf.store(&shared.store, &stored, &map) {
        Ok(shelved) => {
            open.name_repository(&shelved);
            shared.control.hold(open.task, true, &shelved.spans(&shared.store));
        }
        // It can be used all the same, as long as this process lives.
        Err(error) => {
            tracing::warn!(task = %open.task, %error, "a map could not be stored");
            open.name_repository(&shared.shelf.lend(&stored, &map));
        }
    }
    Ok(map)
}

/// What starts elsewhere have read first: kept with the map, for later starts and for whoever is given the map by this peer.
fn expect(open: &Open, map: &LayerMap, order: &StartOrder) {
    match Order::from_wire(order, map.root_hash(), map.piece_count()) {
        Some(known) => {
            open.start.expect(map, known);
            if let Err(error) = open.shared.store.set_start(open.task, &order.encode_to_vec()) {
                tracing::debug!(task = %open.task, %error, "what starts read first could not be stored");
            }
        }
        None => tracing::info!(task = %open.task, "what is said of earlier starts does not fit the map"),
    }
}

/// The last resort, after a wait that spreads the nodes: this peer reads the blob itself, unless somebody who was not asked
/// yet is named meanwhile. A seed need not wait.
async fn from_origin(open: &Arc<Open>, asked: &HashSet<String>, has_mesh: bool) -> Asked {
    if !open.shared.is_seed() {
        let (min, spread) =
            if has_mesh { (TROUBLE_MIN, TROUBLE_SPREAD) } else { (Duration::ZERO, ALONE_SPREAD) };
        let mut peers = open.peers.subscribe();
        let is_new = |peer: &Peer| !asked.contains(&peer.address);
        let named = peers.wait_for(|peers| {
            peers.as_ref().is_some_and(|peers| peers.parents.iter().chain(&peers.seed).any(is_new))
        });
        if timeout(min + spread.mul_f64(random_fraction()), named).await.is_ok() {
            return Asked::Again;
        }
    }
    make_here(open).await
}

async fn make_here(open: &Arc<Open>) -> Asked {
    set_stage(open, Stage::MakingHere, "");
    let told = |read, size| {
        open.progress.send_modify(|progress| (progress.read, progress.size) = (read, size));
    };
    match open.make_here(&told).await {
        Ok(()) => {
            open.count_from("origin", open.progress.borrow().size);
            match stored(open).await {
                Some(map) => Asked::Map(Box::new(map)),
                None => Asked::No("the map that was made here is gone".to_owned()),
            }
        }
        Err(Fault::Failed(reason)) => Asked::No(reason),
        Err(Fault::Impossible(reason) | Fault::Absent(reason) | Fault::Denied(reason)) => {
            Asked::Impossible(reason)
        }
    }
}

/// Has a seed look, with our credentials, whether our repository holds the layer.
pub(super) async fn prove(open: &Arc<Open>, seed: &Peer) -> bool {
    for wish in open.wish().by_registry() {
        if fetch(open, seed, &wish, true).await.is_ok() {
            return true;
        }
    }
    false
}

/// Has a seed make again what it may have lost. True if one has all of the layer now.
pub(super) async fn remake(open: &Arc<Open>) -> bool {
    let peers = open.peers.borrow().clone().unwrap_or_default();
    for seed in seeds(open, &peers) {
        let is_whole = prove(open, &seed).await;
        set_stage(open, Stage::Ready, "");
        if is_whole {
            return true;
        }
    }
    false
}

/// The section of the tar stream's headers for this map, from a seed or parent.
pub(crate) async fn tar_section(open: &Arc<Open>, map: &Arc<LayerMap>) -> Result<Vec<u8>, String> {
    let peers = open.peers.borrow().clone().unwrap_or_default();
    let mut reasons = Vec::new();
    for peer in seeds(open, &peers).iter().chain(&peers.parents) {
        match section(open, peer).await {
            Ok(section) => {
                open.count_map(&peer.node, section.len() as u64);
                let known = map.clone();
                let check = move || is_tar_section(&known, &section).then_some(section);
                match open.shared.work.run(check).await {
                    Some(section) => return Ok(section),
                    None => reasons.push(format!("{}: it is not the map's", peer.node)),
                }
            }
            Err(status) => reasons.push(format!("{}: {}", peer.node, status.message())),
        }
    }
    Err(reasons.join("; "))
}

async fn section(open: &Open, peer: &Peer) -> Result<Vec<u8>, Status> {
    let mut request = request(open, &open.wish_named(), peer.is_seed).await;
    request.tar_section = true;
    let mut client = open.shared.peer_client(&peer.address, peer.is_seed);
    let response = timeout(PARENT_PATIENCE, client.get_map(request)).await.map_err(|_| silent())??;
    let mut parts = response.into_inner();
    loop {
        match next(&mut parts, PARENT_PATIENCE).await? {
            // It waits for its turn.
            Part::Progress(_) => {}
            Part::Head(head) => return collect(&mut parts, head.length, peer).await,
            Part::Data(_) => return Err(Status::internal("the section has no head")),
        }
    }
}
