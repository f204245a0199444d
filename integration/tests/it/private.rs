//! Private registries: each way that a credential can come, what a wrong one ends in, and what becomes of it afterwards.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use darter_integration::cluster::{Cluster, Node, Options};
use darter_integration::command::{Run, eventually};
use darter_integration::containerd::{DARTER, OVERLAYFS};
use darter_integration::darter::{docker_config, docker_config_as, program};
use darter_integration::image::{Blobs, Image};
use darter_integration::registry::{PASSWORD, Registry, Request, USER};
use darter_integration::token::{REFUSAL, TokenRegistry};
use darter_integration::world::World;

use crate::never_worse::{end, last_words};
use crate::site::{Data, SUM, files, found_again, start_again};

pub const STORIES: crate::Stories = &[
    ("each_way_of_a_credential_opens_a_private_registry", 400, each_way_opens_a_private_registry),
    ("a_wrong_password_ends_in_the_registrys_words", 300, a_wrong_password_ends_in_its_words),
    ("credentials_of_a_pull_outlive_a_restart_only_if_configured", 400, kept_only_if_configured),
    ("a_credential_helper_that_hangs_stops_nobody", 180, a_helper_that_hangs),
];

/// The containerd namespace of what comes by CRI.
const CRI: &str = "k8s.io";
const WRONG: &str = "reader:wrong";

fn login() -> String {
    format!("{USER}:{PASSWORD}")
}

/// A cluster of one node beside two registries with the same images and the same user: one asks for the password, the other
/// for a token.
struct Site {
    cluster: Cluster,
    tokens: TokenRegistry,
    blobs: Blobs,
    registry: Registry,
    world: World,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Door {
    Password,
    Token,
}

const DOORS: [Door; 2] = [Door::Password, Door::Token];

impl Site {
    fn new(node_config: &str) -> Result<Self> {
        let world = World::new()?;
        let registry = Registry::start(&world, "registry")?;
        let tokens = TokenRegistry::start(&world, &registry)?;
        let blobs = Blobs::open(world.folder("blobs")?)?;
        let options = Options { nodes: 1, node_config: node_config.to_owned(), ..Options::default() };
        let cluster = Cluster::start(&world, &registry, options)?;
        let site = Self { cluster, tokens, blobs, registry, world };
        site.describe_hosts(None)?;
        site.forget_passwords()?;
        Ok(site)
    }

    fn node(&self) -> &Node {
        &self.cluster.nodes[0]
    }

    fn authority(&self, door: Door) -> String {
        match door {
            Door::Password => self.registry.authority(),
            Door::Token => self.tokens.authority(),
        }
    }

    fn requests(&self, door: Door) -> Vec<Request> {
        match door {
            Door::Password => self.registry.requests(),
            Door::Token => self.tokens.requests(),
        }
    }

    /// An image that nobody has yet, and its reference.
    fn stock(&self, door: Door, salt: u64, name: &str) -> Result<(Data, String)> {
        let data = Data::new(&self.blobs, salt, 3, 70_000)?;
        self.registry.push(&self.blobs, &data.image, name)?;
        Ok((data, format!("{}/{name}:latest", self.authority(door))))
    }

    /// What node and seed know of both registries; `header` goes to the one behind that door.
    fn describe_hosts(&self, header: Option<(Door, &str)>) -> Result<()> {
        for door in DOORS {
            let authority = self.authority(door);
            let mut text = format!("server = \"http://{authority}\"\n\n[host.\"http://{authority}\"]\n");
            if let Some((_, value)) = header.filter(|(at, _)| *at == door) {
                text += &format!("[host.\"http://{authority}\".header]\nAuthorization = \"{value}\"\n");
            }
            for folder in self.folders_of_hosts()? {
                fs::create_dir_all(folder.join(&authority))?;
                fs::write(folder.join(&authority).join("hosts.toml"), &text)?;
            }
        }
        Ok(())
    }

    fn folders_of_hosts(&self) -> Result<[std::path::PathBuf; 2]> {
        Ok([self.node().containerd.hosts_dir(), self.world.folder("seed/certs.d")?])
    }

    /// Node and seed don't know the registry behind that door.
    fn hide(&self, door: Door) -> Result<()> {
        let authority = self.authority(door);
        self.folders_of_hosts()?
            .iter()
            .try_for_each(|folder| Ok(fs::remove_dir_all(folder.join(&authority))?))
    }

    fn docker(&self) -> std::path::PathBuf {
        self.node().snapshotter.folder().join("docker")
    }

    /// The node's Docker configuration has nothing.
    fn forget_passwords(&self) -> Result<()> {
        Ok(fs::write(self.docker().join("config.json"), "{}")?)
    }

    /// Daemons read the folder of hosts.toml anew, and have forgotten what helpers said.
    fn restart(&mut self) -> Result<()> {
        self.cluster.seed.stop(30)?;
        self.cluster.start_seed()?;
        self.cluster.nodes[0].snapshotter.stop(30)?;
        start_again(&mut self.cluster.nodes[0])
    }

    /// As kubelet pulls, from Darter's socket; with the credentials of the pull, if there are any.
    fn cri_pull(&self, user: Option<&str>, reference: &str) -> Run {
        let pull = self.node().containerd.crictl_with_images_of(self.node().socket()).arg("pull");
        let pull = match user {
            Some(user) => pull.args(["--creds", user]),
            None => pull,
        };
        pull.arg(reference)
    }

    fn preheat(&self, user: &str, reference: &str) -> Run {
        let manager = &self.cluster.manager;
        let rest = format!("http://{}:7480", manager.host().address());
        let preheat = manager.host().run(program("darter")).arg("preheat").arg(reference);
        let preheat = preheat.args(["--wait", "--user", user, "--manager", &rest, "--token-file"]);
        preheat.arg(manager.folder().join("root/api-token").display()).timeout(120)
    }

    fn namespace(&self, way: Way) -> String {
        if way.is_by_cri() { CRI.to_owned() } else { self.node().containerd.namespace().to_owned() }
    }

    /// No blob of a layer is in the content store, and the data is what was pushed.
    fn lazy_and_right(&self, way: Way, data: &Data, reference: &str, id: &str) -> Result<()> {
        let ctr = || self.node().containerd.ctr_in(&self.namespace(way));
        let stored = ctr().args(["content", "ls", "-q"]).check()?;
        let blobs = data.image.layers.iter().filter(|layer| stored.contains(&layer.blob.digest)).count();
        ensure!(blobs == 0, "{blobs} layer blobs are in the content store");
        let run = ["run", "--rm", "--net-host", "--snapshotter", DARTER, reference, id, "sh", "-c", SUM];
        let ran = ctr().args(run).output()?;
        ensure!(ran.stdout.starts_with(&data.sum), "not {}: {}: {}", data.sum, ran.status, ran.said());
        Ok(())
    }

    /// The layer with the data was read through this door once, by the seed.
    fn read_once(&self, door: Door, data: &Data) -> Result<()> {
        let requests = self.requests(door);
        let reads: Vec<_> = requests
            .iter()
            .filter(|r| r.method == "GET" && r.status < 300 && r.path.ends_with(data.top_blob()))
            .collect();
        let seed = self.cluster.seed.host().address().to_string();
        ensure!(reads.len() == 1 && reads[0].from == seed, "read by others than the seed: {reads:?}");
        Ok(())
    }
}

/// How a credential comes to the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Cri,
    Config,
    Helper,
    Header,
    Preheat,
}

const WAYS: [Way; 5] = [Way::Cri, Way::Config, Way::Helper, Way::Header, Way::Preheat];

impl Way {
    fn is_by_cri(self) -> bool {
        matches!(self, Way::Cri | Way::Header | Way::Preheat)
    }
}

/// A helper of this name on the path of the node's daemon, which runs `script`.
fn write_helper(folder: &Path, name: &str, script: &str) -> Result<()> {
    fs::create_dir_all(folder)?;
    let helper = folder.join(format!("docker-credential-{name}"));
    fs::write(&helper, format!("#!/bin/sh\n{script}\n"))?;
    Ok(fs::set_permissions(&helper, fs::Permissions::from_mode(0o755))?)
}

fn answer(user: &str) -> String {
    let (username, secret) = user.split_once(':').unwrap_or((user, ""));
    format!("echo '{{\"Username\":\"{username}\",\"Secret\":\"{secret}\"}}'")
}

/// From now on the node finds helpers in a folder of its own.
fn with_helpers(site: &mut Site, helpers: &[(&str, String)]) -> Result<()> {
    let folder = site.world.folder("node-1/bin")?;
    for (name, script) in helpers {
        write_helper(&folder, name, script)?;
    }
    let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap_or_default());
    site.cluster.nodes[0].snapshotter.set_environment(vec![("PATH".to_owned(), path)]);
    site.restart()
}

fn ask_helper(site: &Site, door: Door, name: &str) -> Result<()> {
    let config = serde_json::json!({"credHelpers": {site.authority(door): name}});
    Ok(fs::write(site.docker().join("config.json"), config.to_string())?)
}

fn each_way_opens_a_private_registry() -> Result<()> {
    let mut site = Site::new("")?;
    with_helpers(&mut site, &[("right", answer(&login()))])?;
    let mut salt = 0;
    for door in DOORS {
        for way in WAYS {
            salt += 1;
            let name = format!("private/{door:?}-{way:?}").to_lowercase();
            opens(&mut site, door, way, salt, &name).with_context(|| format!("{door:?} by {way:?}"))?;
        }
    }
    Ok(())
}

fn opens(site: &mut Site, door: Door, way: Way, salt: u64, name: &str) -> Result<()> {
    let (data, reference) = site.stock(door, salt, name)?;
    site.forget_passwords()?;
    match way {
        Way::Cri => site.cri_pull(Some(&login()), &reference).check()?,
        Way::Config => {
            docker_config(&site.docker(), &site.authority(door))?;
            site.node().containerd.ctr_pull(&reference, DARTER).check()?
        }
        Way::Helper => {
            ask_helper(site, door, "right")?;
            site.node().containerd.ctr_pull(&reference, DARTER).check()?
        }
        Way::Header => {
            let value = match door {
                Door::Password => format!("Basic {}", STANDARD.encode(login())),
                Door::Token => format!("Bearer {}", site.tokens.mint(name)?),
            };
            site.describe_hosts(Some((door, &value)))?;
            site.restart()?;
            site.cri_pull(None, &reference).check()?
        }
        Way::Preheat => {
            let said = site.preheat(&login(), &reference).check()?;
            ensure!(said.contains("3 layers ready"), "{said}");
            site.read_once(door, &data)?;
            site.cri_pull(Some(&login()), &reference).check()?
        }
    };
    site.lazy_and_right(way, &data, &reference, &name.replace('/', "-"))?;
    site.read_once(door, &data)?;
    if way == Way::Header {
        site.describe_hosts(None)?;
        site.restart()?;
    }
    Ok(())
}

/// What a registry says to a wrong password.
fn words(door: Door) -> &'static str {
    match door {
        Door::Password => "authentication required",
        Door::Token => REFUSAL,
    }
}

fn a_wrong_password_ends_in_its_words() -> Result<()> {
    let mut site = Site::new("")?;
    with_helpers(&mut site, &[("wrong", answer(WRONG))])?;
    for (salt, door) in DOORS.into_iter().enumerate() {
        let name = format!("wrong/{door:?}").to_lowercase();
        let (data, reference) = site.stock(door, salt as u64, &name)?;
        refused_to_clients(&site, door, &reference).with_context(|| format!("{door:?}"))?;
        let preheat = site.preheat(WRONG, &reference).output()?;
        ensure!(!preheat.success() && preheat.said().contains(words(door)), "{door:?}: {}", preheat.said());
        docker_config_as(&site.docker(), &site.authority(door), WRONG)?;
        left_to_containerd(&site, words(door), &data.image, &reference)
            .with_context(|| format!("{door:?}"))?;
        ask_helper(&site, door, "wrong")?;
        let (data, reference) = site.stock(door, 10 + salt as u64, &format!("{name}-helper"))?;
        left_to_containerd(&site, words(door), &data.image, &reference)
            .with_context(|| format!("{door:?} by a helper"))?;
    }
    // There is one world at a time.
    drop(site);
    DOORS.into_iter().try_for_each(|door| wrong_header(door).with_context(|| format!("{door:?} by a header")))
}

/// The registry doesn't take what hosts.toml brings, and nothing else opens it. ctr, which reads no hosts.toml, has the password.
fn wrong_header(door: Door) -> Result<()> {
    // A site of its own: where layers are shared with other repositories these have a word as well.
    let mut site = Site::new("")?;
    let (value, refusal, other) = match door {
        // It is asked once more, without the header.
        Door::Password => (format!("Basic {}", STANDARD.encode(WRONG)), "authorization failed", Door::Token),
        Door::Token => ("Bearer wrong".to_owned(), REFUSAL, Door::Password),
    };
    site.describe_hosts(Some((door, &value)))?;
    // ctr's pull doesn't say the port: the other registry of this host would be asked as well, and its words might come last.
    site.hide(other)?;
    site.restart()?;
    let name = format!("wrong/{door:?}-header").to_lowercase();
    let (data, reference) = site.stock(door, 20 + door as u64, &name)?;
    left_to_containerd(&site, refusal, &data.image, &reference)
}

/// The client's own password is wrong, so the pull ends as it does with overlayfs.
fn refused_to_clients(site: &Site, door: Door, reference: &str) -> Result<()> {
    let containerd = &site.node().containerd;
    let pull = |snapshotter: &str| {
        end(containerd, containerd.ctr_pull_as(WRONG, reference, snapshotter), reference, snapshotter)
    };
    let (ours, plain) = (pull(DARTER)?, pull(OVERLAYFS)?);
    ensure!(ours == plain, "with Darter: {ours:?}; with overlayfs: {plain:?}");
    ensure!(plain.words()?.contains("401 Unauthorized"), "{plain:?}");
    let by_cri = |socket: &Path| -> Result<String> {
        let crictl = containerd.crictl_with_images_of(socket);
        let pulled = crictl.args(["pull", "--creds", WRONG, reference]).output()?;
        ensure!(!pulled.success(), "a wrong password was taken");
        Ok(without_time(&last_words(&pulled)))
    };
    let (ours, theirs) = (by_cri(site.node().socket())?, by_cri(&containerd.socket())?);
    ensure!(ours == theirs && ours.contains("401 Unauthorized"), "{ours}\n{theirs}");
    let daemon = site.node().host.run(program("darter")).arg("pull").args(["--user", WRONG, "--plain-http"]);
    let daemon = daemon.args(["--namespace", containerd.namespace(), "--containerd-address"]);
    let pulled = daemon.arg(containerd.socket().display()).arg(reference).output()?;
    ensure!(!pulled.success() && pulled.said().contains(words(door)), "{}", pulled.said());
    Ok(())
}

/// crictl logs when it was.
fn without_time(line: &str) -> String {
    let from = line.find("msg=").or_else(|| line.find("pulling image")).unwrap_or(0);
    line[from..].to_owned()
}

/// The client's password is right, the node's own is wrong: containerd pulls, and `darter why` has the registry's words.
fn left_to_containerd(site: &Site, refusal: &str, image: &Image, reference: &str) -> Result<()> {
    let containerd = &site.node().containerd;
    containerd.ctr_pull(reference, DARTER).check()?;
    let blobs = containerd.layer_blobs(image)?.len();
    ensure!(blobs == image.layers.len(), "only {blobs} layers were left to containerd");
    let why = site.node().darter("why").arg(reference).check()?;
    ensure!(why.contains(refusal), "no word of {refusal:?}:\n{why}");
    Ok(())
}

/// The image is pulled by CRI; then the daemon starts again, with nothing of the layers left on node and seed.
fn kept_only_if_configured() -> Result<()> {
    for is_kept in [false, true] {
        let mut site = Site::new("")?;
        let key = site.world.folder("keys")?.join("credentials.key");
        if is_kept {
            let snapshotter = &mut site.cluster.nodes[0].snapshotter;
            snapshotter.set("credentials_key_file", &format!("\"{}\"", key.display()))?;
            snapshotter.stop(30)?;
            start_again(&mut site.cluster.nodes[0])?;
        }
        let (data, reference) = site.stock(Door::Password, 1, "private/kept")?;
        site.cri_pull(Some(&login()), &reference).check()?;
        site.lazy_and_right(Way::Cri, &data, &reference, "before")?;
        no_password_on_the_disk(&site)?;
        let file = site.node().snapshotter.folder().join("root/credentials");
        ensure!(file.exists() == is_kept && key.exists() == is_kept, "kept, or not: {}", file.display());
        forget_layers(&mut site)?;
        let run =
            ["run", "--rm", "--net-host", "--snapshotter", DARTER, &reference, "after", "sh", "-c", SUM];
        let ran = site.node().containerd.ctr_in(CRI).args(run).output()?;
        no_password_on_the_disk(&site)?;
        if !is_kept {
            ensure!(!ran.success() && ran.said().contains("authorization failed"), "{}", ran.said());
            continue;
        }
        ensure!(ran.stdout.starts_with(&data.sum), "not let in again: {}", ran.said());
        for secret in [&file, &key] {
            ensure!(fs::metadata(secret)?.mode() & 0o777 == 0o600, "others may read {}", secret.display());
        }
        forgotten_when_damaged(&mut site, &file, &reference)?;
    }
    Ok(())
}

/// A keyring that can't be opened is as good as none, and the daemon starts.
fn forgotten_when_damaged(site: &mut Site, file: &Path, reference: &str) -> Result<()> {
    let mut bytes = fs::read(file)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(file, bytes)?;
    forget_layers(site)?;
    let run = ["run", "--rm", "--net-host", "--snapshotter", DARTER, reference, "damaged", "sh", "-c", SUM];
    let ran = site.node().containerd.ctr_in(CRI).args(run).output()?;
    ensure!(!ran.success() && ran.said().contains("authorization failed"), "{}", ran.said());
    let log = fs::read_to_string(site.node().snapshotter.folder().join("log"))?;
    ensure!(log.contains("the credentials of earlier pulls are forgotten"), "no word of it in the log");
    Ok(())
}

/// Restarts seed and node without their stores: who wants the layer has to be let in by the registry again.
fn forget_layers(site: &mut Site) -> Result<()> {
    site.cluster.wipe_seed()?;
    let node = &mut site.cluster.nodes[0];
    node.snapshotter.stop(30)?;
    fs::remove_dir_all(node.snapshotter.folder().join("root/store"))?;
    node.start_snapshotter()?;
    found_again(node)
}

/// Neither as it is nor as it is sent.
fn no_password_on_the_disk(site: &Site) -> Result<()> {
    let secrets = [PASSWORD.to_owned(), STANDARD.encode(login())];
    let programs =
        [&site.node().snapshotter, &site.cluster.seed, &site.cluster.manager, &site.cluster.scheduler];
    for root in programs.map(|program| program.folder().join("root")) {
        // What is mounted there has no files of the program's.
        let all = fs::read_dir(&root)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        let (folders, mut found): (Vec<_>, Vec<_>) = all.into_iter().partition(|path| path.is_dir());
        for folder in folders.iter().filter(|folder| !folder.ends_with("s")) {
            found.extend(files(folder, &[""])?);
        }
        ensure!(!found.is_empty(), "no files in {}", root.display());
        for file in found.iter().filter(|file| fs::metadata(file).is_ok_and(|data| data.is_file())) {
            let bytes = fs::read(file)?;
            for secret in &secrets {
                let is_there = bytes.windows(secret.len()).any(|part| part == secret.as_bytes());
                ensure!(!is_there, "the password is in {}", file.display());
            }
        }
    }
    Ok(())
}

/// Nobody waits for it at Prepare, so the image is containerd's; and it runs once at a time, however many want it.
fn a_helper_that_hangs() -> Result<()> {
    let mut site = Site::new("")?;
    let asked = site.world.folder("asked")?.join("times");
    let hang = format!("echo asked >> {}; exec sleep 600", asked.display());
    with_helpers(&mut site, &[("hangs", hang)])?;
    ask_helper(&site, Door::Password, "hangs")?;
    for (salt, name) in ["private/first", "private/second", "private/third"].into_iter().enumerate() {
        let (data, reference) = site.stock(Door::Password, salt as u64, name)?;
        let containerd = &site.node().containerd;
        let began = Instant::now();
        containerd.ctr_pull(&reference, DARTER).check()?;
        let took = began.elapsed();
        ensure!(took < Duration::from_secs(9), "{name} waited for the helper: {took:?}");
        let ran = containerd.ctr_run(&reference, DARTER, &format!("hangs-{salt}")).output()?;
        ensure!(ran.stdout == "hello from a layer\n", "{name}: {}", ran.said());
        let blobs = containerd.layer_blobs(&data.image)?.len();
        ensure!(blobs == data.image.layers.len(), "only {blobs} layers of {name} were left to containerd");
        let why = site.node().darter("why").arg(&reference).check()?;
        let words =
            if salt == 0 { "the credential helper has not answered yet" } else { "authorization failed" };
        ensure!(why.contains(words), "no word of {words:?}:\n{why}");
        let times = fs::read_to_string(&asked)?.lines().count();
        ensure!(times == 1 || salt > 0, "it was asked {times} times for one image");
        eventually("the helper is ended", 30, || {
            let log = fs::read_to_string(site.node().snapshotter.folder().join("log"))?;
            Ok(log.contains("a credential helper failed"))
        })?;
    }
    Ok(())
}
