//! What `fuzz/` feeds with hostile bytes. Each function takes any bytes, and panics where something does not hold that
//! must hold for all of them.
//!
//! The seeds are made here, so that no blobs lie in the tree; the tests below run every target over each seed, over its
//! cuts and over damaged copies, so that targets don't rot between two runs of a fuzzer.

use std::io::{BufReader, Cursor, Read, Write};
use std::sync::Arc;

use darter_types::{Digest, PieceIndex};

use crate::testing::{Item, Pieces, Tar, forged, made};
use crate::tree::{Content, FileKind, NodeIndex};
use crate::{LayerMap, PIECE_LEN, Tree, decompress, is_tar_section, make, rebuild_tar, wire};

/// What is read of a stream that may have no end.
const PLAIN_MAX: u64 = 1 << 20;
/// For the merges: few inputs come near it.
const MERGE_MEMORY: u64 = 16 << 20;
/// Maps with more content are not rebuilt: that would take the fuzzer's time with copying zeros.
const REBUILT_MAX: u64 = 1 << 20;

/// A blob. The stream is the same however its bytes arrive, and what is not compressed stays as it is.
pub fn compression(blob: &[u8]) {
    let read = |at_once: usize| {
        let mut plain = Vec::new();
        let blob = BufReader::with_capacity(at_once, Cursor::new(blob.to_vec()));
        decompress(blob).and_then(|r| r.take(PLAIN_MAX).read_to_end(&mut plain)).ok().map(|_| plain)
    };
    let (whole, drops) = (read(blob.len().max(1)), read(3));
    if !matches!(blob.first(), Some(0x1f | 0x28 | 0x50..=0x5f)) {
        assert_eq!(whole.as_deref(), blob.get(..blob.len().min(PLAIN_MAX as usize)));
    }
    // An error near the limit may be met before it or behind it.
    let is_cut = [&whole, &drops].into_iter().flatten().any(|plain| plain.len() as u64 == PLAIN_MAX);
    assert!(is_cut || whole == drops, "the stream depends on how its bytes arrive");
}

/// A tar stream; the checksums of its headers are mended first. What is taken is rebuilt to the last byte, and shown.
pub fn tar(stream: &[u8]) {
    let stream = with_checksums(stream);
    let mut pieces = Pieces::default();
    let Ok(mut made) = make(&stream[..], &mut pieces) else { return };
    assert_eq!((made.diff_id.0, made.tar_size), (Digest::of(&stream), stream.len() as u64));
    let encoded = made.map.encode();
    let map = LayerMap::decode(&encoded.core).expect("a map that was made is one");
    assert_eq!(map.root_hash(), made.map.root_hash());
    let mut rebuilt = Vec::new();
    rebuild_tar(&map, &encoded.tar, &mut |index| Ok(&pieces.0[index.0 as usize]), &mut rebuilt)
        .expect("a stream that was taken is rebuilt");
    assert!(rebuilt == stream, "the stream was rebuilt wrongly");
    show(map);
}

/// A fuzzer does not find sums: each block that looks like a header gets the right one.
fn with_checksums(stream: &[u8]) -> Vec<u8> {
    let mut stream = stream.to_vec();
    for block in stream.chunks_exact_mut(512).filter(|block| block[257..].starts_with(b"ustar")) {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    stream
}

/// A map's core as it came, and then a map with sections of these bytes whose hashes are right, as a hostile maker would
/// write it. What is decoded does not contradict itself, and is shown.
pub fn map(bytes: &[u8]) {
    if let Ok(map) = LayerMap::decode(bytes) {
        look_at(map, &[]);
    }
    let Sections { tar_size, entries, xattrs, pieces, recipe } = Sections::split(bytes);
    let (count, content) = counted(entries);
    let summary: Vec<u8> =
        [count, content, u64::from(tar_size), 0].iter().flat_map(|number| number.to_le_bytes()).collect();
    let fitting = if pieces.is_empty() { fitting_pieces(content) } else { pieces.to_vec() };
    if let Ok(map) = LayerMap::decode(&forged([&summary, entries, xattrs, &fitting], recipe)) {
        look_at(map, recipe);
    }
}

/// What [`map`] makes of its bytes: a length before each section but the last.
struct Sections<'a> {
    tar_size: u16,
    entries: &'a [u8],
    xattrs: &'a [u8],
    /// Nothing for "those that fit".
    pieces: &'a [u8],
    recipe: &'a [u8],
}

impl<'a> Sections<'a> {
    fn split(bytes: &'a [u8]) -> Self {
        let mut cursor = wire::Cursor::new(bytes);
        let tar_size = [cursor.byte().unwrap_or(0), cursor.byte().unwrap_or(0)];
        let mut section = || cursor.bytes().unwrap_or_default();
        let (entries, xattrs, pieces) = (section(), section(), section());
        let recipe = cursor.take(cursor.len() as u64).expect("so much is left");
        Self { tar_size: u16::from_le_bytes(tar_size), entries, xattrs, pieces, recipe }
    }

    fn join(&self) -> Vec<u8> {
        let mut out = self.tar_size.to_le_bytes().to_vec();
        [self.entries, self.xattrs, self.pieces]
            .iter()
            .for_each(|section| wire::put_bytes(&mut out, section));
        out.extend(self.recipe);
        out
    }
}

/// How many entries the section has, and their content, as far as it can be read.
fn counted(entries: &[u8]) -> (u64, u64) {
    let mut rows = crate::map::Rows::new(entries);
    let mut count = 0;
    while let Ok(Some(_)) = rows.next() {
        count += 1;
    }
    (count, rows.content())
}

/// Lengths that have so much content together; none for much of it.
fn fitting_pieces(content: u64) -> Vec<u8> {
    let full = PIECE_LEN as u64;
    let content = if content > 1024 * full { 0 } else { content };
    let count = content.div_ceil(full);
    let mut out = Vec::new();
    wire::put(&mut out, count);
    out.resize(out.len() + 32 * count as usize, 7);
    (0..count).for_each(|at| wire::put(&mut out, full.min(content - at * full)));
    out
}

fn look_at(map: LayerMap, recipe: &[u8]) {
    let mut end = 0;
    for index in (0..map.piece_count()).map(PieceIndex) {
        let piece = map.piece(index);
        assert_eq!((piece.start, map.piece_at(end)), (end, index));
        assert!((1..=PIECE_LEN).contains(&(piece.plain_len as usize)));
        end += u64::from(piece.plain_len);
    }
    assert_eq!(map.content_size(), end);
    if end <= REBUILT_MAX && map.tar_size() <= REBUILT_MAX {
        let stored = zstd::bulk::compress(recipe, 1).expect("compressing in memory does not fail");
        let mut zeros = |index| Ok(vec![0; map.piece(index).plain_len as usize]);
        let rebuilt = rebuild_tar(&map, &stored, &mut zeros, &mut std::io::sink());
        assert!(rebuilt.is_err() || is_tar_section(&map, &stored));
    }
    show(map);
}

/// As the lowest layer alone, and then above itself: other rules hold there.
fn show(map: LayerMap) {
    let map = Arc::new(map);
    for layers in [&[map.clone()][..], &[map.clone(), map.clone()]] {
        if let Ok(tree) = Tree::merge(layers, MERGE_MEMORY) {
            walk(&tree, layers);
        }
    }
}

fn walk(tree: &Tree, layers: &[Arc<LayerMap>]) {
    for node in (0..tree.node_count()).map(NodeIndex) {
        assert_eq!(tree.find(tree.origin(node)), Some(node));
        let attr = tree.attr(node);
        assert_eq!(tree.readlink(node).is_empty(), attr.kind != FileKind::Symlink || attr.size == 0);
        assert!(tree.xattrs(node).is_sorted_by(|a, b| a.0 < b.0), "names of attributes stand once, in order");
        let found = tree.children(node, 0).map(|(_, name, child)| (name, child));
        found.for_each(|(name, child)| assert_eq!(tree.lookup(node, name), Some(child)));
        if let Some(file) = tree.file(node) {
            let (start, len) = match file.content {
                Content::Whole { start } => (start, file.size),
                Content::Sparse { start, segments } => (start, segments.iter().map(|part| part.len).sum()),
            };
            assert!(start + len <= layers[file.layer].content_size(), "content that the layer has not");
        }
    }
}

/// Streams that have some of everything.
fn streams() -> Vec<Vec<u8>> {
    let pax: &[(&str, &[u8])] =
        &[("SCHILY.xattr.user.k", b"v\0w"), ("mtime", b"1600000000.123456789"), ("path", b"d/longer")];
    let sparse: &[(&str, &[u8])] = &[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"holes"),
        ("GNU.sparse.realsize", b"9000"),
    ];
    let mut holes = b"1\n4096\n5\n".to_vec();
    holes.resize(512, 0);
    holes.extend(b"bytes");
    let links = Tar::default().dir("d").file("d/f", b"text\n").link("d/g", "d/f").symlink("s", "d/f");
    let marks =
        Tar::default().dir("d").file("d/.wh.f", b"").file("d/.wh..wh..opq", b"").file("f", &[7; 3000]);
    let device = Item { type_flag: b'3', name: b"null", device: (1, 3), ..Item::default() };
    let extended =
        Tar::default().item(&Item { name: b"x", data: b"1", mode: 0o4711, pax, ..Item::default() });
    let holed = Tar::default().item(&Item { name: b"h", data: &holes, pax: sparse, ..Item::default() });
    let long = Item { type_flag: b'L', name: b"././@LongLink", data: &[b'n'; 130], ..Item::default() };
    let named = Tar::default().item(&long).file("n", b"");
    [links.item(&device), marks, extended, holed, named].into_iter().map(Tar::end).collect()
}

pub fn tar_seeds() -> Vec<Vec<u8>> {
    streams()
}

/// Cores, and the sections of maps that were made.
pub fn map_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for stream in streams() {
        let mut map = made(&stream).0.map;
        let encoded = map.encode();
        let mut recipe = Vec::new();
        let decoder = zstd::stream::read::Decoder::with_buffer(&encoded.tar[..]);
        decoder.and_then(|mut r| r.read_to_end(&mut recipe)).expect("a recipe that was just written");
        let (entries, xattrs) = map.plain_sections();
        let tar_size = map.tar_size() as u16;
        seeds.push(Sections { tar_size, entries, xattrs, pieces: b"", recipe: &recipe }.join());
        seeds.push(encoded.core);
    }
    seeds
}

pub fn compression_seeds() -> Vec<Vec<u8>> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(b"text, text and text\n").expect("memory takes it");
    let gzip = gzip.finish().expect("memory takes it");
    let zstd = zstd::bulk::compress(b"text, text and text\n", 3).expect("memory takes it");
    let skippable = [&0x184d_2a50u32.to_le_bytes()[..], &3u32.to_le_bytes(), b"toc"].concat();
    let padded = [&gzip[..], &[0; 40]].concat();
    let several = |one: &[u8], other: &[u8]| [one, other, one].concat();
    vec![several(&gzip, &gzip), padded, several(&zstd, &skippable), b"text\n".to_vec(), Vec::new()]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each seed, cut, and with one byte of it damaged, at some hundred places.
    fn over(seeds: Vec<Vec<u8>>, target: fn(&[u8])) {
        for seed in seeds {
            target(&seed);
            for at in (0..seed.len()).step_by(seed.len() / 100 + 1) {
                target(&seed[..at]);
                for flip in [1, 0x80, 0xff] {
                    let mut damaged = seed.clone();
                    damaged[at] ^= flip;
                    target(&damaged);
                }
            }
        }
    }

    #[test]
    fn compressed_seeds_hold_in_every_form() {
        over(compression_seeds(), compression);
    }

    #[test]
    fn tar_seeds_hold_in_every_form() {
        over(tar_seeds(), tar);
    }

    #[test]
    fn map_seeds_hold_in_every_form() {
        over(map_seeds(), map);
    }

    #[test]
    fn seeds_are_taken_and_so_reach_what_lies_behind_the_first_check() {
        for stream in tar_seeds() {
            let stream = with_checksums(&stream);
            assert!(make(&stream[..], &mut Pieces::default()).is_ok());
        }
        for sections in map_seeds().chunks(2) {
            let Sections { entries, tar_size, .. } = Sections::split(&sections[0]);
            let core = LayerMap::decode(&sections[1]).unwrap();
            assert_eq!(counted(entries), (u64::from(core.entry_count()), core.content_size()));
            assert_eq!(u64::from(tar_size), core.tar_size());
        }
    }
}
