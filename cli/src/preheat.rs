//! `darter preheat`: has seeds make images' layers, and nodes fetch them, before anybody asks, through the manager's REST API.

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use darter_manager::TIMEOUT_MAX;
use darter_registry::{ImageRef, Platform, ReferenceError};
use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::manager::{Manager, Place};
use crate::status::bytes_words;

#[derive(Debug, clap::Args)]
pub struct Options {
    /// The images, as docker and nerdctl write them
    #[arg(required_unless_present_any = ["cancel", "status"], conflicts_with_all = ["cancel", "status"], value_parser = image)]
    images: Vec<String>,
    /// Wait until it is done, and show how far it is; without it the order's id is printed
    #[arg(long)]
    wait: bool,
    /// os/architecture; default: the seed's own
    #[arg(long)]
    platform: Option<Platform>,
    /// Every Linux platform that the images have
    #[arg(long, conflicts_with = "platform")]
    all_platforms: bool,
    /// On all seeds that are there; default: on one, from which all others take it
    #[arg(long)]
    all_seeds: bool,
    /// On this seed; several if given several times
    #[arg(long, value_name = "NAME", conflicts_with = "all_seeds")]
    seed: Vec<String>,
    /// On so many of a hundred seeds that are there
    #[arg(long, value_name = "SHARE", conflicts_with_all = ["all_seeds", "seed"], value_parser = clap::value_parser!(u8).range(1..=100))]
    percent: Option<u8>,
    /// On nodes as well, which fetch all of it from the mesh: `all` that are there, so many of them (3), a share (25%), or
    /// these (NAME,NAME)
    #[arg(long, value_name = "WHICH", conflicts_with_all = ["all_seeds", "percent"])]
    nodes: Option<Nodes>,
    /// The order fails if it takes longer, 24h at most [default: 1h]
    #[arg(long, value_name = "TIME", value_parser = timeout)]
    timeout: Option<Duration>,
    /// Cancel the order of this id instead
    #[arg(long, value_name = "ID")]
    cancel: Option<String>,
    /// Show how far the order of this id is instead, with --wait until it is done
    #[arg(long, value_name = "ID", conflicts_with = "cancel")]
    status: Option<String>,
    /// User and password for the registry, if the seeds have none of their own
    #[arg(long, short, value_name = "USER:PASSWORD")]
    user: Option<String>,
    #[command(flatten)]
    place: Place,
}

/// Which nodes are to have the images.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Nodes {
    All,
    Count(u32),
    Percent(u8),
    Named(Vec<String>),
}

impl FromStr for Nodes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} names no nodes: write all, 3, 25% or NAME,NAME");
        if text == "all" {
            return Ok(Nodes::All);
        }
        if let Some(share) = text.strip_suffix('%') {
            let share = share.parse().ok().filter(|share| (1..=100).contains(share));
            return share.map(Nodes::Percent).ok_or_else(wrong);
        }
        if let Ok(count) = text.parse::<u32>() {
            return Some(count).filter(|count| *count > 0).map(Nodes::Count).ok_or_else(wrong);
        }
        // With a comma behind it, a name may be a number, or `all`.
        let names: Vec<String> = text.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
        if names.is_empty() { Err(wrong()) } else { Ok(Nodes::Named(names)) }
    }
}

#[derive(Debug, Deserialize)]
struct Preheat {
    id: String,
    state: String,
    #[serde(default)]
    error: Option<String>,
    #[serde(default)]
    targets: Vec<Target>,
    #[serde(default)]
    away: Vec<String>,
}

/// An image at a member.
#[derive(Debug, Deserialize)]
struct Target {
    image: String,
    #[serde(default)]
    seed: Option<String>,
    #[serde(default)]
    node: Option<String>,
    state: String,
    #[serde(default)]
    error: Option<String>,
    layers: Vec<Layer>,
}

#[derive(Debug, Deserialize)]
struct Layer {
    size: u64,
    read: u64,
    done: bool,
}

impl Options {
    /// The order, as the manager's API takes it.
    fn order(&self) -> Result<Value> {
        let mut order = json!({ "images": self.images });
        let platform = self.platform.as_ref().map(ToString::to_string);
        if let Some(platform) = platform.or(self.all_platforms.then(|| "all".to_owned())) {
            order["platform"] = json!(platform);
        }
        if let Some(scope) = self.scope()? {
            order["scope"] = scope;
        }
        if let Some(timeout) = self.timeout {
            order["timeout_seconds"] = json!(timeout.as_secs());
        }
        if let Some(user) = self.user.as_deref() {
            let (username, password) =
                user.split_once(':').context("--user takes a name and a password, with a colon between")?;
            order["username"] = json!(username);
            order["password"] = json!(password);
        }
        Ok(order)
    }

    /// Who is to have the images; `None`: the API's default, one seed.
    fn scope(&self) -> Result<Option<Value>> {
        let scope = match &self.nodes {
            Some(Nodes::Named(nodes)) => json!({ "members": { "seeds": self.seed, "nodes": nodes } }),
            Some(_) if !self.seed.is_empty() => {
                bail!("--seed goes with nodes that are named: --nodes NAME,NAME")
            }
            Some(Nodes::All) => json!("all-nodes"),
            Some(Nodes::Count(count)) => json!({ "count-of-nodes": count }),
            Some(Nodes::Percent(share)) => json!({ "percent-of-nodes": share }),
            None if self.all_seeds => json!("all-seeds"),
            None if !self.seed.is_empty() => json!({ "seeds": self.seed }),
            None => match self.percent {
                Some(share) => json!({ "percent": share }),
                None => return Ok(None),
            },
        };
        Ok(Some(scope))
    }
}

/// Refused here, since a seed would refuse it only when the order is under way.
fn image(text: &str) -> Result<String, ReferenceError> {
    text.parse::<ImageRef>().map(|_| text.to_owned())
}

fn timeout(text: &str) -> Result<Duration, String> {
    let given = darter_manager::parse_life(text)?;
    if given.is_zero() || given.as_secs() > TIMEOUT_MAX {
        return Err(format!("a preheat may take 1s to {}h, not {text}", TIMEOUT_MAX / 3_600));
    }
    Ok(given)
}

/// How often `--wait` asks.
const POLL: Duration = Duration::from_millis(250);

pub async fn run(options: Options) -> Result<()> {
    let manager = options.place.open()?;
    if let Some(id) = &options.cancel {
        let preheat: Preheat = manager.ask(Method::DELETE, &path(id), None).await?;
        println!("preheat {id}: {}", preheat.state);
        return Ok(());
    }
    if let Some(id) = &options.status {
        let preheat: Preheat = manager.ask(Method::GET, &path(id), None).await?;
        return if options.wait { conclude(&watch(&manager, preheat).await?) } else { tell(&preheat) };
    }
    let preheat: Preheat = manager.ask(Method::POST, "/preheats", Some(&options.order()?)).await?;
    if !preheat.away.is_empty() {
        eprintln!("darter: away, and not preheated: {}", preheat.away.join(", "));
    }
    if !options.wait {
        println!("{}", preheat.id);
        eprintln!("darter: ordered; `darter preheat --status {}` shows how far it is", preheat.id);
        return Ok(());
    }
    conclude(&watch(&manager, preheat).await?)
}

/// How far an order is: a line for each image at each member, and an error if it has failed.
fn tell(preheat: &Preheat) -> Result<()> {
    if is_open(preheat) {
        println!("preheat {}: {}", preheat.id, preheat.state);
        preheat.targets.iter().for_each(|target| println!("{}", progress(target)));
        return Ok(());
    }
    conclude(preheat)
}

fn is_open(preheat: &Preheat) -> bool {
    matches!(preheat.state.as_str(), "pending" | "running")
}

fn progress(target: &Target) -> String {
    let Target { image, seed, node, state, error, layers } = target;
    let member =
        seed.as_deref().or(node.as_deref()).map(|member| format!(" at {member}")).unwrap_or_default();
    let done = layers.iter().filter(|layer| layer.done).count();
    let read: u64 = layers.iter().map(|layer| layer.read.min(layer.size)).sum();
    let all: u64 = layers.iter().map(|layer| layer.size).sum();
    let error = error.as_deref().map(|error| format!(": {error}")).unwrap_or_default();
    let far = format!("{done} of {} layers, {} of {}", layers.len(), bytes_words(read), bytes_words(all));
    format!("{image}{member}: {state}, {far}{error}")
}

fn path(id: &str) -> String {
    format!("/preheats/{}", crate::admin::url_encoded(id))
}

fn show(bar: &indicatif::ProgressBar, preheat: &Preheat) {
    let layers = || preheat.targets.iter().flat_map(|target| &target.layers);
    bar.set_length(layers().map(|layer| layer.size).sum());
    bar.set_position(layers().map(|layer| layer.read.min(layer.size)).sum());
    let done = layers().filter(|layer| layer.done).count();
    bar.set_message(format!("{done} of {} layers", layers().count()));
}

/// A line for each image at each member; an error if one of them failed.
fn conclude(preheat: &Preheat) -> Result<()> {
    let several = preheat.targets.len() > 1;
    for target in &preheat.targets {
        let member = target.seed.as_deref().or(target.node.as_deref()).filter(|_| several);
        let member = member.map(|member| format!(" at {member}")).unwrap_or_default();
        if target.state == "succeeded" {
            let bytes: u64 = target.layers.iter().map(|layer| layer.size).sum();
            let (image, count) = (&target.image, target.layers.len());
            println!("{image}{member}: {count} layers ready, {}", bytes_words(bytes));
        } else if several {
            let words = target.error.as_deref().unwrap_or("no reason was given");
            println!("{}{member}: {}: {words}", target.image, target.state);
        }
    }
    if preheat.state != "succeeded" {
        let words = preheat.error.as_deref().unwrap_or("no reason was given");
        let images: Vec<&str> = preheat.targets.iter().map(|target| target.image.as_str()).collect();
        let what = if several { String::new() } else { format!(" of {}", images.join(" ")) };
        bail!("preheat {}{what} {}: {words}", preheat.id, preheat.state);
    }
    Ok(())
}

/// Shows how far an order is until it is over.
async fn watch(manager: &Manager, mut preheat: Preheat) -> Result<Preheat> {
    let style = indicatif::ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {msg}");
    let bar = indicatif::ProgressBar::new(0).with_style(style.expect("the template is valid"));
    while is_open(&preheat) {
        show(&bar, &preheat);
        tokio::select! {
            () = tokio::time::sleep(POLL) => {}
            () = darter_daemon::shutdown::signal() => {
                bail!("interrupted; the preheat goes on: `darter preheat --cancel {}` ends it", preheat.id);
            }
        }
        preheat = manager.ask(Method::GET, &path(&preheat.id), None).await?;
    }
    bar.finish_and_clear();
    Ok(preheat)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn nodes_are_all_some_a_share_or_named() {
        let named = |names: &[&str]| Ok(Nodes::Named(names.iter().map(ToString::to_string).collect()));
        for (text, wanted) in [
            ("all", Ok(Nodes::All)),
            ("3", Ok(Nodes::Count(3))),
            ("25%", Ok(Nodes::Percent(25))),
            ("node-1", named(&["node-1"])),
            ("node-1,node-2", named(&["node-1", "node-2"])),
            ("3,", named(&["3"])),
        ] {
            assert_eq!(text.parse::<Nodes>(), wanted, "{text:?}");
        }
        for bad in ["", ",", "0", "0%", "101%", "x%"] {
            assert!(bad.parse::<Nodes>().is_err(), "{bad:?} was taken");
        }
    }

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn line(words: &[&str]) -> Result<Options, String> {
        let words = ["darter"].iter().chain(words);
        Line::try_parse_from(words).map(|line| line.options).map_err(|error| error.to_string())
    }

    #[test]
    fn order_that_can_not_be_is_refused_before_the_manager_is_asked() {
        for (words, why) in [
            (vec!["APP:::1"], "invalid reference format"),
            (vec!["r.example/a:1", "--timeout", "48h"], "1s to 24h"),
            (vec!["r.example/a:1", "--timeout", "0s"], "1s to 24h"),
            (vec!["r.example/a:1", "--platform", "linux"], "is no platform"),
            (vec!["r.example/a:1", "--status", "id"], "cannot be used with"),
            (vec!["--status", "id", "--cancel", "id"], "cannot be used with"),
            (vec![], "required"),
        ] {
            let error = line(&words).unwrap_err();
            assert!(error.contains(why), "{words:?}: {error}");
        }
        let order = line(&["r.example/a:1", "--timeout", "24h", "--platform", "linux/arm/v7"]).unwrap();
        let order = order.order().unwrap();
        let wanted =
            json!({ "images": ["r.example/a:1"], "platform": "linux/arm/v7", "timeout_seconds": 86_400 });
        assert_eq!(order, wanted);
        assert!(line(&["--status", "id", "--wait"]).is_ok());
    }

    #[test]
    fn order_under_way_is_told_for_each_image_and_member() {
        let layer = |read, done| Layer { size: 2_000_000, read, done };
        let target = Target {
            image: "r.example/a:1".to_owned(),
            seed: None,
            node: Some("node-1".to_owned()),
            state: "running".to_owned(),
            error: None,
            layers: vec![layer(2_000_000, true), layer(500_000, false)],
        };
        assert_eq!(progress(&target), "r.example/a:1 at node-1: running, 1 of 2 layers, 2.5 MB of 4.0 MB");
    }
}
