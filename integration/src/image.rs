//! Images made here: layers from tar entries or from a folder's difference, configs, manifests; kept as files by digest.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::tar::{Entry, Writer};

/// How a layer's tar is packed. The media type says so too, unless a test lies on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    Gzip,
    /// Gzip in members of so many bytes of tar, as pigz and eStargz write it.
    GzipMembers(usize),
    Zstd,
    Plain,
}

impl Packing {
    fn media_type(self) -> &'static str {
        match self {
            Packing::Gzip | Packing::GzipMembers(_) => "application/vnd.oci.image.layer.v1.tar+gzip",
            Packing::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
            Packing::Plain => "application/vnd.oci.image.layer.v1.tar",
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Descriptor {
    #[serde(rename = "mediaType")]
    pub media_type: String,
    pub digest: String,
    pub size: u64,
}

/// A layer's blob and the digest of its tar.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Layer {
    pub blob: Descriptor,
    pub diff_id: String,
}

/// An image: its manifest and config, and layers whose blobs lie in a [`Blobs`] folder.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Image {
    pub manifest: Descriptor,
    pub config: Descriptor,
    pub layers: Vec<Layer>,
}

impl Image {
    /// The chain ID of the layers up to and including number `upto` (OCI image specification, "Layer ChainID").
    pub fn chain_id(&self, upto: usize) -> String {
        let mut ids = self.layers[..=upto].iter().map(|layer| layer.diff_id.clone());
        let first = ids.next().expect("the range has at least one layer");
        ids.fold(first, |chain, diff| {
            format!("sha256:{}", hex::encode(Sha256::digest(format!("{chain} {diff}"))))
        })
    }

    pub fn top_chain_id(&self) -> String {
        self.chain_id(self.layers.len() - 1)
    }

    /// The one image of an OCI layout; its blobs stay where they are.
    pub fn of_layout(folder: &Path) -> Result<Self> {
        let blob = |digest: &str| fs::read(folder.join("blobs").join(digest.replace(':', "/")));
        let mut index: Index = serde_json::from_slice(&fs::read(folder.join("index.json"))?)?;
        let manifest = index.manifests.pop().context("the layout has no image")?;
        let Manifest { config, layers } = serde_json::from_slice(&blob(&manifest.digest)?)?;
        let Config { rootfs } = serde_json::from_slice(&blob(&config.digest)?)?;
        let layers = layers.into_iter().zip(rootfs.diff_ids);
        let layers = layers.map(|(blob, diff_id)| Layer { blob, diff_id }).collect();
        Ok(Self { manifest, config, layers })
    }

    pub fn compressed_size(&self) -> u64 {
        self.layers.iter().map(|layer| layer.blob.size).sum()
    }
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Config {
    rootfs: Rootfs,
}

#[derive(Deserialize)]
struct Rootfs {
    diff_ids: Vec<String>,
}

/// A folder of blobs by digest.
#[derive(Clone, Debug)]
pub struct Blobs {
    folder: PathBuf,
}

impl Blobs {
    pub fn open(folder: impl Into<PathBuf>) -> Result<Self> {
        let folder = folder.into();
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        Ok(Self { folder })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn path(&self, digest: &str) -> PathBuf {
        self.folder.join(digest.replace(':', "-"))
    }

    pub fn put(&self, media_type: &str, bytes: &[u8]) -> Result<Descriptor> {
        let digest = format!("sha256:{}", hex::encode(Sha256::digest(bytes)));
        fs::write(self.path(&digest), bytes)?;
        Ok(Descriptor { media_type: media_type.into(), digest, size: bytes.len() as u64 })
    }

    /// A layer of these entries.
    pub fn layer(&self, packing: Packing, entries: &[Entry]) -> Result<Layer> {
        self.layer_with(packing, |out| {
            let mut writer = Writer::new(out);
            for entry in entries {
                writer.entry(entry)?;
            }
            writer.finish().map(|_| ())
        })
    }

    /// A layer of whatever bytes `write` writes; they are taken for the tar.
    pub fn layer_with(
        &self,
        packing: Packing,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<Layer> {
        let fresh = self.folder.join(format!(".fresh-{}", std::process::id()));
        let file = Hashing::new(BufWriter::with_capacity(1 << 20, File::create(&fresh)?));
        let mut tar = Hashing::new(Packer::new(packing, file)?);
        write(&mut tar)?;
        let (packer, diff_id, _) = tar.finish();
        let (mut file, digest, size) = packer.finish()?.finish();
        file.flush()?;
        fs::rename(&fresh, self.path(&digest))?;
        let blob = Descriptor { media_type: packing.media_type().into(), digest, size };
        Ok(Layer { blob, diff_id })
    }

    /// The image of these layers, lowest first, that runs `command`.
    pub fn image(&self, layers: &[Layer], command: &[&str]) -> Result<Image> {
        let created = "2024-01-01T00:00:00Z";
        let history: Vec<_> =
            layers.iter().map(|_| json!({"created": created, "created_by": "darter test"})).collect();
        let config = json!({
            "created": created, "architecture": "amd64", "os": "linux",
            "config": {"Cmd": command, "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]},
            "rootfs": {"type": "layers", "diff_ids": layers.iter().map(|l| &l.diff_id).collect::<Vec<_>>()},
            "history": history,
        });
        self.image_with(layers, &serde_json::to_vec(&config)?)
    }

    /// The same for another processor.
    pub fn image_for(&self, architecture: &str, layers: &[Layer], command: &[&str]) -> Result<Image> {
        let image = self.image(layers, command)?;
        let config = fs::read_to_string(self.path(&image.config.digest))?;
        self.image_with(layers, config.replace("\"amd64\"", &format!("\"{architecture}\"")).as_bytes())
    }

    /// The image of these layers with a config made elsewhere, be it wrong.
    pub fn image_with(&self, layers: &[Layer], config: &[u8]) -> Result<Image> {
        let config = self.put("application/vnd.oci.image.config.v1+json", config)?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": layers.iter().map(|l| &l.blob).collect::<Vec<_>>(),
        });
        let manifest =
            self.put("application/vnd.oci.image.manifest.v1+json", &serde_json::to_vec(&manifest)?)?;
        Ok(Image { manifest, config, layers: layers.to_vec() })
    }
}

/// Counts and hashes what goes through.
struct Hashing<W> {
    inner: W,
    hash: Sha256,
    size: u64,
}

impl<W: Write> Hashing<W> {
    fn new(inner: W) -> Self {
        Self { inner, hash: Sha256::new(), size: 0 }
    }

    fn finish(self) -> (W, String, u64) {
        (self.inner, format!("sha256:{}", hex::encode(self.hash.finalize())), self.size)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hash.update(&bytes[..n]);
        self.size += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

type Gzip<W> = flate2::write::GzEncoder<W>;

enum Packer<W: Write> {
    Gzip(Gzip<W>),
    Members { encoder: Option<Gzip<W>>, every: usize, left: usize },
    Zstd(zstd::Encoder<'static, W>),
    Plain(W),
}

fn gzip<W: Write>(out: W) -> Gzip<W> {
    Gzip::new(out, flate2::Compression::new(6))
}

impl<W: Write> Packer<W> {
    fn new(packing: Packing, out: W) -> io::Result<Self> {
        Ok(match packing {
            Packing::Gzip => Packer::Gzip(gzip(out)),
            Packing::GzipMembers(every) => Packer::Members { encoder: Some(gzip(out)), every, left: every },
            Packing::Zstd => Packer::Zstd(zstd::Encoder::new(out, 3)?),
            Packing::Plain => Packer::Plain(out),
        })
    }

    fn finish(self) -> io::Result<W> {
        match self {
            Packer::Gzip(encoder) => encoder.finish(),
            Packer::Members { encoder, .. } => encoder.expect("a member is always open").finish(),
            Packer::Zstd(encoder) => encoder.finish(),
            Packer::Plain(out) => Ok(out),
        }
    }
}

impl<W: Write> Write for Packer<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Packer::Gzip(encoder) => encoder.write(bytes),
            Packer::Zstd(encoder) => encoder.write(bytes),
            Packer::Plain(out) => out.write(bytes),
            Packer::Members { encoder, every, left } => {
                if *left == 0 {
                    let full = encoder.take().expect("a member is always open");
                    *encoder = Some(gzip(full.finish()?));
                    *left = *every;
                }
                let n = bytes.len().min(*left);
                encoder.as_mut().expect("a member is always open").write_all(&bytes[..n])?;
                *left -= n;
                Ok(n)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn members_hold_the_same_tar() {
        let folder = std::env::temp_dir().join(format!("darter-blobs-{}", std::process::id()));
        let blobs = Blobs::open(&folder).expect("a folder");
        let entries = [Entry::file("a", vec![7; 10_000])];
        let one = blobs.layer(Packing::Gzip, &entries).expect("a layer");
        let many = blobs.layer(Packing::GzipMembers(1000), &entries).expect("a layer");
        let zstd = blobs.layer(Packing::Zstd, &entries).expect("a layer");
        assert_eq!(one.diff_id, many.diff_id);
        assert_eq!(one.diff_id, zstd.diff_id);
        assert_ne!(one.blob.digest, many.blob.digest);
        let mut tar = Vec::new();
        let packed = File::open(blobs.path(&many.blob.digest)).expect("the blob");
        flate2::read::MultiGzDecoder::new(packed).read_to_end(&mut tar).expect("gzip");
        assert_eq!(format!("sha256:{}", hex::encode(Sha256::digest(&tar))), many.diff_id);
        fs::remove_dir_all(folder).expect("cleaned");
    }
}
