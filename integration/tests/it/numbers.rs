//! Numbers and words: what each program tells of itself while it runs.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use darter_integration::cluster::{MANAGER_PORT, PEER_PORT, Program, REST_PORT, SCHEDULER_PORT};
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
    let mut site = Site::with_nodes(1)?;
    let data = Data::new(&site.blobs, 1, 12, 300_000)?;
    let reference = site.add(&data, "numbers/app");
    site.pull(0, &data, &reference)?;
    site.check(0, &data, &reference, "reads")?;
    site.cluster.rest("GET", "/api/v1/nodes", "")?;
    for (name, heading, port) in PROGRAMS {
        let program = program(&site, name);
        let samples = samples(&ask(program, port, "/metrics")?);
        labels_are_documented(&samples).with_context(|| name.to_owned())?;
        let told: BTreeSet<String> = samples.into_keys().collect();
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
    numbers_are_right(&site, &data)?;
    a_node_is_ready_once_it_has_joined(&mut site)
}

/// What a program answers on `/readyz`, with the status behind it.
fn readiness(program: &Program, port: u16) -> Result<String> {
    let url = format!("http://127.0.0.1:{port}/readyz");
    program.host().run("curl").args(["-sS", "-w", "%{http_code}", &url]).timeout(20).check()
}

/// It has no certificate yet, and its first start finds no manager.
fn a_node_is_ready_once_it_has_joined(site: &mut Site) -> Result<()> {
    site.cluster.manager.stop(20)?;
    let node = &site.cluster.add_node(&site.world, &site.registry)?.snapshotter;
    let no_mesh = "not ready: the node is in no mesh yet, and its log says why: every snapshot is plain\n503";
    // It answers containerd a moment before it says so.
    let mut seen = Vec::new();
    eventually("the node says that it is in no mesh", 20, || {
        seen.push(readiness(node, 7484)?);
        Ok(seen.last().is_some_and(|last| last == no_mesh))
    })?;
    ensure!(!seen.iter().any(|words| words.ends_with("200")), "it was ready before: {seen:?}");
    ensure!(ask(node, 7484, "/livez")? == "alive\n");
    site.cluster.start_manager()?;
    let node = &site.node(1).snapshotter;
    eventually("the node has joined", 60, || Ok(readiness(node, 7484)? == "ready\n200"))?;
    let manager = &site.cluster.manager;
    eventually("the manager is ready", 20, || Ok(readiness(manager, 7481)? == "ready\n200"))
}

/// Values that no table lists: versions, answers of HTTP, and the bounds of a histogram's buckets, which are no label of it.
const ANY_VALUE: [&str; 2] = ["version", "status"];
const BOUND: &str = "le";

/// Each label that a sample has stands in the row of its name, and each value among that label's.
fn labels_are_documented(samples: &BTreeMap<String, Vec<String>>) -> Result<()> {
    let mut checked = 0;
    for (name, lines) in samples.iter().filter(|(name, _)| row(name).is_some()) {
        let documented = labels(row(name).unwrap_or_default());
        for (label, value) in lines.iter().flat_map(|line| labels_told(line)) {
            if label == BOUND {
                continue;
            }
            let values = documented.get(label).with_context(|| format!("{name} has a label {label}"))?;
            let known = values.contains(&value) || ANY_VALUE.contains(&label) && values.is_empty();
            ensure!(known, "{name} is told with {label}={value:?}, and documented are {values:?}");
            checked += 1;
        }
    }
    ensure!(checked > 0, "no label was found");
    Ok(())
}

fn bare(word: &str) -> &str {
    word.trim().trim_matches('`')
}

/// What stands in the second column: "`label`: `value`, `value`; `label`".
fn labels(row: &str) -> BTreeMap<&str, Vec<&str>> {
    let column = row.split('|').nth(2).unwrap_or_default();
    let parts = column.split(';').map(|part| part.split_once(':').unwrap_or((part, "")));
    parts
        .map(|(label, values)| {
            let values = values.split(',').map(bare).filter(|value| !value.is_empty());
            (bare(label), values.collect())
        })
        .collect()
}

/// Labels and values of a sample.
fn labels_told(line: &str) -> Vec<(&str, &str)> {
    let Some((_, rest)) = line.split_once('{') else { return Vec::new() };
    let inner = rest.rsplit_once('}').map_or(rest, |(inner, _)| inner);
    let pairs = inner.split(',').filter_map(|pair| pair.split_once('='));
    pairs.map(|(label, value)| (label, value.trim_matches('"'))).collect()
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
    Run::new(&promtool).args(["test", "rules"]).arg(cases.display()).check()?;
    let (rules, cases) = (std::fs::read_to_string(rules)?, std::fs::read_to_string(cases)?);
    let alerts = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    let untried: Vec<_> = alerts.filter(|alert| !cases.contains(&format!("alertname: {alert}\n"))).collect();
    ensure!(untried.is_empty(), "{untried:?} have no case in darter.rules.test.yml");
    let text = std::fs::read_to_string(dashboard)?;
    expressions_are_valid(&promtool, &serde_json::from_str(&text)?)?;
    let text = text + &rules;
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c: char| !is_name(c)).filter(|word| word.starts_with("darter_"));
    let asked: BTreeSet<&str> = words.map(|word| word.strip_suffix("_bucket").unwrap_or(word)).collect();
    let told: BTreeSet<String> = documented_everywhere();
    let unknown: Vec<_> = asked.iter().filter(|name| !told.contains(**name)).collect();
    ensure!(!asked.is_empty() && unknown.is_empty(), "nobody tells {unknown:?}");
    selected_labels_are_documented(&text)
}

/// Promtool knows no dashboards: what one asks for is given to it as rules. YAML, which it reads, has JSON within it.
fn expressions_are_valid(promtool: &str, dashboard: &serde_json::Value) -> Result<()> {
    let mut asked = Vec::new();
    expressions(dashboard, &mut asked);
    ensure!(asked.len() >= 20, "only {} expressions were found", asked.len());
    let rule = |(number, asked): (usize, &&str)| {
        // Grafana puts in what fits the picture's width.
        let expression = asked.replace("$__rate_interval", "5m");
        serde_json::json!({ "record": format!("dashboard:expression_{number}"), "expr": expression })
    };
    let rules: Vec<_> = asked.iter().enumerate().map(rule).collect();
    let group = serde_json::json!({ "groups": [{ "name": "dashboard", "rules": rules }] });
    let run = Run::new(promtool).args(["check", "rules", "/dev/stdin"]).input(group.to_string());
    let checked = run.check()?;
    ensure!(checked.contains(&format!("{} rules found", asked.len())), "{checked}");
    Ok(())
}

/// All that a panel asks for, wherever it stands.
fn expressions<'a>(part: &'a serde_json::Value, found: &mut Vec<&'a str>) {
    found.extend(part["expr"].as_str());
    let inner: Vec<_> = match part {
        serde_json::Value::Object(fields) => fields.values().collect(),
        serde_json::Value::Array(parts) => parts.iter().collect(),
        _ => Vec::new(),
    };
    inner.into_iter().for_each(|part| expressions(part, found));
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

/// The scheduler logs JSON, the others text.
fn made_to_say_more() -> Result<()> {
    let mut site = Site::with_nodes(1)?;
    site.cluster.scheduler.stop(20)?;
    site.cluster.scheduler.add_flags(&["--log-format", "json"]);
    site.cluster.start_scheduler()?;
    for (name, port) in
        [("manager", MANAGER_PORT), ("scheduler", SCHEDULER_PORT), ("peer", PEER_PORT), ("node", PEER_PORT)]
    {
        says_more_while_asked(program(&site, name), port).with_context(|| name.to_owned())?;
    }
    site.cluster.scheduler.stop(20)?;
    every_line_is_an_event(&site.cluster.scheduler.said()?)
}

const LEVEL_CHANGED: &str = "SIGUSR1: the log level is changed";

/// Debug and trace after the first two signals, as before after the third, and round again.
fn says_more_while_asked(program: &Program, port: u16) -> Result<()> {
    let is_told = |from: &str| {
        eventually("a refused connection is told", 10, || {
            Ok(program.said()?.lines().any(|line| line.contains("DEBUG") && line.contains(from)))
        })
    };
    knock(program, port)?;
    for filter in ["info,darter=debug", "info,darter=trace"] {
        next_level(program, filter)?;
        is_told(&knock(program, port)?)?;
    }
    next_level(program, "info")?;
    knock(program, port)?;
    next_level(program, "info,darter=debug")?;
    is_told(&knock(program, port)?)?;
    let said = program.said()?;
    let times: Vec<&str> = said.split(LEVEL_CHANGED).collect();
    ensure!(times.len() == 5, "four signals, and the level changed {} times", times.len() - 1);
    ensure!(!times[0].contains("DEBUG"), "it says too much from the start: {}", times[0]);
    ensure!(!times[3].contains("DEBUG"), "it still says too much after the third: {}", times[3]);
    Ok(())
}

/// Sends SIGUSR1, and waits until the program says that it has that level.
fn next_level(program: &Program, filter: &str) -> Result<()> {
    let changes = || Ok::<_, anyhow::Error>(program.said()?.matches(LEVEL_CHANGED).count());
    let before = changes()?;
    kill(Pid::from_raw(program.pid() as i32), Signal::SIGUSR1)?;
    eventually("the level is changed", 10, || Ok(changes()? > before))?;
    let said = program.said()?;
    let last = said.lines().rfind(|line| line.contains(LEVEL_CHANGED)).unwrap_or_default();
    ensure!(last.contains(&format!("\"{filter}\"")), "not {filter}: {last}");
    Ok(())
}

/// What a scan of ports says to a member's port; the address that it came from. A program tells of it at level debug.
fn knock(program: &Program, port: u16) -> Result<String> {
    let host = program.host();
    host.inside(|| {
        let mut stream = TcpStream::connect((host.address(), port))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(b"this is no handshake\r\n")?;
        // An alert, or nothing: what counts is that the other side has hung up.
        let _ = stream.read_to_end(&mut Vec::new());
        Ok(stream.local_addr()?.to_string())
    })
}

fn every_line_is_an_event(said: &str) -> Result<()> {
    let event = |line: &str| {
        serde_json::from_str::<serde_json::Value>(line).with_context(|| format!("this is no JSON: {line}"))
    };
    let events: Vec<_> = said.lines().map(event).collect::<Result<_>>()?;
    for key in ["timestamp", "level", "target"] {
        let without = events.iter().find(|event| !event[key].is_string());
        ensure!(without.is_none(), "no {key}: {without:?}");
    }
    let refused = |event: &&serde_json::Value| {
        event["level"] == "DEBUG"
            && event["message"] == "a connection was refused"
            && event["address"].is_string()
    };
    let told = events.iter().filter(refused).count();
    ensure!(told >= 3, "{told} of three connections are told, each with its address");
    Ok(())
}
