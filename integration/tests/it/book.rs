//! The book's commands, run as they stand there.
//!
//! Every fenced block of `sh` in a page is run, in one shell a page, on a machine with systemd and Debian's containerd. A
//! comment right before a block may say otherwise:
//!
//! - `<!-- not run: REASON -->`: left out; the story lists it.
//! - `<!-- run in the background until it prints: WORDS -->`: it goes on while the blocks behind it run.
//!
//! The pages name a registry `registry.example`: the machine finds it by its `hosts.toml`, with a password. The machine's cgroups
//! have no controllers, so its `ctr run` asks for no processor shares.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use darter_integration::containerd::tool;
use darter_integration::image::Blobs;
use darter_integration::machine::{self, Machine};
use darter_integration::registry::{PASSWORD, Registry, USER};
use darter_integration::world::World;

use crate::harness::busybox;
use crate::packages;

pub const STORIES: crate::Stories = &[
    ("every_command_of_the_readme_runs", 600, every_command_of_the_readme_runs),
    ("every_command_of_the_book_runs", 900, every_command_of_the_book_runs),
];

const PACKAGES: &str = "/root/packages";
const CTR: &str = "#!/bin/sh
if [ \"$1\" = run ]; then shift; set -- run --cpu-shares 0 \"$@\"; fi
exec /usr/bin/ctr \"$@\"
";
/// containerd as it is on a node that pulls from private registries and has no Darter yet.
const CONTAINERD: &str = "version = 2
[plugins.\"io.containerd.grpc.v1.cri\".registry]
  config_path = \"/etc/containerd/certs.d\"
";

/// What is to happen with a block.
#[derive(Debug, PartialEq, Eq)]
enum How {
    Run,
    Background { until: String },
    Not { reason: String },
}

#[derive(Debug)]
struct Block {
    /// `page:line`, for people.
    place: String,
    how: How,
    text: String,
}

/// The blocks of commands in a page, in their order.
fn blocks(page: &str) -> Result<Vec<Block>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(page);
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let lines: Vec<&str> = text.lines().collect();
    let starts = lines.iter().enumerate().filter(|(_, line)| **line == "```sh");
    let block = |at: usize| {
        let place = format!("{page}:{}", at + 1);
        let length = lines[at + 1..].iter().position(|line| *line == "```").context("a fence has no end")?;
        let how = how(at.checked_sub(1).map_or("", |before| lines[before])).with_context(|| place.clone())?;
        let is_command = !matches!(how, How::Background { .. }) || length == 1;
        ensure!(is_command, "{place}: what runs in the background is one command");
        Ok(Block { place, how, text: lines[at + 1..=at + length].join("\n") })
    };
    starts.map(|(at, _)| block(at)).collect()
}

fn how(before: &str) -> Result<How> {
    let Some(comment) = before.strip_prefix("<!-- ") else { return Ok(How::Run) };
    let comment = comment.strip_suffix(" -->").context("the comment before it has no end")?;
    if let Some(reason) = comment.strip_prefix("not run: ") {
        ensure!(reason.split(' ').count() > 4, "{reason:?} is no reason");
        return Ok(How::Not { reason: reason.to_owned() });
    }
    match comment.strip_prefix("run in the background until it prints: ") {
        Some(until) => Ok(How::Background { until: until.to_owned() }),
        None => bail!("{comment:?} is not known"),
    }
}

/// One script of a page's blocks. Each says where it begins, so that a failure names it.
fn script(blocks: &[Block]) -> String {
    let mut script = format!("cd {PACKAGES}\nexport PATH=/usr/local/bin:$PATH HOME=/root\nbackground=\n");
    for Block { place, how, text } in blocks {
        script += &match how {
            How::Run => format!("echo '== {place}'\n{text}\n"),
            How::Background { until } => format!(
                "echo '== {place}'\n(exec {text}) >/root/said 2>&1 &\nbackground=$!\n\
                 for _ in $(seq 300); do grep -q '{until}' /root/said && break; sleep 0.1; done\n\
                 grep '{until}' /root/said || {{ cat /root/said; exit 1; }}\n"
            ),
            How::Not { .. } => continue,
        };
    }
    script + "[ -z \"$background\" ] || { kill $background; wait $background || true; }\necho '== the end'\n"
}

/// A machine with Debian's containerd, a registry, and an image there whose command prints a line.
struct Site {
    machine: Machine,
    _registry: Registry,
    _world: World,
}

impl Site {
    fn new() -> Result<Self> {
        let debs = packages::debs()?;
        let world = World::new()?;
        let registry = Registry::start(&world, "registry")?;
        let blobs = Blobs::open(world.folder("blobs")?)?;
        registry.push_as(&blobs, &busybox(&blobs, &["cat", "/etc/motd"])?, "team/app", "1")?;
        let root = world.folder("machine")?.join("root");
        machine::debian(&root)?;
        let machine = Machine::boot(&world, "machine", &root)?;
        let to = machine.path(PACKAGES);
        machine::copy(debs, &to)?;
        let site = Self { machine, _registry: registry, _world: world };
        site.prepare()?;
        Ok(site)
    }

    /// What a machine has that somebody reads the book at.
    fn prepare(&self) -> Result<()> {
        let authority = self._registry.authority();
        let login = BASE64_STANDARD.encode(format!("{USER}:{PASSWORD}"));
        let hosts = format!(
            "server = \"http://{authority}\"\n[host.\"http://{authority}\"]\n  capabilities = [\"pull\", \"resolve\"]\n\
             [host.\"http://{authority}\".header]\n  Authorization = \"Basic {login}\"\n"
        );
        self.write("/etc/containerd/certs.d/registry.example/hosts.toml", &hosts)?;
        self.write("/etc/containerd/config.toml", CONTAINERD)?;
        self.write("/etc/apt/apt.conf.d/90yes", "APT::Get::Assume-Yes \"true\";\n")?;
        self.program("ctr", |to| Ok(fs::write(to, CTR)?))?;
        let crictl = tool("DARTER_CRICTL", "tools/crictl-1.36.0/crictl");
        self.program("crictl", |to| fs::copy(&crictl, to).map(drop).context("crictl"))?;
        let nerdctl = tool("DARTER_NERDCTL", "tools/nerdctl-2.3.5/nerdctl");
        self.program("nerdctl", |to| fs::copy(&nerdctl, to).map(drop).context("nerdctl"))?;
        self.machine.shell("systemctl restart containerd").check().map(drop)
    }

    fn write(&self, inside: &str, text: &str) -> Result<()> {
        let path = self.machine.path(inside);
        fs::create_dir_all(path.parent().context("a file has a folder")?)?;
        Ok(fs::write(path, text)?)
    }

    fn program(&self, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let path: PathBuf = self.machine.path("/usr/local/bin").join(name);
        make(&path)?;
        Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
    }

    /// Runs a page; what it printed. An error names the block.
    fn page(&self, page: &str) -> Result<String> {
        let blocks = blocks(page)?;
        let run = blocks.iter().filter(|block| !matches!(block.how, How::Not { .. })).count();
        ensure!(run > 0, "{page} has no block that can be run");
        for Block { place, how, .. } in &blocks {
            if let How::Not { reason } = how {
                println!("  {place} is not run: {reason}");
            }
        }
        println!("  {page}: {run} of {} blocks are run", blocks.len());
        let ran = self.machine.shell(&script(&blocks)).timeout(300).output()?;
        let said = ran.said();
        let at = said.lines().rev().find_map(|line| line.strip_prefix("== ")).unwrap_or("its beginning");
        ensure!(ran.success(), "{page} failed at {at}:\n{said}\nthe journal:\n{}", self.machine.journal());
        Ok(said)
    }

    /// Nothing of Darter is mounted once nobody uses it.
    fn no_mounts(&self) -> Result<()> {
        let mounts = self.machine.shell("cat /proc/self/mountinfo").check()?;
        ensure!(!mounts.contains("fuse.darter"), "still mounted:\n{mounts}");
        Ok(())
    }
}

fn has(said: &str, words: &[&str]) -> Result<()> {
    words.iter().try_for_each(|words| {
        ensure!(said.contains(words), "{words:?} was not printed:\n{said}");
        Ok(())
    })
}

fn every_command_of_the_readme_runs() -> Result<()> {
    let site = Site::new()?;
    site.machine.shell(&format!("dpkg -i {PACKAGES}/darter_*.deb")).timeout(120).check()?;
    let said = site.page("README.md")?;
    has(&said, &["2 of 2 layers lazy", "hello from a layer", "a registry has it"])?;
    // containerd may not have collected the container's snapshot before Darter was stopped, which leaves the mounts then.
    site.machine.shell("darter unmount").check()?;
    site.no_mounts()
}

fn every_command_of_the_book_runs() -> Result<()> {
    let site = Site::new()?;
    let said = site.page("docs/install.md")?;
    has(&said, &["proxy_plugins", "is changed"])?;
    let said = site.page("docs/first-image.md")?;
    has(&said, &["2 of 2 layers lazy", "hello from a layer", "✓ the certificate of"])?;
    let said = site.page("docs/operate.md")?;
    has(&said, &["nothing on this node needs Darter any more", "no longer names Darter", "operator"])?;
    site.machine.shell("systemctl stop darter-snapshotter").check()?;
    site.no_mounts()
}
