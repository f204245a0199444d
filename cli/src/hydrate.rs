//! `darter hydrate IMAGE`: brings what lazy layers spared containerd into its content store, so that `push`, `save` and
//! `commit` find everything, and the image stays usable without Darter.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use containerd_client::services::v1::Image;
use darter_registry::ImageRef;

use crate::admin;
use crate::inventory::{Inventory, Platform};
use crate::socket::Socket;

#[derive(Debug, clap::Args)]
pub struct Options {
    /// The image, as docker and nerdctl write it
    image: String,
    #[command(flatten)]
    node: Node,
    /// containerd's namespace: "k8s.io" is kubelet's
    #[arg(long, short, default_value = "default", env = "CONTAINERD_NAMESPACE")]
    namespace: String,
}

/// Where this node's containerd and Darter are.
#[derive(Debug, Clone, clap::Args)]
pub struct Node {
    #[command(flatten)]
    pub containerd: Socket,
    /// The node daemon's state directory
    #[arg(long, value_name = "DIR", default_value = "/var/lib/darter")]
    pub root: PathBuf,
}

pub async fn run(options: Options) -> Result<()> {
    let inventory = Inventory::connect(&options.node.containerd.path()).await?;
    let images = inventory.images(&options.namespace).await?;
    let image = find(&images, &options.image).with_context(|| {
        format!(
            "containerd has no image {} in namespace {}; `ctr -n {1} images ls` lists what it has",
            options.image, options.namespace
        )
    })?;
    let names = [image];
    let work = hydrate(&inventory, &options.node.root, &options.namespace, &names);
    let brought = tokio::select! {
        brought = work => brought?,
        () = darter_daemon::shutdown::signal() => bail!("interrupted; hydrate again to go on"),
    };
    println!(
        "{}: all {} layer blobs are in containerd's content store, {} brought now",
        image.name, brought.all, brought.new
    );
    Ok(())
}

fn find<'a>(images: &'a [Image], name: &str) -> Option<&'a Image> {
    let full = name.parse::<ImageRef>().map(|image| image.to_string()).unwrap_or_default();
    images.iter().find(|image| image.name == name || image.name == full)
}

/// Layer blobs of an image.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Brought {
    pub all: usize,
    pub new: usize,
}

/// Brings the blobs of one image that has these names, all with the same target. One name that says a registry is enough.
pub async fn hydrate(
    inventory: &Inventory,
    root: &Path,
    namespace: &str,
    names: &[&Image],
) -> Result<Brought> {
    let mut brought = Brought::default();
    let target = names[0].target.as_ref().context("containerd's image has no content")?;
    for platform in inventory.platforms(namespace, &target.digest).await? {
        // An index lists platforms that were never pulled: what has no configuration here isn't there at all.
        if inventory.has(namespace, &platform.config).await? {
            platform_blobs(inventory, root, namespace, names, &platform, &mut brought).await?;
        }
    }
    Ok(brought)
}

async fn platform_blobs(
    inventory: &Inventory,
    root: &Path,
    namespace: &str,
    names: &[&Image],
    platform: &Platform,
    brought: &mut Brought,
) -> Result<()> {
    name_layers(inventory, namespace, platform).await?;
    for (index, layer) in platform.layers.iter().enumerate() {
        brought.all += 1;
        if inventory.has(namespace, &layer.digest).await? {
            continue;
        }
        eprintln!(
            "{}: layer {} of {} ({:.1} MB)",
            names[0].name,
            index + 1,
            platform.layers.len(),
            layer.size as f64 / 1e6
        );
        let reference =
            names.iter().find(|image| !image.name.starts_with("sha256:")).map(|image| image.name.as_str());
        let mut query =
            format!("/blob?namespace={namespace}&manifest={}&blob={}", platform.manifest, layer.digest);
        if let Some(reference) = reference {
            query.push_str(&format!("&image={}", admin::url_encoded(reference)));
        }
        let done: Result<serde_json::Value> = admin::post(root, &query).await;
        done.with_context(|| format!("layer {} of {} ({})", index + 1, names[0].name, layer.digest))?;
        brought.new += 1;
    }
    Ok(())
}

/// containerd's garbage collection keeps what the manifest's labels name; a client that pulls lazily may have left some out.
async fn name_layers(inventory: &Inventory, namespace: &str, platform: &Platform) -> Result<()> {
    let labels = inventory.labels(namespace, &platform.manifest).await?.unwrap_or_default();
    let missing = missing_labels(&labels, platform);
    if missing.is_empty() {
        Ok(())
    } else {
        inventory.set_labels(namespace, &platform.manifest, missing).await
    }
}

fn missing_labels(labels: &HashMap<String, String>, platform: &Platform) -> HashMap<String, String> {
    let named: Vec<&String> = labels
        .iter()
        .filter(|(key, _)| key.starts_with("containerd.io/gc.ref.content"))
        .map(|(_, value)| value)
        .collect();
    let layers = platform.layers.iter().enumerate();
    let missing = layers.filter(|(_, layer)| !named.iter().any(|name| **name == layer.digest.to_string()));
    missing
        .map(|(index, layer)| (format!("containerd.io/gc.ref.content.l.{index}"), layer.digest.to_string()))
        .collect()
}

#[cfg(test)]
mod tests {
    use darter_registry::Descriptor;
    use darter_types::Digest;

    use super::*;

    #[test]
    fn only_what_no_label_names_is_added() {
        let (first, second) = (Digest::of(b"1"), Digest::of(b"2"));
        let platform = Platform {
            manifest: Digest::of(b"m"),
            config: Digest::of(b"c"),
            layers: [first, second].map(|digest| Descriptor::new("", digest, 1)).to_vec(),
        };
        let labels = HashMap::from([("containerd.io/gc.ref.content.l.7".to_owned(), first.to_string())]);
        let missing = missing_labels(&labels, &platform);
        assert_eq!(
            missing,
            HashMap::from([("containerd.io/gc.ref.content.l.1".to_owned(), second.to_string())])
        );
    }

    #[test]
    fn short_names_find_their_image() {
        let image = |name: &str| Image { name: name.into(), ..Default::default() };
        let images = [image("docker.io/library/alpine:latest"), image("sha256:aa")];
        assert_eq!(find(&images, "alpine").unwrap().name, images[0].name);
        assert!(find(&images, "busybox").is_none());
    }
}
