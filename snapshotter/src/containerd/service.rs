//! `containerd.services.snapshots.v1.Snapshots` over [`Node`].

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::stream;
use prost_types::Timestamp;
use tonic::{Request, Response, Status};

use super::wire;
use crate::lazy::lazy_name;
use crate::node::Node;
use crate::snapshot::{Filter, Info, Kind, Labels, Mount, NewSnapshot, REF_LABEL, SnapshotError};

/// As many snapshots go into one message of List as containerd itself sends.
const LIST_BATCH: usize = 100;

const NAMESPACE_HEADER: &str = "containerd-namespace";

/// The server of the service.
pub struct SnapshotsService {
    node: Arc<Node>,
}

impl SnapshotsService {
    pub fn new(node: Arc<Node>) -> Self {
        Self { node }
    }

    async fn create(&self, namespace: String, new: NewSnapshot) -> Result<Vec<wire::Mount>, Status> {
        let mounts = self.node.create(&namespace, new).await?;
        Ok(mounts.into_iter().map(to_mount).collect())
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl wire::Snapshots for SnapshotsService {
    async fn prepare(
        &self,
        request: Request<wire::PrepareSnapshotRequest>,
    ) -> Answer<wire::PrepareSnapshotResponse> {
        let namespace = namespace(&request, &request.get_ref().key);
        let request = request.into_inner();
        let new = new_snapshot(Kind::Active, request.key, request.parent, request.labels);
        let mounts = self.create(namespace, new).await?;
        Ok(Response::new(wire::PrepareSnapshotResponse { mounts }))
    }

    async fn view(&self, request: Request<wire::ViewSnapshotRequest>) -> Answer<wire::ViewSnapshotResponse> {
        let namespace = namespace(&request, &request.get_ref().key);
        let request = request.into_inner();
        let new = new_snapshot(Kind::View, request.key, request.parent, request.labels);
        let mounts = self.create(namespace, new).await?;
        Ok(Response::new(wire::ViewSnapshotResponse { mounts }))
    }

    async fn mounts(&self, request: Request<wire::MountsRequest>) -> Answer<wire::MountsResponse> {
        let mounts = self.node.mounts(&request.into_inner().key).await?;
        Ok(Response::new(wire::MountsResponse { mounts: mounts.into_iter().map(to_mount).collect() }))
    }

    async fn commit(&self, request: Request<wire::CommitSnapshotRequest>) -> Answer<()> {
        let wire::CommitSnapshotRequest { name, key, parent, labels, .. } = request.into_inner();
        self.node.commit(name, key, parent, labels.into_iter().collect()).await?;
        Ok(Response::new(()))
    }

    async fn remove(&self, request: Request<wire::RemoveSnapshotRequest>) -> Answer<()> {
        self.node.remove(request.into_inner().key).await?;
        Ok(Response::new(()))
    }

    async fn stat(&self, request: Request<wire::StatSnapshotRequest>) -> Answer<wire::StatSnapshotResponse> {
        let info = self.node.stat(request.into_inner().key).await?;
        Ok(Response::new(wire::StatSnapshotResponse { info: Some(to_info(info)) }))
    }

    async fn update(
        &self,
        request: Request<wire::UpdateSnapshotRequest>,
    ) -> Answer<wire::UpdateSnapshotResponse> {
        let request = request.into_inner();
        let info = request.info.ok_or_else(|| Status::invalid_argument("the request has no info"))?;
        let paths = request.update_mask.map(|mask| mask.paths).unwrap_or_default();
        let only = label_paths(&info.name, paths)?;
        let info = self.node.update(info.name, info.labels.into_iter().collect(), only).await?;
        Ok(Response::new(wire::UpdateSnapshotResponse { info: Some(to_info(info)) }))
    }

    type ListStream = stream::Iter<std::vec::IntoIter<Result<wire::ListSnapshotsResponse, Status>>>;

    async fn list(&self, request: Request<wire::ListSnapshotsRequest>) -> Answer<Self::ListStream> {
        let namespace = namespace(&request, "");
        let filters = request.into_inner().filters;
        let filters = filters.iter().map(|text| Filter::parse(text)).collect::<Result<Vec<_>, _>>()?;
        let own = filters.first().and_then(|filter| looked_for(&namespace, filter));
        let mut infos = self.node.list(filters).await?;
        if let Some(own) = own {
            own_first(&mut infos, &own);
        }
        let batches: Vec<_> = infos.chunks(LIST_BATCH).map(to_batch).collect();
        Ok(Response::new(stream::iter(batches)))
    }

    async fn usage(&self, request: Request<wire::UsageRequest>) -> Answer<wire::UsageResponse> {
        let usage = self.node.usage(request.into_inner().key).await?;
        Ok(Response::new(wire::UsageResponse { size: usage.size, inodes: usage.inodes }))
    }

    async fn cleanup(&self, _: Request<wire::CleanupRequest>) -> Answer<()> {
        self.node.cleanup().await?;
        Ok(Response::new(()))
    }
}

/// From the header, else from the key, which reads `<namespace>/<number>/<what the client named it>`: some builds of
/// containerd 1.6 send no header.
fn namespace<T>(request: &Request<T>, key: &str) -> String {
    let header = request.metadata().get(NAMESPACE_HEADER).and_then(|value| value.to_str().ok());
    header.or(key.split_once('/').map(|(namespace, _)| namespace)).unwrap_or_default().to_owned()
}

/// The name of the lazy snapshot that containerd looks for with this filter, after it was told that there is one.
fn looked_for(namespace: &str, filter: &Filter) -> Option<String> {
    let target = filter.equals(&["labels", REF_LABEL])?;
    Some(lazy_name(namespace, filter.equals(&["parent"])?, target))
}

/// containerd takes the first that it is given, and other namespaces may have the same layer. To a build that doesn't say
/// its namespace the newest is the most likely one.
fn own_first(infos: &mut [Info], own: &str) {
    infos.sort_by_key(|info| (info.name != own, std::cmp::Reverse(info.created_ns)));
}

fn new_snapshot(kind: Kind, key: String, parent: String, labels: HashMap<String, String>) -> NewSnapshot {
    NewSnapshot { kind, key, parent, labels: labels.into_iter().collect() }
}

/// Which labels an update touches: `None` for all of them. Nothing else of a snapshot can be changed.
fn label_paths(name: &str, paths: Vec<String>) -> Result<Option<Vec<String>>, SnapshotError> {
    if paths.is_empty() || paths.iter().any(|path| path == "labels") {
        return Ok(None);
    }
    let label = |path: String| match path.strip_prefix("labels.") {
        Some(label) => Ok(label.to_owned()),
        None => Err(SnapshotError::Invalid(format!("cannot update {path:?} of snapshot {name:?}"))),
    };
    paths.into_iter().map(label).collect::<Result<Vec<_>, _>>().map(Some)
}

fn to_batch(infos: &[Info]) -> Result<wire::ListSnapshotsResponse, Status> {
    Ok(wire::ListSnapshotsResponse { info: infos.iter().cloned().map(to_info).collect() })
}

fn to_info(info: Info) -> wire::Info {
    let kind = match info.kind {
        Kind::View => wire::Kind::View,
        Kind::Active => wire::Kind::Active,
        Kind::Committed => wire::Kind::Committed,
    };
    wire::Info {
        name: info.name,
        parent: info.parent,
        kind: kind.into(),
        created_at: Some(to_timestamp(info.created_ns)),
        updated_at: Some(to_timestamp(info.updated_ns)),
        labels: to_labels(info.labels),
    }
}

fn to_labels(labels: Labels) -> HashMap<String, String> {
    labels.into_iter().collect()
}

fn to_timestamp(ns: i64) -> Timestamp {
    const SECOND: i64 = 1_000_000_000;
    Timestamp { seconds: ns.div_euclid(SECOND), nanos: ns.rem_euclid(SECOND) as i32 }
}

pub(super) fn to_mount(mount: Mount) -> wire::Mount {
    wire::Mount {
        r#type: mount.kind.to_owned(),
        source: mount.source,
        target: String::new(),
        options: mount.options,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespace_is_read_from_the_key_without_a_header() {
        let request = Request::new(());
        assert_eq!(namespace(&request, "k8s.io/12/extract-1 sha256:aa"), "k8s.io");
        let mut request = Request::new(());
        request.metadata_mut().insert(NAMESPACE_HEADER, "default".parse().unwrap());
        assert_eq!(namespace(&request, "k8s.io/12/x"), "default");
    }

    #[test]
    fn containerd_meets_the_snapshot_of_its_own_namespace_first() {
        let filter = Filter::parse(r#"labels."containerd.io/snapshot.ref"==sha256:aa,parent=="""#).unwrap();
        let mine = looked_for("mine", &filter).unwrap();
        assert_eq!(mine, lazy_name("mine", "", "sha256:aa"));
        assert_eq!(looked_for("mine", &Filter::parse("kind==committed").unwrap()), None);
        let info = |name: &str, created_ns| Info {
            name: name.to_owned(),
            parent: String::new(),
            kind: Kind::Committed,
            created_ns,
            updated_ns: 0,
            labels: Labels::new(),
        };
        let names = |own: &str| {
            let mut infos = [info(&mine, 1), info("theirs", 3), info("others", 2)];
            own_first(&mut infos, own);
            infos.map(|info| info.name)
        };
        assert_eq!(names(&mine), [mine.as_str(), "theirs", "others"]);
        assert_eq!(names("of nobody"), ["theirs", "others", mine.as_str()]);
    }

    #[test]
    fn only_labels_can_be_updated() {
        let paths = |list: &[&str]| label_paths("n", list.iter().map(|path| (*path).to_owned()).collect());
        assert_eq!(paths(&[]).unwrap(), None);
        assert_eq!(paths(&["labels.a.b"]).unwrap(), Some(vec!["a.b".to_owned()]));
        assert!(matches!(paths(&["parent"]), Err(SnapshotError::Invalid(_))));
    }

    #[test]
    fn times_before_1970_have_positive_nanoseconds() {
        assert_eq!(to_timestamp(-1), Timestamp { seconds: -1, nanos: 999_999_999 });
    }
}
