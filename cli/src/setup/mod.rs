//! `darter setup containerd`: shows the change to containerd's configuration, makes it, takes it back.

mod k3s;
pub mod plan;

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use containerd_client::services::v1::version_client::VersionClient;
use k3s::Distribution;
use plan::{Generation, Wanted};
use similar::TextDiff;

use crate::hydrate::Node;
use crate::socket::K3S;

const ANSWER_MAX: Duration = Duration::from_secs(2);
/// What the file's copy from before is called: the file's name and this.
const BACKUP: &str = ".before-darter";
/// The copy of a file that wasn't there.
const ABSENT: &str = "# There was no such file.\n";
/// The mode of a file that wasn't there.
const NEW_FILE_MODE: u32 = 0o644;

#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Show what containerd's config.toml needs for Darter; change it with --apply, take it back with --undo
    Containerd(Containerd),
}

#[derive(Debug, clap::Args)]
struct Containerd {
    /// Write the change, and keep a copy of the file beside it
    #[arg(long, conflicts_with = "undo")]
    apply: bool,
    /// Take away what --apply has added
    #[arg(long)]
    undo: bool,
    /// containerd's configuration; default: /etc/containerd/config.toml, with --k3s its template
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// k3s and RKE2 write containerd's configuration themselves: change their template
    #[arg(long)]
    k3s: bool,
    /// Leave kubelet and crictl with the snapshotter that they have
    #[arg(long)]
    no_cri: bool,
    /// containerd's version; default: asked of the one that runs, or of the program
    #[arg(long, value_name = "VERSION")]
    containerd_version: Option<String>,
    #[command(flatten)]
    node: Node,
    /// The name that containerd's configuration gives to Darter
    #[arg(long, default_value = "darter")]
    snapshotter: String,
    /// Darter's socket
    #[arg(long, value_name = "SOCKET", default_value = "/run/darter/darter.sock")]
    address: PathBuf,
}

pub async fn run(options: Options) -> Result<()> {
    let What::Containerd(options) = options.what;
    let (version, from) = options.version().await?;
    let wanted = Wanted {
        generation: Generation::of(&version)?,
        name: options.snapshotter.clone(),
        address: options.address.clone(),
        root: options.node.root.clone(),
        cri: !options.no_cri,
    };
    let file = File::open(options.file(wanted.generation))?;
    if options.undo {
        return undo(&options, &wanted, &file);
    }
    let text = if options.k3s { k3s::apply(&file.text, &wanted)? } else { plan::apply(&file.text, &wanted)? };
    if text == file.text {
        println!("{} has all that Darter needs for containerd {version} ({from}).", file.path.display());
        return Ok(());
    }
    if !options.apply {
        println!("For containerd {version} ({from}) {} needs:\n", file.path.display());
        file.show(&text);
        println!(
            "\nTo make this change, with a copy of the file kept beside it: the same command with --apply."
        );
        return Ok(());
    }
    file.keep_copy()?;
    file.write(&text)?;
    let (path, before) = (file.path.display(), file.backup());
    match file.there {
        true => println!("{path} is changed; as it was before: {}", before.display()),
        false => println!("{path} is made; it was not there before, and {} says so", before.display()),
    }
    println!("\n{}", options.next_steps(true));
    Ok(())
}

fn undo(options: &Containerd, wanted: &Wanted, file: &File) -> Result<()> {
    // Without the copy, what is ours goes all the same.
    let copy = read(&file.backup())?.filter(|copy| copy != ABSENT);
    let before = copy.as_deref().unwrap_or_default();
    let text =
        if options.k3s { k3s::undo(&file.text, before) } else { plan::undo(&file.text, before, wanted)? };
    if text == file.text {
        println!("{} has nothing of Darter's.", file.path.display());
    } else {
        // k3s takes a template that is there: of an empty one containerd would get an empty configuration. The copy of one that
        // was not there is empty, too, where an earlier build has made it.
        if text.is_empty() && (options.k3s || copy.is_none()) {
            file.remove()?;
        } else {
            file.write(&text)?;
        }
        println!("{} no longer names Darter.", file.path.display());
        println!("\n{}", options.next_steps(false));
    }
    match fs::remove_file(file.backup()) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).context("the copy could not be removed")
        }
        _ => Ok(()),
    }
}

fn distribution() -> Distribution {
    Distribution::found(Path::new(k3s::STATE))
}

impl Containerd {
    /// containerd's version, and where it is from. Fails where what would be written is nothing that this containerd reads.
    async fn version(&self) -> Result<(String, String)> {
        let by_default = self.node.containerd.is_k3s_by_default();
        if by_default && !self.k3s && self.config.is_none() {
            bail!("the containerd of this node is that of k3s or RKE2, at {K3S}: add --k3s");
        }
        if let Some(version) = &self.containerd_version {
            return Ok((version.clone(), "as --containerd-version says".to_owned()));
        }
        if by_default {
            println!("The containerd of k3s or RKE2 is asked, at {K3S}: it is the only one here.");
        }
        find_version(&self.node.containerd.path()).await
    }

    fn file(&self, generation: Generation) -> PathBuf {
        match &self.config {
            Some(path) => path.clone(),
            None if self.k3s => distribution().template(Path::new(k3s::STATE), generation),
            None => "/etc/containerd/config.toml".into(),
        }
    }

    fn next_steps(&self, applied: bool) -> String {
        let name = &self.snapshotter;
        match (self.k3s, applied) {
            (true, applied) => distribution().next_steps(name, applied),
            (false, true) if self.no_cri => "Next: systemctl restart containerd".to_owned(),
            (false, true) => format!(
                "Next: systemctl restart containerd. If the node is a kubelet's, drain it first and remove its images ({name}\n\
                 would unpack them as a whole): docs/kubernetes.md"
            ),
            (false, false) => {
                "Next: systemctl restart containerd (containers that run from Darter go on until they end)"
                    .to_owned()
            }
        }
    }
}

/// containerd's version, and where it is from: of the daemon at `socket`, else of the program.
async fn find_version(socket: &Path) -> Result<(String, String)> {
    let place = socket.display();
    if let Some(version) = version_of(socket).await {
        return Ok((version, format!("which answers at {place}")));
    }
    let from = format!("nobody answers at {place}; it is what `containerd --version` says");
    let run = tokio::process::Command::new("containerd").arg("--version").stdin(Stdio::null()).output();
    let output = tokio::time::timeout(ANSWER_MAX, run).await;
    // "containerd github.com/containerd/containerd v1.7.2 0cae528", and Debian's without the v.
    let words =
        output.ok().and_then(Result::ok).map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let version = words.as_deref().and_then(|words| words.split_whitespace().nth(2));
    version.map(|version| (version.to_owned(), from)).with_context(|| {
        format!(
            "no containerd answers at {place}, and there is no program `containerd`: install it, or say which version it will be with \
             --containerd-version"
        )
    })
}

/// What the daemon at `socket` says of itself; `None` if there is none.
pub async fn version_of(socket: &Path) -> Option<String> {
    let ask = async {
        let channel = containerd_client::connect(socket).await.ok()?;
        let answer = VersionClient::new(channel).version(()).await.ok()?;
        Some(answer.into_inner().version)
    };
    tokio::time::timeout(ANSWER_MAX, ask).await.ok().flatten()
}

/// A configuration file, there or not.
struct File {
    path: PathBuf,
    there: bool,
    text: String,
    mode: u32,
}

fn read(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("{} can't be read", path.display())),
    }
}

impl File {
    fn open(path: PathBuf) -> Result<Self> {
        // What a link leads to is written, not the link.
        let path = fs::canonicalize(&path).unwrap_or(path);
        let mode = fs::metadata(&path).map_or(NEW_FILE_MODE, |found| found.permissions().mode());
        let text = read(&path)?;
        Ok(Self { path, there: text.is_some(), text: text.unwrap_or_default(), mode })
    }

    fn backup(&self) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(BACKUP);
        name.into()
    }

    fn show(&self, text: &str) {
        let name = self.path.display().to_string();
        print!("{}", TextDiff::from_lines(self.text.as_str(), text).unified_diff().header(&name, &name));
    }

    /// The first copy stays: it is the file from before Darter.
    fn keep_copy(&self) -> Result<()> {
        if self.backup().exists() {
            return Ok(());
        }
        put(&self.backup(), if self.there { &self.text } else { ABSENT }, self.mode)
    }

    fn write(&self, text: &str) -> Result<()> {
        put(&self.path, text, self.mode)
    }

    fn remove(&self) -> Result<()> {
        fs::remove_file(&self.path).with_context(|| format!("{} can't be removed", self.path.display()))
    }
}

/// Replaces the file whole, or leaves it as it is.
fn put(path: &Path, text: &str, mode: u32) -> Result<()> {
    let folder = path.parent().context("the path of the configuration has no folder")?;
    let write = || {
        fs::create_dir_all(folder)?;
        let fresh = path.with_extension("darter-new");
        let mut file = fs::File::create(&fresh)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&fresh, path)
    };
    match write() {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            bail!("{} can't be written: run this as root", path.display())
        }
        Err(error) => Err(error).with_context(|| format!("{} can't be written", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(file: &Path, more: &[&str]) -> Options {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            options: Options,
        }
        let file = file.to_str().unwrap();
        let words = ["darter", "containerd", "--containerd-version", "2.1.0", "--config", file];
        <Line as clap::Parser>::parse_from(words.iter().chain(more)).options
    }

    #[tokio::test]
    async fn nothing_is_written_without_apply_and_undo_restores_the_file_or_its_absence() {
        let folder = tempfile::tempdir().unwrap();
        for before in [None, Some(""), Some("version = 3\n# mine\nroot = \"/x\"\n")] {
            let path = folder.path().join("sub/config.toml");
            if let Some(text) = before {
                fs::write(&path, text).unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            }
            run(options(&path, &[])).await.unwrap();
            assert_eq!(read(&path).unwrap().as_deref(), before);
            run(options(&path, &["--apply"])).await.unwrap();
            run(options(&path, &["--apply", "--root", "/data/darter"])).await.unwrap();
            let copy = read(&path.with_extension("toml.before-darter")).unwrap();
            assert_eq!(copy.as_deref(), before.or(Some(ABSENT)), "the first copy stays");
            assert!(read(&path).unwrap().unwrap().contains("\"/data/darter\""));
            run(options(&path, &["--undo", "--root", "/data/darter"])).await.unwrap();
            run(options(&path, &["--undo"])).await.unwrap();
            assert_eq!(read(&path).unwrap().as_deref(), before);
            if before.is_some() {
                assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            }
            assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), usize::from(before.is_some()));
        }
    }

    #[tokio::test]
    async fn a_template_of_k3s_is_changed_and_restored_or_taken_away_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config-v3.toml.tmpl");
        let k3s = |more: &[&str]| run(options(&path, &[&["--k3s"], more].concat()));
        let base = "{{ template \"base\" . }}\n";
        for before in [None, Some(base.to_owned()), Some(format!("{base}\n[debug]\n  level = \"warn\"\n"))] {
            before.iter().for_each(|text| fs::write(&path, text).unwrap());
            k3s(&["--apply"]).await.unwrap();
            k3s(&["--apply", "--root", "/data/darter"]).await.unwrap();
            let applied = read(&path).unwrap().unwrap();
            assert!(applied.starts_with(before.as_deref().unwrap_or(base)), "{applied}");
            assert_eq!(applied.matches("[proxy_plugins.darter]").count(), 1, "{applied}");
            assert!(applied.contains("\"/data/darter\""), "{applied}");
            k3s(&["--undo"]).await.unwrap();
            assert_eq!(read(&path).unwrap(), before);
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), usize::from(before.is_some()));
        }
        let copy = path.with_extension("tmpl.before-darter");
        fs::remove_file(&path).unwrap();
        for empty_before in [false, true] {
            if empty_before {
                fs::write(&path, "").unwrap();
            }
            k3s(&["--apply"]).await.unwrap();
            fs::write(&copy, "").unwrap();
            k3s(&["--undo"]).await.unwrap();
            assert_eq!(read(&path).unwrap(), None, "containerd would get an empty configuration");
            assert!(!copy.exists());
        }
        let own = format!("{base}[proxy_plugins.darter]\n  type = \"snapshot\"\n");
        fs::write(&path, &own).unwrap();
        k3s(&["--apply"]).await.unwrap_err();
        assert_eq!(read(&path).unwrap(), Some(own), "what is refused is left as it is");
    }
}
