//! The image that the demo and the benchmark start: Debian with python3, numpy and scipy, in gzip layers.
//!
//! Made the way a builder makes it: a root file system grows package by package, and each layer is what a step changed. Its
//! layers are kept as files, so that every later use has the same bytes and digests.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use sha2::{Digest, Sha256};

use crate::command::Run;
use crate::image::{Blobs, Image, Layer, Packing};
use crate::tar::{Data, Entry, Writer};

const SUITE: &str = "bookworm";
/// What each layer above the base adds.
const STEPS: [&str; 4] = [
    "build-essential ca-certificates curl",
    "python3 python3-dev python3-pip",
    "python3-numpy libopenblas0",
    "python3-scipy",
];
const PROGRAM: &str = include_str!("sci/main.py");
pub const COMMAND: [&str; 2] = ["python3", "/app/main.py"];

/// The image and its blobs, made now unless `cache` has them.
pub fn image(cache: &Path) -> Result<(Blobs, Image)> {
    let recipe = Sha256::digest(format!("{SUITE}{STEPS:?}{PROGRAM}"));
    let folder = cache.join(format!("images/sci-{}", &hex::encode(recipe)[..12]));
    let (blobs, index) = (Blobs::open(folder.join("blobs"))?, folder.join("image.json"));
    if let Ok(text) = fs::read(&index) {
        return Ok((blobs, serde_json::from_slice(&text)?));
    }
    let growing = Growing(folder.join(format!("root-{}", std::process::id())));
    let image = make(&blobs, &growing.0)?;
    let fresh = folder.join(format!("image-{}", std::process::id()));
    fs::write(&fresh, serde_json::to_vec(&image)?)?;
    fs::rename(fresh, index)?;
    Ok((blobs, image))
}

/// The root file system that grows, removed whatever becomes of the image.
struct Growing(PathBuf);

impl Drop for Growing {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn make(blobs: &Blobs, root: &Path) -> Result<Image> {
    debootstrap(root)?;
    let mut before = Listing::new();
    let mut layers = vec![layer_of_change(blobs, root, &mut before)?];
    for packages in STEPS {
        install(root, packages)?;
        layers.push(layer_of_change(blobs, root, &mut before)?);
    }
    layers.push(blobs.layer(Packing::Gzip, &[Entry::dir("app"), Entry::file("app/main.py", PROGRAM)])?);
    let image = blobs.image(&layers, &COMMAND)?;
    let mib = image.compressed_size() >> 20;
    if mib < 200 || image.layers.len() < 5 {
        bail!("the image has {} layers and {mib} MiB: too small to show anything", image.layers.len());
    }
    Ok(image)
}

/// In a mount namespace of its own, so that what it mounts in the new root goes away with it.
fn privately(program: &str) -> Run {
    Run::new("unshare").args(["--mount", "--propagation", "private", "--", program]).timeout(1200)
}

fn debootstrap(root: &Path) -> Result<()> {
    let mirror = std::env::var("DARTER_MIRROR").unwrap_or_else(|_| "http://deb.debian.org/debian".into());
    privately("debootstrap").args(["--variant=minbase", SUITE]).arg(root.display()).arg(mirror).check()?;
    clean(root)
}

fn install(root: &Path, packages: &str) -> Result<()> {
    let script = format!(
        "export DEBIAN_FRONTEND=noninteractive
         apt-get -q -o Acquire::Retries=3 update &&
         apt-get -q -o Acquire::Retries=3 install -y --no-install-recommends {packages}"
    );
    fs::write(root.join("usr/sbin/policy-rc.d"), "#!/bin/sh\nexit 101\n")?;
    Run::new("chmod").arg("755").arg(root.join("usr/sbin/policy-rc.d").display()).check()?;
    fs::copy("/etc/resolv.conf", root.join("etc/resolv.conf"))?;
    privately("chroot").arg(root.display()).args(["sh", "-c", &script]).check()?;
    clean(root)
}

/// What an image's author removes as well, and what would tell of the machine that made it.
fn clean(root: &Path) -> Result<()> {
    for file in ["etc/resolv.conf", "etc/hostname", "usr/sbin/policy-rc.d"] {
        let _ = fs::remove_file(root.join(file));
    }
    let script = "rm -rf var/lib/apt/lists/* var/cache/apt/*.bin var/cache/apt/archives/*.deb var/log/* tmp/* proc/* sys/*";
    Run::new("sh").args(["-c", script]).dir(root).check().map(drop)
}

/// What tells a changed file from the same file.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: u64,
    changed: (i64, i64),
    links: u64,
}

type Listing = BTreeMap<PathBuf, Stamp>;

fn list(root: &Path) -> Result<BTreeMap<PathBuf, Metadata>> {
    let (mut found, mut todo) = (BTreeMap::new(), vec![root.to_path_buf()]);
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            let meta = entry.metadata()?;
            if meta.is_dir() {
                todo.push(entry.path());
            }
            found.insert(entry.path().strip_prefix(root)?.to_path_buf(), meta);
        }
    }
    Ok(found)
}

fn stamp(meta: &Metadata) -> Stamp {
    // A directory's own change time moves with its entries, which the layer need not repeat.
    let (size, links) = if meta.is_dir() { (0, 0) } else { (meta.size(), meta.nlink()) };
    let changed =
        if meta.is_dir() { (meta.mtime(), meta.mtime_nsec()) } else { (meta.ctime(), meta.ctime_nsec()) };
    Stamp { inode: meta.ino(), size, changed, links }
}

/// The layer of everything that differs from `before`, with whiteouts for what is gone; `before` becomes now.
fn layer_of_change(blobs: &Blobs, root: &Path, before: &mut Listing) -> Result<Layer> {
    let now = list(root)?;
    let gone: Vec<PathBuf> = before
        .keys()
        .filter(|path| {
            !now.contains_key(*path)
                && path.parent().is_none_or(|p| p == Path::new("") || now.contains_key(p))
        })
        .cloned()
        .collect();
    let changed: Vec<(&PathBuf, &Metadata)> =
        now.iter().filter(|(path, meta)| before.get(*path) != Some(&stamp(meta))).collect();
    let layer = blobs.layer_with(Packing::Gzip, |out| write_layer(out, root, &changed, &gone))?;
    *before = now.iter().map(|(path, meta)| (path.clone(), stamp(meta))).collect();
    Ok(layer)
}

fn write_layer(
    out: &mut dyn Write,
    root: &Path,
    changed: &[(&PathBuf, &Metadata)],
    gone: &[PathBuf],
) -> io::Result<()> {
    let mut writer = Writer::new(out);
    let mut first_names: BTreeMap<u64, &PathBuf> = BTreeMap::new();
    for (path, meta) in changed {
        let first =
            if meta.nlink() > 1 && !meta.is_dir() { first_names.get(&meta.ino()).copied() } else { None };
        first_names.entry(meta.ino()).or_insert(path);
        if let Some(entry) = entry_of(root, path, meta, first)? {
            writer.entry(&entry)?;
        }
    }
    for path in gone {
        writer.entry(&Entry::whiteout(&path.to_string_lossy()))?;
    }
    writer.finish().map(|_| ())
}

/// `None` for a socket: tar has no form for it.
fn entry_of(root: &Path, path: &Path, meta: &Metadata, first: Option<&PathBuf>) -> io::Result<Option<Entry>> {
    let (name, kind) = (path.as_os_str().as_bytes(), meta.file_type());
    let device = (nix::sys::stat::major(meta.rdev()) as u32, nix::sys::stat::minor(meta.rdev()) as u32);
    let entry = if let Some(first) = first {
        Entry::hard_link(name, first.as_os_str().as_bytes())
    } else if kind.is_dir() {
        Entry::dir([name, b"/"].concat())
    } else if kind.is_symlink() {
        Entry::symlink(name, fs::read_link(root.join(path))?.as_os_str().as_bytes())
    } else if kind.is_file() {
        Entry::new(b'0', name).data(Data::File(root.join(path), meta.size()))
    } else if kind.is_char_device() {
        Entry::char_device(name, device.0, device.1)
    } else if kind.is_block_device() {
        Entry::block_device(name, device.0, device.1)
    } else if kind.is_fifo() {
        Entry::fifo(name)
    } else {
        return Ok(None);
    };
    let owner = (u64::from(meta.uid()), u64::from(meta.gid()));
    Ok(Some(entry.mode(meta.mode() & 0o7777).owner(owner.0, owner.1).mtime(meta.mtime(), 0)))
}
