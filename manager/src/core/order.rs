//! A preheat order: some images, at seeds and nodes. It is as far as its parts are.

use std::collections::BTreeSet;

use darter_types::{NodeName, Role};
use serde::{Deserialize, Serialize};

use super::job::{Part, State};
use super::seeds;

/// Images of one order.
pub(crate) const IMAGES_MAX: usize = 64;

/// Seeds, and nodes, that one order lists.
pub(crate) const LISTED_MAX: usize = 100;

/// Parts of one order: images times members. Of nodes that are away so many are named.
pub(crate) const PARTS_MAX: usize = 1_000;

/// Of an order that says nothing of it, and the longest, in seconds.
pub(crate) const TIMEOUT_DEFAULT: u64 = 3_600;
pub const TIMEOUT_MAX: u64 = 24 * 3_600;

/// Longer than any reference that registries take.
const IMAGE_MAX: usize = 512;
const PLATFORM_MAX: usize = 64;

/// What a platform may be instead of one: all that an index has.
pub(crate) const ALL_PLATFORMS: &str = "all";

/// Who is to have the images.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
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
    /// All nodes that attend when the order is taken. A seed makes the layers before: the one that the manager chooses.
    AllNodes,
    /// All seeds and all nodes that attend when the order is taken; without a node the seeds.
    AllPeers,
    /// These nodes.
    Nodes(Vec<String>),
    /// So many of the nodes that attend in a hundred, rounded up; 1 to 100.
    PercentOfNodes(u8),
    /// So many of them, or all if there are fewer.
    CountOfNodes(u32),
    /// These seeds and these nodes; without a seed one that the manager chooses.
    Members {
        #[serde(default)]
        seeds: Vec<String>,
        #[serde(default)]
        nodes: Vec<String>,
    },
}

impl Scope {
    /// Whether it names members, attending or not.
    pub(crate) fn is_list(&self) -> bool {
        matches!(self, Scope::Seeds(_) | Scope::Nodes(_) | Scope::Members { .. })
    }

    /// Whether it is for all nodes, of which some may be away.
    pub(crate) fn has_all_nodes(&self) -> bool {
        matches!(self, Scope::AllNodes | Scope::AllPeers)
    }
}

/// Who there is.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cluster {
    /// The seeds and nodes that attend now.
    pub(crate) seeds: Vec<NodeName>,
    pub(crate) nodes: Vec<NodeName>,
    /// All that ever joined and were not revoked; it may be empty where the scope doesn't need it.
    pub(crate) joined: BTreeSet<(Role, NodeName)>,
}

impl Cluster {
    /// The nodes that joined and don't attend, for orders that are for all of them.
    pub(crate) fn away(&self, scope: &Scope) -> Vec<String> {
        let here: BTreeSet<&NodeName> = self.nodes.iter().collect();
        let joined = self.joined.iter().filter(|(role, _)| *role == Role::Node);
        let away = joined.filter(|(_, node)| scope.has_all_nodes() && !here.contains(node));
        away.map(|(_, node)| node.to_string()).take(PARTS_MAX).collect()
    }
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
    #[error("scope: percent must be 1 to 100, count 1 at least, and seeds and nodes 1 to {LISTED_MAX} names")]
    Scope,
    #[error("scope: no seed attends this manager now")]
    NoSeed,
    #[error("scope: no node attends this manager now")]
    NoNode,
    #[error("scope: no {0} {1:?} has joined this cluster")]
    Unknown(Role, String),
    #[error("{0} images times members are too many for one order: it may have {PARTS_MAX}")]
    TooLarge(usize),
}

impl OrderError {
    /// The order is well-formed, but the cluster is not as it says.
    pub(crate) fn is_conflict(&self) -> bool {
        matches!(
            self,
            OrderError::NoSeed | OrderError::NoNode | OrderError::Unknown(..) | OrderError::TooLarge(_)
        )
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
    /// Of an order for all nodes: those that had joined and were not there when it was taken. They are no targets.
    pub(crate) away: Vec<String>,
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
    let at = first.target().map(|member| format!(" at {member}")).unwrap_or_default();
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

/// The parts of an order for `images`, each once.
pub(crate) fn parts(images: &[String], scope: &Scope, cluster: &Cluster) -> Result<Vec<Part>, OrderError> {
    if images.is_empty() || images.len() > IMAGES_MAX {
        return Err(OrderError::Images);
    }
    images.iter().try_for_each(|image| checked_image(image))?;
    let mut seen = BTreeSet::new();
    let images: Vec<&String> = images.iter().filter(|image| seen.insert(*image)).collect();
    let mut parts = Vec::new();
    for image in images {
        let mut targets = targets(image, scope, cluster)?;
        if targets.iter().all(|(role, _)| *role == Role::Node) {
            if cluster.seeds.is_empty() {
                return Err(OrderError::NoSeed);
            }
            targets.insert(0, (Role::Seed, None));
        }
        parts.extend(targets.into_iter().map(|(role, pinned)| Part::new(image.clone(), role, pinned)));
    }
    if parts.len() > PARTS_MAX { Err(OrderError::TooLarge(parts.len())) } else { Ok(parts) }
}

/// A member that is to have an image; `None`: a seed that the manager chooses.
type Target = (Role, Option<NodeName>);

fn targets(image: &str, scope: &Scope, cluster: &Cluster) -> Result<Vec<Target>, OrderError> {
    let all = usize::MAX;
    let share = |of: &[NodeName], share: u8| (of.len() * usize::from(share)).div_ceil(100);
    let count = |count: u32| usize::try_from(count).unwrap_or(all);
    match scope {
        Scope::OneSeed => Ok(vec![(Role::Seed, None)]),
        Scope::AllSeeds => some(image, Role::Seed, cluster, all),
        Scope::AllNodes => some(image, Role::Node, cluster, all),
        Scope::AllPeers => {
            let mut targets = some(image, Role::Seed, cluster, all)?;
            if !cluster.nodes.is_empty() {
                targets.extend(some(image, Role::Node, cluster, all)?);
            }
            Ok(targets)
        }
        Scope::Percent(wanted @ 1..=100) => some(image, Role::Seed, cluster, share(&cluster.seeds, *wanted)),
        Scope::PercentOfNodes(wanted @ 1..=100) => {
            some(image, Role::Node, cluster, share(&cluster.nodes, *wanted))
        }
        Scope::Count(wanted @ 1..) => some(image, Role::Seed, cluster, count(*wanted)),
        Scope::CountOfNodes(wanted @ 1..) => some(image, Role::Node, cluster, count(*wanted)),
        Scope::Seeds(seeds) => listed(seeds, &[], cluster),
        Scope::Nodes(nodes) => listed(&[], nodes, cluster),
        Scope::Members { seeds, nodes } => listed(seeds, nodes, cluster),
        Scope::Percent(_) | Scope::Count(_) | Scope::PercentOfNodes(_) | Scope::CountOfNodes(_) => {
            Err(OrderError::Scope)
        }
    }
}

/// So many of those that attend.
fn some(image: &str, role: Role, cluster: &Cluster, wanted: usize) -> Result<Vec<Target>, OrderError> {
    let (attending, nobody) = match role {
        Role::Node => (&cluster.nodes, OrderError::NoNode),
        _ => (&cluster.seeds, OrderError::NoSeed),
    };
    if attending.is_empty() {
        return Err(nobody);
    }
    let chosen = seeds::ranked(image, attending).into_iter().take(wanted).cloned();
    Ok(chosen.map(|member| (role, Some(member))).collect())
}

fn listed(seeds: &[String], nodes: &[String], cluster: &Cluster) -> Result<Vec<Target>, OrderError> {
    if seeds.len() + nodes.len() == 0 || seeds.len().max(nodes.len()) > LISTED_MAX {
        return Err(OrderError::Scope);
    }
    let known = |role: Role, name: &String| {
        let member = name.parse().ok().map(|name| (role, name)).filter(|key| cluster.joined.contains(key));
        member.ok_or_else(|| OrderError::Unknown(role, name.chars().take(64).collect()))
    };
    let seeds = seeds.iter().map(|name| known(Role::Seed, name));
    let named: BTreeSet<(Role, NodeName)> =
        seeds.chain(nodes.iter().map(|name| known(Role::Node, name))).collect::<Result<_, _>>()?;
    Ok(named.into_iter().map(|(role, name)| (role, Some(name))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(role: Role, count: usize) -> Vec<NodeName> {
        (0..count).map(|i| format!("{role}-{i}").parse().unwrap()).collect()
    }

    /// Nine seeds and nine nodes joined; so many attend.
    fn cluster(seeds: usize, nodes: usize) -> Cluster {
        let of = |role| names(role, 9).into_iter().map(move |name| (role, name));
        let joined = of(Role::Seed).chain(of(Role::Node)).collect();
        Cluster { seeds: names(Role::Seed, seeds), nodes: names(Role::Node, nodes), joined }
    }

    const IMAGES: [&str; 3] = ["r.example/a:1", "r.example/b:1", "r.example/a:1"];

    fn expand(scope: Scope, attending: usize) -> Result<Vec<Part>, OrderError> {
        parts(&IMAGES.map(str::to_owned), &scope, &cluster(attending, 0))
    }

    /// How many parts are for seeds that nobody named, for named seeds, and for nodes.
    fn over_nodes(scope: Scope, nodes: usize) -> Result<(usize, usize, usize), OrderError> {
        let parts = parts(&IMAGES.map(str::to_owned), &scope, &cluster(1, nodes))?;
        let count = |role, pinned| {
            let is_such = |part: &&Part| part.role == role && part.pinned.is_some() == pinned;
            parts.iter().filter(is_such).count()
        };
        assert_eq!(count(Role::Node, false), 0);
        Ok((count(Role::Seed, false), count(Role::Seed, true), count(Role::Node, true)))
    }

    #[test]
    fn order_for_nodes_has_a_seed_make_each_image_before() {
        assert_eq!(over_nodes(Scope::AllNodes, 5), Ok((2, 0, 10)));
        assert_eq!(over_nodes(Scope::AllPeers, 5), Ok((0, 2, 10)));
        assert_eq!(over_nodes(Scope::AllPeers, 0), Ok((0, 2, 0)));
        assert_eq!(over_nodes(Scope::PercentOfNodes(30), 5), Ok((2, 0, 4)));
        assert_eq!(over_nodes(Scope::CountOfNodes(3), 5), Ok((2, 0, 6)));
        assert_eq!(over_nodes(Scope::CountOfNodes(u32::MAX), 5), Ok((2, 0, 10)));
        let (seeds, nodes) = (vec!["seed-1".to_owned()], vec!["node-8".to_owned(), "node-8".to_owned()]);
        assert_eq!(over_nodes(Scope::Nodes(nodes.clone()), 1), Ok((2, 0, 2)));
        let both = Scope::Members { seeds: seeds.clone(), nodes: nodes.clone() };
        assert_eq!(over_nodes(both, 1), Ok((0, 2, 2)));
        assert_eq!(over_nodes(Scope::Members { seeds: vec![], nodes }, 1), Ok((2, 0, 2)));
        assert_eq!(over_nodes(Scope::Members { seeds, nodes: vec![] }, 1), Ok((0, 2, 0)));
    }

    #[test]
    fn order_for_nodes_that_are_not_there_is_refused_with_the_reason() {
        assert_eq!(over_nodes(Scope::AllNodes, 0), Err(OrderError::NoNode));
        assert_eq!(over_nodes(Scope::PercentOfNodes(0), 1), Err(OrderError::Scope));
        assert_eq!(over_nodes(Scope::CountOfNodes(0), 1), Err(OrderError::Scope));
        assert_eq!(over_nodes(Scope::Members { seeds: vec![], nodes: vec![] }, 1), Err(OrderError::Scope));
        let unknown = over_nodes(Scope::Nodes(vec!["seed-1".to_owned()]), 1).unwrap_err();
        assert!(unknown.is_conflict() && unknown.to_string().contains("no node \"seed-1\""), "{unknown}");
        for scope in [Scope::AllNodes, Scope::AllPeers] {
            let nobody = parts(&["a".to_owned()], &scope, &cluster(0, 1));
            assert_eq!(nobody, Err(OrderError::NoSeed));
        }
    }

    #[test]
    fn order_for_all_nodes_names_those_that_are_away() {
        assert_eq!(cluster(1, 7).away(&Scope::AllNodes), ["node-7", "node-8"]);
        assert_eq!(cluster(1, 7).away(&Scope::AllPeers), ["node-7", "node-8"]);
        assert!(cluster(1, 7).away(&Scope::CountOfNodes(9)).is_empty());
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
            (r#""all-nodes""#, Scope::AllNodes),
            (r#""all-peers""#, Scope::AllPeers),
            (r#"{"nodes":["a"]}"#, Scope::Nodes(vec!["a".to_owned()])),
            (r#"{"percent-of-nodes":25}"#, Scope::PercentOfNodes(25)),
            (r#"{"count-of-nodes":2}"#, Scope::CountOfNodes(2)),
            (
                r#"{"members":{"seeds":["a"],"nodes":["b"]}}"#,
                Scope::Members { seeds: vec!["a".to_owned()], nodes: vec!["b".to_owned()] },
            ),
        ] {
            assert_eq!(serde_json::from_str::<Scope>(text).unwrap(), scope);
            assert_eq!(serde_json::to_string(&scope).unwrap(), text);
        }
        assert!(serde_json::from_str::<Scope>(r#"{"members":{"nodes":["b"],"seed":["a"]}}"#).is_err());
    }

    #[test]
    fn order_is_as_far_as_its_parts() {
        let with = |states: &[State]| {
            let parts = states
                .iter()
                .map(|state| Part { state: *state, ..Part::new("i".to_owned(), Role::Seed, None) });
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
            member: Some("seed-1".parse().unwrap()),
            error: Some("404".to_owned()),
            ..Part::new("r.example/a".to_owned(), Role::Seed, None)
        };
        assert_eq!(words(std::slice::from_ref(&failed)).as_deref(), Some("404"));
        let good = Part { state: State::Succeeded, ..Part::new("r.example/b".to_owned(), Role::Seed, None) };
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
