//! What people ask: which layers are open and how far, and why an image is lazy or not.

use std::collections::{BTreeMap, BTreeSet};

use darter_types::ChainId;
use serde::Serialize;

use super::decide::Undecided;
use super::{Lazy, Result};
use crate::fs::TracedRead;
use crate::snapshot::Decision;

/// An open layer.
#[derive(Debug, Clone, Serialize)]
pub struct LayerReport {
    pub diff_id: String,
    /// The images that have it, as far as they were decided here: `host/name@sha256:...`.
    pub images: BTreeSet<String>,
    pub pieces: u64,
    pub have: u64,
    /// Bytes by where they came from.
    pub from: BTreeMap<String, u64>,
    pub state: String,
}

/// What was decided for an image.
#[derive(Debug, Clone, Serialize)]
pub struct ImageReport {
    pub manifest: String,
    pub config: String,
    pub namespace: String,
    pub names: Vec<String>,
    /// Seconds since 1970; `None` while it is being decided.
    pub decided: Option<i64>,
    pub layers: Vec<ImageLayerReport>,
}

#[derive(Debug, Clone, Serialize)]
pub struct ImageLayerReport {
    pub diff_id: String,
    pub blob: String,
    pub size: u64,
    /// `None` while it is being decided.
    pub lazy: Option<bool>,
    pub reason: String,
}

/// The first read of a piece by a container of an image.
#[derive(Debug, Clone, Serialize)]
pub struct ReadReport {
    /// Milliseconds after the image's first read on this node since the daemon's start.
    pub at_ms: f64,
    /// How long the reader waited for the piece, be it decoded or fetched.
    pub waited_ms: f64,
    /// The file, from the root.
    pub path: String,
    pub layer: String,
    pub piece: u32,
    /// Whether the piece was on this node when it was read.
    pub local: bool,
    /// The peer that gave it; empty if it was on this node before.
    pub from: String,
}

impl Lazy {
    /// What the newest image that `wanted` fits and that was started here read first, in order, in whichever namespace it was
    /// started. `None`: none was started since the daemon was.
    pub fn trace(&self, wanted: impl Fn(&Decision) -> bool) -> Result<Option<Vec<ReadReport>>> {
        let (decisions, chains) = (
            self.snapshots.records().read(|tx| tx.decisions())?,
            self.snapshots.records().read(|tx| tx.chains())?,
        );
        for decision in decisions.into_iter().filter(wanted) {
            let diff_ids: Vec<_> = decision.layers.iter().map(|layer| layer.diff_id).collect();
            let top = ChainId::chain(&diff_ids).pop();
            let shown = chains.iter().filter(|chain| Some(chain.chain_id) == top);
            let mut reads = shown.filter_map(|chain| self.chains.fs().trace(chain.dir));
            if let Some(reads) = reads.find(|reads| !reads.is_empty()) {
                return Ok(Some(reads.into_iter().map(|read| read_report(read, &decision)).collect()));
            }
        }
        Ok(None)
    }

    /// Every layer that is open, by diff ID.
    pub fn layers(&self) -> Result<Vec<LayerReport>> {
        let mut images: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for decision in self.snapshots.records().read(|tx| tx.decisions())? {
            for layer in &decision.layers {
                let names = decision.names.iter().map(|name| format!("{name}@{}", decision.image));
                images.entry(layer.diff_id.to_string()).or_default().extend(names);
            }
        }
        let mut reports: Vec<_> = self
            .chains
            .open_layers()
            .iter()
            .map(|layer| {
                let status = layer.content.status();
                let diff_id = layer.diff_id.to_string();
                LayerReport {
                    images: images.get(&diff_id).cloned().unwrap_or_default(),
                    diff_id,
                    pieces: status.pieces,
                    have: status.have,
                    from: status.from,
                    state: status.state,
                }
            })
            .collect();
        reports.sort_by(|a, b| a.diff_id.cmp(&b.diff_id));
        Ok(reports)
    }

    /// The decisions for images that `wanted` fits, the newest first. One that is being made takes the place of an earlier one.
    pub fn images(&self, wanted: impl Fn(&Decision) -> bool) -> Result<Vec<ImageReport>> {
        let open = self.decider.undecided();
        let mut reports: Vec<_> = open
            .iter()
            .map(|one| (one, one.image.decision(0, &[])))
            .filter(|(_, decision)| wanted(decision))
            .map(|(one, decision)| open_report(one, decision))
            .collect();
        let is_open = |decision: &Decision| {
            let mut images = open.iter().map(|one| &one.image);
            images.any(|image| {
                image.namespace == decision.namespace && image.found.manifest.to_string() == decision.image
            })
        };
        let decisions = self.snapshots.records().read(|tx| tx.decisions())?;
        let made = decisions.into_iter().filter(|decision| !is_open(decision) && wanted(decision));
        reports.extend(made.map(to_report));
        Ok(reports)
    }

    /// For how many layers it isn't known yet which image they belong to.
    pub fn looking(&self) -> usize {
        self.decider.looking()
    }
}

/// `decision` has the image's names and no layers.
fn open_report(open: &Undecided, decision: Decision) -> ImageReport {
    let layers =
        open.image.found.layers.iter().zip(open.standings()).map(|(layer, standing)| ImageLayerReport {
            diff_id: layer.diff_id.to_string(),
            blob: layer.blob.to_string(),
            size: layer.size,
            lazy: standing.lazy,
            reason: standing.reason,
        });
    ImageReport { decided: None, layers: layers.collect(), ..to_report(decision) }
}

fn read_report(read: TracedRead, decision: &Decision) -> ReadReport {
    ReadReport {
        at_ms: read.at.as_secs_f64() * 1e3,
        waited_ms: read.waited.as_secs_f64() * 1e3,
        path: read.path,
        layer: decision.layers[read.layer].diff_id.to_string(),
        piece: read.piece.0,
        local: read.is_local,
        from: read.from.unwrap_or_default(),
    }
}

fn to_report(decision: Decision) -> ImageReport {
    let layers = decision.layers.into_iter().map(|layer| ImageLayerReport {
        diff_id: layer.diff_id.to_string(),
        blob: layer.blob.to_string(),
        size: layer.size,
        lazy: Some(layer.lazy),
        reason: layer.reason,
    });
    ImageReport {
        manifest: decision.image,
        config: decision.config,
        namespace: decision.namespace,
        names: decision.names,
        decided: Some(decision.decided_ns / 1_000_000_000),
        layers: layers.collect(),
    }
}
