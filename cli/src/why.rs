//! `darter why IMAGE`: for each layer whether it is lazy, and if not, why not.

use std::path::PathBuf;

use anyhow::{Result, bail};
use serde::Deserialize;

#[derive(Debug, clap::Args)]
pub struct Options {
    /// The image: a reference, a repository, or the digest of its manifest
    image: String,
    /// The node daemon's state directory
    #[arg(long, value_name = "DIR", default_value = "/var/lib/darter")]
    root: PathBuf,
    /// Print the daemon's answer as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Deserialize)]
struct Why {
    lazy: bool,
    images: Vec<Image>,
}

#[derive(Deserialize)]
struct Image {
    manifest: String,
    namespace: String,
    layers: Vec<Layer>,
}

#[derive(Deserialize)]
struct Layer {
    diff_id: String,
    size: u64,
    lazy: bool,
    reason: String,
}

pub async fn run(options: Options) -> Result<()> {
    let path = format!("/why?image={}", crate::admin::url_encoded(&options.image));
    let answer: serde_json::Value = crate::admin::get(&options.root, &path).await?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&answer)?);
        return Ok(());
    }
    let why: Why = serde_json::from_value(answer)?;
    if !why.lazy {
        bail!("Darter runs without a mesh here: every layer is plain");
    }
    if why.images.is_empty() {
        bail!(
            "nothing is known of {}: no client has asked for it through Darter, or one that never pulls lazily (ctr of 1.6 and \
             1.7); `darter pull {0}` does",
            options.image
        );
    }
    why.images.iter().for_each(show);
    Ok(())
}

fn show(image: &Image) {
    println!("{} (namespace {})", image.manifest, image.namespace);
    for layer in &image.layers {
        let short: String = layer.diff_id.trim_start_matches("sha256:").chars().take(12).collect();
        let kind = if layer.lazy { "lazy " } else { "plain" };
        println!("  {short}  {:>9.1} MB  {kind}  {}", layer.size as f64 / 1e6, layer.reason);
    }
}
