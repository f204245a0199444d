//! Images as real builders make them, of Debian's own packages: by umoci, by buildah's commands, and by buildah from a
//! Containerfile. They make the same changes, step by step, each in its own way.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::command::Run;
use crate::image::Image;
use crate::sci;

/// What each layer above the base changes; run in the image's root. Removed and made anew is what builders write as
/// opaque directories or as many whiteouts.
const STEPS: [&str; 6] = [
    "rm -rf usr/share/doc/apt && mkdir -m 751 usr/share/doc/apt && echo anew > usr/share/doc/apt/notes",
    "rm -r usr/share/doc/bash usr/bin/ldd && ln -s bash bin/bash-link && ln bin/bash bin/bash-too",
    "cp -a etc etc-copy && chown -R 1000:1001 etc-copy && chmod 2750 etc-copy && mkfifo etc-copy/pipe \
     && touch -d @1234567890.5 etc-copy/passwd",
    "mv usr/share/doc/dpkg usr/share/doc/moved && rm -rf var/lib/dpkg/info && mkdir var/lib/dpkg/info \
     && cp etc-copy/passwd var/lib/dpkg/info/list",
    "rm -rf usr/share/doc/apt etc-copy && mkdir etc-copy && echo second > etc-copy/again",
    "echo back > usr/bin/ldd && mkdir usr/share/doc/bash && echo x > usr/share/doc/bash/new \
     && chmod 4755 usr/bin/env",
];

/// The builders, each with a script that makes the layout `out` of `base.tar`.
const BUILDERS: [(&str, fn() -> String); 3] =
    [("umoci", umoci), ("buildah", buildah), ("containerfile", containerfile)];

/// Beside the folder, nothing of buildah's is used or left.
const BUILDAH: &str = "buildah --root $PWD/storage --runroot $PWD/run --storage-driver overlay";

/// An image in an OCI layout.
pub struct Built {
    pub name: &'static str,
    pub layout: PathBuf,
    pub image: Image,
}

/// The images, made now unless `cache` has them.
pub fn images(cache: &Path) -> Result<Vec<Built>> {
    BUILDERS.iter().map(|&(name, script)| built(cache, name, &script())).collect()
}

fn built(cache: &Path, name: &'static str, script: &str) -> Result<Built> {
    let recipe = hex::encode(Sha256::digest(script));
    let layout = cache.join(format!("images/{name}-{}", &recipe[..12]));
    if !layout.exists() {
        let work = Work(cache.join(format!("images/building-{}", std::process::id())));
        fs::create_dir_all(&work.0)?;
        unpack_base(cache, &work.0.join("base.tar"))?;
        build(&work.0, script).with_context(|| format!("the image by {name}"))?;
        fs::rename(work.0.join("out"), &layout)?;
    }
    let image = Image::of_layout(&layout)?;
    Ok(Built { name, layout, image })
}

/// The folder in which an image is built, removed whatever becomes of it.
struct Work(PathBuf);

impl Drop for Work {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// In a mount namespace of its own, so that what the builder mounts goes away with it.
fn build(work: &Path, script: &str) -> Result<()> {
    let shell = Run::new("unshare").args(["--mount", "--propagation", "private", "--", "sh", "-eu", "-c"]);
    shell.arg(script).dir(work).timeout(300).check().map(drop)
}

/// Debian without anything installed: the lowest layer of the image of the demo.
fn unpack_base(cache: &Path, to: &Path) -> Result<()> {
    let (blobs, image) = sci::image(cache)?;
    let packed = File::open(blobs.path(&image.layers[0].blob.digest))?;
    io::copy(&mut flate2::read::MultiGzDecoder::new(io::BufReader::new(packed)), &mut File::create(to)?)?;
    Ok(())
}

fn umoci() -> String {
    let repack = "umoci repack --refresh-bundle --image out:latest bundle";
    let steps: String =
        STEPS.iter().map(|step| format!("(cd bundle/rootfs && {step})\n{repack}\n")).collect();
    format!(
        "umoci init --layout out
         umoci new --image out:latest
         umoci unpack --image out:latest bundle
         tar xpf base.tar --numeric-owner -C bundle/rootfs
         {repack}
         {steps}
         mkdir inserted && echo x > inserted/alone
         umoci insert --opaque --image out:latest inserted /etc/apt
         umoci insert --whiteout --image out:latest /etc/motd
         umoci config --image out:latest --config.cmd true
         umoci gc --layout out"
    )
}

fn buildah() -> String {
    let commit = |step: &str| {
        format!(
            "root=$(buildah mount $working)
             (cd $root && {step})
             buildah umount $working
             buildah commit -q --rm $working localhost/built
             working=$(buildah from localhost/built)\n"
        )
    };
    let steps: String = STEPS.iter().map(|step| commit(step)).collect();
    format!(
        "buildah() {{ command {BUILDAH} \"$@\"; }}
         working=$(buildah from scratch)
         buildah add -q $working base.tar /
         {}{steps}
         buildah push -q localhost/built oci:out:latest",
        commit("true")
    )
}

fn containerfile() -> String {
    let steps: String = STEPS.iter().map(|step| format!("RUN cd / && {step}\n")).collect();
    format!(
        "cat > Containerfile <<'END'\nFROM scratch\nADD base.tar /\n{steps}CMD [\"true\"]\nEND
         {BUILDAH} bud -q --isolation chroot --layers -t localhost/built .
         {BUILDAH} push -q localhost/built oci:out:latest"
    )
}
