//! Which seed gets an order: by rendezvous hashing over the image, so that the same image goes to the same seed as long as
//! that attends, and no other image moves when one leaves.

use std::collections::BTreeSet;

use darter_types::NodeName;
use sha2::{Digest, Sha256};

fn weight(image: &str, seed: &NodeName) -> [u8; 32] {
    Sha256::new().chain_update(seed.as_str()).chain_update([0]).chain_update(image).finalize().into()
}

/// The seed for `image` among those that attend and have not failed it yet.
pub(crate) fn choose<'a>(
    image: &str,
    attending: impl IntoIterator<Item = &'a NodeName>,
    tried: &BTreeSet<NodeName>,
) -> Option<&'a NodeName> {
    let untried = attending.into_iter().filter(|seed| !tried.contains(*seed));
    untried.max_by_key(|seed| weight(image, seed))
}

/// All of `seeds`, the one first that [`choose`] would take.
pub(crate) fn ranked<'a>(image: &str, seeds: impl IntoIterator<Item = &'a NodeName>) -> Vec<&'a NodeName> {
    let mut ranked: Vec<&NodeName> = seeds.into_iter().collect();
    ranked.sort_by_cached_key(|seed| std::cmp::Reverse(weight(image, seed)));
    ranked
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seeds(count: usize) -> Vec<NodeName> {
        (0..count).map(|i| format!("seed-{i}").parse().unwrap()).collect()
    }

    #[test]
    fn choice_does_not_depend_on_the_order() {
        let (forward, mut backward) = (seeds(5), seeds(5));
        backward.reverse();
        let none = BTreeSet::new();
        assert_eq!(choose("r.example/a:1", &forward, &none), choose("r.example/a:1", &backward, &none));
    }

    #[test]
    fn failed_seed_is_passed_over_until_none_is_left() {
        let all = seeds(3);
        let mut tried = BTreeSet::new();
        for _ in 0..3 {
            let next = choose("r.example/a:1", &all, &tried).unwrap().clone();
            assert!(tried.insert(next));
        }
        assert_eq!(choose("r.example/a:1", &all, &tried), None);
    }

    #[test]
    fn first_of_the_ranking_is_the_chosen_one() {
        let all = seeds(7);
        let ranked = ranked("r.example/a:1", &all);
        assert_eq!((Some(ranked[0]), ranked.len()), (choose("r.example/a:1", &all, &BTreeSet::new()), 7));
    }

    #[test]
    fn other_images_stay_when_a_seed_leaves() {
        let (all, fewer) = (seeds(4), seeds(3));
        let none = BTreeSet::new();
        let gone = &all[3];
        for i in 0..200 {
            let image = format!("r.example/app:{i}");
            let before = choose(&image, &all, &none).unwrap();
            if before != gone {
                assert_eq!(choose(&image, &fewer, &none), Some(before));
            }
        }
    }
}
