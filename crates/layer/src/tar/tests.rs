//! Formats and oddities of tar streams, seen through the maps that they give.

use proptest::prelude::*;

use super::*;
use crate::testing::{Item, Pieces, Tar, header, made};
use crate::{LayerMap, MakeError, make};

#[derive(Debug, PartialEq, Eq)]
struct Seen {
    kind: EntryKind,
    name: Vec<u8>,
    link: Vec<u8>,
    uid: u32,
    size: u64,
    mtime: Time,
}

fn seen(tar: &[u8]) -> Vec<Seen> {
    rows(&made(tar).0.map)
}

fn rows(map: &LayerMap) -> Vec<Seen> {
    let mut rows = map.rows();
    let mut out = Vec::new();
    while let Some(row) = rows.next().unwrap() {
        let (name, link) = (rows.name().to_vec(), row.link.to_vec());
        out.push(Seen { kind: row.kind, name, link, uid: row.uid, size: row.size, mtime: row.mtime });
    }
    out
}

fn names(tar: &[u8]) -> Vec<String> {
    seen(tar).into_iter().map(|entry| String::from_utf8(entry.name).unwrap()).collect()
}

fn refusal(tar: &[u8]) -> TarError {
    match make(tar, &mut Pieces::default()) {
        Err(MakeError::Tar(error)) => error,
        other => panic!("{:?}", other.map(|made| made.tar_size)),
    }
}

/// Changes a header's bytes and makes its checksum right again.
fn patched(item: &Item, patch: impl Fn(&mut [u8; 512])) -> Vec<u8> {
    let mut block = header(item);
    patch(&mut block);
    block[148..156].copy_from_slice(b"        ");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block.to_vec()
}

fn file(name: &[u8]) -> Item<'_> {
    Item { name, ..Item::default() }
}

#[test]
fn prefix_and_name_are_joined() {
    let block = patched(&file(b"name"), |block| block[345..352].copy_from_slice(b"dir/sub"));
    assert_eq!(names(&block), ["dir/sub/name"]);
}

#[test]
fn gnu_long_names_reach_over_one_header() {
    let long = "n".repeat(150);
    let target = format!("{}\0", "t".repeat(120));
    let tar = Tar::default()
        .item(&Item { type_flag: b'L', name: b"././@LongLink", data: long.as_bytes(), ..Item::default() })
        .item(&Item { type_flag: b'K', name: b"././@LongLink", data: target.as_bytes(), ..Item::default() })
        .symlink("short", "short")
        .file("next", b"");
    let seen = seen(&tar.end());
    assert_eq!((seen[0].name.as_slice(), seen[0].link.len()), (long.as_bytes(), 120));
    assert_eq!(seen[1].name, b"next");
}

#[test]
fn pax_records_replace_the_fields() {
    let pax: &[(&str, &[u8])] = &[
        ("path", "p\u{e4}th".as_bytes()),
        ("uid", b"3000000"),
        ("mtime", b"-1.5"),
        ("size", b"3"),
        ("gid", b""),
    ];
    let mut tar = Tar::default().item(&Item { name: b"old", pax, ..Item::default() });
    tar.0.extend([b"abc".as_slice(), &[0; 509]].concat());
    let seen = seen(&tar.file("next", b"").end());
    assert_eq!((seen[0].name.as_slice(), seen[0].uid, seen[0].size), ("p\u{e4}th".as_bytes(), 3_000_000, 3));
    assert_eq!(seen[0].mtime, Time { seconds: -2, nanos: 500_000_000 });
    assert_eq!((seen[1].name.as_slice(), seen[1].uid), (&b"next"[..], 0));
}

#[test]
fn v7_directories_are_told_by_their_slash() {
    let v7 = |block: &mut [u8; 512]| block[257..].fill(0);
    let tar = [
        patched(&Item { type_flag: 0, ..file(b"d/") }, v7),
        patched(&Item { type_flag: 0, ..file(b"f") }, v7),
    ];
    let kinds: Vec<_> = seen(&tar.concat()).iter().map(|entry| entry.kind).collect();
    assert_eq!(kinds, [EntryKind::Directory, EntryKind::File]);
}

#[test]
fn gnu_numbers_may_be_binary() {
    let block = patched(&file(b"f"), |block| {
        block[108..116].copy_from_slice(&[0x80, 0, 0, 0, 0, 0x2d, 0xc6, 0xc0]);
        block[136..148].copy_from_slice(&[0xff; 12]);
        block[257..265].copy_from_slice(b"ustar  \0");
    });
    let seen = seen(&block);
    assert_eq!((seen[0].uid, seen[0].mtime.seconds), (3_000_000, -1));
}

#[test]
fn signed_checksums_are_accepted() {
    let mut block = header(&file(b"\xff\xfe"));
    let signed: i32 =
        (0..512).map(|i| if (148..156).contains(&i) { 32 } else { i32::from(block[i] as i8) }).sum();
    block[148..156].copy_from_slice(format!("{signed:06o}\0 ").as_bytes());
    assert_eq!(seen(&block)[0].name, b"\xff\xfe");
}

#[test]
fn sizes_of_links_and_directories_mean_nothing() {
    let sized = |item: &Item| patched(item, |block| block[124..136].copy_from_slice(b"00000001000\0"));
    let link = Item { type_flag: b'1', link: b"f", ..file(b"l") };
    let tar =
        [header(&file(b"f")).to_vec(), sized(&link), sized(&Item { type_flag: b'5', ..file(b"d") })].concat();
    assert_eq!(names(&tar), ["f", "l", "d"]);
}

#[test]
fn stream_may_end_at_any_block_between_entries() {
    let whole = Tar::default().file("a", b"x").file("b", b"y").end();
    for len in [1024, 2048, 2560] {
        assert_eq!(made(&whole[..len]).0.tar_size, len as u64);
    }
    // Go takes an end within the padding too, and nothing else.
    assert_eq!(names(&whole[..700]), ["a"]);
    assert_eq!(refusal(&whole[..512]), TarError::UnexpectedEof);
    assert_eq!(refusal(&whole[..1500]), TarError::UnexpectedEof);
    assert_eq!(refusal(&whole[..2100]), TarError::UnexpectedEof);
}

#[test]
fn what_follows_the_end_counts_in_the_digest_alone() {
    let mut tar = Tar::default().file("a", b"x").end();
    tar.extend(Tar::default().file("b", b"y").end());
    tar.extend(vec![0; 9000]);
    tar.extend(b"garbage");
    let (made, _) = made(&tar);
    assert_eq!(rows(&made.map).len(), 1);
    assert_eq!(made.diff_id.0, darter_types::Digest::of(&tar));
    assert_eq!(made.tar_size, tar.len() as u64);
}

#[test]
fn damaged_headers_are_refused() {
    let mut tar = Tar::default().file("a", b"x").file("b", b"y").end();
    tar[1024 + 10] ^= 1;
    assert_eq!(refusal(&tar), TarError::Header);
    let zeros_between = [&[0; 512][..], &header(&file(b"a"))].concat();
    assert_eq!(refusal(&zeros_between), TarError::Header);
    let negative = patched(&file(b"a"), |block| block[124..136].fill(0xff));
    assert_eq!(refusal(&negative), TarError::Header);
}

#[test]
fn types_that_containerd_does_not_know_are_refused() {
    for type_flag in [b'7', b'S', b'D', b'V', b'A'] {
        let words = refusal(&header(&Item { type_flag, ..file(b"a") })).to_string();
        assert_eq!(words, format!("unhandled tar header type {type_flag}"));
    }
}

#[test]
fn whiteouts_and_the_root_may_have_any_type() {
    let entry = |name: &'static str| Item { type_flag: b'7', data: b"data", ..file(name.as_bytes()) };
    let tar = Tar::default().item(&entry("d/.wh.gone")).item(&entry("./")).file("next", b"");
    assert_eq!(names(&tar.end()), ["d/.wh.gone", "./", "next"]);
}

#[test]
fn too_long_extended_headers_are_refused() {
    let item = |data| Item { type_flag: b'L', data, ..file(b"L") };
    assert_eq!(
        refusal(&Tar::default().item(&item(&vec![b'a'; (1 << 20) + 1])).end()),
        TarError::FieldTooLong
    );
}

proptest! {
    #[test]
    fn hostile_streams_never_panic(
        noise in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..30),
        len in any::<prop::sample::Index>(),
    ) {
        let pax: &[(&str, &[u8])] = &[("path", b"x/y"), ("GNU.sparse.map", b"0,1"), ("GNU.sparse.numblocks", b"1")];
        let tar = Tar::default().dir("d").item(&Item { data: b"a", pax, ..file(b"s") }).link("l", "s").symlink("m", "l");
        let mut bytes = tar.file("z", &[7; 600]).end();
        for (at, byte) in noise {
            let at = at.index(bytes.len());
            bytes[at] = byte;
            // Most changes would only break a checksum: make those right again.
            let block = at / 512 * 512;
            let mut header: [u8; 512] = bytes[block..][..512].try_into().unwrap();
            header[148..156].fill(b' ');
            let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
            bytes[block + 148..][..8].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        bytes.truncate(len.index(bytes.len() + 1));
        if let Ok(mut made) = make(bytes.as_slice(), &mut Pieces::default()) {
            let map = LayerMap::decode(&made.map.encode().core).unwrap();
            prop_assert_eq!(made.diff_id.0, darter_types::Digest::of(&bytes));
            let _ = crate::Tree::merge(&[std::sync::Arc::new(map)], crate::Tree::MEMORY_DEFAULT);
        }
    }
}
