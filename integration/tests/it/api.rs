//! The manager's REST API: who may use it, and that it is as its document says.

use std::fs;

use anyhow::{Context, Result, ensure};
use darter_integration::cluster::{Options, Program, REST_PORT, start_manager};
use darter_integration::command::{Run, eventually};
use darter_integration::darter::program;
use darter_integration::world::World;
use serde_json::{Value, json};

use crate::site::{Data, Site};

pub const STORIES: crate::Stories = &[
    ("an_api_token_opens_what_its_role_and_scopes_name", 60, tokens_open),
    ("harbors_requests_preheat_an_image", 180, harbors_requests),
    ("a_property_based_client_finds_no_fault", 300, a_property_based_client),
];

/// A manager whose cluster has no member.
struct Alone {
    manager: Program,
    _world: World,
}

impl Alone {
    fn new() -> Result<Self> {
        let world = World::new()?;
        let manager = start_manager(&world, &world.host("control")?, &Options::default())?;
        Ok(Self { manager, _world: world })
    }

    fn first_token(&self) -> Result<String> {
        Ok(fs::read_to_string(self.manager.folder().join("root/api-token"))?.trim().to_owned())
    }

    /// `darter-manager api-token ...`, as its operator types it.
    fn api_token(&self, words: &[&str]) -> Run {
        let run = self.manager.host().run(program("darter-manager")).arg("--config");
        run.arg(self.manager.config().display()).arg("api-token").args(words)
    }

    fn made(&self, words: &[&str]) -> Result<String> {
        Ok(self.api_token(words).check()?.trim().to_owned())
    }

    /// Status and body of an answer.
    fn ask(&self, token: &str, method: &str, path: &str, body: &str) -> Result<(u16, Value)> {
        let url = format!("http://{}:{REST_PORT}{path}", self.manager.host().address());
        let mut curl =
            self.manager.host().run("curl").args(["-sS", "-X", method, "-w", "\n%{http_code}", &url]);
        if !token.is_empty() {
            curl = curl.args(["-H", &format!("Authorization: Bearer {token}")]);
        }
        if !body.is_empty() {
            curl = curl.args(["-H", "Content-Type: application/json", "-d", body]);
        }
        let said = curl.check()?;
        let (body, status) = said.rsplit_once('\n').context("no status")?;
        Ok((status.trim().parse()?, serde_json::from_str(body).with_context(|| body.to_owned())?))
    }

    fn status(&self, token: &str, method: &str, path: &str, body: &str) -> Result<u16> {
        Ok(self.ask(token, method, path, body)?.0)
    }
}

fn tokens_open() -> Result<()> {
    let alone = Alone::new()?;
    let order = json!({ "image": "r.example/a:1" }).to_string();
    let reader = alone.made(&["add", "dashboard", "--role", "reader", "--scope", "preheats,nodes"])?;
    let operator = alone.made(&["add", "ci", "--role", "operator", "--scope", "preheats", "--ttl", "1h"])?;
    for (token, method, path, body, wanted) in [
        ("", "GET", "/api/v1/nodes", "", 401),
        ("guessed", "GET", "/api/v1/nodes", "", 401),
        (&reader, "GET", "/api/v1/nodes", "", 200),
        (&reader, "POST", "/api/v1/preheats", &order, 403),
        (&operator, "POST", "/api/v1/preheats", &order, 201),
        (&operator, "GET", "/api/v1/nodes", "", 403),
        (&operator, "POST", "/api/v1/api-tokens", r#"{"name":"n","role":"reader"}"#, 403),
    ] {
        let got = alone.status(token, method, path, body)?;
        ensure!(got == wanted, "{method} {path}: {got} instead of {wanted}");
    }
    let list = alone.made(&["list"])?;
    let line = list.lines().find(|line| line.contains("  ci ")).context("the token is not listed")?;
    let cells: Vec<&str> = line.split_whitespace().collect();
    ensure!(cells[1..4] == ["ci", "operator", "preheats"] && !list.contains(&operator), "{list}");
    let id = line.split_whitespace().next().context("a line without words")?;
    alone.api_token(&["remove", id]).check()?;
    ensure!(alone.status(&operator, "POST", "/api/v1/preheats", &order)? == 401, "it still counts");

    let short = alone.made(&["add", "short", "--role", "admin", "--ttl", "2s"])?;
    eventually("the token expires", 20, || {
        let (status, body) = alone.ask(&short, "GET", "/api/v1/nodes", "")?;
        Ok(status == 401 && body["error"].as_str().is_some_and(|words| words.contains("expired")))
    })?;
    for file in ["manager.db", "manager.db-wal"] {
        let bytes = fs::read(alone.manager.folder().join("root").join(file)).unwrap_or_default();
        let holds = |secret: &String| bytes.windows(secret.len()).any(|part| part == secret.as_bytes());
        ensure!(![&reader, &operator, &short].into_iter().any(holds), "{file} holds a token");
    }
    Ok(())
}

/// What Harbor from 2.12 on sends, in its order, with the fields that it always has.
fn harbors_requests() -> Result<()> {
    let site = Site::with_nodes(1)?;
    let data = Data::new(&site.blobs, 1, 2, 100_000)?;
    site.add(&data, "library/app");
    let healthy = site.cluster.rest("GET", "/healthy", "")?;
    ensure!(healthy["status"] == "ok", "{healthy}");
    let job = |name: &str, scope: &str| {
        let url = format!("http://{}/v2/{name}/manifests/latest", site.stub.authority());
        let args = json!({
            "type": "image", "url": url, "tag": "", "filtered_query_params": "",
            "headers": {"Authorization": "Bearer a-pull-token"}, "scope": scope, "concurrent_count": 0, "timeout": 0
        });
        let body = json!({ "type": "preheat", "args": args, "scheduler_cluster_ids": null }).to_string();
        let made = site.cluster.rest("POST", "/oapi/v1/jobs", &body)?;
        ensure!(made["state"] == "PENDING" && made["result"].is_null(), "{made}");
        let path = format!("/oapi/v1/jobs/{}", made["id"].as_u64().context("no id")?);
        let mut last = Value::Null;
        eventually("the job is over", 60, || {
            last = site.cluster.rest("GET", &path, "")?;
            Ok(last["state"] != "PENDING")
        })?;
        Ok(last)
    };
    let seed = ("seed", site.cluster.seed.host().address().to_string());
    let node = ("node-1", site.node(0).host.address().to_string());
    for (scope, peers) in [
        ("single_seed_peer", vec![&seed]),
        ("all_seed_peers", vec![&seed]),
        ("all_peers", vec![&seed, &node]),
    ] {
        let done = job("library/app", scope)?;
        let table = &done["result"]["job_states"][0]["results"][0];
        let lines = table["success_tasks"].as_array().context("no table")?;
        ensure!(done["state"] == "SUCCESS" && lines.len() == 3 * peers.len(), "{done}");
        for (name, ip) in peers {
            let own = lines.iter().filter(|line| line["hostname"] == *name && line["ip"] == ip.as_str());
            ensure!(own.count() == 3, "{name} at {ip}: {done}");
        }
    }
    let failed = job("library/none", "single_seed_peer")?;
    let state = &failed["result"]["job_states"][0];
    ensure!(
        failed["state"] == "FAILURE" && state["error"].as_str().is_some_and(|it| !it.is_empty()),
        "{failed}"
    );
    ensure!(!failed.to_string().contains("a-pull-token"), "{failed}");
    Ok(())
}

fn a_property_based_client() -> Result<()> {
    let alone = Alone::new()?;
    let tool = std::env::var("DARTER_SCHEMATHESIS").context("scripts/tools installs schemathesis")?;
    let base = format!("http://{}:{REST_PORT}", alone.manager.host().address());
    let folder = alone.manager.folder().join("schemathesis");
    fs::create_dir_all(&folder)?;
    let run = alone.manager.host().run(tool).dir(&folder).timeout(280);
    let run = run.args(["run", &format!("{base}/api/v1/openapi.json"), "--url", &base, "--checks", "all"]);
    // An order that is cancelled can still be looked at, which that check takes for a mistake.
    let run = run.args(["--exclude-checks", "use_after_free"]);
    let run = run.args(["--max-examples", "100", "--seed", "1", "--no-color"]);
    let said = run.args(["--header", &format!("Authorization: Bearer {}", alone.first_token()?)]).output()?;
    ensure!(said.success(), "{}", said.said());
    let count = said.stdout.split_once(" generated").and_then(|(before, _)| before.split_whitespace().last());
    let count: usize = count.and_then(|count| count.parse().ok()).context("no count of requests")?;
    ensure!(count >= 500, "{count} requests are few:\n{}", said.said());
    Ok(())
}
