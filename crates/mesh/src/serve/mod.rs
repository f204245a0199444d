//! The serving side: one TLS port for gRPC (`Peer`) and for the piece protocol.

mod maps;
mod patience;
mod pieces;
mod share;
mod slots;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use darter_identity::Listener;
use darter_proto::v1::peer_server::PeerServer;
use darter_types::{LayerSource, LayerTask};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::frames::{ALPN, ALPN_BEFORE};
use crate::make::{self, LINGERS_FOR_ORDER, Wish};
use crate::shared::Shared;
use crate::upkeep;

#[cfg(test)]
pub(crate) use pieces::testing;

/// How often a child's connection for maps is looked at, and how long it may take to say that it lives.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_DEADLINE: Duration = Duration::from_secs(10);

/// The metadata key by which a seed says that an error is its last word: no other seed could do better with these sources.
pub(crate) const VERDICT: &str = "darter-verdict";

/// Its values: other credentials may help, there is no such blob for whoever asks with these, or nothing helps. Whoever doesn't know
/// one of the first two takes it for the last.
pub(crate) const DENIED: &str = "denied";
pub(crate) const ABSENT: &str = "absent";
const IMPOSSIBLE: &str = "impossible";

/// What goes at once where uploads are limited: so little that each of many children hears something before it loses patience.
const LIMITED_PART: usize = 32 << 10;

/// The ALPN names of the port.
pub(crate) const ALPNS: &[&[u8]] = &[b"h2", ALPN, ALPN_BEFORE];

/// Serves until the tasks stop.
pub(crate) fn start(shared: &Arc<Shared>, mut listener: Listener) {
    let (incoming, streams) = (listener.grpc(), [ALPN, ALPN_BEFORE].map(|alpn| listener.raw(alpn)));
    let service = PeerServer::new(maps::MapServer::new(shared.clone()));
    let stop = shared.tasks.token();
    shared.tasks.spawn("serve maps", async move {
        let mut server = Server::builder()
            .http2_keepalive_interval(Some(PING_EVERY))
            .http2_keepalive_timeout(Some(PING_DEADLINE));
        let served = server.add_service(service).serve_with_incoming_shutdown(incoming, stop.cancelled());
        if let Err(error) = served.await {
            tracing::error!(%error, "maps are not served any more");
        }
    });
    shared.tasks.spawn_until_stop("serve pieces", pieces::serve(shared.clone(), streams));
}

/// A scheduler's order to a seed. It has no credentials: those of private layers come with the first child's request, which
/// joins the work or begins it anew.
///
/// It stands for whoever has the layer open. Where this seed itself has, because it preheats it, that is for its own sake, and
/// the order is over when the layer is closed: others who want it ask for it.
pub(crate) fn obey(shared: &Arc<Shared>, task: LayerTask, sources: Vec<LayerSource>) {
    let owner = shared.clone();
    let closed =
        shared.open_layer(task).map_or_else(CancellationToken::new, |layer| layer.open().stop.clone());
    shared.tasks.spawn_alone("make order", async move {
        let (shelf, store) = (owner.clone(), owner.store.clone());
        let known = owner.work.run(move || shelf.shelf.get(&store, task)).await;
        if let Some(shelved) = known.filter(|shelved| shelved.proof.is_some()) {
            let store = owner.store.clone();
            if shelved.held(&store).is_full() {
                make::already_made(&owner, task);
                return;
            }
        }
        // An order is for somebody who may want it. Who needs it asks for it, and then it has more right to the room.
        let size = sources.first().map_or(0, |source| source.size);
        if !upkeep::room_to_grow(&owner, size).await {
            make::no_room(&owner, task);
            return;
        }
        // Its outcome is told to the scheduler as it comes.
        let wish = Wish { task, sources, credentials: HashMap::new(), lingers: LINGERS_FOR_ORDER };
        let _ = closed.run_until_cancelled(make::make(&owner, &wish, &|_, _| {})).await;
    });
}
