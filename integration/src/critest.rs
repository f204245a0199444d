//! critest, Kubernetes' own tests of a container runtime: the images that it asks for, a network for its pods, its run and report.
//!
//! It names registries of the internet. Their hosts.toml turn them to the test's registry, which has images of our own under the
//! same names: busybox, and what behaves as critest wants of a web server. What it writes beside that lies in the folder it is given.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::json;

use crate::command::{Run, Running, tail};
use crate::containerd::{Containerd, SANDBOX, tool};
use crate::image::{Blobs, Image, Layer, Packing};
use crate::registry::{PASSWORD, Registry, USER};
use crate::tar::Entry;

/// The registries that critest names, and the sandbox image's.
const REGISTRIES: [&str; 4] = ["registry.k8s.io", "k8s.gcr.io", "gcr.io", "sandbox.test"];

/// The first wants an image with a digest that nobody can make, the second a shell that has no `ls` of its own. docs/behaviour.md
/// tells of both.
const SKIPPED: &str = "public image with digest|support MaskedPaths";

/// At once, for one containerd. Most of the time its tests wait.
const PARALLEL: usize = 2;

const REPORT: &str = "report.json";

/// How a test ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Passed,
    Skipped,
    /// With what it said.
    Failed(String),
}

/// By the test's whole name.
pub type Verdicts = BTreeMap<String, Verdict>;

/// Pushes all images that critest and its pods' sandboxes ask for. The one given back is what most of its
/// containers are made of.
pub fn push_images(registry: &Registry, blobs: &Blobs) -> Result<Image> {
    let base = [system(blobs)?, tools(blobs)?];
    let busybox = blobs.image(&base, &["sh"])?;
    registry.push_as(blobs, &busybox, "e2e-test-images/busybox", "1.29-2")?;
    for (name, tag, more, command) in programs()? {
        let layers = over(&base, blobs, &more)?;
        registry.push_as(blobs, &blobs.image(&layers, command)?, name, tag)?;
    }
    for (name, tag) in DISTINCT {
        let image = sleeping(&base, blobs, &format!("{name}:{tag}"))?;
        registry.push_as(blobs, &image, &format!("k8s-staging-cri-tools/test-image-{name}"), tag)?;
    }
    let tagged = sleeping(&base, blobs, "tags")?;
    for tag in ["1", "2", "3"] {
        registry.push_as(blobs, &tagged, "k8s-staging-cri-tools/test-image-tags", tag)?;
    }
    for (name, user) in USERS {
        let image = with_user(blobs, &base, user)?;
        registry.push_as(blobs, &image, &format!("k8s-staging-cri-tools/test-image-{name}"), "latest")?;
    }
    Ok(busybox)
}

/// Each an image of its own.
const DISTINCT: [(&str, &str); 6] = [
    ("latest", "latest"),
    ("tag", "test"),
    ("tag", "all"),
    ("1", "latest"),
    ("2", "latest"),
    ("3", "latest"),
];

/// Images with the user that their configuration names.
const USERS: [(&str, &str); 5] = [
    ("user-uid", "1002"),
    ("user-username", "www-data"),
    ("user-uid-group", "1003:users"),
    ("user-username-group", "www-data:100"),
    ("predefined-group", "1000"),
];
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n\
                      default-user:x:1000:1000::/:/bin/sh\n";
const GROUP: &str = "root:x:0:\nusers:x:100:\nwww-data:x:33:\ndefault-user:x:1000:\n\
                     group-defined-in-image:x:50000:default-user\n";

/// Says as whom a program runs that has the bit of "set user ID". Without the right to raw sockets `ping` ends at once.
const WHO: &str = "#!/bin/sh\n/suid/ping 127.0.0.1 >/dev/null 2>&1 &\nsleep 1\n\
                   awk '/^Uid:/ { print \"Effective uid: \" $3 }' /proc/$!/status 2>/dev/null || echo \"Effective uid: $(id -u)\"\n\
                   kill $! 2>/dev/null\n";

/// Name, tag, what lies above busybox, and the command. The sandbox's must not be one that critest looks for in pods.
type Program = (&'static str, &'static str, Vec<Entry>, &'static [&'static str]);

fn programs() -> Result<[Program; 6]> {
    let who = vec![Entry::dir("suid"), busybox("suid/ping")?.mode(0o4755), script("who", WHO)];
    let mark = |name: &str| vec![Entry::file("mark", name)];
    Ok([
        ("e2e-test-images/httpd", "2.4.39-4", web_server("httpd", 80)?, &["/serve"]),
        ("e2e-test-images/nginx", "1.14-2", web_server("nginx", 80)?, &["/serve"]),
        ("k8s-staging-cri-tools/hostnet-nginx-amd64", "latest", web_server("nginx", 12003)?, &["/serve"]),
        ("e2e-test-images/nonewprivs", "1.3", who, &["/who"]),
        ("pause", "3.9", mark("pause"), &["sleep", "10000"]),
        ("pause", "latest", mark("sandbox"), &["tail", "-f", "/dev/null"]),
    ])
}

fn over(base: &[Layer], blobs: &Blobs, more: &[Entry]) -> Result<Vec<Layer>> {
    Ok(base.iter().cloned().chain([blobs.layer(Packing::Gzip, more)?]).collect())
}

fn sleeping(base: &[Layer], blobs: &Blobs, mark: &str) -> Result<Image> {
    blobs.image(&over(base, blobs, &[Entry::file("mark", mark)])?, &["sleep", "10000"])
}

fn with_user(blobs: &Blobs, layers: &[Layer], user: &str) -> Result<Image> {
    let image = blobs.image(layers, &["sh"])?;
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(blobs.path(&image.config.digest))?)?;
    config["config"]["User"] = json!(user);
    blobs.image_with(layers, &serde_json::to_vec(&config)?)
}

/// Busybox with all that it can do, by hard links.
fn system(blobs: &Blobs) -> Result<Layer> {
    let folders = ["bin", "etc", "root", "usr", "usr/sbin", "var", "var/run"];
    let mut entries: Vec<Entry> = folders.into_iter().map(Entry::dir).collect();
    entries.push(Entry::dir("tmp").mode(0o1777));
    entries.push(Entry::file("etc/passwd", PASSWD));
    entries.push(Entry::file("etc/group", GROUP));
    entries.push(busybox("bin/busybox")?);
    let applets = Run::new("/bin/busybox").arg("--list").check()?;
    let applets = applets.lines().filter(|name| *name != "busybox");
    let link = |name: &str| Entry::hard_link(format!("bin/{name}"), "bin/busybox").mode(0o755);
    entries.extend(applets.map(link));
    blobs.layer(Packing::Gzip, &entries)
}

/// What critest calls and Debian's busybox lacks.
fn tools(blobs: &Blobs) -> Result<Layer> {
    let entries = [
        script("bin/pgrep", "#!/bin/sh\nexec pidof \"$1\"\n"),
        script("bin/ipcs", "#!/bin/sh\nexec cat /proc/sysvipc/shm\n"),
    ];
    blobs.layer(Packing::Gzip, &entries)
}

fn busybox(name: &str) -> Result<Entry> {
    Ok(Entry::file(name, fs::read("/bin/busybox")?).mode(0o755))
}

fn script(name: &str, text: &str) -> Entry {
    Entry::file(name, text).mode(0o755)
}

/// A server whose process is called `name`, whose first argument has "master process" in it, and which has written its number to
/// a file: so critest recognizes nginx.
fn web_server(name: &str, port: u16) -> Result<Vec<Entry>> {
    let program = format!("usr/sbin/{name}");
    let serve = format!(
        "#!/bin/sh\necho {name} starts\necho $$ > /var/run/{name}.pid\n\
         exec -a 'busybox: master process' /{program} httpd -f -p {port} -h /www\n"
    );
    let page = Entry::file("www/index.html", "<p>It works\n");
    Ok(vec![busybox(&program)?, script("serve", &serve), Entry::dir("www"), page])
}

/// Lets pods have a network of their own, and the registries of the internet be the test's.
pub fn prepare(containerd: &Containerd, registry: &Registry) -> Result<()> {
    let authority = registry.authority();
    let login = BASE64_STANDARD.encode(format!("{USER}:{PASSWORD}"));
    let hosts = format!(
        "server = \"http://{authority}\"\n\n[host.\"http://{authority}\"]\n  capabilities = [\"pull\", \"resolve\"]\n\n\
         [host.\"http://{authority}\".header]\n  Authorization = \"Basic {login}\"\n"
    );
    for name in REGISTRIES {
        let folder = containerd.hosts_dir().join(name);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("hosts.toml"), &hosts)?;
    }
    let addresses = containerd.cni_dir().join("addresses");
    let network = json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [
        {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipam": {
            "type": "host-local", "dataDir": addresses, "ranges": [[{"subnet": "10.88.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}],
        }},
        {"type": "portmap", "capabilities": {"portMappings": true}},
    ]});
    fs::write(containerd.cni_dir().join("pods.conflist"), network.to_string())?;
    containerd.crictl().args(["pull", SANDBOX]).check().map(drop)
}

/// critest under way.
pub struct Critest {
    running: Running,
    folder: PathBuf,
}

/// Starts it; `images` is the socket that it asks about images. It writes nothing outside `folder`.
pub fn start(containerd: &Containerd, images: &Path, folder: PathBuf, seconds: u64) -> Result<Critest> {
    let tools = tool("DARTER_CRITEST", "tools/critest-1.36.0");
    let temporary = folder.join("tmp");
    fs::create_dir_all(&temporary)?;
    let path = std::env::var("PATH").unwrap_or_default();
    let run =
        containerd.host().run("nsenter").arg(format!("--ipc=/proc/{}/ns/ipc", containerd.pid())).arg("--");
    let run = run
        .arg(tools.join("critest").display())
        .arg(format!("--runtime-endpoint=unix://{}", containerd.socket().display()))
        .arg(format!("--image-endpoint=unix://{}", images.display()))
        .arg(format!("--config={}", folder.join("none.yaml").display()))
        .args([format!("--ginkgo.json-report={REPORT}"), format!("--ginkgo.skip={SKIPPED}")])
        .args(["--ginkgo.no-color", "--ginkgo.seed=1"])
        .arg(format!("--parallel={PARALLEL}"))
        .env("TMPDIR", temporary.display())
        // With ginkgo, which runs tests beside each other.
        .env("PATH", format!("{}:{path}", tools.display()))
        .dir(&folder)
        .timeout(seconds);
    Ok(Critest { running: run.start()?, folder })
}

impl Critest {
    /// Waits for its end. That tests fail is no error here.
    pub fn finish(self) -> Result<Verdicts> {
        let finished = self.running.finish()?;
        fs::write(self.folder.join("log"), finished.said())?;
        let report = fs::read_to_string(self.folder.join(REPORT))
            .with_context(|| format!("critest left no report:\n{}", tail(&finished.said(), 20)))?;
        let verdicts = verdicts(&report)?;
        ensure!(!verdicts.is_empty(), "critest's report is empty:\n{}", tail(&finished.said(), 20));
        Ok(verdicts)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Report {
    #[serde(default)]
    spec_reports: Vec<Spec>,
}

/// As ginkgo writes it.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Spec {
    #[serde(default)]
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    #[serde(default)]
    leaf_node_text: String,
    state: String,
    #[serde(default)]
    failure: Failure,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Failure {
    #[serde(default)]
    message: String,
}

fn verdicts(report: &str) -> Result<Verdicts> {
    let reports: Vec<Report> = serde_json::from_str(report).context("critest's report")?;
    let specs = reports.into_iter().flat_map(|report| report.spec_reports);
    Ok(specs.filter(|spec| spec.leaf_node_type == "It").map(Spec::verdict).collect())
}

impl Spec {
    fn verdict(self) -> (String, Verdict) {
        let verdict = match self.state.as_str() {
            "passed" => Verdict::Passed,
            "skipped" | "pending" => Verdict::Skipped,
            other => Verdict::Failed(format!("{other}: {}", self.failure.message)),
        };
        let mut words = self.container_hierarchy_texts.unwrap_or_default();
        words.push(self.leaf_node_text);
        (words.join(" "), verdict)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_ginkgo_gives_a_verdict_for_each_test() {
        let report = r#"[{"SpecReports": [
            {"ContainerHierarchyTexts": null, "LeafNodeType": "BeforeSuite", "LeafNodeText": "", "State": "passed"},
            {"ContainerHierarchyTexts": ["Image", "list"], "LeafNodeType": "It", "LeafNodeText": "works", "State": "passed"},
            {"ContainerHierarchyTexts": ["Pod"], "LeafNodeType": "It", "LeafNodeText": "waits", "State": "skipped"},
            {"ContainerHierarchyTexts": ["Pod"], "LeafNodeType": "It", "LeafNodeText": "runs", "State": "panicked",
             "Failure": {"Message": "no such file"}}
        ]}]"#;
        let verdicts = verdicts(report).expect("a report");
        assert_eq!(verdicts.len(), 3);
        assert_eq!(verdicts["Image list works"], Verdict::Passed);
        assert_eq!(verdicts["Pod waits"], Verdict::Skipped);
        assert_eq!(verdicts["Pod runs"], Verdict::Failed("panicked: no such file".into()));
    }
}
