//! Darter's programs as a user runs them: `darter standalone`, and the command line.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::cluster::Node;
use crate::command::{Daemon, Run};
use crate::containerd::{Containerd, DARTER, tool};
use crate::registry::{PASSWORD, USER};
use crate::world::{Host, World};

/// The program of this name, as built.
pub fn program(name: &str) -> PathBuf {
    tool("DARTER_BIN", "target/release").join(name)
}

/// Writes the docker configuration that has the test registry's password, and returns its folder.
pub fn docker_config(folder: &Path, authority: &str) -> Result<PathBuf> {
    docker_config_as(folder, authority, &format!("{USER}:{PASSWORD}"))
}

pub fn docker_config_as(folder: &Path, authority: &str, user: &str) -> Result<PathBuf> {
    fs::create_dir_all(folder)?;
    let secret = Run::new("base64").args(["-w0"]).input(user).check()?;
    let config = serde_json::json!({"auths": {authority: {"auth": secret}}});
    fs::write(folder.join("config.json"), config.to_string())?;
    Ok(folder.to_path_buf())
}

/// Where the snapshotter of the node on `host` listens; known before it is started, for containerd's configuration.
pub fn snapshotter_socket(world: &World, host: &Host) -> Result<PathBuf> {
    Ok(world.folder(&format!("{}/darter", host.role()))?.join("darter.sock"))
}

/// `darter standalone`, with everything of its own below the world.
pub struct Standalone {
    host: Host,
    folder: PathBuf,
    containerd: PathBuf,
    hosts_dir: PathBuf,
    daemon: Daemon,
}

impl Standalone {
    /// Starts it beside `containerd`, which must have been told of [`snapshotter_socket`].
    pub fn start(world: &World, containerd: &Containerd) -> Result<Self> {
        let host = containerd.host().clone();
        let folder = world.folder(&format!("{}/darter", host.role()))?;
        let (socket, hosts_dir) = (containerd.socket(), containerd.hosts_dir());
        let daemon = launch(&host, &folder, &socket, &hosts_dir)?;
        let mut standalone = Self { host, folder, containerd: socket, hosts_dir, daemon };
        standalone.wait_ready()?;
        Ok(standalone)
    }

    fn wait_ready(&mut self) -> Result<()> {
        let socket = self.folder.join("darter.sock");
        self.daemon.wait_ready(30, || std::os::unix::net::UnixStream::connect(&socket).is_ok())
    }

    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    pub fn root(&self) -> PathBuf {
        self.folder.join("root")
    }

    /// SIGTERM, and start again on the same state.
    pub fn restart(&mut self) -> Result<()> {
        self.daemon.stop(30)?;
        self.start_again()
    }

    pub fn start_again(&mut self) -> Result<()> {
        self.daemon = launch(&self.host, &self.folder, &self.containerd, &self.hosts_dir)?;
        self.wait_ready()
    }

    pub fn command(&self, words: &[&str]) -> Run {
        self.host.run(program("darter")).args(words.iter()).arg("--root").arg(self.root().display())
    }
}

fn launch(host: &Host, folder: &Path, containerd: &Path, hosts_dir: &Path) -> Result<Daemon> {
    let run = host
        .run(program("darter"))
        .arg("standalone")
        .arg("--root")
        .arg(folder.join("root").display())
        .arg("--address")
        .arg(folder.join("darter.sock").display())
        .arg("--containerd-address")
        .arg(containerd.display())
        .arg("--hosts-dir")
        .arg(hosts_dir.display())
        // The disk of whoever runs the tests may be as full as it likes.
        .args(["--store-high-percent", "100", "--store-low-percent", "100"])
        .env("DOCKER_CONFIG", folder.join("docker").display())
        // Where a test puts programs that Darter is to find.
        .env(
            "PATH",
            format!("{}:{}", folder.join("bin").display(), std::env::var("PATH").unwrap_or_default()),
        );
    Daemon::start("darter standalone", run, &folder.join("log"))
}

/// FUSE requests by kind.
pub type Requests = BTreeMap<String, u64>;

/// What the kernel has asked the node daemon with this root since its start.
pub fn fuse_requests(root: &Path) -> Result<Requests> {
    let socket = root.join("admin.sock").display().to_string();
    let answer = Run::new("curl").args(["-sS", "--unix-socket", &socket, "http://darter/stats"]).check()?;
    let answer: serde_json::Value = serde_json::from_str(&answer)?;
    Ok(serde_json::from_value(answer["fuse"].clone())?)
}

/// The first read of a piece by a container, as `darter trace` tells it.
#[derive(Clone, Debug, serde::Deserialize)]
pub struct Read {
    pub waited_ms: f64,
    pub path: String,
    /// Its diff ID.
    pub layer: String,
    /// The piece was on the node when it was read.
    pub local: bool,
    pub from: String,
}

/// What the start of the image has read on the node, in order.
pub fn trace(node: &Node, reference: &str) -> Result<Vec<Read>> {
    let told = node.darter("trace").args(["--json", reference]).check()?;
    let told: serde_json::Value = serde_json::from_str(&told)?;
    Ok(serde_json::from_value(told["reads"].clone())?)
}

/// `darter pull` on the host of `containerd`, with the test registry's password.
pub fn pull(containerd: &Containerd, reference: &str) -> Run {
    pull_as(containerd, &format!("{USER}:{PASSWORD}"), reference)
}

pub fn pull_as(containerd: &Containerd, user: &str, reference: &str) -> Run {
    pull_into(containerd, containerd.namespace(), user, reference)
}

/// With the client that brings a whole image lazily: `ctr` where it can, which is from 2.0 on, else `darter pull`.
pub fn pull_lazily_in(containerd: &Containerd, namespace: &str, reference: &str) -> Run {
    let user = format!("{USER}:{PASSWORD}");
    if containerd.generation().ctr_pulls_lazily() {
        containerd.ctr_pull_in(namespace, &user, reference, DARTER)
    } else {
        pull_into(containerd, namespace, &user, reference)
    }
}

/// The same into another namespace of containerd's.
pub fn pull_into(containerd: &Containerd, namespace: &str, user: &str, reference: &str) -> Run {
    containerd
        .host()
        .run(program("darter"))
        .arg("pull")
        .arg("--containerd-address")
        .arg(containerd.socket().display())
        .args(["--namespace", namespace])
        .args(["--user", user, "--plain-http", reference])
        .timeout(120)
}
