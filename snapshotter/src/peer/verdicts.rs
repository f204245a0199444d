//! What registries say themselves of credentials that somebody says they refuse: one question for all who ask at a time, and its
//! answer for a while. The layers of an image are refused together, and each of them asks.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use darter_registry::Credential;
use darter_types::Repository;
use parking_lot::Mutex;
use tokio::sync::OnceCell;

/// Answers that are remembered; of more the oldest go.
const VERDICTS_MAX: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// 401.
    Refused,
    /// 403: it may be a missing right; some answer so to a token that has expired.
    Forbidden,
    LetIn,
    /// Nobody can say now.
    Unknown,
}

impl Verdict {
    /// How long it is remembered. What is refused is forgotten, and nobody asks again before it has been let in.
    fn lasts(self) -> Duration {
        match self {
            Verdict::Refused => Duration::ZERO,
            Verdict::Forbidden => Duration::from_secs(60),
            Verdict::LetIn | Verdict::Unknown => Duration::from_secs(5),
        }
    }
}

type Answer = Arc<OnceCell<(Verdict, Instant)>>;

#[derive(Default)]
pub(super) struct Verdicts(Mutex<VecDeque<(Repository, Credential, Answer)>>);

impl Verdicts {
    /// Has `ask` ask, unless somebody else does, or has a moment ago.
    pub async fn of<F: Future<Output = Verdict>>(
        &self,
        repository: &Repository,
        credential: &Credential,
        ask: impl FnOnce() -> F,
    ) -> Verdict {
        let answer = self.answer(repository, credential);
        let asked = answer.get_or_init(|| async { (ask().await, Instant::now()) });
        asked.await.0
    }

    fn answer(&self, repository: &Repository, credential: &Credential) -> Answer {
        let mut known = self.0.lock();
        known.retain(|(_, _, answer)| answer.get().is_none_or(|(said, at)| at.elapsed() < said.lasts()));
        let same = |one: &&(Repository, Credential, Answer)| (&one.0, &one.1) == (repository, credential);
        if let Some((_, _, answer)) = known.iter().find(same) {
            return answer.clone();
        }
        if known.len() >= VERDICTS_MAX {
            known.pop_front();
        }
        let answer = Answer::default();
        known.push_back((repository.clone(), credential.clone(), answer.clone()));
        answer
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use futures_util::future::join_all;

    use super::*;

    #[tokio::test]
    async fn one_asks_for_all_and_each_credential_of_each_repository_by_itself() {
        let (verdicts, asked) = (&Verdicts::default(), &Cell::new(0));
        let named = |name| format!("https://r.example/{name}").parse::<Repository>().unwrap();
        let [app, other] = ["app", "other"].map(named);
        let [one, two] = ["me:one", "me:two"].map(|text| Credential::from_user(text).unwrap());
        let of = |repository, credential, verdict| {
            let ask = move || async move {
                asked.set(asked.get() + 1);
                tokio::task::yield_now().await;
                verdict
            };
            verdicts.of(repository, credential, ask)
        };
        let said = join_all((0..5).map(|_| of(&app, &one, Verdict::Forbidden))).await;
        assert_eq!((said, asked.get()), (vec![Verdict::Forbidden; 5], 1));
        assert_eq!(of(&app, &two, Verdict::Refused).await, Verdict::Refused);
        assert_eq!(of(&other, &one, Verdict::Unknown).await, Verdict::Unknown);
        assert_eq!(asked.get(), 3);
        assert_eq!(of(&app, &one, Verdict::Unknown).await, Verdict::Forbidden);
        assert_eq!(of(&app, &two, Verdict::Unknown).await, Verdict::Unknown, "it may have been let in since");
        assert_eq!(asked.get(), 4);
    }

    #[tokio::test]
    async fn no_more_are_remembered_than_there_may_be() {
        let (verdicts, one) = (Verdicts::default(), Credential::from_user("me:one").unwrap());
        for number in 0..2 * VERDICTS_MAX {
            let repository = format!("https://r.example/app-{number}").parse().unwrap();
            verdicts.of(&repository, &one, || async { Verdict::Forbidden }).await;
        }
        assert_eq!(verdicts.0.lock().len(), VERDICTS_MAX);
    }
}
