//! Numbers and words: what each program tells of itself while it runs.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::net::TcpStream;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use darter_integration::cluster::{Program, REST_PORT};
use darter_integration::command::{Run, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::site::{Data, Site};

pub const STORIES: crate::Stories = &[
    ("alert_rules_and_dashboard_ask_for_numbers_that_are_told", 60, rules_and_dashboard),
    ("every_number_is_documented_and_told", 120, every_number_is_documented),
    ("two_hundred_slow_connections_stop_no_scrape", 60, slow_connections),
    ("a_running_program_can_be_made_to_say_more", 60, made_to_say_more),
];

/// The programs as `docs/metrics.md` heads their tables, and the ports that they tell at.
const PROGRAMS: [(&str, &str, u16); 4] = [
    ("manager", "## darter-manager", 7481),
    ("scheduler", "## darter-scheduler", 7482),
    ("peer", "## Peers", 7483),
    ("snapshotter", "## darter-snapshotter", 7484),
];

fn program<'a>(site: &'a Site, name: &str) -> &'a Program {
    match name {
        "manager" => &site.cluster.manager,
        "scheduler" => &site.cluster.scheduler,
        "peer" => &site.cluster.seed,
        _ => &site.node(0).snapshotter,
    }
}

/// What a program answers on loopback.
pub fn ask(program: &Program, port: u16, path: &str) -> Result<String> {
    let url = format!("http://127.0.0.1:{port}{path}");
    program.host().run("curl").args(["-sS", "--fail-with-body", &url]).timeout(20).check()
}

/// At each program's numbers, and at the manager's REST API: half of them say nothing, half begin a request.
fn slow_connections() -> Result<()> {
    let site = Site::with_nodes(1)?;
    let rest = site.cluster.manager.host().address().to_string();
    let mut doors: Vec<(&Program, String, u16, &str)> = PROGRAMS
        .iter()
        .map(|(name, _, port)| (program(&site, name), "127.0.0.1".to_owned(), *port, "/livez"))
        .collect();
    doors.push((&site.cluster.manager, rest, REST_PORT, "/healthy"));
    for (program, address, port, path) in doors {
        let slow = program.host().inside(|| {
            let open = |words: &str| {
                let mut stream = TcpStream::connect((address.as_str(), port))?;
                stream.write_all(words.as_bytes())?;
                Ok(stream)
            };
            let words = ["", "GET /metrics HTTP/1.1\r\nHo"];
            words.into_iter().cycle().take(200).map(open).collect::<Result<Vec<_>>>()
        })?;
        let url = format!("http://{address}:{port}{path}");
        for _ in 0..5 {
            let curl = program.host().run("curl").args(["-sS", "--fail-with-body", "--max-time", "5", &url]);
            curl.check().with_context(|| format!("{url} with {} slow connections", slow.len()))?;
        }
    }
    Ok(())
}

/// Samples by name; a histogram's have the name that their TYPE line has.
pub fn samples(text: &str) -> BTreeMap<String, Vec<String>> {
    let mut all: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap_or_default();
        let name =
            ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        all.entry(name.to_owned()).or_default().push(line.to_owned());
    }
    all
}

pub fn value(samples: &BTreeMap<String, Vec<String>>, name: &str, label: &str) -> Result<f64> {
    let lines = samples.get(name).with_context(|| format!("{name} is not told"))?;
    let line = lines.iter().find(|line| line.contains(label));
    let line = line.with_context(|| format!("{name} with {label} is not told: {lines:?}"))?;
    Ok(line.rsplit(' ').next().unwrap_or_default().parse()?)
}

/// The names in the table below a heading.
fn documented(heading: &str) -> BTreeSet<String> {
    let text = include_str!("../../../docs/metrics.md");
    let section = text.split(heading).nth(1).unwrap_or_default();
    let section = section.split("\n## ").next().unwrap_or_default();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.filter_map(|row| row.split('`').next()).map(str::to_owned).collect()
}

fn every_number_is_documented() -> Result<()> {
    let site = Site::with_nodes(1)?;
    let data = Data::new(&site.blobs, 1, 12, 300_000)?;
    let reference = site.add(&data, "numbers/app");
    site.pull(0, &data, &reference)?;
    site.check(0, &data, &reference, "reads")?;
    site.cluster.rest("GET", "/api/v1/nodes", "")?;
    for (name, heading, port) in PROGRAMS {
        let program = program(&site, name);
        let told: BTreeSet<String> = samples(&ask(program, port, "/metrics")?).into_keys().collect();
        let mut expected = documented("## Every program");
        expected.extend(documented(heading));
        if name == "snapshotter" {
            expected.extend(documented("## Peers"));
        }
        ensure!(
            told == expected,
            "{name}: told and not documented {:?}, documented and not told {:?}",
            told.difference(&expected).collect::<Vec<_>>(),
            expected.difference(&told).collect::<Vec<_>>()
        );
        ensure!(ask(program, port, "/livez")? == "alive\n" && ask(program, port, "/readyz")? == "ready\n");
    }
    numbers_are_right(&site, &data)
}

fn numbers_are_right(site: &Site, data: &Data) -> Result<()> {
    let of = |name: &str, port| Ok::<_, anyhow::Error>(samples(&ask(program(site, name), port, "/metrics")?));
    let (node, seed) = (of("snapshotter", 7484)?, of("peer", 7483)?);
    let (manager, scheduler) = (of("manager", 7481)?, of("scheduler", 7482)?);
    let blobs: u64 = data.image.layers.iter().map(|layer| layer.blob.size).sum();
    let layers = data.image.layers.len() as f64;
    let read = 12.0 * 300_000.0;
    let facts = [
        (
            "the registry's bytes are the layers'",
            value(&seed, "darter_mesh_received_bytes_total", "registry")?,
            blobs as f64..=blobs as f64,
        ),
        (
            "every layer was made once",
            value(&seed, "darter_mesh_layers_made_total", "\"made\"")?,
            layers..=layers,
        ),
        (
            "the node read nothing from the registry",
            value(&node, "darter_mesh_received_bytes_total", "registry")?,
            0.0..=0.0,
        ),
        (
            "what was read came from peers",
            value(&node, "darter_mesh_received_bytes_total", "peer")?,
            read..=4.0 * read,
        ),
        ("the seed sent it", value(&seed, "darter_mesh_sent_bytes_total", "")?, read..=4.0 * read),
        (
            "all layers are lazy",
            value(&node, "darter_snapshotter_layers_total", "lazy")?,
            layers..=2.0 * layers,
        ),
        ("none is plain", value(&node, "darter_snapshotter_layers_total", "plain")?, 0.0..=0.0),
        ("files were read", value(&node, "darter_fuse_requests_total", "\"read\"")?, 12.0..=1e6),
        ("one node is connected", value(&scheduler, "darter_scheduler_peers", "node")?, 1.0..=1.0),
        (
            "one seed is alive",
            value(&manager, "darter_manager_members", "role=\"seed\",alive=\"yes\"")?,
            1.0..=1.0,
        ),
        ("three have joined", value(&manager, "darter_manager_certificates_issued_total", "")?, 3.0..=3.0),
        (
            "one list was asked for",
            value(&manager, "darter_manager_http_requests_total", "200")?,
            1.0..=100.0,
        ),
    ];
    for (fact, told, range) in facts {
        ensure!(range.contains(&told), "not so: {fact}: {told}, not {range:?}");
    }
    Ok(())
}

fn rules_and_dashboard() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/prometheus");
    let (rules, dashboard) = (folder.join("darter.rules.yml"), folder.join("grafana-dashboard.json"));
    let promtool = std::env::var("DARTER_PROMTOOL").unwrap_or_else(|_| "promtool".to_owned());
    let checked = Run::new(&promtool).args(["check", "rules"]).arg(rules.display()).check()?;
    ensure!(checked.contains("12 rules found"), "{checked}");
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/darter.rules.test.yml");
    Run::new(promtool).args(["test", "rules"]).arg(cases.display()).check()?;
    let text = std::fs::read_to_string(dashboard)?;
    serde_json::from_str::<serde_json::Value>(&text)?;
    let text = text + &std::fs::read_to_string(rules)?;
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c: char| !is_name(c)).filter(|word| word.starts_with("darter_"));
    let asked: BTreeSet<&str> = words.map(|word| word.strip_suffix("_bucket").unwrap_or(word)).collect();
    let told: BTreeSet<String> = documented_everywhere();
    let unknown: Vec<_> = asked.iter().filter(|name| !told.contains(**name)).collect();
    ensure!(!asked.is_empty() && unknown.is_empty(), "nobody tells {unknown:?}");
    selected_labels_are_documented(&text)
}

/// What stands in braces behind a name: labels and values that the row of that name has in `docs/metrics.md`. The dashboard is
/// JSON, so quotes have a backslash there.
fn selected_labels_are_documented(text: &str) -> Result<()> {
    let (text, mut checked) = (text.replace("\\\"", "\""), 0);
    let selections = text.split("darter_").skip(1).filter_map(|rest| rest.split_once('{'));
    for (name, rest) in
        selections.filter(|(name, _)| name.chars().all(|c| c.is_ascii_lowercase() || c == '_'))
    {
        let name = format!("darter_{name}");
        let row = row(&name).with_context(|| format!("{name} is not documented"))?;
        for selection in rest.split('}').next().unwrap_or_default().split(',') {
            let (label, value) = selection.split_once('=').with_context(|| format!("{name}{{{selection}"))?;
            let known =
                [label, value.trim_matches('"')].iter().all(|word| row.contains(&format!("`{word}`")));
            ensure!(known, "{name} has no {selection}: {row}");
            checked += 1;
        }
    }
    ensure!(checked >= 10, "only {checked} labels were found");
    Ok(())
}

/// The row of that name in `docs/metrics.md`.
fn row(name: &str) -> Option<&'static str> {
    let text = include_str!("../../../docs/metrics.md");
    text.lines().find(|line| line.starts_with(&format!("| `{name}`")))
}

fn documented_everywhere() -> BTreeSet<String> {
    let headings = PROGRAMS.iter().map(|(_, heading, _)| *heading).chain(["## Every program"]);
    headings.flat_map(documented).collect()
}

fn made_to_say_more() -> Result<()> {
    let mut site = Site::with_nodes(0)?;
    let scheduler = &mut site.cluster.scheduler;
    let pid = Pid::from_raw(scheduler.pid() as i32);
    let daemon = scheduler.daemon()?;
    ensure!(!daemon.log_text().contains("DEBUG"), "it says too much from the start");
    for expected in ["filter=\"info,darter=debug\"", "filter=\"info,darter=trace\"", "filter=\"info\""] {
        kill(pid, Signal::SIGUSR1)?;
        eventually("the level is changed", 10, || Ok(daemon.log_text().contains(expected)))?;
    }
    if daemon.stop(20)?.success() { Ok(()) } else { bail!("it did not end well") }
}
