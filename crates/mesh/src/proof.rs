//! What makes a map trustworthy: a seed's signature over cluster, layer, format and root hash.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use darter_identity::{Identity, IdentityError};
use darter_proto::v1::{MapStatement, Proof};
use darter_types::{LayerSource, LayerTask, Role, RootHash};
use prost::Message;

use crate::note::Note;

/// What is signed begins with this, so that nothing else that a seed may ever sign can stand in for a map's statement.
const CONTEXT: &[u8] = b"darter map statement v1\0";

/// How far ahead of ours a seed's clock may be.
const SKEW_MAX: Duration = Duration::from_secs(300);

/// Why a map is not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProofError {
    #[error("nobody vouches for the map")]
    Missing,
    #[error("the map's statement can't be read")]
    Statement,
    #[error("the map's statement is about another {0}")]
    Other(&'static str),
    #[error("the map was signed in the future: check the clocks")]
    Future,
    #[error("{0} signed the map, which only a seed may")]
    NoSeed(String),
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

fn signed_bytes(statement: &[u8]) -> Vec<u8> {
    [CONTEXT, statement].concat()
}

/// This seed's word that `root` is the map of `task`, made of `source`, which is public or not.
pub(crate) fn sign(
    identity: &Identity,
    task: LayerTask,
    root: RootHash,
    source: &LayerSource,
    is_public: bool,
) -> Proof {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let statement = MapStatement {
        cluster: identity.member().cluster.to_string(),
        diff_id: task.diff_id.as_bytes().to_vec(),
        format: task.format,
        root: root.as_bytes().to_vec(),
        signed_at: now.as_secs(),
        repository: source.repository.to_string(),
        blob: source.blob.as_bytes().to_vec(),
        public: is_public,
    }
    .encode_to_vec();
    let (signature, chain) = identity.sign_with_chain(&signed_bytes(&statement));
    Proof { statement, signature, chain }
}

/// What a seed says with its signature.
#[derive(Debug)]
pub(crate) struct Word {
    /// Its name.
    pub seed: String,
    /// Who may read the layer, by what it saw when it made the map.
    pub note: Note,
}

/// The word of the seed that vouches for `root` as the map of `task`.
pub(crate) fn verify(
    identity: &Identity,
    task: LayerTask,
    root: RootHash,
    proof: Option<&Proof>,
) -> Result<Word, ProofError> {
    let proof = proof.filter(|proof| !proof.signature.is_empty()).ok_or(ProofError::Missing)?;
    let statement = MapStatement::decode(proof.statement.as_slice()).map_err(|_| ProofError::Statement)?;
    let at = UNIX_EPOCH.checked_add(Duration::from_secs(statement.signed_at)).ok_or(ProofError::Future)?;
    if at > SystemTime::now() + SKEW_MAX {
        return Err(ProofError::Future);
    }
    check("cluster", statement.cluster == identity.member().cluster.as_str())?;
    check("layer", statement.diff_id == task.diff_id.as_bytes())?;
    check("format", statement.format == task.format)?;
    check("map", statement.root == root.as_bytes())?;
    let signer =
        identity.verify_signed(&signed_bytes(&proof.statement), &proof.signature, &proof.chain, at)?;
    if signer.role != Role::Seed {
        return Err(ProofError::NoSeed(signer.to_string()));
    }
    Ok(Word { seed: signer.node.to_string(), note: Note::signed(&statement) })
}

fn check(what: &'static str, same: bool) -> Result<(), ProofError> {
    if same { Ok(()) } else { Err(ProofError::Other(what)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use darter_identity::{Authority, Member};
    use darter_types::{DiffId, Digest};

    const LIFE: Duration = Duration::from_secs(3600);

    fn identity(authority: &Authority, role: &str) -> Identity {
        let member: Member = format!("spiffe://darter/here/{role}/one").parse().unwrap();
        Identity::issued_by(authority, &member, LIFE).unwrap()
    }

    fn authority() -> Authority {
        darter_daemon::run::install_tls_provider();
        Authority::create("here".parse().unwrap()).unwrap()
    }

    fn source() -> LayerSource {
        let blob = darter_types::BlobDigest(Digest::of(b"blob"));
        LayerSource { repository: "https://registry.example/a".parse().unwrap(), blob, size: 1 }
    }

    fn task(name: &[u8]) -> LayerTask {
        LayerTask::current(DiffId(Digest::of(name)))
    }

    const ROOT: RootHash = RootHash::from_bytes([5; 32]);

    #[test]
    fn seeds_word_holds_for_that_map_of_that_layer_only() {
        let authority = authority();
        let (seed, node) = (identity(&authority, "seed"), identity(&authority, "node"));
        let proof = sign(&seed, task(b"a"), ROOT, &source(), false);
        let word = verify(&node, task(b"a"), ROOT, Some(&proof)).unwrap();
        assert_eq!(word.seed, "one");
        assert!(word.note.allows("https://registry.example/a") && word.note.knows_blob(&source().blob));
        assert!(!word.note.allows("https://registry.example/b"));
        assert!(matches!(verify(&node, task(b"b"), ROOT, Some(&proof)), Err(ProofError::Other("layer"))));
        let other = RootHash::from_bytes([6; 32]);
        assert!(matches!(verify(&node, task(b"a"), other, Some(&proof)), Err(ProofError::Other("map"))));
        assert!(matches!(verify(&node, task(b"a"), ROOT, None), Err(ProofError::Missing)));
    }

    #[test]
    fn node_can_not_vouch() {
        let authority = authority();
        let node = identity(&authority, "node");
        let proof = sign(&node, task(b"a"), ROOT, &source(), false);
        assert!(matches!(verify(&node, task(b"a"), ROOT, Some(&proof)), Err(ProofError::NoSeed(_))));
    }

    #[test]
    fn seed_of_another_ca_or_a_changed_statement_is_refused() {
        let (ours, theirs) = (authority(), authority());
        let node = identity(&ours, "node");
        let proof = sign(&identity(&theirs, "seed"), task(b"a"), ROOT, &source(), false);
        assert!(matches!(verify(&node, task(b"a"), ROOT, Some(&proof)), Err(ProofError::Identity(_))));
        let mut proof = sign(&identity(&ours, "seed"), task(b"a"), ROOT, &source(), false);
        let mut statement = MapStatement::decode(proof.statement.as_slice()).unwrap();
        statement.root = vec![6; 32];
        proof.statement = statement.encode_to_vec();
        let other = RootHash::from_bytes([6; 32]);
        assert!(matches!(verify(&node, task(b"a"), other, Some(&proof)), Err(ProofError::Identity(_))));
    }
}
