//! Images with the entries that builders make seldom and unpackers get wrong, each with the fact that it is about.

mod entries;
mod layering;
mod refused;

use std::fs;
use std::path::Path;

use anyhow::Result;

use crate::image::{Blobs, Image, Layer, Packing};
use crate::tar::Entry;

pub use entries::CAPABILITY;

/// One image; its name says what is odd about it.
pub struct Edge {
    pub name: &'static str,
    layers: fn(&Blobs) -> Result<Vec<Layer>>,
}

impl Edge {
    pub fn image(&self, blobs: &Blobs) -> Result<Image> {
        blobs.image(&(self.layers)(blobs)?, &["/bin/true"])
    }

    /// The image and its blobs, made now unless `cache` has them.
    pub fn kept(&self, cache: &Path) -> Result<(Blobs, Image)> {
        let folder = cache.join(format!("images/edge-{}", self.name));
        let (blobs, index) = (Blobs::open(folder.join("blobs"))?, folder.join("image.json"));
        if let Ok(text) = fs::read(&index) {
            return Ok((blobs, serde_json::from_slice(&text)?));
        }
        let image = self.image(&blobs)?;
        let fresh = folder.join(format!("image-{}", std::process::id()));
        fs::write(&fresh, serde_json::to_vec(&image)?)?;
        fs::rename(fresh, index)?;
        Ok((blobs, image))
    }
}

/// Its size needs more than 32 bits, and its last piece has three bytes.
pub const HUGE: Edge = Edge { name: "huge-file", layers: entries::huge_file };

/// All that containerd's overlayfs unpacks, save [`HUGE`], which takes its time.
pub const EDGES: &[Edge] = &[
    Edge { name: "hard-links", layers: layering::hard_links },
    Edge { name: "whiteouts", layers: layering::whiteouts },
    Edge { name: "opaque-directories", layers: layering::opaque_directories },
    Edge { name: "implicit-parents", layers: layering::implicit_parents },
    Edge { name: "names", layers: entries::names },
    Edge { name: "extended-attributes", layers: entries::extended_attributes },
    Edge { name: "special-files", layers: entries::special_files },
    Edge { name: "null-devices", layers: entries::null_devices },
    Edge { name: "sparse-files", layers: entries::sparse_files },
    Edge { name: "duplicates", layers: layering::duplicates },
    Edge { name: "symlinked-parents", layers: layering::symlinked_parents },
    Edge { name: "times", layers: entries::times },
    Edge { name: "owners", layers: entries::owners },
    Edge { name: "old-headers", layers: entries::old_headers },
    Edge { name: "roots", layers: layering::roots },
    Edge { name: "ends", layers: entries::ends },
    Edge { name: "empty-layers", layers: layering::empty_layers },
    Edge { name: "same-layer-twice", layers: layering::same_layer_twice },
    Edge { name: "packings", layers: entries::packings },
    Edge { name: "many-entries", layers: entries::many_entries },
    Edge { name: "one-layer", layers: layering::one_layer },
    Edge { name: "forty-layers", layers: layering::forty_layers },
];

/// What containerd's overlayfs refuses to unpack: Darter must not show such an image either.
pub const REFUSED: &[Edge] = &[
    Edge { name: "link-to-a-lower-layer", layers: refused::link_to_a_lower_layer },
    Edge { name: "link-to-nothing", layers: refused::link_to_nothing },
    Edge { name: "late-whiteout", layers: refused::late_whiteout },
    Edge { name: "entry-below-a-file", layers: refused::entry_below_a_file },
    Edge { name: "name-of-256-bytes", layers: refused::name_of_256_bytes },
    Edge { name: "whiteout-of-the-directory", layers: refused::whiteout_of_the_directory },
    Edge { name: "old-gnu-sparse", layers: refused::old_gnu_sparse },
    Edge { name: "cut-off-in-a-file", layers: refused::cut_off_in_a_file },
];

fn gzip(blobs: &Blobs, layers: &[&[Entry]]) -> Result<Vec<Layer>> {
    layers.iter().map(|entries| blobs.layer(Packing::Gzip, entries)).collect()
}
