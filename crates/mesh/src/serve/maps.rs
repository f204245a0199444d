//! `Peer.GetMap`: a node gives the maps that it has; a seed makes those that it has not, and judges who may read.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use darter_daemon::traces::Step;
use darter_identity::Member;
use darter_proto::v1::map_part::Part;
use darter_proto::v1::peer_server::Peer;
use darter_proto::v1::{MakeProgress, MapHead, MapPart, MapRequest, StartNote, StartNoted, StartOrder};
use darter_proto::{convert, v1};
use darter_registry::Credential;
use darter_types::{FORMAT_VERSION, LayerSource, LayerTask, RateKind, Role};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataValue;
use tonic::{Request, Response, Status};

use super::patience::Patience;
use super::slots::Slots;
use super::{ABSENT, DENIED, IMPOSSIBLE, LIMITED_PART, VERDICT};
use crate::layer::SLOWEST;
use crate::limits::{Bucket, Urgency};
use crate::make::{self, Fault, LINGERS, Wish};
use crate::origin::credential_from_wire;
use crate::right::{self, Unknown};
use crate::shared::Shared;
use crate::shelf::Shelved;
use crate::start;

/// Maps that are being sent at the same time, and so in memory; fewer where uploads are limited. Others wait for their turn.
const SENDING_MAX: usize = 16;
/// A child that keeps a map waiting for so long, longer by what the slowest that it may be takes, is let go.
const SEND_DEADLINE: Duration = Duration::from_secs(30);

/// Sources in one request; more are not looked at.
const SOURCES_MAX: usize = 8;

const PART_LEN: usize = 256 * 1024;
const PARTS_QUEUED: usize = 2;

/// How often a child hears that the map is being made.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);

type Parts = mpsc::Sender<Result<MapPart, Status>>;

#[derive(Clone)]
pub(super) struct MapServer {
    shared: Arc<Shared>,
    slots: Arc<Slots>,
}

/// A request that was checked.
struct Asked {
    task: LayerTask,
    sources: Vec<LayerSource>,
    credential: Option<Credential>,
    tar_section: bool,
    make: bool,
}

impl TryFrom<MapRequest> for Asked {
    type Error = Status;
    fn try_from(request: MapRequest) -> Result<Self, Status> {
        convert::check_protocol(request.protocol)?;
        let sources = &request.sources[..request.sources.len().min(SOURCES_MAX)];
        Ok(Self {
            task: convert::task(&request.diff_id, request.format)?,
            sources: convert::sources(sources)?,
            credential: credential_from_wire(request.credential),
            tar_section: request.tar_section,
            make: request.make,
        })
    }
}

impl Asked {
    /// The one credential of a request is for the registry of its first source.
    fn wish(&self) -> Wish {
        let first = self.sources.first().map(|source| source.repository.registry.clone());
        let credentials = first.into_iter().zip(self.credential.clone()).collect();
        Wish { task: self.task, sources: self.sources.clone(), credentials, lingers: LINGERS }
    }
}

impl MapServer {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let slots = Slots::of_uploads(&shared, SENDING_MAX);
        Self { shared, slots }
    }
}

#[tonic::async_trait]
impl Peer for MapServer {
    type GetMapStream = ReceiverStream<Result<MapPart, Status>>;

    async fn get_map(&self, request: Request<MapRequest>) -> Result<Response<Self::GetMapStream>, Status> {
        let member = darter_identity::require(&request, &[Role::Node, Role::Seed])?;
        let trail = darter_identity::trail(&request);
        let asked = Asked::try_from(request.into_inner())?;
        if asked.task.format != FORMAT_VERSION {
            return Err(Status::not_found(format!("this peer has no maps of format {}", asked.task.format)));
        }
        let (parts, answer) = mpsc::channel(PARTS_QUEUED);
        let server = self.clone();
        let mut step = Step::for_member(trail, "give map").with("darter.peer", || member.node.to_string());
        step.say("darter.layer", || asked.task.diff_id.to_string());
        self.shared.tasks.spawn_alone("serve map", async move {
            let closed = parts.clone();
            let work = async {
                if let Err(status) = step.trail().over(server.serve(&member, &asked, &parts)).await {
                    step.fail(status.message());
                    tracing::debug!(task = %asked.task, child = %member, reason = status.message(), "no map for a child");
                    let _ = parts.send_timeout(Err(status), SEND_DEADLINE).await;
                }
            };
            tokio::select! {
                () = work => {}
                () = closed.closed() => {}
            }
        });
        Ok(Response::new(ReceiverStream::new(answer)))
    }

    async fn note_start(&self, request: Request<StartNote>) -> Result<Response<StartNoted>, Status> {
        darter_identity::require(&request, &[Role::Node, Role::Seed])?;
        let StartNote { protocol, diff_id, format, repository, order } = request.into_inner();
        convert::check_protocol(protocol)?;
        let task = convert::task(&diff_id, format)?;
        let order = order.ok_or_else(|| Status::invalid_argument("the note has no order"))?;
        if !self.shared.is_seed() {
            return Err(Status::failed_precondition("only seeds are told of starts"));
        }
        let owner = self.shared.clone();
        match self.shared.work.run(move || start::take(&owner, task, &repository, &order)).await {
            true => Ok(Response::new(StartNoted {})),
            false => Err(Status::not_found("this seed has no such layer for this repository")),
        }
    }
}

/// A last word: no seed could do better with these sources.
fn verdict(verdict: &'static str, reason: String) -> Status {
    let mut status = Status::failed_precondition(reason);
    status.metadata_mut().insert(VERDICT, MetadataValue::from_static(verdict));
    status
}

impl From<Fault> for Status {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Impossible(reason) => verdict(IMPOSSIBLE, reason),
            Fault::Absent(reason) => verdict(ABSENT, reason),
            Fault::Denied(reason) => verdict(DENIED, reason),
            Fault::Failed(reason) => Status::unavailable(reason),
        }
    }
}

impl MapServer {
    async fn serve(&self, member: &Member, asked: &Asked, parts: &Parts) -> Result<(), Status> {
        let shared = &self.shared;
        let shelved = match shelved(shared, asked.task).await {
            Some(shelved) => {
                shared.makes.tell_made(asked.task);
                self.made_whole(asked, shelved, parts).await
            }
            None if asked.make && shared.is_seed() => {
                make(shared, asked, parts).await?;
                shelved(shared, asked.task)
                    .await
                    .ok_or_else(|| Status::unavailable("the map is gone again"))?
            }
            None => return Err(Status::not_found("this peer has no map of the layer")),
        };
        self.permit(asked, &shelved, parts).await?;
        shared.upkeep.touch(asked.task);
        let _place = with_signs_of_life(self.slots.wait(member), parts, || (0, 0)).await;
        let data = load(shared, asked).await?;
        let _sending = Step::here("send map").with("darter.bytes", || data.len());
        let start = if asked.tar_section { None } else { start_order(shared, asked.task, &shelved).await };
        send(&shelved, data, start, parts, shared.limits.of(RateKind::Upload)).await
    }

    /// A seed that had all of a layer and lost some of it, on a disk that spoilt it, makes it again. If it can't now, the
    /// map is still good.
    async fn made_whole(&self, asked: &Asked, held: Arc<Shelved>, parts: &Parts) -> Arc<Shelved> {
        let shared = &self.shared;
        let store = &shared.store;
        let is_whole = || held.held(store).is_full() && store.has_tar(asked.task);
        let has_lost = || held.note().verified && !is_whole();
        if !asked.make || !shared.is_seed() || !has_lost() {
            return held;
        }
        tracing::warn!(task = %asked.task, "a part of a layer was lost here; it is made again");
        if let Err(fault) = make(shared, asked, parts).await {
            tracing::warn!(task = %asked.task, %fault, "it can't be made again");
        }
        shelved(shared, asked.task).await.unwrap_or(held)
    }

    /// Whether the caller may read the layer, by one of the repositories that it names. A seed lets it prove it; that counts
    /// for the others of its repository too.
    async fn permit(&self, asked: &Asked, shelved: &Shelved, parts: &Parts) -> Result<(), Status> {
        let allows = |source: &LayerSource| shelved.allows(&source.repository.to_string());
        if asked.sources.iter().any(allows) {
            return Ok(());
        }
        if !self.shared.is_seed() {
            return Err(Status::permission_denied(
                "the repository has not shown here that it holds the layer: ask a seed",
            ));
        }
        let mut refusal = None;
        for source in &asked.sources {
            let wish = asked.wish();
            let credential = wish.credential_for(source);
            let proven = right::prove(&self.shared, shelved, asked.task, source, credential, Unknown::Read);
            match with_signs_of_life(proven, parts, || (0, source.size)).await {
                Ok(()) => return Ok(()),
                Err(fault) => drop(refusal.get_or_insert(Status::from(fault))),
            }
        }
        Err(refusal.unwrap_or_else(|| Status::permission_denied("the request names no repository")))
    }
}

/// Maps without a seed's word are of no use to others.
async fn shelved(shared: &Arc<Shared>, task: LayerTask) -> Option<Arc<Shelved>> {
    let owner = shared.clone();
    let found = shared.work.run(move || owner.shelf.get(&owner.store, task)).await;
    found.filter(|shelved| shelved.proof.is_some())
}

async fn make(shared: &Arc<Shared>, asked: &Asked, parts: &Parts) -> Result<(), Fault> {
    let wish = asked.wish();
    let known = Mutex::new((0, wish.sources.first().map_or(0, |source| source.size)));
    let told = |read, size| *known.lock() = (read, size);
    let making = make::make(shared, &wish, &told);
    with_signs_of_life(making, parts, || *known.lock()).await
}

/// Lets the child know, as long as `work` takes, that it goes on, and how far it is.
async fn with_signs_of_life<T>(
    work: impl Future<Output = T>,
    parts: &Parts,
    progress: impl Fn() -> (u64, u64),
) -> T {
    let mut work = std::pin::pin!(work);
    let mut ticks = interval(PROGRESS_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            _ = ticks.tick() => {
                let (read, size) = progress();
                let progress = MapPart { part: Some(Part::Progress(MakeProgress { read, size })) };
                // A child that does not read hears the next one.
                let _ = parts.try_send(Ok(progress));
            }
        }
    }
}

async fn load(shared: &Arc<Shared>, asked: &Asked) -> Result<Bytes, Status> {
    let (store, task, tar_section) = (shared.store.clone(), asked.task, asked.tar_section);
    let loaded = shared.work.run(move || {
        if tar_section { store.tar(task) } else { store.map(task).map(|map| map.map(|map| map.core)) }
    });
    let data = loaded.await.map_err(|error| Status::unavailable(error.to_string()))?;
    data.ok_or_else(|| Status::not_found("this peer does not have that section of the map"))
}

/// What starts have read of the layer first, as far as it is known here.
async fn start_order(shared: &Arc<Shared>, task: LayerTask, shelved: &Shelved) -> Option<StartOrder> {
    let (owner, root, pieces) = (shared.clone(), shelved.root, shelved.hashes.len() as u32);
    let known = shared.work.run(move || start::known(&owner, task, root, pieces)).await;
    known.map(|order| order.to_wire(root))
}

async fn send(
    shelved: &Shelved,
    mut data: Bytes,
    start: Option<StartOrder>,
    parts: &Parts,
    limit: &Bucket,
) -> Result<(), Status> {
    let head = MapHead {
        root: shelved.root.as_bytes().to_vec(),
        proof: shelved.proof.clone(),
        length: data.len() as u64,
        access: Some(shelved.note().to_wire()),
        start,
    };
    let mut patience = Patience::new(SEND_DEADLINE + Duration::from_secs(data.len() as u64 / SLOWEST));
    let mut next = Some(Part::Head(head));
    while let Some(part) = next {
        let part = Ok(v1::MapPart { part: Some(part) });
        match patience.with(parts.send(part)).await {
            Ok(Ok(())) => {}
            // It has gone.
            Ok(Err(_)) => return Ok(()),
            Err(_) => return Err(Status::deadline_exceeded("the child takes the map too slowly")),
        }
        let part_len = if limit.is_limited() { LIMITED_PART } else { PART_LEN };
        let part = data.split_to(data.len().min(part_len));
        // Without its map no container starts: it goes before pieces, as far as these have their share.
        limit.take(part.len() as u64, Urgency::Demand).await;
        next = (!part.is_empty()).then(|| Part::Data(part));
    }
    Ok(())
}
