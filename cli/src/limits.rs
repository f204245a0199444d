//! `darter limits`: how many bytes seeds and nodes may move in a second, set on the manager while they run.

use anyhow::{Result, bail};
use darter_manager::{RATE_MAX, RATE_MIN};
use darter_types::RateKind;
use reqwest::Method;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::manager::{Manager, Place};

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Rates are bytes per second, at least 100kB: 5MB, 640KiB, 6250000; a link of 50 Mbit/s moves 6.25MB. \
    Without a word on a member, its own configuration counts, and what is set for a member goes before what is set for all."
)]
pub struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Show what is set: for all, and for each member that has limits of its own
    Show(Show),
    /// Set limits; those that are not named stay as they are
    Set(Set),
    /// Take limits back, all or some kinds: then what each host has configured counts again
    Reset(Reset),
}

#[derive(Debug, clap::Args)]
struct Show {
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, clap::Args)]
struct Set {
    /// What comes from other peers, seeds included; "none" for no limit
    #[arg(long, value_name = "RATE", value_parser = rate)]
    download: Option<u64>,
    /// What goes to other peers
    #[arg(long, value_name = "RATE", value_parser = rate)]
    upload: Option<u64>,
    /// What is read from registries to make layers
    #[arg(long, value_name = "RATE", value_parser = rate)]
    registry: Option<u64>,
    /// What comes from other peers and no container has asked for
    #[arg(long, value_name = "RATE", value_parser = rate)]
    background: Option<u64>,
    #[command(flatten)]
    whose: Whose,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, clap::Args)]
struct Reset {
    /// The kinds: download, upload, registry, background [default: all]
    kinds: Vec<RateKind>,
    #[command(flatten)]
    whose: Whose,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, clap::Args)]
struct Whose {
    /// Of this node alone; default: of every seed and node
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// Of this seed alone
    #[arg(long, value_name = "NAME", conflicts_with = "node")]
    seed: Option<String>,
}

impl Whose {
    /// Role and name, if it is one alone.
    fn member(&self) -> Option<(&str, &str)> {
        let node = self.node.as_deref().map(|name| ("node", name));
        node.or(self.seed.as_deref().map(|name| ("seed", name)))
    }

    fn path(&self) -> String {
        let of = |(role, name)| format!("/nodes/{role}/{}/limits", crate::admin::url_encoded(name));
        self.member().map_or_else(|| "/limits".to_owned(), of)
    }

    fn shown(&self) -> String {
        self.member().map_or_else(|| ALL.to_owned(), |(role, name)| format!("{role} {name}"))
    }
}

/// How those of the cluster are shown.
const ALL: &str = "every seed and node";

/// As the API has them: a number or null for each kind.
type Limits = Map<String, Value>;

#[derive(Deserialize)]
struct Nodes {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    node: String,
    role: String,
    limits: Limits,
}

pub async fn run(options: Options) -> Result<()> {
    match options.what {
        What::Show(Show { place }) => show(&place.open()?).await,
        What::Set(Set { download, upload, registry, background, whose, place }) => {
            let given = [download, upload, registry, background];
            let given: Vec<_> =
                RateKind::ALL.into_iter().zip(given).filter(|(_, rate)| rate.is_some()).collect();
            if given.is_empty() {
                bail!("nothing was given to set: --download, --upload, --registry or --background RATE");
            }
            change(&place.open()?, &whose, &given).await
        }
        What::Reset(Reset { kinds, whose, place }) => {
            let kinds = if kinds.is_empty() { RateKind::ALL.to_vec() } else { kinds };
            let given: Vec<_> = kinds.into_iter().map(|kind| (kind, None)).collect();
            change(&place.open()?, &whose, &given).await
        }
    }
}

async fn change(manager: &Manager, whose: &Whose, given: &[(RateKind, Option<u64>)]) -> Result<()> {
    if let Some(member) = whose.member() {
        let Nodes { nodes } = manager.ask(Method::GET, "/nodes", None).await?;
        not_another_role(member, &nodes)?;
    }
    let path = whose.path();
    let mut limits: Limits = manager.ask(Method::GET, &path, None).await?;
    for (kind, rate) in given {
        limits.insert(kind.as_str().to_owned(), json!(rate));
    }
    let limits: Limits = manager.ask(Method::PUT, &path, Some(&Value::Object(limits))).await?;
    heading();
    line(&whose.shown(), &limits);
    Ok(())
}

/// Fails where nobody of that role has the name, and somebody of the other one. Whatever else is wrong the manager says.
fn not_another_role((role, name): (&str, &str), nodes: &[Node]) -> Result<()> {
    let is_there = |wanted: &str| nodes.iter().any(|node| node.node == name && node.role == wanted);
    let other = if role == "node" { "seed" } else { "node" };
    if !is_there(role) && is_there(other) {
        bail!("no {role} {name} ever joined; there is a {other} of that name: --{other} {name}");
    }
    Ok(())
}

async fn show(manager: &Manager) -> Result<()> {
    let cluster: Limits = manager.ask(Method::GET, "/limits", None).await?;
    let Nodes { nodes } = manager.ask(Method::GET, "/nodes", None).await?;
    heading();
    line(ALL, &cluster);
    for Node { node, role, limits } in nodes {
        if limits.values().any(|rate| !rate.is_null()) {
            line(&format!("{role} {node}"), &limits);
        }
    }
    Ok(())
}

fn heading() {
    let [download, upload, registry, background] = RateKind::ALL.map(|kind| kind.as_str().to_uppercase());
    println!("{:<28} {download:>12} {upload:>12} {registry:>12} {background:>12}", "LIMITS OF");
}

fn line(whose: &str, limits: &Limits) {
    let [download, upload, registry, background] =
        RateKind::ALL.map(|kind| words(limits.get(kind.as_str()).and_then(Value::as_u64)));
    println!("{whose:<28} {download:>12} {upload:>12} {registry:>12} {background:>12}");
}

fn words(rate: Option<u64>) -> String {
    rate.map_or_else(|| "-".to_owned(), rate_words)
}

/// A rate for people; 0 is no limit.
pub fn rate_words(rate: u64) -> String {
    let (size, unit) = match rate {
        0 => return "none".to_owned(),
        1..1_000 => (1.0, "B"),
        1_000..1_000_000 => (1e3, "kB"),
        1_000_000..1_000_000_000 => (1e6, "MB"),
        _ => (1e9, "GB"),
    };
    let number = format!("{:.2}", rate as f64 / size);
    format!("{} {unit}/s", number.trim_end_matches('0').trim_end_matches('.'))
}

/// Of bytes: as it is written matters, because `Mb` is a word for bits.
const UNITS: [(&str, f64); 9] = [
    ("", 1.0),
    ("B", 1.0),
    ("kB", 1e3),
    ("KB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("KiB", 1024.0),
    ("MiB", 1_048_576.0),
    ("GiB", 1_073_741_824.0),
];

/// Bytes per second, of a number with a unit. A `/s` behind it may be written.
fn rate(text: &str) -> Result<u64, String> {
    let text = text.trim().trim_end_matches("/s");
    if text.eq_ignore_ascii_case("none") {
        return Ok(0);
    }
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = (&text[..split], text[split..].trim());
    let size = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, size)| *size);
    let bytes = number.parse::<f64>().ok().zip(size).map(|(number, size)| number * size);
    let wrong = "bytes per second are wanted: a number with B, kB, MB, GB, KiB, MiB or GiB, or \"none\"; 50 Mbit/s are 6.25MB";
    let bytes = bytes.filter(|bytes| bytes.is_finite()).map(|bytes| bytes.round() as u64);
    let bytes = bytes.ok_or_else(|| wrong.to_owned())?;
    if bytes != 0 && !(RATE_MIN..=RATE_MAX).contains(&bytes) {
        let [given, least, most] = [bytes, RATE_MIN, RATE_MAX].map(rate_words);
        return Err(format!(
            "{given} can't be set: {least} to {most}, or none; for what each host has configured, `darter limits reset`"
        ));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("6250000", 6_250_000),
            ("6.25MB", 6_250_000),
            ("6.25 MB/s", 6_250_000),
            ("640KiB", 655_360),
            ("2GB", 2_000_000_000),
            ("none", 0),
            ("0", 0),
        ] {
            assert_eq!(rate(text), Ok(bytes), "{text}");
        }
        for bad in ["", "MB", "50Mbit", "50Mb", "-1", "1.2.3MB", "fast"] {
            assert!(rate(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rate_that_the_manager_would_refuse_is_refused_before_it_is_asked() {
        for bad in ["50", "99kB", "1001GB"] {
            let error = rate(bad).unwrap_err();
            assert!(
                error.contains("100 kB/s to 1000 GB/s") && error.contains("darter limits reset"),
                "{error}"
            );
        }
        assert_eq!([rate("100kB"), rate("1000GB")], [Ok(RATE_MIN), Ok(RATE_MAX)]);
    }

    #[test]
    fn name_of_a_member_of_the_other_role_is_told() {
        let node = |role: &str, node: &str| Node {
            node: node.to_owned(),
            role: role.to_owned(),
            limits: Limits::new(),
        };
        let there = [node("seed", "one"), node("seed", "both"), node("node", "both"), node("scheduler", "c")];
        let error = not_another_role(("node", "one"), &there).unwrap_err().to_string();
        assert!(error.contains("no node one ever joined") && error.ends_with("--seed one"), "{error}");
        for fine in [("seed", "one"), ("node", "both"), ("node", "c"), ("node", "nobody")] {
            not_another_role(fine, &there).unwrap();
        }
    }

    #[test]
    fn rates_are_shown_as_they_are_read() {
        let shown = [0, 50, 640_000, 6_250_000, 1_500_000_000].map(rate_words);
        assert_eq!(shown, ["none", "50 B/s", "640 kB/s", "6.25 MB/s", "1.5 GB/s"]);
    }
}
