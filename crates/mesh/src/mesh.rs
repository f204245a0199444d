//! The handle to this peer's part of the mesh.

use std::net::SocketAddr;
use std::sync::Arc;

use darter_daemon::numbers::Registry;
use darter_identity::ClientAuth;
use darter_types::LayerTask;
use futures_util::future::join_all;
use tokio::net::TcpListener;

use crate::error::MeshError;
use crate::layer::{Cause, Layer, LayerRequest, Renew};
use crate::limits::{self, RateStatus};
use crate::load::Resource;
use crate::options::{Deps, Options};
use crate::origin::Origin;
use crate::probe::{self, Probe};
use crate::shared::Shared;
use crate::status::{LayerStatus, SchedulerStatus, StoreStatus};
use crate::upkeep::{self, InUse};
use crate::{background, control, metrics, serve, start};

/// One peer. Clones are cheap; it works until its tasks stop.
#[derive(Clone)]
pub struct Mesh {
    pub(crate) shared: Arc<Shared>,
    address: SocketAddr,
}

impl Mesh {
    /// Listens, serves, and keeps a stream to each scheduler.
    pub async fn start(options: Options, deps: Deps) -> Result<Self, MeshError> {
        let address = options.listen;
        let listen = |error| MeshError::Listen { address, error };
        let tcp = TcpListener::bind(address).await.map_err(listen)?;
        Self::start_on(tcp, options, deps).await
    }

    /// The same on a socket that listens already: whoever must know the port before takes this.
    pub async fn start_on(tcp: TcpListener, options: Options, deps: Deps) -> Result<Self, MeshError> {
        let origin = deps.registry.clone();
        Self::start_with(tcp, options, deps, origin).await
    }

    pub(crate) async fn start_with(
        tcp: TcpListener,
        options: Options,
        deps: Deps,
        origin: Arc<dyn Origin>,
    ) -> Result<Self, MeshError> {
        let listener = deps.identity.listener(tcp, serve::ALPNS, ClientAuth::Required, &deps.tasks)?;
        let address = listener.address();
        let advertised =
            if options.advertise.is_empty() { address.to_string() } else { options.advertise.clone() };
        let set = deps.limits.clone();
        let shared = Arc::new(Shared::new(options, advertised, deps, origin));
        serve::start(&shared, listener);
        take_inventory(&shared).await;
        shared.tasks.spawn_until_stop("schedulers", control::keep(shared.clone()));
        shared.tasks.spawn_until_stop("background", background::run(shared.clone()));
        shared.tasks.spawn_until_stop("prefetch", start::run(shared.clone()));
        shared.tasks.spawn_until_stop("upkeep", upkeep::run(shared.clone()));
        shared.tasks.spawn_until_stop("limits", limits::follow(shared.clone(), set));
        Ok(Self { shared, address })
    }

    /// Where it listens, with the port that the kernel chose.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Opens a layer, or joins it: sources and credential are added to what is known. The search for its map begins.
    pub fn open(&self, request: LayerRequest) -> Layer {
        Layer::join(&self.shared, request, Cause::Use)
    }

    /// The same for an order to preheat: if nobody but such orders wants the layer, a registry is read for it no longer than
    /// some seconds after they have let go of it. For others a read that has begun goes on for minutes, should they come back.
    pub fn open_ordered(&self, request: LayerRequest) -> Layer {
        Layer::join(&self.shared, request, Cause::Order)
    }

    /// Opens what of the layer is on this peer. Nobody else is asked before [`Mesh::open`] says where it may come from.
    pub fn open_here(&self, task: LayerTask) -> Layer {
        let cause = if self.shared.store.has_map(task) { Cause::Use } else { Cause::Probe };
        let request = LayerRequest { task, sources: Vec::new(), credential: None };
        Layer::join(&self.shared, request, cause)
    }

    /// The layer, if somebody has it open.
    pub fn opened(&self, task: LayerTask) -> Option<Layer> {
        self.shared.open_layer(task).map(Layer::from_handle)
    }

    /// Whether these layers can probably be had, in the order given. The caller bounds how long it waits.
    pub async fn probe(&self, requests: &[LayerRequest]) -> Vec<Probe> {
        join_all(requests.iter().map(|request| probe::probe(&self.shared, request.clone()))).await
    }

    #[cfg(test)]
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The schedulers that the manager has named.
    pub fn schedulers(&self) -> Vec<SchedulerStatus> {
        self.shared.control.schedulers()
    }

    /// Adds this peer's numbers to those that its program tells.
    pub fn register(&self, registry: &mut Registry) {
        metrics::register(self, &self.shared, registry);
    }

    /// From now on old layers go when there is too little room, save those that this says are in use. It is asked on threads
    /// that may block. Until this is called nothing goes.
    pub fn keep(&self, in_use: InUse) {
        self.shared.upkeep.set_in_use(in_use);
    }

    /// From now on this is asked where a registry refuses what an open layer was given; the first that is named stays.
    pub fn renew_with(&self, renewal: Arc<dyn Renew>) {
        let _ = self.shared.renewal.set(renewal);
    }

    /// How much room there is, and what has it. May block on the disk.
    pub fn store_status(&self) -> StoreStatus {
        upkeep::status(&self.shared)
    }

    /// The limits in force.
    pub fn rates(&self) -> [RateStatus; 4] {
        self.shared.limits.status()
    }

    /// What the background stands back for: none, one or both of `disk` and `network`.
    pub fn yields_to(&self) -> Vec<&'static str> {
        let busy = self.shared.load.yields_to();
        Resource::ALL.into_iter().filter(|resource| busy.is(*resource)).map(Resource::as_str).collect()
    }

    /// The layers that are open, by name.
    pub fn statuses(&self) -> Vec<LayerStatus> {
        let mut all: Vec<_> = self.shared.open_layers().iter().map(|open| open.status()).collect();
        all.sort_by_key(|status| status.task);
        all
    }
}

/// Tells the schedulers' state what is in the store, before the first of them is connected.
async fn take_inventory(shared: &Arc<Shared>) {
    let owner = shared.clone();
    let work = move || {
        for task in owner.store.maps() {
            if let Some(shelved) = owner.shelf.get(&owner.store, task) {
                owner.control.hold(task, shelved.proof.is_some(), &shelved.spans(&owner.store));
            }
        }
    };
    shared.work.run(work).await;
}
