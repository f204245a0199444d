//! Once: what somebody has brought into the mesh costs the registry nothing any more.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use darter_integration::command::{Run, eventually};
use darter_integration::darter::program;
use darter_integration::stub::Fault;

use crate::site::{Data, Site};

pub const STORIES: crate::Stories = &[
    ("darter_preheat_waits_until_all_is_made", 180, darter_preheat_waits),
    ("several_images_are_preheated_for_all_platforms", 180, several_images),
    ("an_image_preheated_at_all_seeds_needs_one_of_them", 180, at_all_seeds),
    ("a_cancelled_or_late_preheat_ends_at_once", 180, cancelled_or_late),
];

pub fn order(site: &Site, words: &[&str]) -> Run {
    let manager = &site.cluster.manager;
    let token = manager.folder().join("root/api-token");
    let rest = format!("http://{}:7480", manager.host().address());
    let preheat = manager.host().run(program("darter")).arg("preheat").args(words);
    preheat.args(["--manager", &rest, "--token-file"]).arg(token.display())
}

fn preheat(site: &Site, reference: &str) -> Run {
    order(site, &[reference, "--wait"])
}

fn several_images() -> Result<()> {
    let site = Site::with_nodes(0)?;
    let plain = Data::new(&site.blobs, 1, 2, 100_000)?;
    let (amd64, other) = (Data::new(&site.blobs, 2, 2, 100_000)?, Data::new(&site.blobs, 3, 2, 100_000)?);
    let config = serde_json::json!({
        "architecture": "arm64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": other.image.layers.iter().map(|l| &l.diff_id).collect::<Vec<_>>()},
    });
    let arm64 = site.blobs.image_with(&other.image.layers, &serde_json::to_vec(&config)?)?;
    let first = site.add(&plain, "several/plain");
    site.stub.add(&amd64.image, "several/index");
    site.stub.add(&arm64, "several/index");
    let index = site.stub.add_index(&[("amd64", &amd64.image), ("arm64", &arm64)], "several/index")?;
    let said = order(&site, &[&first, &index, "--all-platforms", "--all-seeds", "--wait"]).check()?;
    // Busybox's two layers are in all three images.
    ensure!(said.contains(&format!("{first} at seed: 3 layers ready")), "{said}");
    ensure!(said.contains(&format!("{index} at seed: 4 layers ready")), "{said}");
    for data in [&plain, &amd64, &other] {
        let reads = site.stub.reads_of(data.top_blob());
        ensure!(reads == 1, "a layer was read {reads} times");
    }
    let absent = format!("{}/no/such:latest", site.stub.authority());
    let failed = order(&site, &[&first, &absent, "--seed", "seed", "--wait"]).output()?;
    ensure!(!failed.success() && failed.said().contains("1 of 2 failed"), "{}", failed.said());
    ensure!(failed.stdout.contains(&format!("{first} at seed: 3 layers ready")), "{}", failed.said());
    let unknown = order(&site, &[&first, "--seed", "nobody"]).output()?;
    ensure!(unknown.said().contains("no seed \"nobody\" has joined"), "{}", unknown.said());
    Ok(())
}

fn at_all_seeds() -> Result<()> {
    let mut site = Site::with_nodes(1)?;
    site.cluster.add_seed(&site.world, "second")?;
    let (data, later) = (Data::new(&site.blobs, 4, 4, 100_000)?, Data::new(&site.blobs, 5, 2, 100_000)?);
    let reference = site.add(&data, "seeds/all");
    let said = order(&site, &[&reference, "--all-seeds", "--wait"]).check()?;
    for seed in ["seed", "second"] {
        ensure!(said.contains(&format!("{reference} at {seed}: 3 layers ready")), "{said}");
    }
    let reads = || site.stub.reads_of(data.top_blob());
    let before = reads();
    ensure!(before <= 2, "the layer was read {before} times for two seeds");
    site.cluster.seed.kill();
    site.pull(0, &data, &reference)?;
    site.check(0, &data, &reference, "without-the-first")?;
    ensure!(reads() == before, "the layer was read anew with one seed left");
    let id = order(&site, &[&site.add(&later, "seeds/one")]).check()?.trim().to_owned();
    eventually("the seed that is left has an order for one of them", 60, || {
        let preheat = site.cluster.rest("GET", &format!("/api/v1/preheats/{id}"), "")?;
        ensure!(preheat["state"] != "failed", "{preheat}");
        Ok(preheat["state"] == "succeeded" && preheat["targets"][0]["seed"] == "second")
    })
}

fn cancelled_or_late() -> Result<()> {
    let site = Site::with_nodes(0)?;
    let data = Data::new(&site.blobs, 1, 40, 300_000)?;
    let reference = site.add(&data, "cancelled");
    // All of it takes two minutes.
    site.stub.fault(data.top_blob(), Fault::Slow(100_000));
    let id = order(&site, &[&reference]).check()?.trim().to_owned();
    let state = || site.cluster.rest("GET", &format!("/api/v1/preheats/{id}"), "");
    eventually("the layer is being read", 60, || {
        let layers = state()?["targets"][0]["layers"].clone();
        Ok(layers.as_array().is_some_and(|layers| {
            layers.iter().filter(|layer| layer["done"] == true).count() == 2
                && layers.iter().any(|layer| layer["done"] == false && layer["read"].as_u64() > Some(0))
        }))
    })?;
    let received = || Ok::<_, anyhow::Error>(site.cluster.seed.host().traffic()?.received);
    let reads_no_more = || {
        eventually("the seed reads no more", 20, || {
            let before = received()?;
            thread::sleep(Duration::from_secs(2));
            Ok(received()? - before < 20_000)
        })
    };
    let said = order(&site, &["--cancel", &id]).check()?;
    ensure!(said.contains("cancelled") && state()?["state"] == "cancelled", "{said}");
    reads_no_more()?;
    let late = order(&site, &[&reference, "--wait", "--timeout", "5s"]).output()?;
    ensure!(!late.success() && late.said().contains("not done within 5 s"), "{}", late.said());
    let reads = || site.stub.reads_of(data.top_blob());
    ensure!(reads() == 2, "the layer was asked for {} times", reads());
    reads_no_more()?;
    site.stub.heal(data.top_blob());
    order(&site, &[&reference, "--wait"]).check()?;
    ensure!(reads() == 3, "the layer was asked for {} times", reads());
    Ok(())
}

fn darter_preheat_waits() -> Result<()> {
    let site = Site::with_nodes(1)?;
    let data = Data::new(&site.blobs, 1, 12, 300_000)?;
    let reference = site.add(&data, "once/preheated");
    let said = preheat(&site, &reference).check()?;
    ensure!(said.contains("3 layers ready"), "{said}");
    let reads =
        || data.image.layers.iter().map(|layer| site.stub.reads_of(&layer.blob.digest)).sum::<usize>();
    ensure!(reads() == data.image.layers.len(), "the seed read the layers {} times", reads());
    site.pull(0, &data, &reference)?;
    site.check(0, &data, &reference, "warm")?;
    ensure!(reads() == data.image.layers.len(), "a layer was read from the registry after the preheat");
    let absent = preheat(&site, &format!("{}/no/such:latest", site.stub.authority())).output()?;
    ensure!(!absent.success() && absent.said().contains("failed"), "{}", absent.said());
    Ok(())
}
