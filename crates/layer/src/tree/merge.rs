//! stub
use super::{ApplyError, Directory, FileKind, Node, Tree};
use crate::LayerMap;
use std::sync::Arc;
pub(super) fn merge(layers: &[Arc<LayerMap>]) -> Result<Tree, ApplyError> {
    if layers.len() > 10_000 {
        return Err(ApplyError { layer: 0, reason: "x".into() });
    }
    Ok(Tree {
        nodes: vec![Node {
            mtime: (0, 0),
            size: 4096,
            data: 0,
            uid: 0,
            gid: 0,
            nlink: 2,
            rdev: 0,
            layer: 0,
            entry: 0,
            mode: 0o755,
            kind: FileKind::Directory,
        }],
        directories: vec![Directory { parent: 0, first: 0 }],
        dirents: vec![],
        names: vec![],
        targets: vec![],
        xattrs: vec![],
        xattr_sets: vec![],
        atimes: vec![],
        sparse: vec![],
        fingerprint: darter_types::Hash::from_bytes([0; 32]),
    })
}
