//! The map's bytes: what is frozen, what survives, what is refused.

use proptest::prelude::*;

use super::*;
use crate::testing::{Item, Tar, made};
use crate::{MapError, Tree};

/// A layer that has some of everything.
fn layer() -> Vec<u8> {
    let noise = |seed: u32, len: usize| {
        let mut out = vec![0; len];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
        out
    };
    let pax: &[(&str, &[u8])] =
        &[("SCHILY.xattr.user.k", b"v\0w"), ("mtime", b"1600000000.123456789"), ("atime", b"1700000000.5")];
    let mut tar = Tar::default().dir("etc").file("etc/hostname", b"box\n");
    tar = tar.item(&Item {
        name: b"etc/x",
        data: b"1",
        mode: 0o4711,
        uid: 3,
        gid: 70_000,
        pax,
        ..Item::default()
    });
    tar = tar.symlink("bin", "usr/bin").link("etc/y", "etc/x").file("usr/bin/big", &noise(1, 700_000));
    for i in 0..200 {
        tar = tar.file(&format!("usr/share/{:03}", i * 7 % 200), &noise(i, i as usize * 40));
    }
    tar = tar.item(&Item { type_flag: b'4', name: b"dev/b", device: (8, 300), ..Item::default() });
    tar.item(&Item { name: b"usr/\xff\xfe", ..Item::default() }).file("etc/.wh.gone", b"").end()
}

#[test]
fn format_version_1_is_frozen() {
    let (made, _) = made(&layer());
    let map = &made.map;
    let lengths: Vec<u32> = (0..map.piece_count()).map(|i| map.piece(PieceIndex(i)).plain_len).collect();
    // If this fails, peers of two versions would make different maps of one layer: raise the format's version.
    assert_eq!(lengths, GOLDEN_LENGTHS);
    assert_eq!(map.root_hash().to_string(), GOLDEN_ROOT);
    let tree = Tree::merge(&[std::sync::Arc::new(made.map)], Tree::MEMORY_DEFAULT).unwrap();
    let origin = |path: &[&[u8]]| {
        let node = path.iter().try_fold(Tree::ROOT, |dir, name| tree.lookup(dir, name));
        tree.origin(node.unwrap())
    };
    let entry = |entry| crate::Origin::Entry { layer: 0, base: true, entry };
    let found = [origin(&[b"etc", b"y"]), origin(&[b"usr", b"bin", b"big"]), origin(&[b"dev", b"b"])];
    assert_eq!(found, [entry(2), entry(5), entry(206)]);
    let directories = [origin(&[]), origin(&[b"dev"]), origin(&[b"usr"]), origin(&[b"usr", b"share"])];
    assert_eq!(directories, [0, 1, 3, 5].map(crate::Origin::Directory));
    assert_eq!(tree.fingerprint().to_string(), GOLDEN_FINGERPRINT);
}

const GOLDEN_LENGTHS: [u32; 13] =
    [5, 262144, 262144, 175712, 78120, 75000, 127720, 102800, 75400, 75600, 88400, 149200, 23760];
const GOLDEN_ROOT: &str = "367feeff5bdd340df5fe8f4caf9f2f15cccc957b7699bf6513d8c7c27aac24f9";
const GOLDEN_FINGERPRINT: &str = "e44a8a8ee31fa446dbe1a7b809b4e14f47a39d597f1ea8190c6a94395d6ec0b4";

#[test]
fn decoded_map_is_the_one_that_was_encoded() {
    let (mut made, _) = made(&layer());
    let encoded = made.map.encode();
    let mut decoded = LayerMap::decode(&encoded.core).unwrap();
    assert_eq!(decoded.root_hash(), made.map.root_hash());
    assert_eq!(decoded.encode().core, encoded.core);
    assert_eq!(decoded.entry_count(), 209);
    assert_eq!(decoded.tar_size(), made.tar_size);
    assert_eq!(decoded.entries, made.map.entries);
    assert_eq!((decoded.hashes, decoded.ends), (made.map.hashes, made.map.ends));
}

#[test]
fn root_hash_does_not_depend_on_how_the_stream_arrives() {
    struct Slow<'a>(&'a [u8]);
    impl std::io::Read for Slow<'_> {
        fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
            let len = out.len().min(self.0.len()).min(777);
            out[..len].copy_from_slice(&self.0[..len]);
            self.0 = &self.0[len..];
            Ok(len)
        }
    }
    let tar = layer();
    let slow = crate::make(Slow(&tar), &mut crate::testing::Pieces::default()).unwrap();
    let (fast, _) = made(&tar);
    assert_eq!(slow.map.root_hash(), fast.map.root_hash());
    assert_eq!(slow.diff_id, fast.diff_id);
    assert_eq!(slow.diff_id.0, darter_types::Digest::of(&tar));
}

#[test]
fn pieces_are_found_by_offset() {
    let (made, pieces) = made(&layer());
    let map = made.map;
    assert_eq!(map.content_size(), pieces.0.iter().map(|piece| piece.len() as u64).sum::<u64>());
    for index in (0..map.piece_count()).map(PieceIndex) {
        let info = map.piece(index);
        assert_eq!(map.piece_at(info.start), index);
        assert_eq!(map.piece_at(info.start + u64::from(info.plain_len) - 1), index);
    }
    assert_eq!(map.piece_at(map.content_size()).0, map.piece_count());
}

#[test]
fn empty_layers_have_maps() {
    for tar in [vec![], vec![0; 512], vec![0; 1024], vec![0; 10240]] {
        let (mut made, _) = made(&tar);
        assert_eq!((made.map.entry_count(), made.map.piece_count()), (0, 0));
        assert_eq!(made.tar_size, tar.len() as u64);
        LayerMap::decode(&made.map.encode().core).unwrap();
    }
}

/// A core with one more section, as a later version might write it.
fn with_section(flags: u16) -> Vec<u8> {
    let mut core = made(&layer()).0.map.encode().core;
    let (table, lengths) = (16 + 5 * 48, 16 + 5 * 48 + 5 * 8);
    let mut row = vec![99, 0];
    row.extend(flags.to_le_bytes());
    row.resize(48, 0);
    core.splice(lengths..lengths, 3u64.to_le_bytes());
    core.splice(table..table, row);
    core[12] = 6;
    core.extend(b"new");
    core
}

#[test]
fn unknown_sections_are_skipped_if_they_are_optional() {
    assert!(LayerMap::decode(&with_section(1)).is_ok());
    assert_eq!(LayerMap::decode(&with_section(0)).unwrap_err(), MapError::UnknownSection(99));
}

#[test]
fn truncated_maps_are_refused() {
    let core = made(&layer()).0.map.encode().core;
    for len in 0..core.len() {
        assert!(LayerMap::decode(&core[..len]).is_err(), "{len} bytes were taken");
    }
    assert!(LayerMap::decode(&[core.as_slice(), b"x"].concat()).is_err());
}

/// A map that only a hostile maker would write, with no recipe.
fn forged(sections: [&[u8]; 4]) -> Vec<u8> {
    crate::testing::forged(sections, b"")
}

fn summary(entries: u64, content: u64) -> Vec<u8> {
    [entries, content, 0, 0].iter().flat_map(|number| number.to_le_bytes()).collect()
}

#[test]
fn forged_maps_that_contradict_themselves_are_refused() {
    let directory: &[u8] = &[0x35, 0, 1, b'd'];
    assert!(LayerMap::decode(&forged([&summary(1, 0), directory, b"", &[0]])).is_ok());
    let cases: [(&str, u64, u64, &[u8], &[u8], &[u8]); 10] = [
        ("a count that is wrong", 2, 0, directory, b"", &[0]),
        ("content without pieces", 1, 5, &[0x30, 0, 1, b'f', 5], b"", &[0]),
        ("a shared name without one before", 1, 0, &[0x35, 9, 1, b'd'], b"", &[0]),
        ("an unknown kind", 1, 0, &[0x3e, 0, 1, b'd'], b"", &[0]),
        ("a set that is not there", 1, 0, &[0x75, 0, 1, b'd', 0], b"", &[0]),
        ("a set that ends early", 1, 0, directory, &[1, 5, b'a'], &[0]),
        ("an empty set", 1, 0, &[0x75, 0, 1, b'd', 0], &[0], &[0]),
        ("a large count of pieces", 1, 0, directory, b"", &[0xff, 0xff, 0xff, 0xff, 0x0f]),
        ("holes in a directory", 1, 0, &[0xb5, 0, 1, b'd', 2, 9, 0], b"", &[0]),
        ("a segment outside", 1, 0, &[0xb0, 0, 1, b'f', 0, 2, 4, 1, 2, 9], b"", &[0]),
    ];
    for (what, entries, content, rows, xattrs, pieces) in cases {
        let core = forged([&summary(entries, content), rows, xattrs, pieces]);
        assert!(LayerMap::decode(&core).is_err(), "{what} was taken");
    }
}

/// Sets that no entry has would be a number of four bytes in memory for each byte of the section.
#[test]
fn sets_of_attributes_are_those_of_the_entries_in_their_order() {
    let decode = |entries: u64, rows: &[u8], sets: &[u8]| {
        LayerMap::decode(&forged([&summary(entries, 0), rows, sets, &[0]])).map(|map| map.xattr_sets)
    };
    let set: &[u8] = &[1, 1, b'a', 0];
    let (bare, first, second) = ([0x35, 0, 1, b'd'], [0x75, 0, 1, b'd', 0], [0x75, 0, 1, b'e', 1]);
    assert_eq!(decode(1, &first, set), Ok(vec![0]));
    assert_eq!(decode(3, &[first, second, first].concat(), &[set, set].concat()), Ok(vec![0, 4]));
    let unused = Err(MapError::Invalid("attributes that no entry has"));
    assert_eq!(decode(1, &bare, &vec![0; 1 << 20]), unused);
    assert_eq!(decode(1, &first, &[set, set].concat()), unused);
    let out_of_order = Err(MapError::Invalid("sets of attributes out of order"));
    assert_eq!(decode(2, &[second, first].concat(), &[set, set].concat()), out_of_order);
}

#[test]
fn section_longer_than_it_says_is_refused_before_it_fills_the_memory() {
    let mut core = forged([&summary(0, 0), b"", &vec![0; 50 << 20], &[0]]);
    // The table says that the third section has one byte.
    core[16 + 2 * 48 + 8..][..8].copy_from_slice(&1u64.to_le_bytes());
    assert_eq!(LayerMap::decode(&core).unwrap_err(), MapError::Damaged(3));
}

#[test]
fn what_the_root_does_not_vouch_for_is_not_inflated() {
    let mut map = made(&layer()).0.map;
    let core = map.encode().core;
    assert_eq!(LayerMap::decode_signed(&core, map.root_hash()).unwrap().root_hash(), map.root_hash());
    // The sections are cut off: an error of theirs would be another one.
    let error = LayerMap::decode_signed(&core[..16 + 5 * 48], RootHash::from_bytes([1; 32])).unwrap_err();
    assert_eq!(error, MapError::Invalid("it is not the one that was signed"));
}

proptest! {
    #[test]
    fn flipped_bytes_never_give_the_same_root(at in any::<prop::sample::Index>(), flip in 1u8..) {
        let mut map = made(&layer()).0.map;
        let mut core = map.encode().core;
        let at = at.index(core.len());
        core[at] ^= flip;
        if let Ok(decoded) = LayerMap::decode(&core) {
            prop_assert!(decoded.root_hash() != map.root_hash() || decoded.entries == map.entries);
        }
    }

    #[test]
    fn hostile_rows_neither_panic_nor_hang(
        rows in prop::collection::vec(any::<u8>(), 0..200), xattrs in prop::collection::vec(any::<u8>(), 0..20),
        count in 0u64..20,
    ) {
        for entries in 0..count {
            if let Ok(map) = LayerMap::decode(&forged([&summary(entries, 0), &rows, &xattrs, &[0]])) {
                let _ = Tree::merge(&[std::sync::Arc::new(map)], crate::Tree::MEMORY_DEFAULT);
            }
        }
    }

    #[test]
    fn arbitrary_bytes_are_no_map(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(LayerMap::decode(&bytes).is_err());
    }
}
