//! `darter drain`: makes this node independent of Darter, image by image, and names what still hangs on it.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use containerd_client::services::v1::Image;

use crate::hydrate::{self, Node};
use crate::inventory::Inventory;

#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    node: Node,
    /// The name that containerd's configuration gives to Darter
    #[arg(long, default_value = "darter")]
    snapshotter: String,
    /// Remove the images rather than bring their layers into containerd's content store
    #[arg(long)]
    remove: bool,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

/// The label by which an image's configuration keeps its snapshots.
fn snapshot_label(snapshotter: &str) -> String {
    format!("containerd.io/gc.ref.snapshot.{snapshotter}")
}

pub async fn run(options: Options) -> Result<()> {
    let inventory = Inventory::connect(&options.node.containerd.path()).await?;
    let work = drain(&options, &inventory);
    tokio::select! {
        drained = work => drained,
        () = darter_daemon::shutdown::signal() => bail!("interrupted; drain again to go on"),
    }
}

async fn drain(options: &Options, inventory: &Inventory) -> Result<()> {
    let (mut used, mut failed) = (0, 0);
    for namespace in inventory.namespaces().await? {
        if inventory.snapshots(&namespace, &options.snapshotter).await?.is_empty() {
            continue;
        }
        let images = images_of(options, inventory, &namespace).await?;
        for names in images.values() {
            if let Err(error) = release(options, inventory, &namespace, names).await {
                eprintln!("{namespace}: {}: {error:#}", names[0].name);
                failed += 1;
            }
        }
        if !options.dry_run {
            inventory.collect_garbage(&namespace).await?;
        }
        used += still_used(options, inventory, &namespace).await?;
    }
    match (used, failed) {
        (0, 0) if options.dry_run => println!("nothing would hold Darter then"),
        (0, 0) => println!(
            "nothing on this node needs Darter any more; `darter setup containerd --undo` comes next"
        ),
        (0, failed) => {
            bail!("{failed} images still need Darter, for the reasons above; --remove removes them instead")
        }
        (used, _) => bail!(
            "{used} containers or snapshots still use Darter: stop and remove them (kubelet: `kubectl drain` the node), then drain again"
        ),
    }
    Ok(())
}

/// The images that hold snapshots of ours, by what they point at: an image of kubelet's has three names.
async fn images_of(
    options: &Options,
    inventory: &Inventory,
    namespace: &str,
) -> Result<BTreeMap<String, Vec<Image>>> {
    let mut found: BTreeMap<String, Vec<Image>> = BTreeMap::new();
    let label = snapshot_label(&options.snapshotter);
    for image in inventory.images(namespace).await? {
        let target = image.target.clone().unwrap_or_default().digest;
        for platform in inventory.platforms(namespace, &target).await? {
            let labels = inventory.labels(namespace, &platform.config).await?.unwrap_or_default();
            if labels.contains_key(&label) {
                found.entry(target.clone()).or_default().push(image.clone());
                break;
            }
        }
    }
    Ok(found)
}

/// Takes an image's snapshots from it, once it can do without.
async fn release(options: &Options, inventory: &Inventory, namespace: &str, names: &[Image]) -> Result<()> {
    if options.dry_run {
        println!(
            "{namespace}: {} would be {}",
            names[0].name,
            if options.remove { "removed" } else { "hydrated" }
        );
        return Ok(());
    }
    if options.remove {
        for image in names {
            inventory.remove_image(namespace, &image.name).await?;
        }
        println!("{namespace}: {} is removed", names[0].name);
        return Ok(());
    }
    let every: Vec<&Image> = names.iter().collect();
    let brought = hydrate::hydrate(inventory, &options.node.root, namespace, &every).await?;
    let target = names[0].target.clone().unwrap_or_default().digest;
    for platform in inventory.platforms(namespace, &target).await? {
        if inventory.has(namespace, &platform.config).await? {
            let gone = [(snapshot_label(&options.snapshotter), String::new())].into();
            inventory.set_labels(namespace, &platform.config, gone).await?;
        }
    }
    println!(
        "{namespace}: {} is containerd's alone ({} of {} layer blobs brought)",
        names[0].name, brought.new, brought.all
    );
    Ok(())
}

/// Names who uses our snapshots, and says how many.
async fn still_used(options: &Options, inventory: &Inventory, namespace: &str) -> Result<usize> {
    let containers = inventory.containers(namespace, &options.snapshotter).await?;
    for container in &containers {
        eprintln!("{namespace}: container {} ({}) uses Darter", container.id, container.image);
    }
    if !containers.is_empty() || options.dry_run {
        return Ok(containers.len());
    }
    let left = inventory.snapshots(namespace, &options.snapshotter).await?;
    for name in &left {
        eprintln!("{namespace}: snapshot {name} is held by a client or a lease");
    }
    Ok(left.len())
}
