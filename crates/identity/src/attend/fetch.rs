//! Orders to nodes: layers that a seed has made, to be fetched from the mesh. No credential is in them.

use std::time::Duration;

use darter_proto::convert::{self, WireError};
use darter_proto::v1;
use darter_types::{BlobDigest, DiffId, LayerSource, Repository};

/// Layers of one order: those of an image for each of many platforms.
pub const FETCH_LAYERS_MAX: usize = 4_096;

/// No order lives longer, whatever is said.
const LIFE_MAX: Duration = Duration::from_secs(24 * 3600);

/// What a node is to fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchOrder {
    pub id: String,
    /// For people.
    pub image: String,
    pub layers: Vec<FetchLayer>,
    /// How long the node works on it, a day at most: the manager may be gone by then.
    pub life: Duration,
}

/// A layer, and where the seed that made it found it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchLayer {
    pub diff_id: DiffId,
    pub source: LayerSource,
}

impl TryFrom<&v1::FetchOrder> for FetchOrder {
    type Error = WireError;
    fn try_from(order: &v1::FetchOrder) -> Result<Self, WireError> {
        if order.layers.len() > FETCH_LAYERS_MAX {
            return Err(WireError::invalid("layers", format_args!("there may be {FETCH_LAYERS_MAX}")));
        }
        let repository: Repository =
            order.repository.parse().map_err(|error| WireError::invalid("repository", error))?;
        let layer = |layer: &v1::FetchLayer| {
            let blob = BlobDigest::from_slice(&layer.blob);
            let blob = blob.map_err(|error| WireError::invalid("blob", error))?;
            let source = LayerSource { repository: repository.clone(), blob, size: layer.size };
            Ok(FetchLayer { diff_id: convert::diff_id(&layer.diff_id)?, source })
        };
        Ok(Self {
            id: order.id.clone(),
            image: order.image.clone(),
            layers: order.layers.iter().map(layer).collect::<Result<_, WireError>>()?,
            life: Duration::from_secs(order.seconds).min(LIFE_MAX),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use darter_types::Digest;

    fn wire() -> v1::FetchOrder {
        let digest = Digest::of(b"layer").as_bytes().to_vec();
        v1::FetchOrder {
            id: "p.1".to_owned(),
            image: "r.example/app:1".to_owned(),
            repository: "https://r.example/app".to_owned(),
            layers: vec![v1::FetchLayer { diff_id: digest.clone(), blob: digest, size: 7 }],
            seconds: u64::MAX,
        }
    }

    #[test]
    fn each_layer_comes_from_where_the_seed_found_it_and_no_order_lives_for_ever() {
        let order = FetchOrder::try_from(&wire()).unwrap();
        assert_eq!(order.layers[0].source.repository.to_string(), "https://r.example/app");
        assert_eq!((order.layers[0].source.size, order.life), (7, LIFE_MAX));
    }

    #[test]
    fn order_that_is_said_again_later_is_the_same_with_less_to_live() {
        use super::super::PreheatCommand::Fetch;
        let before = FetchOrder::try_from(&wire()).unwrap();
        let now = FetchOrder { life: Duration::from_secs(9), ..before.clone() };
        assert!(Fetch(now.clone()).is_repeat_of(&Fetch(before.clone())));
        let other = FetchOrder { layers: Vec::new(), ..now };
        assert!(!Fetch(other).is_repeat_of(&Fetch(before)));
    }

    #[test]
    fn order_that_can_not_be_one_is_refused_by_name() {
        let words = |order: v1::FetchOrder| FetchOrder::try_from(&order).unwrap_err().to_string();
        assert!(words(v1::FetchOrder { repository: "nonsense".to_owned(), ..wire() }).contains("repository"));
        let layers = vec![wire().layers.remove(0); FETCH_LAYERS_MAX + 1];
        assert!(words(v1::FetchOrder { layers, ..wire() }).contains("layers"));
        let layers = vec![v1::FetchLayer { diff_id: vec![0; 31], ..wire().layers.remove(0) }];
        assert!(words(v1::FetchOrder { layers, ..wire() }).contains("diff_id"));
    }
}
