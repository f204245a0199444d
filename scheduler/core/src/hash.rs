//! Hashes that spread load: the same on every machine and in every later version, so that recorded logs replay.

use crate::PeerId;

/// FNV-1a over the parts (each ended by a byte that no name contains), mixed at the end so that all bits count.
pub(crate) fn spread(parts: &[&[u8]]) -> u64 {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for part in parts {
        for byte in part.iter().chain(&[0xff]) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    mix(hash)
}

/// For a parent and a child: which parent comes first differs from child to child.
pub(crate) fn pair(a: PeerId, b: PeerId) -> u64 {
    mix(a.0.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(mix(b.0.wrapping_add(1))))
}

fn mix(mut hash: u64) -> u64 {
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash_never_changes() {
        assert_eq!(spread(&[b"a", b"b"]), spread(&[b"a", b"b"]));
        assert_ne!(spread(&[b"a", b"b"]), spread(&[b"ab"]));
        assert_eq!(spread(&[b"seed-1"]), 4_355_918_879_581_633_744);
    }
}
