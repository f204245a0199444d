//! `bench cold-start`: Darter against overlayfs, in turn, on the current containerd.
//!
//! A pair is one run of overlayfs (A) and one of Darter (B) minutes apart at most, in changing order; what counts is the median
//! of the ratios B/A. In the case of a changed command A is Darter as well, which fetches nothing ahead. Before each run every store on the node is wiped, its daemons are restarted and the page cache is dropped.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use darter_integration::cluster::{Cluster, Node, Options};
use darter_integration::command::{Run, eventually};
use darter_integration::containerd::{Containerd, DARTER, OVERLAYFS, cache};
use darter_integration::darter::{Read, Requests, fuse_requests, trace};
use darter_integration::image::Image;
use darter_integration::registry::Registry;
use darter_integration::steps::Steps;
use darter_integration::world::{World, sweep_on_signal};
use darter_integration::{procfs, sci};

const IMAGE: &str = "bench/sci";
const PAIRS: usize = 5;
const RATES: [Option<u32>; 2] = [None, Some(200)];

fn main() -> ExitCode {
    sweep_on_signal();
    let words: Vec<String> = std::env::args().skip(1).collect();
    match arguments(&words).and_then(|arguments| cold_start(&arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

struct Arguments {
    pairs: usize,
    rates: Vec<Option<u32>>,
    scan: bool,
    /// Overlayfs too; without it there are counts, and nothing to compare times with.
    plain: bool,
    only: Option<String>,
}

fn arguments(words: &[String]) -> Result<Arguments> {
    let mut arguments =
        Arguments { pairs: PAIRS, rates: RATES.to_vec(), scan: true, plain: true, only: None };
    let mut words = words.iter();
    ensure!(words.next().is_some_and(|word| word == "cold-start"), "which benchmark? cold-start");
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} takes a value"));
        match word.as_str() {
            "--pairs" => arguments.pairs = value()?.parse()?,
            "--rate" => arguments.rates = vec![Some(value()?.parse()?)],
            "--unthrottled" => arguments.rates = vec![None],
            "--no-scan" => arguments.scan = false,
            "--ours" => arguments.plain = false,
            "--only" => arguments.only = Some(value()?.clone()),
            other => {
                bail!(
                    "{other} is not known: --pairs N, --rate MBIT, --unthrottled, --no-scan, --only CASE, --ours"
                )
            }
        }
    }
    Ok(arguments)
}

/// What Darter starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Case {
    /// Nobody in the mesh has seen the image.
    FirstContact,
    /// The seed has made it; the node has nothing, and fetches nothing ahead of what its container asks for
    /// (`prefetch = false`).
    Known,
    /// As it comes: the seed has made it, another node has started it, and what that start read is fetched before this
    /// node's container asks.
    Started,
    /// As started, but what runs here is another command than the one whose start is known.
    Changed,
}

const CASES: [Case; 4] = [Case::FirstContact, Case::Known, Case::Started, Case::Changed];

/// What runs where the command is another than the image's own.
const CHANGED: [&str; 3] = [
    "sh",
    "-c",
    "echo 'int main() { return 0; }' | gcc -O2 -x c -o /tmp/program - && /tmp/program && echo ready",
];

/// One side of a pair.
#[derive(Clone, Copy)]
struct Side {
    name: &'static str,
    snapshotter: &'static str,
    case: Case,
    prefetch: bool,
    /// Empty: the image's own.
    command: &'static [&'static str],
}

impl Side {
    /// A and B of this case.
    fn pair(case: Case) -> [Self; 2] {
        let ours =
            Self { name: "darter", snapshotter: DARTER, case, prefetch: case != Case::Known, command: &[] };
        match case {
            Case::Changed => {
                let changed = Self { command: &CHANGED, ..ours };
                [Self { name: "without", prefetch: false, ..changed }, changed]
            }
            Case::FirstContact | Case::Known | Case::Started => {
                [Self { name: "plain", snapshotter: OVERLAYFS, ..ours }, ours]
            }
        }
    }
}

/// The node that is measured, and the one whose start is recorded.
const MEASURED: usize = 0;
const FIRST: usize = 1;

/// One start, and what it cost.
#[derive(Clone, Debug, Default)]
struct Sample {
    pull: f64,
    line: f64,
    second_line: f64,
    scan: f64,
    second_scan: f64,
    /// Of the image's compressed bytes, those that had come to the node at the line.
    moved: f64,
    registry_requests: usize,
    resident_mb: f64,
    anonymous_mb: f64,
    /// To the line and the end of that container.
    cpu: Vec<(&'static str, f64)>,
    /// Of the first scan with its pull.
    scan_cpu: Vec<(&'static str, f64)>,
    /// Of the second scan: what the background still does shows here.
    second_scan_cpu: Vec<(&'static str, f64)>,
    /// What the start read, and what it waited for.
    reads: Vec<Read>,
    /// FUSE requests: to the line, of the second run, of the scan and of the second scan.
    fuse: Vec<(&'static str, Requests)>,
}

struct Bench {
    registry: Registry,
    image: Image,
    cluster: Cluster,
    world: World,
    /// The seed knows what a start reads, and of nothing else that was read.
    start_is_known: bool,
}

fn cold_start(arguments: &Arguments) -> Result<()> {
    let mut steps = Steps::new(None);
    let (blobs, image) = steps.step("the image is made", || sci::image(&cache()))?;
    let world = World::new()?;
    let registry = steps.step("the registry has it", || {
        let registry = Registry::start(&world, "registry")?;
        registry.push(&blobs, &image, IMAGE)?;
        Ok(registry)
    })?;
    let cluster = steps.step("the cluster is up", || {
        let options = Options { nodes: 2, ..Options::default() };
        Cluster::start(&world, &registry, options)
    })?;
    let mut bench = Bench { registry, image, cluster, world, start_is_known: false };
    print_machine(&bench)?;
    for rate in &arguments.rates {
        bench.set_rate(*rate)?;
        for case in CASES {
            if arguments.only.as_ref().is_none_or(|only| format!("{case:?}").eq_ignore_ascii_case(only)) {
                bench.series(case, *rate, arguments)?;
            }
        }
    }
    Ok(())
}

impl Bench {
    fn node(&self) -> &Node {
        &self.cluster.nodes[MEASURED]
    }

    fn set_rate(&self, rate: Option<u32>) -> Result<()> {
        let nodes = self.cluster.nodes.iter().map(|node| &node.host);
        for host in nodes.chain([self.registry.host(), self.cluster.seed.host()]) {
            match rate {
                Some(mbit) => host.limit(mbit)?,
                None => host.unlimit()?,
            }
        }
        Ok(())
    }

    fn series(&mut self, case: Case, rate: Option<u32>, arguments: &Arguments) -> Result<()> {
        let rate = rate.map_or("unthrottled".to_owned(), |mbit| format!("{mbit} Mbit/s"));
        println!("\n{case:?}, {rate}");
        println!(
            "  {:<4} {:<7} {:>6} {:>7} {:>7} {:>7} {:>7} {:>7} {:>5} {:>7} {:>7}",
            "pair", "", "pull", "line", "again", "scan", "scan 2", "moved", "GETs", "RSS MB", "anon"
        );
        let mut pairs = Vec::new();
        let [theirs, ours] = Side::pair(case);
        // Tar reads the same whatever was to be started.
        let scan = arguments.scan && case != Case::Changed;
        for number in 0..arguments.pairs {
            if !arguments.plain {
                self.sample(ours, scan)?.print(number + 1, ours.name);
                continue;
            }
            // A B, B A, A B: what drifts hits both.
            let pair = if number % 2 == 0 {
                let plain = self.sample(theirs, scan)?;
                (plain, self.sample(ours, scan)?)
            } else {
                let sample = self.sample(ours, scan)?;
                (self.sample(theirs, scan)?, sample)
            };
            pair.0.print(number + 1, theirs.name);
            pair.1.print(number + 1, ours.name);
            pairs.push(pair);
        }
        if !pairs.is_empty() {
            summary(&pairs);
        }
        Ok(())
    }

    fn sample(&mut self, side: Side, scan: bool) -> Result<Sample> {
        self.prepare(side)?;
        let mut sample = self.start(side)?;
        // The seed is told what this command read, too.
        self.start_is_known &= side.command.is_empty();
        if scan {
            self.prepare(side)?;
            self.scan(side.snapshotter, &mut sample)?;
        }
        Ok(sample)
    }

    /// Pull and run to the line, and once more. `ctr` of 2.x pulls lazily by itself: the same client for both.
    fn start(&self, side: Side) -> Result<Sample> {
        let snapshotter = side.snapshotter;
        let run = |containerd: &Containerd, reference: &str, id: &str| {
            containerd.ctr_run_command(reference, snapshotter, id, side.command)
        };
        let (containerd, reference) = (&self.node().containerd, self.registry.reference(IMAGE));
        let (requests, used, got) = (self.requests(), self.processor_times(), self.node().host.traffic()?);
        let started = Instant::now();
        containerd.ctr_pull(&reference, snapshotter).check()?;
        let pull = seconds(started.elapsed());
        let mut running = run(containerd, &reference, "one").start()?;
        running.first_line();
        let line = seconds(started.elapsed());
        let to_line = self.fuse_requests();
        let got = self.node().host.traffic()? - got;
        let daemon = if snapshotter == DARTER { self.node().snapshotter.pid() } else { containerd.pid() };
        let (resident, anonymous) = (procfs::resident(daemon), procfs::resident_anonymous(daemon));
        let ran = running.finish()?;
        let reads = if snapshotter == DARTER { trace(self.node(), &reference)? } else { Vec::new() };
        ensure!(ran.stdout.starts_with("ready"), "no line: {}", ran.said());
        let (cpu, registry_requests) = (self.used_since(&used), self.requests() - requests);
        let before = self.fuse_requests();
        let again = run(containerd, &reference, "two").output()?;
        let fuse = vec![("to the line", to_line), ("again", more(&before, self.fuse_requests()))];
        ensure!(
            snapshotter != DARTER || containerd.layer_blobs(&self.image)?.is_empty(),
            "the pull was not lazy"
        );
        Ok(Sample {
            pull,
            line,
            second_line: seconds(again.first_line_after.context("no second line")?),
            moved: got.received as f64 / self.image.compressed_size() as f64,
            registry_requests,
            resident_mb: resident as f64 / 1e6,
            anonymous_mb: anonymous as f64 / 1e6,
            cpu,
            reads,
            fuse: if snapshotter == DARTER { fuse } else { Vec::new() },
            ..Sample::default()
        })
    }

    fn processor_times(&self) -> Vec<(&'static str, f64)> {
        self.programs().into_iter().map(|(name, pid)| (name, seconds(procfs::processor_time(pid)))).collect()
    }

    fn used_since(&self, before: &[(&'static str, f64)]) -> Vec<(&'static str, f64)> {
        let now = self.processor_times().into_iter();
        now.zip(before).map(|((name, now), (_, was))| (name, now - was)).collect()
    }

    /// Every store on the node empty, daemons fresh, the seed as the case has it, the page cache dropped.
    fn prepare(&mut self, side: Side) -> Result<()> {
        self.node().snapshotter.set("prefetch", if side.prefetch { "true" } else { "false" })?;
        self.cluster.nodes[MEASURED].wipe()?;
        if side.snapshotter == DARTER {
            match side.case {
                Case::FirstContact => {
                    self.cluster.wipe_seed()?;
                    self.start_is_known = false;
                }
                Case::Known | Case::Started | Case::Changed if self.start_is_known => self.preheat()?,
                Case::Known | Case::Started | Case::Changed => {
                    self.cluster.wipe_seed()?;
                    self.preheat()?;
                    self.record()?;
                    self.start_is_known = true;
                }
            }
        }
        Run::new("sync").check()?;
        std::fs::write("/proc/sys/vm/drop_caches", "3")?;
        Ok(())
    }

    /// Has the seed make the image, unless it has it.
    fn preheat(&self) -> Result<()> {
        let order = serde_json::json!({
            "image": self.registry.reference(IMAGE),
            "username": darter_integration::registry::USER,
            "password": darter_integration::registry::PASSWORD,
        });
        let made = self.cluster.rest("POST", "/api/v1/preheats", &order.to_string())?;
        let id = made["id"].as_str().context("the preheat has no id")?.to_owned();
        eventually("the preheat ends", 300, || {
            let state = self.cluster.rest("GET", &format!("/api/v1/preheats/{id}"), "")?;
            match state["state"].as_str() {
                Some("pending" | "running") => Ok(false),
                Some("done" | "succeeded" | "success") => Ok(true),
                other => bail!("the preheat is {other:?}: {state}"),
            }
        })
    }

    /// Has the first node start the image. Afterwards that node has nothing, so that all comes from the seed.
    fn record(&mut self) -> Result<()> {
        let (node, reference) = (&self.cluster.nodes[FIRST], self.registry.reference(IMAGE));
        node.containerd.ctr_pull(&reference, DARTER).check()?;
        node.containerd.ctr_run(&reference, DARTER, "first").check()?;
        // Of some layers nothing is read.
        let read: BTreeSet<_> = trace(node, &reference)?.into_iter().map(|read| read.layer).collect();
        ensure!(!read.is_empty(), "the first node's start read nothing");
        eventually("the seed knows what the start read", 60, || Ok(self.starts_known()? >= read.len()))?;
        self.cluster.nodes[FIRST].wipe()?;
        let mut used = Duration::ZERO;
        eventually("the seed has packed those pieces anew", 300, || {
            std::thread::sleep(Duration::from_secs(1));
            let before = std::mem::replace(&mut used, procfs::processor_time(self.cluster.seed.pid()));
            Ok(used - before < Duration::from_millis(50))
        })
    }

    /// The layers of which the seed knows what starts read.
    fn starts_known(&self) -> Result<usize> {
        let maps = std::fs::read_dir(self.cluster.seed.folder().join("root/store/maps"))?;
        let names = maps.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>()?;
        Ok(names.iter().filter(|name| name.to_string_lossy().ends_with(".start")).count())
    }

    /// Pull and `tar c` of the whole root, then once more. What tar writes is counted inside: `ctr`'s pipe would be measured.
    fn scan(&self, snapshotter: &str, sample: &mut Sample) -> Result<()> {
        let (containerd, reference) = (&self.node().containerd, self.registry.reference(IMAGE));
        let command = "tar c --one-file-system -f - / | wc -c";
        let (used, started) = (self.processor_times(), Instant::now());
        containerd.ctr_pull(&reference, snapshotter).check()?;
        let scan = |id: &str| {
            containerd.ctr_run_command(&reference, snapshotter, id, &["sh", "-c", command]).timeout(300)
        };
        let first = scan("scan-1").check()?;
        sample.scan = seconds(started.elapsed());
        sample.scan_cpu = self.used_since(&used);
        let (before, used) = (self.fuse_requests(), self.processor_times());
        let second = scan("scan-2").output()?;
        sample.second_scan = seconds(second.took);
        sample.second_scan_cpu = self.used_since(&used);
        ensure!(first.trim() != "0", "the scan read nothing");
        if snapshotter == DARTER {
            let fuse = more(&before, self.fuse_requests());
            sample.fuse.extend([("scan", before), ("scan again", fuse)]);
        }
        Ok(())
    }

    fn requests(&self) -> usize {
        self.registry.requests().len()
    }

    fn programs(&self) -> Vec<(&'static str, u32)> {
        let node = self.node();
        vec![
            ("snapshotter", node.snapshotter.pid()),
            ("containerd", node.containerd.pid()),
            ("seed", self.cluster.seed.pid()),
            ("scheduler", self.cluster.scheduler.pid()),
            ("manager", self.cluster.manager.pid()),
        ]
    }

    /// Since the daemon's start.
    fn fuse_requests(&self) -> Requests {
        fuse_requests(&self.node().snapshotter.folder().join("root")).unwrap_or_default()
    }
}

fn more(before: &Requests, after: Requests) -> Requests {
    let was = |name: &String| before.get(name).copied().unwrap_or_default();
    after.into_iter().map(|(name, count)| (name.clone(), count.saturating_sub(was(&name)))).collect()
}

impl Sample {
    fn print(&self, pair: usize, what: &str) {
        let list = |cpu: &[(&str, f64)]| {
            let each: Vec<String> = cpu.iter().map(|(name, cpu)| format!("{name} {cpu:.2}")).collect();
            each.join(", ")
        };
        println!(
            "  {pair:<4} {what:<7} {:>6.2} {:>7.2} {:>7.2} {:>7.2} {:>7.2} {:>6.1}% {:>5} {:>7.1} {:>7.1}  cpu-s: {}",
            self.pull,
            self.line,
            self.second_line,
            self.scan,
            self.second_scan,
            self.moved * 100.0,
            self.registry_requests,
            self.resident_mb,
            self.anonymous_mb,
            list(&self.cpu),
        );
        if !self.reads.is_empty() {
            let (here, elsewhere): (Vec<&Read>, Vec<&Read>) = self.reads.iter().partition(|read| read.local);
            let waited = |reads: &[&Read]| reads.iter().map(|read| read.waited_ms).sum::<f64>();
            println!(
                "              pieces read: {} here in {:.0} ms, {} waited for in {:.0} ms",
                here.len(),
                waited(&here),
                elsewhere.len(),
                waited(&elsewhere)
            );
        }
        if !self.scan_cpu.is_empty() {
            println!("              cpu-s of the scan: {}", list(&self.scan_cpu));
            println!("              cpu-s of the second: {}", list(&self.second_scan_cpu));
        }
        for (when, requests) in &self.fuse {
            let kinds = requests.iter().filter(|(_, count)| **count > 0);
            let kinds: Vec<String> = kinds.map(|(name, count)| format!("{name} {count}")).collect();
            let all: u64 = requests.values().sum();
            println!("              FUSE requests {when}: {all} ({})", kinds.join(", "));
        }
    }
}

fn summary(pairs: &[(Sample, Sample)]) {
    let ratio = |field: fn(&Sample) -> f64| {
        let mut ratios: Vec<f64> =
            pairs.iter().filter(|(a, _)| field(a) > 0.0).map(|(a, b)| field(b) / field(a)).collect();
        ratios.sort_by(f64::total_cmp);
        match ratios.as_slice() {
            [] => "-".to_owned(),
            all => format!("{:.3} ({:.3}-{:.3})", all[all.len() / 2], all[0], all[all.len() - 1]),
        }
    };
    println!("  B/A  to the line {}", ratio(|s| s.line));
    println!("       second run  {}", ratio(|s| s.second_line));
    println!("       full scan   {}; the second {}", ratio(|s| s.scan), ratio(|s| s.second_scan));
    let middle = |field: fn(&Sample) -> f64| {
        let mut values: Vec<f64> = pairs.iter().map(|(_, ours)| field(ours)).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or_default()
    };
    println!(
        "       moved {:.1} %, RSS {:.1} MB, CPU of all programs {:.2} s",
        middle(|s| s.moved * 100.0),
        middle(|s| s.resident_mb),
        middle(|s| s.cpu.iter().map(|(_, cpu)| cpu).sum())
    );
}

fn print_machine(bench: &Bench) -> Result<()> {
    let kernel = Run::new("uname").arg("-r").check()?;
    let version = bench.node().containerd.ctr().arg("version").check()?;
    let version = version.lines().rfind(|line| line.contains("Version")).unwrap_or("").trim().to_owned();
    let control = bench
        .node()
        .host
        .inside(|| Ok(std::fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control")?))?;
    let processors = Run::new("lscpu").check()?;
    let model =
        processors.lines().find_map(|line| line.strip_prefix("Model name:")).unwrap_or("unknown").trim();
    let count = std::thread::available_parallelism()?;
    println!(
        "\n{count} processors ({model}), kernel {}, containerd {version}, tcp {}, image {:.0} MB",
        kernel.trim(),
        control.trim(),
        bench.image.compressed_size() as f64 / 1e6
    );
    println!("seconds; moved: bytes at the node's link when the line came, of the compressed image");
    let _ = &bench.world;
    Ok(())
}

fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}
