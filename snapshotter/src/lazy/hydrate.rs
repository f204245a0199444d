//! The places of an image's layers, for who brings their blobs into containerd's content store.

use darter_types::{ChainId, Digest};

use super::decide::Image;
use super::ports::{FoundImage, PlainLayer};
use super::pull::Pull;
use super::{Lazy, Wanted};
use crate::snapshot::Labels;

impl Lazy {
    /// The layer of `found` whose blob is `blob`, with the places where exactly that blob is said to lie. `reference` is the
    /// image's name where the caller knows it: containerd's own labels lack the port.
    pub fn layer_with_blob(
        &self,
        found: FoundImage,
        namespace: &str,
        reference: Option<&str>,
        blob: Digest,
    ) -> Option<PlainLayer> {
        let labels = reference.map(|name| (super::decide::REFERENCE_LABEL.to_owned(), name.to_owned()));
        let wanted = Wanted {
            namespace: namespace.to_owned(),
            target: ChainId::chain(&[found.layers.first()?.diff_id])[0],
            parent: String::new(),
            labels: labels.into_iter().collect::<Labels>(),
        };
        let image = Image::new(found, &wanted, &*self.registries, Pull::default());
        let position = image.found.layers.iter().position(|layer| layer.blob.0 == blob)?;
        let layer = &image.layers[position];
        let sources = layer.layer_sources().into_iter().filter(|source| source.blob.0 == blob).collect();
        Some(PlainLayer { diff_id: layer.diff_id, media_type: layer.media_type.clone(), sources })
    }
}
