//! Kills: what the node daemon had stored when it got SIGKILL is never a wrong byte afterwards.

use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use darter_integration::cluster::{Node, Options};
use darter_integration::containerd::{Containerd, DARTER, Generation, OVERLAYFS};
use darter_integration::image::Image;
use darter_integration::tree::{self, Tree};

use crate::harness::busybox;
use crate::site::{Data, Site, found_again, mount, next_random};

pub const STORIES: crate::Stories = &[("fifty_kills_leave_no_wrong_byte", 400, fifty_kills)];

const KILLS: u64 = 50;
/// Each image is met twice: new, and partly or wholly there.
const KILLS_PER_IMAGE: u64 = 2;
const FILES: usize = 300;
const FILE_LEN: usize = 9_000;
/// Slow enough that a pull with all reads takes longer than the longest wait before a kill.
const LINK_MBIT: u32 = 40;
const WAIT_MS_MAX: u64 = 1_200;
const SEED: u64 = 20_261_122;

/// At a random moment of pull and reads the daemon is killed and started; then every byte of the root is compared.
fn fifty_kills() -> Result<()> {
    let mut site = Site::new(Options { nodes: 1, ..Options::default() })?;
    let plain = Containerd::start(&site.world, &site.world.host("plain")?, Generation::Two, None)?;
    let below = busybox(&site.blobs, &[])?.layers;
    site.node(0).host.limit(LINK_MBIT)?;
    let mut random = SEED;
    let (mut met, since) = (None, SystemTime::now());
    for kill in 0..KILLS {
        if kill % KILLS_PER_IMAGE == 0 {
            let data = Data::over(&below, &site.blobs, kill, FILES, FILE_LEN)?;
            let reference = site.add(&data, &format!("kills/{kill}"));
            let truth = truth(&plain, &data.image, &reference)?;
            met = Some((data.image, reference, truth));
        }
        let (image, reference, truth) = met.as_ref().expect("the first round meets an image");
        let wait = Duration::from_millis(next_random(&mut random) % WAIT_MS_MAX);
        let node = &mut site.cluster.nodes[0];
        kill_while_reading(node, image, reference, kill, wait)?;
        found_again(node)?;
        pull_and_compare(node, image, reference, truth, kill, since)
            .with_context(|| format!("kill {kill}, after {wait:?}"))?;
        if kill % KILLS_PER_IMAGE == KILLS_PER_IMAGE - 1 {
            node.containerd.remove_image(reference)?;
        }
    }
    Ok(())
}

/// What overlayfs shows.
fn truth(plain: &Containerd, image: &Image, reference: &str) -> Result<Tree> {
    plain.ctr_pull(reference, OVERLAYFS).check()?;
    let mounted = plain.mount_snapshot(OVERLAYFS, &image.top_chain_id(), "truth", true)?;
    tree::walk(mounted.path())
}

fn kill_while_reading(
    node: &mut Node,
    image: &Image,
    reference: &str,
    kill: u64,
    wait: Duration,
) -> Result<()> {
    let containerd = &node.containerd;
    let socket = node.socket().to_owned();
    let snapshotter = &mut node.snapshotter;
    thread::scope(|scope| {
        // What a pull meets when the daemon dies is its own business, as long as it ends.
        let reading = scope.spawn(move || -> Result<()> {
            let key = format!("killed-{kill}");
            let pulled = containerd.ctr_pull(reference, DARTER).timeout(30).check();
            let mounted =
                pulled.and_then(|_| containerd.mount_snapshot(DARTER, &image.top_chain_id(), &key, true));
            mounted.map_or(Ok(()), |mounted| tree::walk(mounted.path()).map(drop))
        });
        thread::sleep(wait);
        snapshotter.kill();
        snapshotter.start(|| std::os::unix::net::UnixStream::connect(&socket).is_ok())?;
        // Who reads waits for the next one, and meets no error.
        reading.join().expect("no panic")
    })
}

fn pull_and_compare(
    node: &Node,
    image: &Image,
    reference: &str,
    truth: &Tree,
    kill: u64,
    since: SystemTime,
) -> Result<()> {
    node.containerd.ctr_pull(reference, DARTER).check()?;
    let mounted = mount(node, image, &format!("after-{kill}"))?;
    tree::compare(truth, &tree::walk(mounted.path())?, since)
}
