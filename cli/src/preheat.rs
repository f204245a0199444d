//! `darter preheat`: has seeds make images' layers, and nodes fetch them, before anybody asks, through the manager's REST API.

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::manager::{Manager, Place};

#[derive(Debug, clap::Args)]
pub struct Options {
    /// The images, as docker and nerdctl write them
    #[arg(required_unless_present = "cancel", conflicts_with = "cancel")]
    images: Vec<String>,
    /// Wait until it is done, and show how far it is
    #[arg(long)]
    wait: bool,
    /// os/architecture; default: the seed's own
    #[arg(long)]
    platform: Option<String>,
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
    #[arg(long, value_name = "TIME", value_parser = darter_manager::parse_life)]
    timeout: Option<Duration>,
    /// Cancel the order of this id instead
    #[arg(long, value_name = "ID")]
    cancel: Option<String>,
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
        if let Some(platform) = self.platform.as_deref().or(self.all_platforms.then_some("all")) {
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

/// How often `--wait` asks.
const POLL: Duration = Duration::from_millis(250);
pub async fn run(options: Options) -> Result<()> {
    let manager = options.place.open()?;
    if let Some(id) = &options.cancel {
        let preheat: Preheat = manager.ask(Method::DELETE, &path(id), None).await?;
        println!("preheat {id}: {}", preheat.state);
        return Ok(());
    }
    let preheat: Preheat = manager.ask(Method::POST, "/preheats", Some(&options.order()?)).await?;
    if !preheat.away.is_empty() {
        eprintln!("darter: away, and not preheated: {}", preheat.away.join(", "));
    }
    if !options.wait {
        println!("{}", preheat.id);
        return Ok(());
    }
    conclude(&watch(&manager, preheat).await?)
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
            println!("{image}{member}: {count} layers ready, {:.1} MB", bytes as f64 / 1e6);
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
    while matches!(preheat.state.as_str(), "pending" | "running") {
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
}
