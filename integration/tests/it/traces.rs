//! Traces: one read and one pull, followed from the node to the seed, as a collector gets them.

use anyhow::{Context, Result, ensure};
use darter_integration::cluster::Options;
use darter_integration::collector::{self, Collector, Span};
use darter_integration::command::eventually;
use darter_integration::world::Host;

use crate::site::{Data, Site, start_again};

pub const STORIES: crate::Stories = &[
    ("a_read_is_followed_to_the_peer_that_serves_it", 120, a_read_is_followed),
    ("a_pull_is_followed_from_prepare_to_the_mount", 120, a_pull_is_followed),
    ("a_dead_collector_harms_nothing", 180, a_dead_collector_harms_nothing),
];

const FILES: usize = 12;
const FILE_LEN: usize = 300_000;
const NODE: &str = "darter-snapshotter";
const SEED: &str = "darter-peer";

/// A seed and a node; the seed learns from its environment where the collector is, the node from its configuration, and
/// follows every read.
fn site(node_endpoint: impl Fn(&Host) -> String, seed_endpoint: &str) -> Result<(Site, Host)> {
    // What comes was asked for by a container.
    let node_config = "background_idle_ms = 3600000\nprefetch = false\n".to_owned();
    let mut site = Site::new(Options { nodes: 1, node_config, ..Options::default() })?;
    let host = site.world.host("collector")?;
    let of_seed =
        if seed_endpoint.is_empty() { collector::endpoint(&host) } else { seed_endpoint.to_owned() };
    site.cluster.seed.stop(30)?;
    site.cluster.seed.set_environment(vec![("OTEL_EXPORTER_OTLP_ENDPOINT".to_owned(), of_seed)]);
    site.cluster.start_seed()?;
    let node = &mut site.cluster.nodes[0];
    node.snapshotter.stop(30)?;
    node.snapshotter.set("traces.endpoint", &format!("{:?}", node_endpoint(&host)))?;
    node.snapshotter.set("traces.share", "1")?;
    start_again(node)?;
    Ok((site, host))
}

fn followed_site() -> Result<(Site, Collector)> {
    let (site, host) = site(collector::endpoint, "")?;
    let collector = Collector::start(&host)?;
    Ok((site, collector))
}

/// The spans of one trace.
struct Trace(Vec<Span>);

impl Trace {
    fn of(first: &Span, all: &[Span]) -> Self {
        Self(all.iter().filter(|span| span.trace == first.trace).cloned().collect())
    }

    /// Those of this service and name directly below.
    fn below(&self, parent: &Span, service: &str, name: &str) -> Vec<&Span> {
        let is_it = |span: &&Span| span.service == service && span.name == name && span.parent == parent.id;
        self.0.iter().filter(is_it).collect()
    }

    /// One of them that says this.
    fn one(&self, parent: &Span, service: &str, name: &str, (key, value): (&str, &str)) -> Result<&Span> {
        let all = self.below(parent, service, name);
        let found = all.iter().find(|span| span.says(key) == value);
        found.copied().with_context(|| format!("below {parent:?} no {name} with {key}={value}: {all:?}"))
    }
}

/// The first spans of traces with this name.
fn firsts<'a>(all: &'a [Span], name: &str) -> Vec<&'a Span> {
    all.iter().filter(|span| span.name == name && span.parent.is_empty()).collect()
}

fn a_read_is_followed() -> Result<()> {
    let (site, collector) = followed_site()?;
    let data = Data::new(&site.blobs, 71, FILES, FILE_LEN)?;
    let reference = site.add(&data, "traces/read");
    site.pull(0, &data, &reference)?;
    site.check(0, &data, &reference, "reads")?;
    // Each of the two sends by itself.
    eventually("reads are followed to the seed, and nothing is sent that nobody asked for", 30, || {
        let all = collector.spans();
        let asks = |span: &&Span| span.name == "ask parent";
        let is_asked = |upload: &Span| {
            all.iter().filter(asks).any(|ask| (&ask.trace, &ask.id) == (&upload.trace, &upload.parent))
        };
        let mut uploads = all.iter().filter(|span| span.name == "upload");
        Ok(whole_reads(&all) > 0 && uploads.all(is_asked))
    })?;
    let all = collector.spans();
    ensure!(all.iter().all(|span| span.ended_ns >= span.begun_ns && span.fault.is_empty()), "{all:#?}");
    Ok(())
}

/// Reads that went all the way: this node, its question, the seed's answer.
fn whole_reads(all: &[Span]) -> usize {
    let reads = firsts(all, "read");
    reads.iter().filter(|read| whole_read(read, &Trace::of(read, all)).is_ok()).count()
}

fn whole_read(read: &Span, trace: &Trace) -> Result<()> {
    ensure!(read.service == NODE && !read.says("darter.inode").is_empty() && read.says("darter.size") != "0");
    ensure!(read.says("darter.pieces_from_disk") == "0", "{read:?}");
    ensure!(read.says("darter.path").starts_with('/'), "{read:?}");
    let pieces = trace.below(read, NODE, "piece");
    let piece = pieces.first().context("no piece was waited for")?;
    let asked = trace.one(piece, NODE, "ask parent", ("darter.peer", "seed"))?;
    let sent = trace.one(asked, SEED, "upload", ("darter.bytes", asked.says("darter.bytes")))?;
    for key in ["darter.layer", "darter.piece"] {
        ensure!(!sent.says(key).is_empty() && sent.says(key) == piece.says(key), "{sent:?} of {piece:?}");
    }
    ensure!(trace.below(piece, NODE, "check and keep piece").len() == 1, "{trace:?}", trace = trace.0);
    Ok(())
}

fn a_pull_is_followed() -> Result<()> {
    let (site, collector) = followed_site()?;
    let data = Data::new(&site.blobs, 72, FILES, FILE_LEN)?;
    let reference = site.add(&data, "traces/pull");
    site.pull(0, &data, &reference)?;
    site.check(0, &data, &reference, "reads")?;
    let mut last = Ok(());
    let whole = eventually("the pull is followed to the mount", 30, || {
        last = whole_pull(&collector.spans(), &data);
        Ok(last.is_ok())
    });
    last.and(whole)?;
    ensure!(!site.stub.was_followed(), "a registry was told of a trace");
    Ok(())
}

fn whole_pull(all: &[Span], data: &Data) -> Result<()> {
    let layers = &data.image.layers;
    let pulls = firsts(all, "pull");
    let is_it = |pull: &&&Span| pull.says("darter.image") == data.image.manifest.digest;
    let pull = *pulls.iter().find(is_it).with_context(|| format!("no pull of the image: {pulls:?}"))?;
    let trace = Trace::of(pull, all);
    ensure!(pull.service == NODE);
    let answers = trace.below(pull, NODE, "prepare");
    ensure!(answers.len() >= layers.len(), "{answers:?}");
    ensure!(answers.iter().all(|answer| answer.says("darter.answer") == "lazy"), "{answers:?}");
    trace.one(pull, NODE, "decide", ("darter.layers", &layers.len().to_string()))?;
    for layer in layers {
        let found = trace.one(pull, NODE, "find map", ("darter.layer", &layer.diff_id))?;
        let asked = trace.one(found, NODE, "ask for map", ("darter.peer", "seed"))?;
        let given = trace.one(asked, SEED, "give map", ("darter.layer", &layer.diff_id))?;
        let making = trace.below(given, SEED, "make layer");
        let made = making.first().with_context(|| format!("no making below {given:?}"))?;
        trace.one(made, SEED, "read blob", ("darter.blob", &layer.blob.digest))?;
        ensure!(trace.below(made, SEED, "sign and keep map").len() == 1, "it was not signed once");
        ensure!(trace.below(given, SEED, "send map").len() == 1, "it was not sent once");
        ensure!(trace.below(asked, NODE, "check and keep map").len() == 1, "it was not kept once");
    }
    ensure!(!trace.below(pull, NODE, "mount").is_empty(), "nothing was mounted");
    ensure!(trace.0.iter().all(|span| span.fault.is_empty()), "{:#?}", trace.0);
    Ok(())
}

/// The node's collector is connected to and says nothing, the seed's isn't there.
fn a_dead_collector_harms_nothing() -> Result<()> {
    let (mut site, host) = site(collector::endpoint, "http://127.0.0.1:9")?;
    let deaf = collector::deaf(&host)?;
    let data = Data::new(&site.blobs, 73, FILES, FILE_LEN)?;
    let reference = site.add(&data, "traces/dead");
    site.pull(0, &data, &reference)?;
    site.check(0, &data, &reference, "reads")?;
    for (program, port) in [(&site.node(0).snapshotter, 7484), (&site.cluster.seed, 7483)] {
        let url = format!("http://127.0.0.1:{port}/metrics");
        eventually("what could not be told is counted", 60, || {
            let told = program.host().run("curl").args(["-sS", &url]).timeout(20).check()?;
            let is_failed = |line: &str| line.starts_with("darter_traces_spans_total{result=\"failed\"}");
            let failed = told.lines().find(|line| is_failed(line)).context("it is not told")?;
            Ok(!failed.ends_with(" 0.0"))
        })?;
    }
    let log = site.cluster.nodes[0].snapshotter.daemon()?.log_text();
    ensure!(!log.contains("ERROR") && log.matches("does not take traces").count() == 1, "{log}");
    // Both end as they should, with something still to be told.
    site.check(0, &data, &reference, "reads-again")?;
    site.cluster.nodes[0].snapshotter.stop(30)?;
    site.cluster.seed.stop(30)?;
    drop(deaf);
    Ok(())
}
