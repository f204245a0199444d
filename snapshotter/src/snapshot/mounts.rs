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

/// The two mounts of the file system of merged layers. They show the same, files by the same numbers, but for extended
/// attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// With extended attributes, which the kernel asks for again and again.
    Full,
    /// For trees without any: the kernel never asks.
    Bare,
}

impl Via {
    pub const ALL: [Via; 2] = [Via::Full, Via::Bare];
}

/// Where things lie below the program's root. The names are short: all lower directories share one page of mount options.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// A mount point of the file system of merged layers.
    pub fn merged(&self, via: Via) -> PathBuf {
        self.snapshots.join(match via {
            Via::Full => "m",
            Via::Bare => "n",
        })
    }
    pub fn chain(&self, dir: u32, via: Via) -> PathBuf {
        self.merged(via).join(dir.to_string())
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
    fn paths(&self, paths: &Paths, via: Via) -> Vec<String> {
        let plain = self.plain.iter().map(|id| paths.upper(*id));
        let all = plain.chain(self.chain.map(|dir| paths.chain(dir, via)));
        all.map(|path| path.display().to_string()).collect()
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

/// What to mount for an active snapshot or a view, and which chain has to be shown for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPlan {
    /// The chain below it all.
    pub chain: Option<u32>,
    id: i64,
    writable: bool,
    lowers: Lowers,
    paths: Paths,
    overlay: Overlay,
}

impl MountPlan {
    pub(super) fn new(id: i64, writable: bool, lowers: Lowers, paths: &Paths, overlay: Overlay) -> MountPlan {
        MountPlan { chain: lowers.chain, id, writable, lowers, paths: paths.clone(), overlay }
    }

    /// The mounts, with the chain as it is seen through `via` where that is for a container's start.
    ///
    /// containerd compares what lies in views, and in a snapshot that a container has used, and takes only ENODATA for "no
    /// such attribute": both are shown as they are.
    pub fn mounts(&self, via: Via) -> Vec<Mount> {
        let via = if self.writable && !self.was_mounted() { via } else { Via::Full };
        if self.writable { self.over_upper(via) } else { self.read_only(via) }
    }

    /// An overlay makes a directory in its work directory when it is mounted for the first time.
    fn was_mounted(&self) -> bool {
        self.paths.work(self.id).join("work").exists()
    }

    fn over_upper(&self, via: Via) -> Vec<Mount> {
        let Self { id, lowers, paths, .. } = self;
        if *lowers == Lowers::default() {
            return vec![bind(paths.upper(*id).display().to_string(), "rw")];
        }
        let mut options = self.overlay.options(lowers.chain.is_some());
        options.push(format!("workdir={}", paths.work(*id).display()));
        options.push(format!("upperdir={}", paths.upper(*id).display()));
        options.push(format!("lowerdir={}", lowers.paths(paths, via).join(":")));
        vec![Mount { kind: "overlay", source: "overlay".to_owned(), options }]
    }

    fn read_only(&self, via: Via) -> Vec<Mount> {
        let Self { id, lowers, paths, .. } = self;
        let mut lower = lowers.paths(paths, via);
        match lower.len() {
            0 => vec![bind(paths.upper(*id).display().to_string(), "ro")],
            1 => vec![bind(lower.remove(0), "ro")],
            _ => {
                let mut options = self.overlay.options(lowers.chain.is_some());
                options.push(format!("lowerdir={}", lower.join(":")));
                vec![Mount { kind: "overlay", source: "overlay".to_owned(), options }]
            }
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

    fn mounts(id: i64, writable: bool, lowers: Lowers, via: Via) -> Vec<Mount> {
        MountPlan::new(id, writable, lowers, &Paths::new(Path::new("/r")), ALL).mounts(via)
    }

    #[test]
    fn a_container_on_a_lazy_image_has_one_lower_directory() {
        let lowers = Lowers { plain: vec![], chain: Some(4) };
        let wanted =
            ["index=off", "xino=on", "workdir=/r/s/9/work", "upperdir=/r/s/9/fs", "lowerdir=/r/s/m/4"];
        assert_eq!(mounts(9, true, lowers.clone(), Via::Full)[0].options, wanted);
        assert_eq!(mounts(9, true, lowers.clone(), Via::Bare)[0].options[4], "lowerdir=/r/s/n/4");
        assert_eq!(
            mounts(9, false, lowers, Via::Bare)[0].source,
            "/r/s/m/4",
            "a view is compared with others"
        );
    }

    #[test]
    fn plain_layers_lie_above_the_chain() {
        let lowers = Lowers { plain: vec![8, 7], chain: Some(4) };
        let mounts = mounts(9, false, lowers, Via::Full);
        assert_eq!(mounts[0].options.last().unwrap(), "lowerdir=/r/s/8/fs:/r/s/7/fs:/r/s/m/4");
    }

    #[test]
    fn without_a_chain_overlays_are_mounted_as_containerd_does() {
        let plain = |ids: &[i64]| Lowers { plain: ids.to_vec(), chain: None };
        let over = mounts(3, true, plain(&[2, 1]), Via::Full);
        assert!(!over[0].options.contains(&"xino=on".to_owned()));
        assert_eq!(
            mounts(3, false, plain(&[2]), Via::Full)[0],
            Mount { kind: "bind", source: "/r/s/2/fs".into(), options: vec!["ro".into(), "rbind".into()] }
        );
        let lone = mounts(3, true, Lowers::default(), Via::Full);
        assert_eq!((lone[0].kind, lone[0].source.as_str()), ("bind", "/r/s/3/fs"));
    }
}
