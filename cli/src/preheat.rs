//! `darter preheat`: has seeds make images' layers before anybody asks, through the manager's REST API.

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

#[derive(Debug, Deserialize)]
struct Preheat {
    id: String,
    state: String,
    #[serde(default)]
    error: Option<String>,
    #[serde(default)]
    targets: Vec<Target>,
}

/// An image at a seed.
#[derive(Debug, Deserialize)]
struct Target {
    image: String,
    #[serde(default)]
    seed: Option<String>,
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
        if self.all_seeds {
            order["scope"] = json!("all-seeds");
        } else if let Some(share) = self.percent {
            order["scope"] = json!({ "percent": share });
        } else if !self.seed.is_empty() {
            order["scope"] = json!({ "seeds": self.seed });
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

/// A line for each image at each seed; an error if one of them failed.
fn conclude(preheat: &Preheat) -> Result<()> {
    let several = preheat.targets.len() > 1;
    for target in &preheat.targets {
        let seed = target.seed.as_deref().filter(|_| several);
        let seed = seed.map(|seed| format!(" at {seed}")).unwrap_or_default();
        if target.state == "succeeded" {
            let bytes: u64 = target.layers.iter().map(|layer| layer.size).sum();
            let (image, count) = (&target.image, target.layers.len());
            println!("{image}{seed}: {count} layers ready, {:.1} MB", bytes as f64 / 1e6);
        } else if several {
            let words = target.error.as_deref().unwrap_or("no reason was given");
            println!("{}{seed}: {}: {words}", target.image, target.state);
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
