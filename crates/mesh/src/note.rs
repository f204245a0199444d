//! What a peer notes beside a map: who may read the layer, and what the peer itself has checked.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{SystemTime, UNIX_EPOCH};

use darter_proto::v1::{Access, MapStatement};
use darter_types::{BlobDigest, Digest, LayerSource, Registry, Repository};
use serde::{Deserialize, Serialize};

/// A proof that a repository holds the blob, or that anybody may read it, counts for so long.
const PROOF_SECONDS: u64 = 24 * 3600;

/// How long what an order has brought goes after all else that may go.
const PREHEATED_SECONDS: u64 = 24 * 3600;

/// Repositories remembered of one layer. One more takes the place of the oldest.
const REPOSITORIES_MAX: usize = 1024;

/// Blobs remembered of one layer: as many as there are compressions of it that somebody pulls.
const BLOBS_MAX: usize = 64;

/// Seconds since the epoch.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// It rests in the store as JSON. One that can't be read is as good as none: it opens nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Note {
    /// When the blob was last read without credentials.
    public_at: Option<u64>,
    /// When each repository was last seen to hold the blob.
    repositories: BTreeMap<String, u64>,
    /// Blobs that were streamed to this diff ID by a seed.
    blobs: BTreeSet<String>,
    /// Whether this peer read the whole layer itself and found its diff ID.
    pub verified: bool,
    /// When an order to preheat had last brought all of it. Others aren't told.
    preheated_at: Option<u64>,
}

impl Note {
    pub(crate) fn decode(bytes: &[u8]) -> Self {
        serde_json::from_slice(bytes).unwrap_or_default()
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a note is plain data")
    }

    /// What the peer that gave us the map says, as of now.
    pub(crate) fn from_wire(access: Option<&Access>) -> Self {
        let mut note = Self::default();
        let Some(access) = access else { return note };
        let at = |age: u64| now().saturating_sub(age);
        note.public_at = access.public.then(|| at(access.public_age));
        let ages = access.ages.iter().copied().chain(std::iter::repeat(0));
        let repositories = access.repositories.iter().zip(ages);
        let repositories = repositories.filter(|(name, _)| name.parse::<Repository>().is_ok());
        note.repositories =
            repositories.take(REPOSITORIES_MAX).map(|(name, age)| (name.clone(), at(age))).collect();
        let blobs = access.blobs.iter().filter_map(|blob| BlobDigest::from_slice(blob).ok());
        note.blobs = blobs.take(BLOBS_MAX).map(|blob| blob.to_string()).collect();
        note
    }

    /// What a seed signed together with the map; nothing once that is too old.
    pub(crate) fn signed(statement: &MapStatement) -> Self {
        let mut note = Self::default();
        let at = statement.signed_at;
        let repository = statement.repository.parse::<Repository>();
        if let (Ok(repository), Ok(blob)) = (repository, BlobDigest::from_slice(&statement.blob))
            && is_fresh(at)
        {
            note.public_at = statement.public.then_some(at);
            note.repositories.insert(repository.to_string(), at);
            note.blobs.insert(blob.to_string());
        }
        note
    }

    /// What of this counts on the word of a plain node: that it lets in repositories which we have named ourselves. What it
    /// says of others, we would keep and pass on beyond its time.
    pub(crate) fn about(&self, sources: &[LayerSource]) -> Self {
        let mut note = Self::default();
        for LayerSource { repository, blob, .. } in sources {
            let (name, blob) = (repository.to_string(), blob.to_string());
            if self.allows(&name) {
                let at = self.repositories.get(&name).copied().max(self.public_at);
                note.repositories.insert(name, at.unwrap_or_default());
                note.blobs.extend(self.blobs.get(&blob).cloned());
            }
        }
        note
    }

    /// Only what still counts.
    pub(crate) fn to_wire(&self) -> Access {
        let digest = |blob: &String| blob.parse::<Digest>().map(|digest| digest.as_bytes().to_vec()).ok();
        let age = |at: u64| now().saturating_sub(at);
        let fresh = self.repositories.iter().filter(|(_, at)| is_fresh(**at));
        let (repositories, ages) = fresh.map(|(name, at)| (name.clone(), age(*at))).unzip();
        Access {
            public: self.is_public(),
            public_age: self.public_at.filter(|_| self.is_public()).map_or(0, age),
            repositories,
            ages,
            blobs: self.blobs.iter().filter_map(digest).collect(),
        }
    }

    /// An order has all of the layer here now.
    pub(crate) fn preheated(&mut self) {
        self.preheated_at = Some(now());
    }

    /// Whether it is here for an order of the last day.
    pub(crate) fn is_preheated(&self) -> bool {
        // A clock that was ahead must not make it longer.
        let is_recent = |at: u64| at <= now() + 3600 && now() < at.saturating_add(PREHEATED_SECONDS);
        self.preheated_at.is_some_and(is_recent)
    }

    fn is_public(&self) -> bool {
        self.public_at.is_some_and(is_fresh)
    }

    /// Whether a peer whose containerd read `repository` may have the layer.
    pub(crate) fn allows(&self, repository: &str) -> bool {
        self.is_public() || self.repositories.get(repository).copied().is_some_and(is_fresh)
    }

    /// Whether the layer was public, or this repository held it, however long ago: for what is on this peer's own disk.
    pub(crate) fn has_seen(&self, repository: &str) -> bool {
        self.public_at.is_some() || self.repositories.contains_key(repository)
    }

    /// Nothing is known of who may read, as after its file was damaged.
    pub(crate) fn is_empty(&self) -> bool {
        self.public_at.is_none() && self.repositories.is_empty() && self.blobs.is_empty()
    }

    /// Whether a seed has streamed this blob to this diff ID.
    pub(crate) fn knows_blob(&self, blob: &BlobDigest) -> bool {
        self.blobs.contains(&blob.to_string())
    }

    /// Whether a repository of this registry was seen to hold the layer: others' word that they have a blob says nothing.
    pub(crate) fn knows_registry(&self, registry: &Registry) -> bool {
        let prefix = format!("{registry}/");
        self.repositories.keys().any(|repository| repository.starts_with(&prefix))
    }

    /// The repository was seen to hold the blob, a moment ago.
    pub(crate) fn prove(&mut self, repository: &Repository, is_public: bool) {
        if is_public {
            self.public_at = Some(now());
        }
        self.repositories.insert(repository.to_string(), now());
        if self.repositories.len() > REPOSITORIES_MAX {
            let oldest = self.repositories.iter().min_by_key(|(_, at)| **at).map(|(name, _)| name.clone());
            self.repositories.remove(&oldest.expect("there are many"));
        }
    }

    /// The blob was streamed to this diff ID.
    pub(crate) fn streamed(&mut self, source: &LayerSource) {
        if self.blobs.len() < BLOBS_MAX {
            self.blobs.insert(source.blob.to_string());
        }
    }

    /// Adds what another note of the same layer says.
    pub(crate) fn merge(&mut self, other: &Note) {
        self.public_at = self.public_at.max(other.public_at);
        for (name, at) in &other.repositories {
            let known = self.repositories.entry(name.clone()).or_default();
            *known = (*known).max(*at);
        }
        self.blobs.extend(other.blobs.iter().take(BLOBS_MAX).cloned());
        self.verified |= other.verified;
        self.preheated_at = self.preheated_at.max(other.preheated_at);
    }
}

fn is_fresh(at: u64) -> bool {
    now() < at.saturating_add(PROOF_SECONDS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository(name: &str) -> Repository {
        format!("https://registry.example/{name}").parse().unwrap()
    }

    #[test]
    fn only_proven_repositories_open_a_private_layer() {
        let mut note = Note::default();
        note.prove(&repository("team/app"), false);
        assert!(note.allows("https://registry.example/team/app"));
        assert!(!note.allows("https://registry.example/team/other"));
        assert!(!note.allows("http://registry.example/team/app"), "another scheme is another repository");
        note.prove(&repository("library/base"), true);
        assert!(note.allows("https://registry.example/team/other"));
    }

    #[test]
    fn proofs_age() {
        let mut note = Note::default();
        note.prove(&repository("a"), true);
        note.public_at = Some(now() - PROOF_SECONDS);
        note.repositories.insert(repository("a").to_string(), now() - PROOF_SECONDS);
        assert!(!note.allows(&repository("a").to_string()));
        assert!(note.has_seen(&repository("a").to_string()), "it is on the disk already");
        assert_eq!(note.to_wire(), Access::default());
    }

    #[test]
    fn a_proof_grows_no_younger_on_its_way() {
        let mut note = Note::default();
        note.prove(&repository("a"), true);
        let nearly = now() - PROOF_SECONDS + 60;
        (note.public_at, note.repositories) = (Some(nearly), [(repository("a").to_string(), nearly)].into());
        let relayed = Note::from_wire(Some(&Note::from_wire(Some(&note.to_wire())).to_wire()));
        assert!(relayed.allows(&repository("a").to_string()));
        assert!(
            relayed.public_at.unwrap() <= nearly + 5
                && relayed.repositories.values().all(|at| *at <= nearly + 5)
        );
    }

    #[test]
    fn a_nodes_word_counts_for_what_was_named_to_it_and_makes_nothing_public() {
        let source = |name: &str, blob: &[u8]| {
            let blob = BlobDigest(Digest::of(blob));
            LayerSource { repository: repository(name), blob, size: 1 }
        };
        let (ours, other) = (source("ours", b"a"), source("other", b"b"));
        let mut note = Note::default();
        note.prove(&repository("x"), true);
        note.streamed(&ours);
        note.streamed(&other);
        let kept = note.about(std::slice::from_ref(&ours));
        assert!(kept.allows(&ours.repository.to_string()) && kept.knows_blob(&ours.blob));
        assert!(!kept.has_seen(&other.repository.to_string()) && !kept.knows_blob(&other.blob));
        assert!(!kept.has_seen(&repository("x").to_string()) && !kept.is_public());
        assert!(note.about(&[]).is_empty());
    }

    #[test]
    fn what_was_preheated_counts_as_such_for_a_day_and_on_this_peer_only() {
        let mut note = Note::default();
        note.preheated();
        assert!(Note::decode(&note.encode()).is_preheated());
        assert!(!Note::from_wire(Some(&note.to_wire())).is_preheated());
        for then in [now() - PREHEATED_SECONDS, now() + PREHEATED_SECONDS, u64::MAX] {
            note.preheated_at = Some(then);
            assert!(!note.is_preheated(), "{then}");
        }
    }

    #[test]
    fn note_survives_disk_and_wire_and_rubbish_opens_nothing() {
        let mut note = Note::default();
        note.prove(&repository("a"), false);
        let blob = BlobDigest(Digest::of(b"blob"));
        note.streamed(&LayerSource { repository: repository("a"), blob, size: 1 });
        assert_eq!(Note::decode(&note.encode()), note);
        let relayed = Note::from_wire(Some(&note.to_wire()));
        assert!(relayed.allows(&repository("a").to_string()) && relayed.knows_blob(&blob));
        assert_eq!(Note::decode(b"{\"public_at\": \"yes\"}"), Note::default());
    }
}
