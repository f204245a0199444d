//! A whole cluster: manager, scheduler, seed and nodes as separate processes with configuration files.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::command::{Daemon, Run};
use crate::containerd::{Containerd, Generation};
use crate::darter::{docker_config, program, snapshotter_socket};
use crate::registry::Registry;
use crate::world::{Host, World};

/// A program with its configuration file, to be killed and started at will.
pub struct Program {
    name: String,
    host: Host,
    folder: PathBuf,
    flags: Vec<String>,
    file: PathBuf,
    environment: Vec<(String, String)>,
    /// What the next start is given as systemd gives it, by name.
    passed: Vec<(String, OwnedFd)>,
    daemon: Option<Daemon>,
}

impl Program {
    /// Writes `config` to `NAME.toml` in `folder`; nothing runs yet.
    pub fn new(name: &str, host: &Host, folder: &Path, config: &str, flags: &[&str]) -> Result<Self> {
        fs::create_dir_all(folder)?;
        fs::write(folder.join(format!("{name}.toml")), config)?;
        let flags = flags.iter().map(ToString::to_string).collect();
        Ok(Self {
            name: name.into(),
            host: host.clone(),
            folder: folder.into(),
            flags,
            file: program(&format!("darter-{name}")),
            environment: Vec::new(),
            passed: Vec::new(),
            daemon: None,
        })
    }

    pub fn config(&self) -> PathBuf {
        self.folder.join(format!("{}.toml", self.name))
    }

    /// Sets a key of its configuration, for its next start.
    pub fn set(&self, key: &str, value: &str) -> Result<()> {
        let (path, is_it) = (self.config(), format!("{key} = "));
        let text = fs::read_to_string(&path)?;
        let kept: String =
            text.lines().filter(|line| !line.starts_with(&is_it)).map(|line| format!("{line}\n")).collect();
        Ok(fs::write(path, format!("{kept}{key} = {value}\n"))?)
    }

    /// Flags for every start from now on.
    pub fn add_flags(&mut self, flags: &[&str]) {
        self.flags.extend(flags.iter().map(ToString::to_string));
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What it has said since its last start, one event a line.
    pub fn said(&self) -> Result<String> {
        let log = fs::read_to_string(self.folder.join("log"))?;
        let (_, last) = log.rsplit_once("\n--- ").unwrap_or(("", &log));
        Ok(last.split_once('\n').map_or("", |(_, said)| said).to_owned())
    }

    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Starts it; `ready` says when it can be used.
    pub fn start(&mut self, ready: impl FnMut() -> bool) -> Result<()> {
        let passed = std::mem::take(&mut self.passed);
        let mut run = self
            .program_with(&passed)?
            .arg("--config")
            .arg(self.config().display())
            .args(self.flags.iter())
            .env("DOCKER_CONFIG", self.folder.join("docker").display());
        for (name, value) in &self.environment {
            run = run.env(name, value);
        }
        let log = self.folder.join("log");
        let started = Daemon::start(&format!("darter-{}", self.name), run, &log);
        (0..passed.len()).try_for_each(|index| nix::unistd::close(PASSED_FIRST + index as RawFd))?;
        let mut daemon = started?;
        daemon.wait_ready(30, ready)?;
        self.daemon = Some(daemon);
        Ok(())
    }

    /// From now on another file is started, of another version perhaps.
    pub fn set_file(&mut self, file: &Path) {
        self.file = file.to_owned();
    }

    /// Variables for every start from now on.
    pub fn set_environment(&mut self, environment: Vec<(String, String)>) {
        self.environment = environment;
    }

    /// The next start is given these, as systemd gives them.
    pub fn pass(&mut self, descriptors: &BTreeMap<String, OwnedFd>) -> Result<()> {
        let copy = |(name, descriptor): (&String, &OwnedFd)| Ok((name.clone(), descriptor.try_clone()?));
        self.passed = descriptors.iter().map(copy).collect::<Result<_>>()?;
        Ok(())
    }

    /// With descriptors from number 3 on and the variables that tell of them, one of which is the program's own process id.
    fn program_with(&self, passed: &[(String, OwnedFd)]) -> Result<Run> {
        if passed.is_empty() {
            return Ok(self.host.run(&self.file));
        }
        let mut script = String::new();
        for (index, (_, descriptor)) in passed.iter().enumerate() {
            // Open also in the program that is started, until it is closed here.
            let number = PASSED_FIRST + index as RawFd;
            let got = nix::fcntl::fcntl(descriptor, nix::fcntl::FcntlArg::F_DUPFD(number))?;
            anyhow::ensure!(got == number, "the descriptor {number} is in use");
            script += &format!("exec {}<&{number} {number}<&-; ", index + 3);
        }
        let names: Vec<&str> = passed.iter().map(|(name, _)| name.as_str()).collect();
        script += "export LISTEN_PID=$$; exec \"$@\"";
        let run = self.host.run("bash").args(["-c", &script, "bash"]).arg(self.file.display());
        Ok(run.env("LISTEN_FDS", passed.len()).env("LISTEN_FDNAMES", names.join(":")))
    }

    pub fn daemon(&mut self) -> Result<&mut Daemon> {
        self.daemon.as_mut().with_context(|| format!("{} was not started", self.name))
    }

    pub fn pid(&self) -> u32 {
        self.daemon.as_ref().map_or(0, Daemon::pid)
    }

    /// SIGTERM; an error when it does not end well within the time.
    pub fn stop(&mut self, seconds: u64) -> Result<()> {
        let Some(mut daemon) = self.daemon.take() else { return Ok(()) };
        let status = daemon.stop(seconds)?;
        if !status.success() {
            bail!("{} ended with {status}:\n{}", self.name, crate::command::tail(&daemon.log_text(), 10));
        }
        Ok(())
    }

    pub fn kill(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill();
        }
    }
}

/// Above whatever else is open here.
const PASSED_FIRST: RawFd = 300;

/// A node: a containerd and the snapshotter beside it.
pub struct Node {
    pub host: Host,
    pub snapshotter: Program,
    pub containerd: Containerd,
    socket: PathBuf,
}

impl Node {
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Starts the snapshotter, and waits until it answers.
    pub fn start_snapshotter(&mut self) -> Result<()> {
        let socket = self.socket.clone();
        self.snapshotter.start(|| std::os::unix::net::UnixStream::connect(&socket).is_ok())
    }

    /// Both daemons stopped, everything that they kept gone, and both started again; the identity stays.
    pub fn wipe(&mut self) -> Result<()> {
        self.snapshotter.stop(30)?;
        self.unmount()?;
        wipe_but_identity(&self.snapshotter.folder().join("root"))?;
        self.containerd.wipe()?;
        self.start_snapshotter()
    }

    /// Takes away what a snapshotter that doesn't run has left mounted.
    pub fn unmount(&self) -> Result<()> {
        let config = self.snapshotter.config();
        let run = self.host.run(program("darter-snapshotter")).arg("--config").arg(config.display());
        run.args(["unmount", "--force"]).check().map(drop)
    }

    /// A `darter` command about this node.
    pub fn darter(&self, command: &str) -> Run {
        let root = self.snapshotter.folder().join("root");
        self.host.run(program("darter")).arg(command).arg("--root").arg(root.display())
    }
}

/// Removes what a program keeps, save the certificate that it joined for.
pub fn wipe_but_identity(root: &Path) -> Result<()> {
    for entry in fs::read_dir(root).with_context(|| format!("listing {}", root.display()))? {
        let path = entry?.path();
        if path.ends_with("identity") {
            continue;
        }
        if path.is_dir() && !path.is_symlink() { fs::remove_dir_all(&path)? } else { fs::remove_file(&path)? }
    }
    Ok(())
}

/// What a test may choose.
#[derive(Clone, Debug)]
pub struct Options {
    pub nodes: usize,
    pub generation: Generation,
    pub certificate_life_seconds: u64,
    /// Lines added to every snapshotter's configuration.
    pub node_config: String,
    pub seed_config: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            nodes: 2,
            generation: Generation::Two,
            certificate_life_seconds: 7 * 24 * 3600,
            node_config: String::new(),
            seed_config: String::new(),
        }
    }
}

/// All of it. The fields are dropped in this order: nodes first.
pub struct Cluster {
    pub nodes: Vec<Node>,
    pub seed: Program,
    more_seeds: Vec<Program>,
    pub scheduler: Program,
    pub manager: Program,
    options: Options,
}

/// Where members reach the manager, the scheduler, and each other.
pub const MANAGER_PORT: u16 = 7400;
pub const SCHEDULER_PORT: u16 = 7410;
pub const PEER_PORT: u16 = 7420;
/// Of the manager's REST API.
pub const REST_PORT: u16 = 7480;

impl Cluster {
    pub fn start(world: &World, registry: &Registry, options: Options) -> Result<Self> {
        let control = world.host("control")?;
        let manager = start_manager(world, &control, &options)?;
        let mut scheduler =
            member(world, &manager, &control, "scheduler", "scheduler", SCHEDULER_PORT, "", &[])?;
        scheduler.start(listening(&control, SCHEDULER_PORT))?;
        plain_http_hosts(world, registry)?;
        let seed = start_seed(world, &manager, "seed", &options)?;
        let more_seeds = Vec::new();
        let mut cluster = Self { nodes: Vec::new(), seed, more_seeds, scheduler, manager, options };
        for _ in 0..cluster.options.nodes {
            cluster.add_node(world, registry)?;
        }
        Ok(cluster)
    }

    /// One more node, with nothing on it.
    pub fn add_node(&mut self, world: &World, registry: &Registry) -> Result<&mut Node> {
        let host = world.host(&format!("node-{}", self.nodes.len() + 1))?;
        let socket = snapshotter_socket(world, &host)?;
        let containerd = Containerd::start(world, &host, self.options.generation, Some(&socket))?;
        containerd.plain_http(&registry.authority())?;
        let lines = format!(
            "address = \"{}\"\ncontainerd_address = \"{}\"\nhosts_dir = \"{}\"\n{}",
            socket.display(),
            containerd.socket().display(),
            containerd.hosts_dir().display(),
            with_marks(&self.options.node_config)
        );
        let snapshotter = member(world, &self.manager, &host, "snapshotter", "node", PEER_PORT, &lines, &[])?;
        docker_config(&snapshotter.folder().join("docker"), &registry.authority())?;
        let mut node = Node { host, snapshotter, containerd, socket };
        node.start_snapshotter()?;
        self.nodes.push(node);
        Ok(self.nodes.last_mut().expect("one was pushed"))
    }

    /// One more seed, named as its host.
    pub fn add_seed(&mut self, world: &World, host: &str) -> Result<()> {
        self.more_seeds.push(start_seed(world, &self.manager, host, &self.options)?);
        Ok(())
    }

    /// The seed stopped, what it kept gone, and started again.
    pub fn wipe_seed(&mut self) -> Result<()> {
        self.seed.stop(30)?;
        wipe_but_identity(&self.seed.folder().join("root"))?;
        self.start_seed()
    }

    pub fn start_seed(&mut self) -> Result<()> {
        let host = self.seed.host().clone();
        self.seed.start(listening(&host, PEER_PORT))
    }

    pub fn start_scheduler(&mut self) -> Result<()> {
        let host = self.scheduler.host().clone();
        self.scheduler.start(listening(&host, SCHEDULER_PORT))
    }

    pub fn start_manager(&mut self) -> Result<()> {
        let host = self.manager.host().clone();
        self.manager.start(listening(&host, MANAGER_PORT))
    }

    /// Asks the manager's REST API.
    pub fn rest(&self, method: &str, path: &str, body: &str) -> Result<serde_json::Value> {
        let token = fs::read_to_string(self.manager.folder().join("root/api-token"))?;
        let url = format!("http://{}:{REST_PORT}{path}", self.manager.host().address());
        let mut curl = self.manager.host().run("curl").args(["-sS", "--fail-with-body", "-X", method]);
        curl = curl.args(["-H", &format!("Authorization: Bearer {}", token.trim())]);
        if !body.is_empty() {
            curl = curl.args(["-H", "Content-Type: application/json", "-d", body]);
        }
        Ok(serde_json::from_str(&curl.arg(url).check()?)?)
    }
}

/// A manager with nobody in its cluster yet, at the ports that all managers of tests have.
pub fn start_manager(world: &World, host: &Host, options: &Options) -> Result<Program> {
    let folder = world.folder("manager")?;
    let address = host.address();
    let config = format!(
        "root = \"{}/root\"\ncluster = \"test\"\ngrpc_listen = \"{address}:{MANAGER_PORT}\"\n\
         http_listen = \"{address}:{REST_PORT}\"\ncertificate_life_seconds = {}\n",
        folder.display(),
        options.certificate_life_seconds
    );
    let mut manager = Program::new("manager", host, &folder, &config, &[])?;
    manager.start(listening(host, MANAGER_PORT))?;
    Ok(manager)
}

/// A join token for `role`, as the manager's operator makes it.
pub fn token(manager: &Program, role: &str) -> Result<String> {
    let run = manager.host().run(program("darter-manager")).arg("--config").arg(manager.config().display());
    let token = run.args(["token", "--role", role]).check()?;
    Ok(token.trim().to_owned())
}

/// A member's program with its token and the settings that all members have; `lines` are its own.
#[expect(clippy::too_many_arguments, reason = "one call each, all told apart by type or name")]
fn member(
    world: &World,
    manager: &Program,
    host: &Host,
    name: &str,
    role: &str,
    port: u16,
    lines: &str,
    flags: &[&str],
) -> Result<Program> {
    let folder = world.folder(&format!("{}/{name}", host.role()))?;
    let token_file = folder.join("token");
    fs::write(&token_file, token(manager, role)?)?;
    let config = format!(
        "root = \"{}/root\"\nmanager = \"{}:{MANAGER_PORT}\"\njoin_token_file = \"{}\"\nnode_name = \"{}\"\n\
         listen = \"{}:{port}\"\n{lines}",
        folder.display(),
        manager.host().address(),
        token_file.display(),
        host.role(),
        host.address(),
    );
    Program::new(name, host, &folder, &config, flags)
}

fn start_seed(world: &World, manager: &Program, host: &str, options: &Options) -> Result<Program> {
    let (host, hosts) = (world.host(host)?, hosts_of_seeds(world)?);
    let lines = format!("hosts_dir = \"{}\"\n{}", hosts.display(), with_marks(&options.seed_config));
    let mut seed = member(world, manager, &host, "peer", "seed", PEER_PORT, &lines, &["--seed"])?;
    seed.start(listening(&host, PEER_PORT))?;
    Ok(seed)
}

/// The folder of hosts.toml that all seeds read.
fn hosts_of_seeds(world: &World) -> Result<PathBuf> {
    world.folder("seed/certs.d")
}

fn plain_http_hosts(world: &World, registry: &Registry) -> Result<()> {
    let authority = registry.authority();
    let folder = hosts_of_seeds(world)?.join(&authority);
    fs::create_dir_all(&folder)?;
    Ok(fs::write(folder.join("hosts.toml"), format!("server = \"http://{authority}\"\n"))?)
}

/// The disk of whoever runs the tests may be as full and as busy as it likes, unless a story has something to say on that.
fn with_marks(config: &str) -> String {
    let marks = "store_high_percent = 100\nstore_low_percent = 100\n";
    let unless = |key: &str, lines: &'static str| if config.contains(key) { "" } else { lines };
    let busy = unless("background_yields", "background_yields = false\n");
    format!("{config}{}{busy}", unless("store_high_percent", marks))
}

/// Whether something accepts connections at this port of the host.
fn listening(host: &Host, port: u16) -> impl FnMut() -> bool {
    let host = host.clone();
    move || {
        let connect = || Ok(std::net::TcpStream::connect((host.address(), port)).is_ok());
        host.inside(connect).unwrap_or(false)
    }
}
