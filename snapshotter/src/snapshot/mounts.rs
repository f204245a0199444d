//! What containerd has to mount for a snapshot.

use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// One mount, as containerd's mount package takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub kind: &'static str,
    pub source: String,
    pub options: Vec<String>,
}

/// Where things lie below the program's root. The names are short: all lower directories share one page of mount options.
#[derive(Debug, Clone)]
pub(super) struct Paths {
    snapshots: PathBuf,
}

impl Paths {
    pub fn new(root: &Path) -> Paths {
        Paths { snapshots: root.join("s") }
    }
    pub fn snapshots(&self) -> &Path {
        &self.snapshots
    }
    pub fn snapshot(&self, id: i64) -> PathBuf {
        self.snapshots.join(id.to_string())
    }
    pub fn upper(&self, id: i64) -> PathBuf {
        self.snapshot(id).join("fs")
    }
    pub fn work(&self, id: i64) -> PathBuf {
        self.snapshot(id).join("work")
    }
    /// The mount point of the file system of merged layers.
    pub fn merged(&self) -> PathBuf {
        self.snapshots.join("m")
    }
    pub fn chain(&self, dir: u32) -> PathBuf {
        self.merged().join(dir.to_string())
    }
}

/// What lies below a snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Lowers {
    /// Plain snapshots, the topmost first.
    pub plain: Vec<i64>,
    /// The chain below them all: it has everything further down.
    pub chain: Option<u32>,
}

impl Lowers {
    fn paths(&self, paths: &Paths) -> Vec<String> {
        let plain = self.plain.iter().map(|id| paths.upper(*id));
        plain.chain(self.chain.map(|dir| paths.chain(dir))).map(|path| path.display().to_string()).collect()
    }
}

/// Which options this kernel's overlayfs takes, as a trial at the start shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overlay {
    /// `index=off`: without it a lower directory can't be in two mounts at a time.
    index_off: bool,
    /// `xino=on`: files over another file system have one device number with their directories.
    xino: bool,
}

impl Overlay {
    pub const NEITHER: Overlay = Overlay { index_off: false, xino: false };

    /// Mounts a small overlay below `root` for each choice, until one is taken.
    pub fn probe(root: &Path) -> Overlay {
        let choices = [(true, true), (true, false), (false, true)];
        let works = |overlay: &Overlay| try_mount(root, &overlay.options(true)).is_ok();
        let overlay = choices.map(|(index_off, xino)| Overlay { index_off, xino }).into_iter().find(works);
        overlay.unwrap_or(Overlay::NEITHER)
    }

    fn options(self, over_chain: bool) -> Vec<String> {
        let mut options = Vec::new();
        if self.index_off {
            options.push("index=off".to_owned());
        }
        if self.xino && over_chain {
            options.push("xino=on".to_owned());
        }
        options
    }
}

fn try_mount(root: &Path, options: &[String]) -> std::io::Result<()> {
    let dir = root.join("overlay-check");
    let make = |name: &str| {
        let path = dir.join(name);
        std::fs::create_dir_all(&path).map(|()| path.display().to_string())
    };
    let (lower, upper, work, merged) = (make("lower")?, make("upper")?, make("work")?, make("merged")?);
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work},{}", options.join(","));
    let mounted =
        mount(Some("overlay"), merged.as_str(), Some("overlay"), MsFlags::empty(), Some(options.as_str()));
    if mounted.is_ok() {
        umount2(merged.as_str(), MntFlags::MNT_DETACH)?;
    }
    std::fs::remove_dir_all(&dir)?;
    Ok(mounted?)
}

/// A writable snapshot `id` over `lowers`.
pub(super) fn writable(id: i64, lowers: &Lowers, paths: &Paths, overlay: Overlay) -> Vec<Mount> {
    if *lowers == Lowers::default() {
        return vec![bind(paths.upper(id).display().to_string(), "rw")];
    }
    let mut options = overlay.options(lowers.chain.is_some());
    options.push(format!("workdir={}", paths.work(id).display()));
    options.push(format!("upperdir={}", paths.upper(id).display()));
    options.push(format!("lowerdir={}", lowers.paths(paths).join(":")));
    vec![Mount { kind: "overlay", source: "overlay".to_owned(), options }]
}

/// A view `id` of `lowers`.
pub(super) fn read_only(id: i64, lowers: &Lowers, paths: &Paths, overlay: Overlay) -> Vec<Mount> {
    let mut lower = lowers.paths(paths);
    match lower.len() {
        0 => vec![bind(paths.upper(id).display().to_string(), "ro")],
        1 => vec![bind(lower.remove(0), "ro")],
        _ => {
            let mut options = overlay.options(lowers.chain.is_some());
            options.push(format!("lowerdir={}", lower.join(":")));
            vec![Mount { kind: "overlay", source: "overlay".to_owned(), options }]
        }
    }
}

fn bind(source: String, mode: &str) -> Mount {
    Mount { kind: "bind", source, options: vec![mode.to_owned(), "rbind".to_owned()] }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Overlay = Overlay { index_off: true, xino: true };

    #[test]
    fn a_container_on_a_lazy_image_has_one_lower_directory() {
        let lowers = Lowers { plain: vec![], chain: Some(4) };
        let mounts = writable(9, &lowers, &Paths::new(Path::new("/r")), ALL);
        let wanted =
            ["index=off", "xino=on", "workdir=/r/s/9/work", "upperdir=/r/s/9/fs", "lowerdir=/r/s/m/4"];
        assert_eq!(mounts[0].options, wanted);
    }

    #[test]
    fn plain_layers_lie_above_the_chain() {
        let lowers = Lowers { plain: vec![8, 7], chain: Some(4) };
        let mounts = read_only(9, &lowers, &Paths::new(Path::new("/r")), ALL);
        assert_eq!(mounts[0].options.last().unwrap(), "lowerdir=/r/s/8/fs:/r/s/7/fs:/r/s/m/4");
    }

    #[test]
    fn without_a_chain_overlays_are_mounted_as_containerd_does() {
        let lowers = Lowers { plain: vec![2, 1], chain: None };
        let mounts = writable(3, &lowers, &Paths::new(Path::new("/r")), ALL);
        assert!(!mounts[0].options.contains(&"xino=on".to_owned()));
        let single = read_only(3, &Lowers { plain: vec![2], chain: None }, &Paths::new(Path::new("/r")), ALL);
        assert_eq!(
            single[0],
            Mount { kind: "bind", source: "/r/s/2/fs".into(), options: vec!["ro".into(), "rbind".into()] }
        );
        let lone = writable(3, &Lowers::default(), &Paths::new(Path::new("/r")), ALL);
        assert_eq!((lone[0].kind, lone[0].source.as_str()), ("bind", "/r/s/3/fs"));
    }
}
