//! A preheat order: some images, at one seed or at several. It is as far as its parts are.

use std::collections::BTreeSet;

use darter_types::NodeName;
use serde::{Deserialize, Serialize};

use super::job::{Part, State};
use super::seeds;

/// Images of one order.
pub(crate) const IMAGES_MAX: usize = 64;

/// Seeds that one order lists.
pub(crate) const LISTED_MAX: usize = 100;

/// Parts of one order: images times seeds.
pub(crate) const PARTS_MAX: usize = 1_000;

/// Of an order that says nothing of it, and the longest, in seconds.
pub(crate) const TIMEOUT_DEFAULT: u64 = 3_600;
pub(crate) const TIMEOUT_MAX: u64 = 24 * 3_600;

/// Longer than any reference that registries take.
const IMAGE_MAX: usize = 512;
const PLATFORM_MAX: usize = 64;

/// What a platform may be instead of one: all that an index has.
pub(crate) const ALL_PLATFORMS: &str = "all";

/// Who is to have the images.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Scope {
    /// One seed, which all others take them from: for each image the one that the manager chooses.
    #[default]
    OneSeed,
    /// All seeds that attend when the order is taken.
    AllSeeds,
    /// So many of these in a hundred, rounded up; 1 to 100.
    Percent(u8),
    /// So many of these, or all if there are fewer.
    Count(u32),
    /// These seeds, attending or not.
    Seeds(Vec<String>),
    AllNodes,
    Nodes(Vec<String>),
}

/// Why an order can't be taken. What is not a mistake in the order itself says so by [`is_conflict`](Self::is_conflict).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OrderError {
    #[error("an image must be a reference such as registry.example/team/app:1.0, not {0:?}")]
    Image(String),
    #[error("name 1 to {IMAGES_MAX} images")]
    Images,
    #[error("platform must be os/architecture, for example linux/amd64, or all")]
    Platform,
    #[error("timeout_seconds must be 1 to {TIMEOUT_MAX}")]
    Timeout,
    #[error("scope: percent must be 1 to 100, count 1 at least, and seeds 1 to {LISTED_MAX} names")]
    Scope,
    #[error(
        "scope: nodes can't be targets yet. Preheat seeds (one-seed, all-seeds): nodes then take every layer from \
         them, and the registry is not asked"
    )]
    Nodes,
    #[error("scope: no seed attends this manager now")]
    NoSeed,
    #[error("scope: no seed {0:?} has joined this cluster")]
    UnknownSeed(String),
    #[error("{0} images times seeds are too many for one order: it may have {PARTS_MAX}")]
    TooLarge(usize),
}

impl OrderError {
    /// The order is well-formed, but the cluster is not as it says.
    pub(crate) fn is_conflict(&self) -> bool {
        matches!(self, OrderError::NoSeed | OrderError::UnknownSeed(_) | OrderError::TooLarge(_))
    }
}

/// What is known of an order; the database has the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Preheat {
    pub(crate) id: String,
    /// `None`: the seed's own.
    pub(crate) platform: Option<String>,
    pub(crate) scope: Scope,
    pub(crate) timeout_seconds: u64,
    /// Whether it came with a credential, which only this process's memory has.
    pub(crate) private: bool,
    pub(crate) state: State,
    pub(crate) error: Option<String>,
    /// Seconds since the epoch.
    pub(crate) created_at: u64,
    pub(crate) ended_at: Option<u64>,
    pub(crate) parts: Vec<Part>,
}

impl Preheat {
    /// The images, each once.
    pub(crate) fn images(&self) -> Vec<&str> {
        let mut seen = BTreeSet::new();
        self.parts.iter().map(|part| part.image.as_str()).filter(|image| seen.insert(*image)).collect()
    }

    pub(crate) fn ends_by(&self) -> u64 {
        self.created_at.saturating_add(self.timeout_seconds)
    }

    /// State and error are those of the parts.
    pub(crate) fn refold(&mut self, now: u64) {
        self.state = folded(&self.parts);
        self.error = words(&self.parts);
        self.ended_at = self.state.is_over().then(|| self.ended_at.unwrap_or(now));
    }
}

fn folded(parts: &[Part]) -> State {
    let any = |wanted: State| parts.iter().any(|part| part.state == wanted);
    if parts.iter().all(|part| part.state.is_over()) {
        let worst = [State::Cancelled, State::Failed].into_iter().find(|state| any(*state));
        return worst.unwrap_or(State::Succeeded);
    }
    if parts.iter().all(|part| part.state == State::Pending) { State::Pending } else { State::Running }
}

/// The first error; where there are several parts, with how many failed and which that was.
fn words(parts: &[Part]) -> Option<String> {
    if let [part] = parts {
        return part.error.clone();
    }
    let bad = |part: &&Part| part.state.is_over() && part.error.is_some();
    let first = parts.iter().find(bad)?;
    let at =
        first.seed.as_ref().or(first.pinned.as_ref()).map(|seed| format!(" at {seed}")).unwrap_or_default();
    let error = first.error.as_deref().unwrap_or_default();
    let (count, all) = (parts.iter().filter(bad).count(), parts.len());
    Some(format!("{count} of {all} failed; {}{at}: {error}", first.image))
}

pub(crate) fn checked_image(image: &str) -> Result<(), OrderError> {
    let part = |part: &str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._:@+[]-".contains(&b))
    };
    let first = image.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'[');
    if !first || image.len() > IMAGE_MAX || !image.split('/').all(part) {
        return Err(OrderError::Image(image.chars().take(80).collect()));
    }
    Ok(())
}

pub(crate) fn checked_platform(platform: &str) -> Result<(), OrderError> {
    let word = |part: &str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    };
    let parts: Vec<&str> = platform.split('/').collect();
    let shape = (2..=3).contains(&parts.len()) && parts.into_iter().all(word);
    if platform == ALL_PLATFORMS || shape && platform.len() <= PLATFORM_MAX {
        return Ok(());
    }
    Err(OrderError::Platform)
}

pub(crate) fn checked_timeout(seconds: Option<u64>) -> Result<u64, OrderError> {
    let seconds = seconds.unwrap_or(TIMEOUT_DEFAULT);
    if (1..=TIMEOUT_MAX).contains(&seconds) { Ok(seconds) } else { Err(OrderError::Timeout) }
}

/// The parts of an order for `images`, each once. `attending` are the seeds there now, `joined` all that ever joined.
pub(crate) fn parts(
    images: &[String],
    scope: &Scope,
    attending: &[NodeName],
    joined: &BTreeSet<NodeName>,
) -> Result<Vec<Part>, OrderError> {
    if images.is_empty() || images.len() > IMAGES_MAX {
        return Err(OrderError::Images);
    }
    images.iter().try_for_each(|image| checked_image(image))?;
    let mut seen = BTreeSet::new();
    let images: Vec<&String> = images.iter().filter(|image| seen.insert(*image)).collect();
    let mut parts = Vec::new();
    for image in images {
        let targets = targets(image, scope, attending, joined)?;
        parts.extend(targets.into_iter().map(|pinned| Part::new(image.clone(), pinned)));
    }
    if parts.len() > PARTS_MAX { Err(OrderError::TooLarge(parts.len())) } else { Ok(parts) }
}

fn targets(
    image: &str,
    scope: &Scope,
    attending: &[NodeName],
    joined: &BTreeSet<NodeName>,
) -> Result<Vec<Option<NodeName>>, OrderError> {
    let all = attending.len();
    let wanted = match scope {
        Scope::OneSeed => return Ok(vec![None]),
        Scope::Seeds(names) => return listed(names, joined),
        Scope::AllNodes | Scope::Nodes(_) => return Err(OrderError::Nodes),
        Scope::AllSeeds => all,
        Scope::Percent(share @ 1..=100) => (all * usize::from(*share)).div_ceil(100),
        Scope::Count(count @ 1..) => usize::try_from(*count).unwrap_or(all),
        Scope::Percent(_) | Scope::Count(_) => return Err(OrderError::Scope),
    };
    if attending.is_empty() {
        return Err(OrderError::NoSeed);
    }
    Ok(seeds::ranked(image, attending).into_iter().take(wanted).cloned().map(Some).collect())
}

fn listed(names: &[String], joined: &BTreeSet<NodeName>) -> Result<Vec<Option<NodeName>>, OrderError> {
    if names.is_empty() || names.len() > LISTED_MAX {
        return Err(OrderError::Scope);
    }
    let known = |name: &String| name.parse().ok().filter(|name| joined.contains(name));
    let nodes = names
        .iter()
        .map(|name| known(name).ok_or_else(|| OrderError::UnknownSeed(name.chars().take(64).collect())));
    let nodes: BTreeSet<NodeName> = nodes.collect::<Result<_, _>>()?;
    Ok(nodes.into_iter().map(Some).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(count: usize) -> Vec<NodeName> {
        (0..count).map(|i| format!("seed-{i}").parse().unwrap()).collect()
    }

    fn expand(scope: Scope, attending: usize) -> Result<Vec<Part>, OrderError> {
        let images = ["r.example/a:1", "r.example/b:1", "r.example/a:1"].map(str::to_owned);
        parts(&images, &scope, &names(attending), &names(9).into_iter().collect())
    }

    #[test]
    fn each_image_goes_once_to_each_target() {
        let pinned = |parts: Vec<Part>| parts.iter().filter(|part| part.pinned.is_some()).count();
        assert_eq!(expand(Scope::OneSeed, 0).unwrap().len(), 2);
        assert_eq!(pinned(expand(Scope::OneSeed, 3).unwrap()), 0);
        assert_eq!(pinned(expand(Scope::AllSeeds, 5).unwrap()), 10);
        assert_eq!(pinned(expand(Scope::Percent(30), 5).unwrap()), 4);
        assert_eq!(pinned(expand(Scope::Percent(1), 5).unwrap()), 2);
        assert_eq!(pinned(expand(Scope::Count(3), 5).unwrap()), 6);
        assert_eq!(pinned(expand(Scope::Count(u32::MAX), 5).unwrap()), 10);
        let twice = Scope::Seeds(vec!["seed-8".to_owned(), "seed-8".to_owned()]);
        assert_eq!(pinned(expand(twice, 1).unwrap()), 2);
    }

    #[test]
    fn order_that_nobody_can_take_is_refused_with_the_reason() {
        assert_eq!(expand(Scope::AllSeeds, 0), Err(OrderError::NoSeed));
        assert_eq!(expand(Scope::Percent(0), 1), Err(OrderError::Scope));
        assert_eq!(expand(Scope::Percent(101), 1), Err(OrderError::Scope));
        assert_eq!(expand(Scope::Count(0), 1), Err(OrderError::Scope));
        assert_eq!(expand(Scope::Seeds(vec![]), 1), Err(OrderError::Scope));
        assert_eq!(expand(Scope::AllNodes, 1), Err(OrderError::Nodes));
        let unknown = Scope::Seeds(vec!["seed-99".to_owned()]);
        assert!(expand(unknown, 1).unwrap_err().is_conflict());
        assert_eq!(expand(Scope::AllSeeds, 600), Err(OrderError::TooLarge(1200)));
    }

    #[test]
    fn scope_is_written_as_the_document_says() {
        for (text, scope) in [
            (r#""one-seed""#, Scope::OneSeed),
            (r#""all-seeds""#, Scope::AllSeeds),
            (r#"{"percent":25}"#, Scope::Percent(25)),
            (r#"{"count":2}"#, Scope::Count(2)),
            (r#"{"seeds":["a"]}"#, Scope::Seeds(vec!["a".to_owned()])),
        ] {
            assert_eq!(serde_json::from_str::<Scope>(text).unwrap(), scope);
            assert_eq!(serde_json::to_string(&scope).unwrap(), text);
        }
    }

    #[test]
    fn order_is_as_far_as_its_parts() {
        let with = |states: &[State]| {
            let parts = states.iter().map(|state| Part { state: *state, ..Part::new("i".to_owned(), None) });
            folded(&parts.collect::<Vec<_>>())
        };
        use State::{Cancelled, Failed, Pending, Running, Succeeded};
        assert_eq!(with(&[Pending, Pending]), Pending);
        assert_eq!(with(&[Pending, Succeeded]), Running);
        assert_eq!(with(&[Failed, Running]), Running);
        assert_eq!(with(&[Failed, Succeeded]), Failed);
        assert_eq!(with(&[Cancelled, Failed]), Cancelled);
        assert_eq!(with(&[Succeeded, Succeeded]), Succeeded);
    }

    #[test]
    fn error_names_image_and_seed_where_there_are_several() {
        let failed = Part {
            state: State::Failed,
            seed: Some("seed-1".parse().unwrap()),
            error: Some("404".to_owned()),
            ..Part::new("r.example/a".to_owned(), None)
        };
        assert_eq!(words(std::slice::from_ref(&failed)).as_deref(), Some("404"));
        let good = Part { state: State::Succeeded, ..Part::new("r.example/b".to_owned(), None) };
        assert_eq!(words(&[good, failed]).as_deref(), Some("1 of 2 failed; r.example/a at seed-1: 404"));
    }

    #[test]
    fn references_and_platforms_have_their_shapes() {
        for good in ["alpine", "r.example:5000/a/b_c:1", "[::1]:5000/a", "r.example/a@sha256:00"] {
            assert!(checked_image(good).is_ok(), "{good:?} was refused");
        }
        for bad in ["", "https://r.example/a", "/a", "a/", "a b", "a\n", "ä", ".a", &"a".repeat(513)] {
            assert!(checked_image(bad).is_err(), "{bad:?} was taken");
        }
        for good in ["all", "linux/amd64", "linux/arm/v7"] {
            assert!(checked_platform(good).is_ok(), "{good:?} was refused");
        }
        for bad in ["", "linux", "linux/", "a/b/c/d", "linux/amd 64", "linux/amd64\n"] {
            assert!(checked_platform(bad).is_err(), "{bad:?} was taken");
        }
    }
}
