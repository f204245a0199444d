//! Generates the server of containerd's snapshots service over the messages of `containerd-client`, which has only the
//! client. No `.proto` file is needed for it.

use tonic_build::manual::{Builder, Method, MethodBuilder, Service};

fn method(name: &str, route: &str, input: &str, output: &str) -> MethodBuilder {
    Method::builder()
        .name(name)
        .route_name(route)
        .input_type(format!("crate::containerd::wire::{input}"))
        .output_type(format!("crate::containerd::wire::{output}"))
        .codec_path("tonic_prost::ProstCodec")
}

fn main() {
    let service = Service::builder()
        .name("Snapshots")
        .package("containerd.services.snapshots.v1")
        .method(method("prepare", "Prepare", "PrepareSnapshotRequest", "PrepareSnapshotResponse").build())
        .method(method("view", "View", "ViewSnapshotRequest", "ViewSnapshotResponse").build())
        .method(method("mounts", "Mounts", "MountsRequest", "MountsResponse").build())
        .method(method("commit", "Commit", "CommitSnapshotRequest", "Empty").build())
        .method(method("remove", "Remove", "RemoveSnapshotRequest", "Empty").build())
        .method(method("stat", "Stat", "StatSnapshotRequest", "StatSnapshotResponse").build())
        .method(method("update", "Update", "UpdateSnapshotRequest", "UpdateSnapshotResponse").build())
        .method(
            method("list", "List", "ListSnapshotsRequest", "ListSnapshotsResponse")
                .server_streaming()
                .build(),
        )
        .method(method("usage", "Usage", "UsageRequest", "UsageResponse").build())
        .method(method("cleanup", "Cleanup", "CleanupRequest", "Empty").build())
        .build();
    Builder::new().build_client(false).compile(&[service]);
}
