//! Credentials of an open layer that a registry doesn't take any more: whoever knows credentials is asked again.
//!
//! A layer may be open for as long as a container runs, and the token that it was opened with lives for some hours.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use darter_registry::Credential;
use darter_types::{LayerSource, Registry};
use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio::time::timeout;

use super::LayerRequest;
use super::open::Open;
use crate::make::{self, Fault, Wish};
use crate::shared::Shared;

/// Before it is asked again for a registry that goes on refusing a layer's credentials.
const RENEW_EVERY: Duration = Duration::from_secs(60);

/// How long all that is asked for one read, or one image, may take to answer: a container may wait for that.
const RENEW_PATIENCE: Duration = if cfg!(test) { Duration::from_secs(1) } else { Duration::from_secs(15) };

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

/// Somebody asks about a registry, so nobody else does. One that is cut off before its answer counts as never asked.
struct Question<'a> {
    renewals: &'a Renewals,
    registry: &'a Registry,
    is_answered: bool,
}

impl Renewals {
    /// A question about this registry, if it is time for one.
    fn begin<'a>(&'a self, registry: &'a Registry) -> Option<Question<'a>> {
        let mut asked = self.0.lock();
        asked.retain(|_, at| at.elapsed() < RENEW_EVERY);
        if asked.contains_key(registry) {
            return None;
        }
        asked.insert(registry.clone(), Instant::now());
        Some(Question { renewals: self, registry, is_answered: false })
    }
}

impl Question<'_> {
    fn answered(mut self) {
        self.is_answered = true;
    }
}

impl Drop for Question<'_> {
    fn drop(&mut self) {
        if !self.is_answered {
            self.renewals.0.lock().remove(self.registry);
        }
    }
}

impl Open {
    /// The wish with the credentials that are known by now, since one of its registries took none of those that it has. `None` if
    /// these are the same.
    pub(super) async fn renewed(&self, wish: &Wish) -> Option<Wish> {
        let parts = wish.by_registry();
        // All at the same time: none is to use up the patience for the others. What was found by then counts.
        let _ = timeout(RENEW_PATIENCE, join_all(parts.iter().map(|part| self.renew(part)))).await;
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
        if self.wish().credential_for(first) != refused {
            return;
        }
        let Some(question) = self.renewals.begin(registry) else { return };
        let found = ask(&self.shared, &wish.sources, refused).await;
        if let Some(found) = found {
            self.replace_credential(registry, refused, found);
        }
        question.answered();
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
            Fault::Impossible(_) | Fault::Absent(_) => false,
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
    let mut renewed = requests.to_vec();
    let all = join_all(renewed.iter_mut().map(|request| renew_request(shared, request)));
    // What was found by then counts.
    let _ = timeout(RENEW_PATIENCE, all).await;
    let is_news = renewed.iter().zip(requests).any(|(now, before)| now.credential != before.credential);
    is_news.then_some(renewed)
}

async fn renew_request(shared: &Shared, request: &mut LayerRequest) {
    let Some(first) = request.sources.first() else { return };
    let found = ask(shared, std::slice::from_ref(first), request.credential.as_ref()).await;
    if let Some(found) = found {
        request.credential = found;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_registry_is_asked_about_once_in_a_while() {
        let renewals = Renewals::default();
        let [one, other] = ["https://one.example/a", "https://other.example/a"]
            .map(|text| text.parse::<darter_types::Repository>().unwrap().registry);
        let question = renewals.begin(&one).unwrap();
        assert!(
            renewals.begin(&one).is_none() && renewals.begin(&other).is_some(),
            "one is being asked about"
        );
        question.answered();
        assert!(renewals.begin(&one).is_none());
        let long_ago = Instant::now().checked_sub(RENEW_EVERY).expect("this machine runs for a minute");
        renewals.0.lock().insert(one.clone(), long_ago);
        drop(renewals.begin(&one).expect("it is time again"));
        assert!(renewals.begin(&one).is_some(), "the last question was never answered");
    }
}
