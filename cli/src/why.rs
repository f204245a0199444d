//! `darter why IMAGE`: for each layer whether it is lazy, and if not, why not; while that is being decided, who is asked.

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
    /// Layers of which it isn't known yet to which image they belong.
    #[serde(default)]
    looking: usize,
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
    /// `None` while it is being decided.
    lazy: Option<bool>,
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
    if why.images.is_empty() && why.looking > 0 {
        bail!(
            "nothing is known of {} yet, but {} layers are being looked for in containerd's content store: ask again",
            options.image,
            why.looking
        );
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
    image.layers.iter().for_each(|layer| println!("{}", line(layer)));
}

fn line(layer: &Layer) -> String {
    let short: String = layer.diff_id.trim_start_matches("sha256:").chars().take(12).collect();
    let kind = match layer.lazy {
        Some(true) => "lazy ",
        Some(false) => "plain",
        None => "open ",
    };
    format!("  {short}  {:>9.1} MB  {kind}  {}", layer.size as f64 / 1e6, layer.reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_that_is_being_decided_is_open() {
        let layer = |lazy: serde_json::Value| {
            serde_json::json!({
                "diff_id": "sha256:0123456789abcdef", "blob": "sha256:b", "size": 1_500_000, "lazy": lazy, "reason": "because"
            })
        };
        let answer = serde_json::json!({
            "image": "app", "lazy": true, "looking": 0,
            "images": [{
                "manifest": "sha256:m", "config": "sha256:c", "namespace": "k8s.io", "names": [], "decided": null,
                "layers": [layer(true.into()), layer(false.into()), layer(serde_json::Value::Null)]
            }]
        });
        let why: Why = serde_json::from_value(answer).unwrap();
        let lines: Vec<_> = why.images[0].layers.iter().map(line).collect();
        assert_eq!(
            lines,
            ["lazy ", "plain", "open "]
                .map(|kind| { format!("  0123456789ab        1.5 MB  {kind}  because") })
        );
    }
}
