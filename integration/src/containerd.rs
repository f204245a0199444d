//! A containerd of its own for each node: Debian's 1.6 or the current 2.x, with the clients that belong to it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde::Deserialize;

use crate::command::{Daemon, Finished, Run};
use crate::image::Image;
use crate::registry::{PASSWORD, USER};
use crate::sweep;
use crate::world::{Host, World};

pub const DARTER: &str = "darter";
pub const OVERLAYFS: &str = "overlayfs";

/// The image that a pod's sandbox is made of. A test tags one of its own so.
pub const SANDBOX: &str = "sandbox.test/pause:latest";

/// The lease that is made in order to be deleted: so garbage is collected.
pub const COLLECTING: &str = "collecting";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Generation {
    /// 1.6, Debian's package.
    One,
    /// 1.7, and all below, built by `scripts/tools`.
    OneSeven,
    TwoZero,
    /// The current one.
    Two,
}

/// The oldest and the newest, for what takes long.
pub const GENERATIONS: [Generation; 2] = [Generation::One, Generation::Two];

/// All that are supported.
pub const ALL_GENERATIONS: [Generation; 4] =
    [Generation::One, Generation::OneSeven, Generation::TwoZero, Generation::Two];

impl Generation {
    /// Whether `ctr images pull` asks the snapshotter for layers before it downloads them. That of 1.x downloads everything, always.
    pub fn ctr_pulls_lazily(self) -> bool {
        matches!(self, Generation::TwoZero | Generation::Two)
    }

    fn folder(self) -> PathBuf {
        match self {
            Generation::One => "/usr/bin".into(),
            Generation::OneSeven => tool("DARTER_CONTAINERD17", "tools/containerd-1.7.35"),
            Generation::TwoZero => tool("DARTER_CONTAINERD20", "tools/containerd-2.0.14"),
            Generation::Two => tool("DARTER_CONTAINERD2", "tools/containerd-2.4.2"),
        }
    }
}

/// A tool's place, from the scripts' environment or the usual cache.
pub fn tool(variable: &str, fallback: &str) -> PathBuf {
    std::env::var_os(variable).map_or_else(|| cache().join(fallback), PathBuf::from)
}

/// Where builds and images are kept between runs.
pub fn cache() -> PathBuf {
    std::env::var_os("DARTER_CACHE").map_or_else(|| "/var/cache/darter".into(), PathBuf::from)
}

/// A containerd that is running.
pub struct Containerd {
    generation: Generation,
    host: Host,
    folder: PathBuf,
    namespace: String,
    daemon: Daemon,
}

impl Containerd {
    /// Starts one on `host`; `snapshotter` is the socket of a Darter that it is told of.
    pub fn start(
        world: &World,
        host: &Host,
        generation: Generation,
        snapshotter: Option<&Path>,
    ) -> Result<Self> {
        let folder = world.folder(&format!("{}/containerd", host.role()))?;
        for sub in ["certs.d", "cni"] {
            fs::create_dir_all(folder.join(sub))?;
        }
        fs::write(folder.join("config.toml"), configuration(generation, &folder, snapshotter))?;
        let daemon = launch(generation, host, &folder)?;
        let namespace = sweep::containerd_namespace(std::process::id());
        let mut containerd = Self { generation, host: host.clone(), folder, namespace, daemon };
        containerd.wait_ready()?;
        Ok(containerd)
    }

    fn wait_ready(&mut self) -> Result<()> {
        let probe =
            |me: &Self| me.ctr().args(["version"]).timeout(10).output().is_ok_and(|out| out.success());
        let started = std::time::Instant::now();
        while !(self.socket().exists() && probe(self)) {
            self.daemon.must_run()?;
            if started.elapsed().as_secs() > 30 {
                bail!("containerd was not ready:\n{}", crate::command::tail(&self.daemon.log_text(), 15));
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        Ok(())
    }

    /// The same containerd, killed and started again.
    pub fn restart(&mut self) -> Result<()> {
        self.daemon.stop(20)?;
        self.daemon = launch(self.generation, &self.host, &self.folder)?;
        self.wait_ready()
    }

    /// Stopped, its content and snapshots gone, and started again.
    pub fn wipe(&mut self) -> Result<()> {
        self.daemon.stop(20)?;
        for sub in ["root", "state"] {
            for mounted in sweep::mounts_below(&self.folder.join(sub)).iter().rev() {
                umount2(&mounted.path, MntFlags::MNT_DETACH)?;
            }
            let _ = fs::remove_dir_all(self.folder.join(sub));
        }
        self.daemon = launch(self.generation, &self.host, &self.folder)?;
        self.wait_ready()
    }

    pub fn generation(&self) -> Generation {
        self.generation
    }

    pub fn host(&self) -> &Host {
        &self.host
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.join("c.sock")
    }

    /// Its configuration file.
    pub fn config(&self) -> PathBuf {
        self.folder.join("config.toml")
    }

    pub fn hosts_dir(&self) -> PathBuf {
        self.folder.join("certs.d")
    }

    /// Where it looks for descriptions of the pods' network. Without one there are pods on the host's network only.
    pub fn cni_dir(&self) -> PathBuf {
        self.folder.join("cni")
    }

    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    /// The containerd namespace that tests use unless they say otherwise.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Writes the hosts.toml by which clients that read such files reach a plain-http registry.
    pub fn plain_http(&self, authority: &str) -> Result<()> {
        let folder = self.hosts_dir().join(authority);
        fs::create_dir_all(&folder)?;
        let text = format!(
            "server = \"http://{authority}\"\n\n[host.\"http://{authority}\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
        );
        Ok(fs::write(folder.join("hosts.toml"), text)?)
    }

    pub fn ctr(&self) -> Run {
        self.ctr_in(&self.namespace)
    }

    pub fn ctr_in(&self, namespace: &str) -> Run {
        self.ctr_at(&self.socket()).args(["-n", namespace]).timeout(120)
    }

    /// `ctr` that takes whatever serves this socket for containerd.
    fn ctr_at(&self, socket: &Path) -> Run {
        self.host
            .run(self.generation.folder().join("ctr"))
            // Else it asks for deprecations first.
            .env("CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS", "1")
            .arg("-a")
            .arg(socket.display())
    }

    pub fn crictl(&self) -> Run {
        self.crictl_with_images_of(&self.socket())
    }

    /// `crictl` that asks another socket about images.
    pub fn crictl_with_images_of(&self, images: &Path) -> Run {
        let (runtime, images) =
            (format!("unix://{}", self.socket().display()), format!("unix://{}", images.display()));
        let crictl = tool("DARTER_CRICTL", "tools/crictl-1.36.0/crictl");
        self.host.run(crictl).args(["-r", &runtime, "-i", &images, "-t", "90s"]).timeout(120)
    }

    pub fn nerdctl(&self) -> Run {
        self.nerdctl_in(&self.namespace)
    }

    pub fn nerdctl_in(&self, namespace: &str) -> Run {
        self.host
            .run(tool("DARTER_NERDCTL", "tools/nerdctl-2.3.5/nerdctl"))
            .arg("--address")
            .arg(self.socket().display())
            .arg("--data-root")
            .arg(self.folder.join("nerdctl").display())
            .arg("--hosts-dir")
            .arg(self.hosts_dir().display())
            .args(["--namespace", namespace])
            .env("DOCKER_CONFIG", self.folder.join("docker").display())
            .timeout(120)
    }

    /// `ctr images pull`, with the test registry's password.
    pub fn ctr_pull(&self, reference: &str, snapshotter: &str) -> Run {
        self.ctr_pull_as(&format!("{USER}:{PASSWORD}"), reference, snapshotter)
    }

    pub fn ctr_pull_as(&self, user: &str, reference: &str, snapshotter: &str) -> Run {
        self.ctr_pull_in(&self.namespace, user, reference, snapshotter)
    }

    pub fn ctr_pull_in(&self, namespace: &str, user: &str, reference: &str, snapshotter: &str) -> Run {
        let words =
            ["images", "pull", "--plain-http", "--user", user, "--snapshotter", snapshotter, reference];
        self.ctr_in(namespace).args(words)
    }

    /// `ctr images push` of what containerd has as `local`, with the test registry's password.
    pub fn ctr_push(&self, remote: &str, local: &str) -> Run {
        let login = format!("{USER}:{PASSWORD}");
        let push = self.ctr().args(["images", "push", "--plain-http", "--user", &login]);
        // 1.7 hands it to its transfer service, which takes no plain http.
        let push = if self.generation == Generation::OneSeven { push.arg("--local") } else { push };
        push.args([remote, local])
    }

    /// `ctr run` of the image's own command, on the host's network.
    pub fn ctr_run(&self, reference: &str, snapshotter: &str, id: &str) -> Run {
        self.ctr().args(["run", "--rm", "--net-host", "--snapshotter", snapshotter, reference, id])
    }

    /// `ctr run` of another command.
    pub fn ctr_run_command(&self, reference: &str, snapshotter: &str, id: &str, command: &[&str]) -> Run {
        self.ctr_run(reference, snapshotter, id).args(command)
    }

    /// Layer blobs of `image` that this containerd has in its content store.
    pub fn layer_blobs(&self, image: &Image) -> Result<Vec<String>> {
        self.layer_blobs_in(&self.namespace, image)
    }

    pub fn layer_blobs_in(&self, namespace: &str, image: &Image) -> Result<Vec<String>> {
        let list = self.ctr_in(namespace).args(["content", "ls", "-q"]).check()?;
        let have: BTreeSet<&str> = list.lines().map(str::trim).collect();
        let wanted = image.layers.iter().map(|layer| layer.blob.digest.clone());
        Ok(wanted.filter(|digest| have.contains(digest.as_str())).collect())
    }

    /// Removes the image and waits for the garbage collection that follows.
    pub fn remove_image(&self, reference: &str) -> Result<()> {
        self.remove_image_in(&self.namespace, reference)
    }

    pub fn remove_image_in(&self, namespace: &str, reference: &str) -> Result<()> {
        self.ctr_in(namespace).args(["images", "rm", "--sync", reference]).check().map(drop)
    }

    /// Has it collect garbage, of all namespaces, and waits until that is done.
    pub fn collect_garbage(&self) -> Result<()> {
        self.ctr().args(["leases", "create", "--id", COLLECTING]).check()?;
        self.ctr().args(["leases", "delete", "--sync", COLLECTING]).check().map(drop)
    }

    /// Does `work` while garbage is collected again and again; prints how often that was.
    pub fn while_collecting<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            let collector = scope.spawn(|| {
                let mut times = 0;
                while times == 0 || !is_over.load(Ordering::SeqCst) {
                    self.collect_garbage()?;
                    times += 1;
                }
                anyhow::Ok(times)
            });
            let done = {
                // Also when the work panics: the scope waits for the collector.
                let _over = SetAtEnd(&is_over);
                work()
            };
            let times = collector.join().expect("no panic in a loop of commands");
            let done = done?;
            println!("  {:?}: garbage was collected {} times meanwhile", self.generation, times?);
            Ok(done)
        })
    }

    /// The snapshots that are left at the snapshotter with this socket, for whichever namespace.
    pub fn snapshots_at(&self, socket: &Path) -> Result<Vec<String>> {
        let listed = self.ctr_at(socket).args(["snapshots", "--snapshotter", DARTER, "ls"]).check()?;
        Ok(listed.lines().skip(1).map(str::to_owned).collect())
    }

    /// Mounts a snapshot of `parent` at a folder of its own: writable for a container's root, else a view.
    pub fn mount_snapshot(
        &self,
        snapshotter: &str,
        parent: &str,
        key: &str,
        writable: bool,
    ) -> Result<MountedSnapshot> {
        let make = if writable { "prepare" } else { "view" };
        let made = self
            .ctr()
            .args(["snapshots", "--snapshotter", snapshotter, make, "--mounts", key, parent])
            .check()?;
        let mounts: Vec<SnapshotMount> =
            serde_json::from_str(&made).with_context(|| format!("the mounts of {key}: {made}"))?;
        let path = self.folder.join(format!("mounted-{key}"));
        fs::create_dir_all(&path)?;
        for one in &mounts {
            one.mount(&path)?;
        }
        let remove = self.ctr().args(["snapshots", "--snapshotter", snapshotter, "rm", key]);
        Ok(MountedSnapshot { path, remove: Some(remove) })
    }

    /// SIGTERM; whatever containers it had must be gone before.
    pub fn stop(&mut self) -> Result<Finished> {
        let status = self.daemon.stop(20)?;
        Ok(Finished {
            status,
            stdout: String::new(),
            stderr: self.daemon.log_text(),
            took: Default::default(),
            first_line_after: None,
        })
    }
}

/// Sets it when dropped.
struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// What containers leave in shared memory ends with an IPC namespace of its own.
fn launch(generation: Generation, host: &Host, folder: &Path) -> Result<Daemon> {
    let programs = generation.folder();
    let run = host.run("unshare").args(["--ipc", "--"]).arg(programs.join("containerd").display());
    let run = run.arg("-c").arg(folder.join("config.toml").display()).env(
        "PATH",
        format!("{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", programs.display()),
    );
    Daemon::start("containerd", run, &folder.join("log"))
}

fn configuration(generation: Generation, folder: &Path, snapshotter: Option<&Path>) -> String {
    let d = folder.display();
    let common = format!(
        "root = \"{d}/root\"\nstate = \"{d}/state\"\noom_score = 0\n\n[grpc]\naddress = \"{d}/c.sock\"\n\n\
         [ttrpc]\naddress = \"{d}/c.ttrpc\"\n\n[plugins.\"io.containerd.internal.v1.opt\"]\npath = \"{d}/opt\"\n\n"
    );
    let chosen = if snapshotter.is_some() { DARTER } else { OVERLAYFS };
    let pods = pods(generation, folder);
    let specific = match generation {
        Generation::One | Generation::OneSeven => format!(
            "[plugins.\"io.containerd.grpc.v1.cri\"]\nrestrict_oom_score_adj = true\n\
             {pods}sandbox_image = \"{SANDBOX}\"\nregistry.config_path = \"{d}/certs.d\"\n\
             containerd.snapshotter = \"{chosen}\"\n\n"
        ),
        Generation::TwoZero | Generation::Two => format!(
            "[plugins.\"io.containerd.cri.v1.images\"]\nsnapshotter = \"{chosen}\"\n\
             pinned_images.sandbox = \"{SANDBOX}\"\n\
             registry.config_path = \"{d}/certs.d\"\n\n\
             [plugins.\"io.containerd.cri.v1.runtime\"]\nrestrict_oom_score_adj = true\n\
             {pods}\n{}",
            [OVERLAYFS, chosen]
                .iter()
                .collect::<BTreeSet<_>>()
                .into_iter()
                .map(|name| unpack(name))
                .collect::<String>()
        ),
    };
    let version = if matches!(generation, Generation::One | Generation::OneSeven) { 2 } else { 3 };
    let proxy = snapshotter.map_or(String::new(), |socket| {
        format!("[proxy_plugins.{DARTER}]\ntype = \"snapshot\"\naddress = \"{}\"\n", socket.display())
    });
    format!("version = {version}\n{common}{specific}{proxy}")
}

/// CRI's settings for pods: what it keeps of them lies below the folder, where [`sweep::sweep`] looks for it.
fn pods(generation: Generation, folder: &Path) -> String {
    let d = folder.display();
    let plugins = match generation {
        Generation::Two => "bin_dirs = [\"/usr/lib/cni\"]",
        _ => "bin_dir = \"/usr/lib/cni\"",
    };
    format!(
        "netns_mounts_under_state_dir = true\ncni = {{ {plugins}, conf_dir = \"{d}/cni\" }}\n\
         containerd.runtimes.runc = {{ runtime_type = \"io.containerd.runc.v2\", options = {{ Root = \"{d}/{}\" }} }}\n",
        sweep::POD_STATE
    )
}

fn unpack(snapshotter: &str) -> String {
    format!(
        "[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\nplatform = \"linux/amd64\"\n\
         snapshotter = \"{snapshotter}\"\n\n"
    )
}

#[derive(Deserialize)]
struct SnapshotMount {
    #[serde(alias = "type")]
    #[serde(rename = "Type")]
    kind: String,
    #[serde(rename = "Source", alias = "source")]
    source: String,
    #[serde(rename = "Options", alias = "options", default)]
    options: Vec<String>,
}

impl SnapshotMount {
    fn mount(&self, target: &Path) -> Result<()> {
        let mut flags = MsFlags::empty();
        let mut data = Vec::new();
        for option in &self.options {
            match option.as_str() {
                "ro" => flags |= MsFlags::MS_RDONLY,
                "rw" => {}
                "bind" => flags |= MsFlags::MS_BIND,
                "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
                other => data.push(other),
            }
        }
        let data = data.join(",");
        if data.len() >= OPTIONS_MAX {
            return mount_from_below(&data, target);
        }
        mount(Some(self.source.as_str()), target, Some(self.kind.as_str()), flags, Some(data.as_str()))
            .with_context(|| format!("mounting {} {} with {:?}", self.kind, self.source, self.options))
    }
}

/// The kernel takes a page of options, less some.
const OPTIONS_MAX: usize = 4000;

/// As containerd does it where the options are too long: with relative lower directories, from the folder that all share.
fn mount_from_below(data: &str, target: &Path) -> Result<()> {
    let lower = data
        .split(',')
        .find_map(|option| option.strip_prefix("lowerdir="))
        .context("no lower directories")?;
    let first = Path::new(lower.split(':').next().unwrap_or(lower));
    let shared = first.parent().and_then(Path::parent).context("a snapshot lies two folders deep")?;
    let short = data.replace(&format!("{}/", shared.display()), "");
    Run::new("mount")
        .args(["-t", "overlay", "overlay", "-o", &short])
        .arg(target.display())
        .dir(shared)
        .check()
        .map(drop)
}

/// A snapshot that is mounted; dropped, it is unmounted and removed.
pub struct MountedSnapshot {
    path: PathBuf,
    remove: Option<Run>,
}

impl MountedSnapshot {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for MountedSnapshot {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        if let Some(remove) = self.remove.take() {
            let _ = remove.output();
        }
    }
}
