//! `darter preheat`: has a seed make an image's layers before anybody asks, through the manager's REST API.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::json;

#[derive(Debug, clap::Args)]
pub struct Options {
    /// The image, as docker and nerdctl write it
    image: String,
    /// Wait until it is done, and show how far it is
    #[arg(long)]
    wait: bool,
    /// os/architecture; default: the seed's own
    #[arg(long)]
    platform: Option<String>,
    /// User and password for the registry, if the seeds have none of their own
    #[arg(long, short, value_name = "USER:PASSWORD")]
    user: Option<String>,
    /// The manager's REST API
    #[arg(long, default_value = "http://127.0.0.1:7480", env = "DARTER_MANAGER")]
    manager: String,
    /// File with the API token that the manager wrote at its first start
    #[arg(long, default_value = "/var/lib/darter-manager/api-token", env = "DARTER_API_TOKEN_FILE")]
    token_file: PathBuf,
}

#[derive(Debug, Deserialize)]
struct Preheat {
    id: String,
    state: String,
    #[serde(default)]
    error: Option<String>,
    #[serde(default)]
    layers: Vec<Layer>,
}

#[derive(Debug, Deserialize)]
struct Layer {
    size: u64,
    read: u64,
    done: bool,
    #[serde(default)]
    error: Option<String>,
}

/// How often `--wait` asks.
const POLL: Duration = Duration::from_millis(250);
/// No answer within this time is an error.
const TIMEOUT: Duration = Duration::from_secs(10);

struct Api {
    client: reqwest::Client,
    base: String,
    token: String,
}

pub async fn run(options: Options) -> Result<()> {
    let token = std::fs::read_to_string(&options.token_file).with_context(|| {
        format!(
            "the manager's API token could not be read from {}; name its file with --token-file",
            options.token_file.display()
        )
    })?;
    let client = reqwest::Client::builder().timeout(TIMEOUT).no_proxy().build()?;
    let api = Api {
        client,
        base: options.manager.trim_end_matches('/').to_owned(),
        token: token.trim().to_owned(),
    };
    let mut order = json!({ "image": options.image });
    if let Some(platform) = &options.platform {
        order["platform"] = json!(platform);
    }
    if let Some((username, password)) = options.user.as_deref().and_then(|user| user.split_once(':')) {
        order["username"] = json!(username);
        order["password"] = json!(password);
    }
    let mut preheat = api.send(api.client.post(format!("{}/api/v1/preheats", api.base)).json(&order)).await?;
    if !options.wait {
        println!("{}", preheat.id);
        return Ok(());
    }
    let bar = indicatif::ProgressBar::new(0).with_style(
        indicatif::ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {msg}")
            .expect("the template is valid"),
    );
    while matches!(preheat.state.as_str(), "pending" | "running") {
        show(&bar, &preheat);
        tokio::select! {
            () = tokio::time::sleep(POLL) => {}
            () = darter_daemon::shutdown::signal() => bail!("interrupted; the preheat {} goes on without us", preheat.id),
        }
        preheat = api.send(api.client.get(format!("{}/api/v1/preheats/{}", api.base, preheat.id))).await?;
    }
    bar.finish_and_clear();
    conclude(&options.image, &preheat)
}

fn show(bar: &indicatif::ProgressBar, preheat: &Preheat) {
    bar.set_length(preheat.layers.iter().map(|layer| layer.size).sum());
    bar.set_position(preheat.layers.iter().map(|layer| layer.read.min(layer.size)).sum());
    let done = preheat.layers.iter().filter(|layer| layer.done).count();
    bar.set_message(format!("{done} of {} layers", preheat.layers.len()));
}

fn conclude(image: &str, preheat: &Preheat) -> Result<()> {
    if preheat.state != "succeeded" {
        let layer =
            preheat.layers.iter().find_map(|layer| layer.error.clone().filter(|text| !text.is_empty()));
        let words = preheat.error.clone().filter(|text| !text.is_empty()).or(layer);
        bail!(
            "preheat {} of {image} {}: {}",
            preheat.id,
            preheat.state,
            words.unwrap_or_else(|| "no reason was given".into())
        );
    }
    let bytes: u64 = preheat.layers.iter().map(|layer| layer.size).sum();
    println!("{image}: {} layers ready, {:.1} MB", preheat.layers.len(), bytes as f64 / 1e6);
    Ok(())
}

impl Api {
    async fn send(&self, request: reqwest::RequestBuilder) -> Result<Preheat> {
        let answer = request
            .bearer_auth(&self.token)
            .send()
            .await
            .with_context(|| format!("no manager answers at {}; name it with --manager", self.base))?;
        let status = answer.status();
        let body = answer.bytes().await.context("the manager's answer broke off")?;
        if !status.is_success() {
            #[derive(Deserialize)]
            struct Refusal {
                error: String,
            }
            let words = serde_json::from_slice::<Refusal>(&body).map(|refusal| refusal.error);
            bail!(
                "the manager refused ({status}): {}",
                words.unwrap_or_else(|_| String::from_utf8_lossy(&body).into_owned())
            );
        }
        serde_json::from_slice(&body).context("the manager's answer is not what this version of darter knows")
    }
}
