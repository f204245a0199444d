//! Registries that are ill: busy, faint, breaking off, sending their readers elsewhere. It is ridden out, or told.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use darter_integration::cluster::{Cluster, Node, Options};
use darter_integration::command::eventually;
use darter_integration::containerd::{Containerd, DARTER, OVERLAYFS};
use darter_integration::darter::docker_config;
use darter_integration::ill::{Ill, Illness};
use darter_integration::image::Blobs;
use darter_integration::registry::{PASSWORD, Registry, USER};
use darter_integration::world::World;

use crate::never_worse::{End, end};
use crate::site::{Data, SUM};

pub const STORIES: crate::Stories = &[
    ("an_ill_registry_is_ridden_out", 300, an_ill_registry_is_ridden_out),
    ("a_registry_that_stays_ill_is_left_to_containerd", 300, a_registry_that_stays_ill),
];

const FILES: usize = 6;
const FILE_LEN: usize = 1_000_000;

/// The fields are dropped in this order: the world last.
struct Site {
    cluster: Cluster,
    ill: Ill,
    blobs: Blobs,
    registry: Registry,
    world: World,
}

impl Site {
    fn new(node_config: &str) -> Result<Self> {
        let world = World::new()?;
        let registry = Registry::start(&world, "registry")?;
        let blobs = Blobs::open(world.folder("blobs")?)?;
        let ill = Ill::start(&world, &registry, &blobs)?;
        let options = Options { nodes: 1, node_config: node_config.to_owned(), ..Options::default() };
        let cluster = Cluster::start(&world, &registry, options)?;
        let authority = ill.authority();
        let node = &cluster.nodes[0];
        node.containerd.plain_http(&authority)?;
        docker_config(&node.snapshotter.folder().join("docker"), &authority)?;
        let site = Self { cluster, ill, blobs, registry, world };
        let folder = site.world.folder("seed/certs.d")?.join(&authority);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("hosts.toml"), format!("server = \"http://{authority}\"\n"))?;
        Ok(site)
    }

    fn node(&self) -> &Node {
        &self.cluster.nodes[0]
    }

    fn containerd(&self) -> &Containerd {
        &self.node().containerd
    }

    /// An image whose topmost layer, with the data, is ill.
    fn stock(&self, salt: u64, name: &str, illness: Illness) -> Result<(Data, String)> {
        let data = Data::new(&self.blobs, salt, FILES, FILE_LEN)?;
        self.registry.push(&self.blobs, &data.image, name)?;
        self.ill.afflict(data.top_blob(), illness);
        Ok((data, self.ill.reference(name)))
    }

    fn check(&self, data: &Data, reference: &str, id: &str) -> Result<()> {
        let run = self.containerd().ctr_run_command(reference, DARTER, id, &["sh", "-c", SUM]);
        let ran = run.timeout(150).output()?;
        ensure!(ran.stdout.starts_with(&data.sum), "not {}: {}", data.sum, ran.said());
        Ok(())
    }

    fn why(&self, reference: &str) -> Result<String> {
        self.node().darter("why").arg(reference).check()
    }
}

fn an_ill_registry_is_ridden_out() -> Result<()> {
    let site = Site::new("")?;
    let illnesses = [
        ("busy", Illness::Busy { times: 6, retry_after: None }),
        ("asks-to-wait", Illness::Busy { times: 3, retry_after: Some(2) }),
        ("faint", Illness::Faint { times: 5 }),
        ("resets", Illness::Resets(1 << 20)),
        ("signed", Illness::Signed(1 << 20)),
    ];
    for (salt, (name, illness)) in illnesses.into_iter().enumerate() {
        let ride = || {
            let (data, reference) = site.stock(salt as u64, &format!("ill/{name}"), illness)?;
            site.containerd().ctr_pull(&reference, DARTER).check()?;
            let blobs = site.containerd().layer_blobs(&data.image)?.len();
            ensure!(blobs == 0, "{blobs} layers were left to containerd:\n{}", site.why(&reference)?);
            site.check(&data, &reference, name)?;
            let blobs = site.containerd().layer_blobs(&data.image)?.len();
            ensure!(blobs == 0, "{blobs} layers were left to containerd later");
            was_ill(&site.ill, &data, illness)
        };
        ride().with_context(|| name)?;
    }
    Ok(())
}

/// The story was about what it says.
fn was_ill(ill: &Ill, data: &Data, illness: Illness) -> Result<()> {
    let asked = ill.asked(data.top_blob());
    let refused: Vec<_> = asked.iter().filter(|asked| asked.refused.is_some()).collect();
    match illness {
        Illness::Busy { times, retry_after } => {
            ensure!(refused.len() == times as usize, "refused {} times", refused.len());
            if let Some(wait) = retry_after.map(Duration::from_secs) {
                // Node and seed each wait for themselves, so of all requests only the last is sure to come late.
                let waited = asked.last().context("it was asked")?.at - refused[0].at;
                ensure!(waited >= wait, "asked again after {waited:?}");
            }
        }
        Illness::Faint { times } => {
            let heads = refused.iter().filter(|asked| asked.method == "HEAD").count();
            let gets = refused.len() - heads;
            ensure!((heads, gets) == (1, times as usize), "refused {heads} HEADs and {gets} GETs");
        }
        Illness::Resets(after) => {
            let reads = asked.iter().filter(|asked| asked.method == "GET").count() as u64;
            let size = (FILES * FILE_LEN) as u64;
            ensure!(reads > size / after, "only {reads} reads");
            ensure!(
                asked.iter().any(|asked| asked.headers.contains("range: bytes=")),
                "it began anew each time"
            );
        }
        Illness::Signed(_) => nothing_leaked(ill)?,
        Illness::HeadStatus(_) | Illness::Status(_) => {}
    }
    Ok(())
}

/// The other host was asked with good and with expired addresses, and never told the password.
fn nothing_leaked(ill: &Ill) -> Result<()> {
    let elsewhere = ill.asked_elsewhere();
    let (expired, good): (Vec<_>, Vec<_>) = elsewhere.iter().partition(|asked| asked.refused.is_some());
    ensure!(good.len() > 4 && expired.len() > 3, "{} good ones, {} expired", good.len(), expired.len());
    let secret = STANDARD.encode(format!("{USER}:{PASSWORD}"));
    for asked in &elsewhere {
        let text = format!("{}\n{}", asked.target, asked.headers);
        let leaks = text.contains("authorization") || text.contains(&secret) || text.contains(PASSWORD);
        ensure!(!leaks, "the other host was told: {text}");
    }
    Ok(())
}

const MOUNT_WAIT: Duration = Duration::from_secs(5);

fn a_registry_that_stays_ill() -> Result<()> {
    // Its second answer, too, comes before the decision is due, also on a busy machine.
    let config = format!("mount_wait_seconds = {}\nprepare_wait_ms = 3000\n", MOUNT_WAIT.as_secs());
    let site = Site::new(&config)?;
    left_to_containerd(&site, 1, 503, "503")?;
    left_to_containerd(&site, 2, 429, "429 Too Many Requests")?;
    refused_in_the_same_words(&site)?;
    told_and_made_up_for(&site)
}

/// It doesn't say in time whether it has the layer: containerd reads it, and all above it.
fn left_to_containerd(site: &Site, salt: u64, status: u16, words: &str) -> Result<()> {
    let (data, reference) = site.stock(salt, &format!("ill/head-{status}"), Illness::HeadStatus(status))?;
    let ours = end(site.containerd(), site.containerd().ctr_pull(&reference, DARTER), &reference, DARTER)?;
    ensure!(ours == End::Printed("hello from a layer\n".into()), "{status}: {ours:?}");
    let blobs = site.containerd().layer_blobs(&data.image)?;
    ensure!(blobs == [data.top_blob()], "{status}: left to containerd were {blobs:?}");
    let why = site.why(&reference)?;
    ensure!(why.contains(words), "no word of {words:?}:\n{why}");
    site.check(&data, &reference, &format!("plain-{status}"))
}

fn refused_in_the_same_words(site: &Site) -> Result<()> {
    let (_, reference) = site.stock(3, "ill/down", Illness::Status(503))?;
    let pull = |snapshotter: &str| {
        let pull = site.containerd().ctr_pull(&reference, snapshotter);
        end(site.containerd(), pull, &reference, snapshotter)
    };
    let (ours, plain) = (pull(DARTER)?, pull(OVERLAYFS)?);
    ensure!(ours == plain, "with Darter: {ours:?}; with overlayfs: {plain:?}");
    ensure!(plain.words()?.contains("503"), "{plain:?}");
    Ok(())
}

/// It has the layer and doesn't give it: whoever starts the container is told, and can when it is well again.
fn told_and_made_up_for(site: &Site) -> Result<()> {
    let (data, reference) = site.stock(4, "ill/faint", Illness::Faint { times: u32::MAX })?;
    site.containerd().ctr_pull(&reference, DARTER).check()?;
    let started = site.containerd().ctr_run(&reference, DARTER, "faint").output()?;
    let layer = &data.image.layers.last().context("it has layers")?.diff_id;
    ensure!(!started.success() && started.said().contains(layer.as_str()), "{}", started.said());
    // containerd, its shim and a busy machine add to it.
    ensure!(started.took < 4 * MOUNT_WAIT, "the start failed only after {:?}", started.took);
    site.ill.heal(data.top_blob());
    let mut tries = 0;
    eventually("the layer is there when the registry is well", 120, || {
        tries += 1;
        Ok(site.check(&data, &reference, &format!("well-{tries}")).is_ok())
    })
}
