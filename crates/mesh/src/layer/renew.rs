//! Credentials of an open layer that a registry doesn't take any more: whoever knows credentials is asked again.
//!
//! A layer may be open for as long as a container runs, and the token that it was opened with lives for some hours.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use darter_registry::Credential;
use darter_types::{LayerSource, Registry};
use parking_lot::Mutex;
use tokio::time::timeout;

use super::LayerRequest;
use super::open::Open;
use crate::make::{self, Fault, Wish};
use crate::shared::Shared;

/// Before it is asked again for a registry that goes on refusing a layer's credentials.
const RENEW_EVERY: Duration = Duration::from_secs(60);

/// How long all that is asked for one read may take to answer: a container may wait for that.
const RENEW_PATIENCE: Duration = Duration::from_secs(15);

/// Whoever knows the credentials of repositories.
#[async_trait]
pub trait Renew: Send + Sync {
    /// What the source's repository is to be read with, now that somebody says that a registry has refused `refused`
    /// (`None`: a request without a credential). `None`: nothing is known.
    async fn renew(&self, source: &LayerSource, refused: Option<Credential>) -> Option<Credential>;
}

/// When a layer's registries were last asked about.
#[derive(Default)]
pub(super) struct Renewals(Mutex<HashMap<Registry, Instant>>);

impl Renewals {
    /// Whether it is time to ask about this registry; then it counts as done.
    fn is_due(&self, registry: &Registry) -> bool {
        let mut asked = self.0.lock();
        asked.retain(|_, at| at.elapsed() < RENEW_EVERY);
        let is_due = !asked.contains_key(registry);
        asked.entry(registry.clone()).or_insert_with(Instant::now);
        is_due
    }
}

impl Open {
    /// The wish with the credentials that are known by now, since one of its registries took none of those that it has. `None` if
    /// these are the same.
    pub(super) async fn renewed(&self, wish: &Wish) -> Option<Wish> {
        let all = async {
            for part in wish.by_registry() {
                self.renew(&part).await;
            }
        };
        // What was found by then counts.
        let _ = timeout(RENEW_PATIENCE, all).await;
        let now = self.wish();
        let differs = |source: &LayerSource| now.credential_for(source) != wish.credential_for(source);
        let is_news = wish.sources.iter().any(differs);
        is_news.then(|| Wish { credentials: now.credentials, ..wish.clone() })
    }

    /// `wish` is of one registry.
    async fn renew(&self, wish: &Wish) {
        let Some(first) = wish.sources.first() else { return };
        let (registry, refused) = (&first.repository.registry, wish.credential_for(first));
        // Another one may be known already.
        if self.wish().credential_for(first) != refused || !self.renewals.is_due(registry) {
            return;
        }
        if let Some(found) = ask(&self.shared, &wish.sources, refused).await {
            self.replace_credential(registry, refused, found);
        }
    }

    /// Has the layer made here, at need with other credentials.
    pub(super) async fn make_here(&self, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<(), Fault> {
        let wish = self.wish();
        let fault = match make::make(&self.shared, &wish, progress).await {
            Ok(()) => return Ok(()),
            Err(fault) => fault,
        };
        let may_be_refused = match &fault {
            Fault::Denied(_) => true,
            // A source that is away hides that another one has refused.
            Fault::Failed(_) => wish.sources.len() > 1,
            Fault::Impossible(_) => false,
        };
        if !may_be_refused {
            return Err(fault);
        }
        match self.renewed(&wish).await {
            Some(wish) => make::make(&self.shared, &wish, progress).await,
            None => Err(fault),
        }
    }
}

/// The first credential for one of these repositories that isn't the one that was refused, else none: `Some(None)`. `None` if
/// nobody knows any other.
async fn ask(
    shared: &Shared,
    sources: &[LayerSource],
    refused: Option<&Credential>,
) -> Option<Option<Credential>> {
    let renewal = shared.renewal.get()?;
    let mut is_refused_one = false;
    for source in sources {
        let found = renewal.renew(source, refused.cloned()).await;
        is_refused_one |= found.as_ref() == refused;
        if found.is_some() && found.as_ref() != refused {
            return Some(found);
        }
    }
    (!is_refused_one).then_some(None)
}

/// The requests with what else is known, or `None`. One image's right is not lent to another: only its own repositories count.
pub(super) async fn renewed_requests(
    shared: &Shared,
    requests: &[LayerRequest],
) -> Option<Vec<LayerRequest>> {
    let (mut renewed, mut is_news) = (requests.to_vec(), false);
    for request in &mut renewed {
        let first = request.sources.get(..1).unwrap_or_default();
        let asked = timeout(RENEW_PATIENCE, ask(shared, first, request.credential.as_ref()));
        if let (false, Ok(Some(found))) = (first.is_empty(), asked.await) {
            request.credential = found;
            is_news = true;
        }
    }
    is_news.then_some(renewed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_registry_is_asked_about_once_in_a_while() {
        let renewals = Renewals::default();
        let [one, other] = ["https://one.example/a", "https://other.example/a"]
            .map(|text| text.parse::<darter_types::Repository>().unwrap().registry);
        assert!(renewals.is_due(&one) && !renewals.is_due(&one) && renewals.is_due(&other));
        let long_ago = Instant::now().checked_sub(RENEW_EVERY).expect("this machine runs for a minute");
        renewals.0.lock().insert(one.clone(), long_ago);
        assert!(renewals.is_due(&one) && !renewals.is_due(&one));
    }
}
