//! Who may have a layer that is here: whoever names a repository that was seen to hold it. Another repository shows that it
//! holds the blob, with the credentials of whoever names it; that is found out once for all who ask at the same time.
//!
//! Neither a digest nor a diff ID opens anything: anybody can write them into a manifest.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use darter_registry::Credential;
use darter_types::{LayerSource, LayerTask, Repository};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::layer::LayerRequest;
use crate::make::{self, Fault, Faults};
use crate::shared::Shared;
use crate::shelf::Shelved;

/// Repositories that are showing that they hold a layer.
#[derive(Default)]
pub(crate) struct Proving(Mutex<HashMap<(LayerTask, Repository), Weak<Semaphore>>>);

impl Proving {
    /// Lets one at a time prove that this repository holds the layer.
    fn turn(&self, task: LayerTask, repository: &Repository) -> Arc<Semaphore> {
        let mut proving = self.0.lock();
        let key = (task, repository.clone());
        if let Some(turn) = proving.get(&key).and_then(Weak::upgrade) {
            return turn;
        }
        proving.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::new(Semaphore::new(1));
        proving.insert(key, Arc::downgrade(&turn));
        turn
    }
}

/// What to do about a blob of which nobody has shown that it gives the layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unknown {
    /// Seeds do so for others: it is read once, and both digests are checked.
    Read,
    Refuse,
}

/// Whether an image that names these sources may have what is here, by what is known already.
pub(crate) fn is_open(shelved: Option<&Shelved>, sources: &[LayerSource]) -> bool {
    let note = shelved.map(Shelved::note).unwrap_or_default();
    sources.iter().any(|source| note.has_seen(&source.repository.to_string()))
}

/// Sees to it that this source's repository has shown that it holds the layer; that is written down.
pub(crate) async fn prove(
    shared: &Arc<Shared>,
    shelved: &Shelved,
    task: LayerTask,
    source: &LayerSource,
    credential: Option<&Credential>,
    unknown: Unknown,
) -> Result<(), Fault> {
    let turn = shared.proving.turn(task, &source.repository);
    let _turn = turn.acquire().await.expect("the semaphore is never closed");
    // Somebody else may have shown it while we waited for our turn.
    if shelved.allows(&source.repository.to_string()) {
        return Ok(());
    }
    // A registry of which nothing was ever read may say that it has every blob there is.
    let note = shelved.note();
    let is_known = note.knows_blob(&source.blob) && note.knows_registry(&source.repository.registry);
    match unknown {
        _ if is_known => holds(shared, source, credential).await?,
        Unknown::Read => make::verify_blob(shared, task, source, credential).await?,
        Unknown::Refuse => {
            let words = "the image's repository has not shown that it holds the layer";
            return Err(Fault::Impossible(words.to_owned()));
        }
    }
    // That a registry says it has the blob counts for that repository; only who was given every byte knows more.
    let is_public = !is_known && credential.is_none() && shared.origin.asks_as_anybody(&source.repository);
    let (owner, source) = (shared.clone(), source.clone());
    let change = move || {
        owner.shelf.change_note(&owner.store, task, |note| {
            note.streamed(&source);
            note.prove(&source.repository, is_public);
        });
    };
    shared.work.run(change).await;
    Ok(())
}

async fn holds(shared: &Shared, source: &LayerSource, credential: Option<&Credential>) -> Result<(), Fault> {
    match shared.origin.size(source, credential).await? {
        Some(size) if source.size > 0 && size != source.size => {
            let LayerSource { repository, blob, size: said } = source;
            Err(Fault::Impossible(format!("{blob} has {size} bytes in {repository}, not {said}")))
        }
        _ => Ok(()),
    }
}

/// Asks the repositories of an image for a layer whose map is here, all at the same time, until one has shown that it holds it.
pub(crate) async fn admit(
    shared: &Arc<Shared>,
    shelved: &Shelved,
    requests: &[LayerRequest],
) -> Result<(), Fault> {
    let each = |request: &LayerRequest| {
        let claim = request.clone();
        request
            .sources
            .clone()
            .into_iter()
            .map(move |source| (claim.task, claim.credential_for(&source), source))
    };
    let mut asked: FuturesUnordered<_> = requests
        .iter()
        .flat_map(each)
        .map(|(task, credential, source)| async move {
            let refuse = Unknown::Refuse;
            let shown = prove(shared, shelved, task, &source, credential.as_ref(), refuse).await;
            (source, shown)
        })
        .collect();
    let mut faults = Faults::default();
    while let Some((source, shown)) = asked.next().await {
        match shown {
            Ok(()) => return Ok(()),
            Err(fault) => faults.add(shared, &source, fault),
        }
    }
    Err(faults.last_word())
}
