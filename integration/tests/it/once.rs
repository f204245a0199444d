//! Once: what somebody has brought into the mesh costs the registry nothing any more.

use anyhow::{Result, ensure};
use darter_integration::command::Run;
use darter_integration::darter::program;

use crate::site::{Data, Site};

pub const STORIES: crate::Stories = &[("darter_preheat_waits_until_all_is_made", 180, darter_preheat_waits)];

fn preheat(site: &Site, reference: &str) -> Run {
    let manager = &site.cluster.manager;
    let token = manager.folder().join("root/api-token");
    let rest = format!("http://{}:7480", manager.host().address());
    let preheat = manager.host().run(program("darter")).args(["preheat", reference, "--wait"]);
    preheat.args(["--manager", &rest, "--token-file"]).arg(token.display())
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
