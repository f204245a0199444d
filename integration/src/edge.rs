//! Images with the entries that builders make seldom and unpackers get wrong, each with the fact that it is about.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::Result;

use crate::image::{Blobs, Image, Layer, Packing};
use crate::tar::{Data, Entry, LongNames, Writer, checksum};

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
pub const HUGE: Edge = Edge { name: "huge-file", layers: huge_file };

/// All that containerd's overlayfs unpacks, save [`HUGE`], which takes its time.
pub const EDGES: &[Edge] = &[
    Edge { name: "hard-links", layers: hard_links },
    Edge { name: "whiteouts", layers: whiteouts },
    Edge { name: "opaque-directories", layers: opaque_directories },
    Edge { name: "implicit-parents", layers: implicit_parents },
    Edge { name: "names", layers: names },
    Edge { name: "extended-attributes", layers: extended_attributes },
    Edge { name: "special-files", layers: special_files },
    Edge { name: "null-devices", layers: null_devices },
    Edge { name: "sparse-files", layers: sparse_files },
    Edge { name: "duplicates", layers: duplicates },
    Edge { name: "symlinked-parents", layers: symlinked_parents },
    Edge { name: "times", layers: times },
    Edge { name: "owners", layers: owners },
    Edge { name: "old-headers", layers: old_headers },
    Edge { name: "roots", layers: roots },
    Edge { name: "ends", layers: ends },
    Edge { name: "empty-layers", layers: empty_layers },
    Edge { name: "same-layer-twice", layers: same_layer_twice },
    Edge { name: "packings", layers: packings },
    Edge { name: "many-entries", layers: many_entries },
    Edge { name: "one-layer", layers: one_layer },
    Edge { name: "forty-layers", layers: forty_layers },
];

/// What containerd's overlayfs refuses to unpack: Darter must not show such an image either.
pub const REFUSED: &[Edge] = &[
    Edge { name: "link-to-a-lower-layer", layers: link_to_a_lower_layer },
    Edge { name: "link-to-nothing", layers: link_to_nothing },
    Edge { name: "late-whiteout", layers: late_whiteout },
    Edge { name: "entry-below-a-file", layers: entry_below_a_file },
    Edge { name: "name-of-256-bytes", layers: name_of_256_bytes },
    Edge { name: "whiteout-of-the-directory", layers: whiteout_of_the_directory },
    Edge { name: "old-gnu-sparse", layers: old_gnu_sparse },
    Edge { name: "cut-off-in-a-file", layers: cut_off_in_a_file },
];

fn gzip(blobs: &Blobs, layers: &[&[Entry]]) -> Result<Vec<Layer>> {
    layers.iter().map(|entries| blobs.layer(Packing::Gzip, entries)).collect()
}

fn hard_links(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(
        blobs,
        &[
            &[
                Entry::dir("d"),
                Entry::file("d/one", "linked").mode(0o640).owner(1, 2),
                Entry::hard_link("d/two", "d/one").mode(0o600).owner(3, 4).mtime(1_500_000_000, 0),
                Entry::hard_link("three", "./d/two").mode(0o604).owner(5, 6),
                Entry::file("gone", "unlinked above"),
                Entry::hard_link("stays", "gone"),
                Entry::symlink("link", "d/one"),
                Entry::hard_link("link-to-link", "link"),
                Entry::file("replaced", "first"),
                Entry::hard_link("keeps-first", "replaced"),
                Entry::file("replaced", "second"),
                Entry::fifo("pipe"),
                Entry::hard_link("pipe-too", "pipe"),
                Entry::symlink("dir-link", "d"),
                Entry::hard_link("through", "dir-link/one"),
            ],
            &[
                Entry::whiteout("gone"),
                Entry::whiteout("d/one"),
                Entry::file("new", "upper"),
                Entry::hard_link("new-too", "new").xattr("user.note", "for both"),
            ],
        ],
    )
}

fn whiteouts(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(
        blobs,
        &[
            &[
                Entry::dir("a"),
                Entry::file("a/removed-at-once", "x"),
                Entry::whiteout("a/removed-at-once-in-base"),
                Entry::file("a/hidden", "base"),
                Entry::file("a/stays", "base"),
                Entry::dir("b"),
                Entry::file("b/inner", "base"),
                Entry::dir("c").mode(0o711),
                Entry::file("c/old", "base"),
                Entry::dir("e"),
                Entry::file("e/x", "base"),
            ],
            &[
                Entry::whiteout("a/hidden"),
                Entry::whiteout("never-was"),
                Entry::whiteout("b"),
                Entry::whiteout("c"),
                Entry::dir("c").mode(0o700),
                Entry::file("c/new", "second"),
                Entry::file(".wh..wh.plnk", ""),
                Entry::file("e/.wh.x", "whiteouts may have data").owner(7, 8),
            ],
            &[
                Entry::file("a/hidden", "shown again"),
                Entry::dir("b").mode(0o770),
                Entry::file("b/second", "third"),
                Entry::file("e/x", "third"),
            ],
        ],
    )
}

fn opaque_directories(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(
        blobs,
        &[
            &[
                Entry::dir("d").mode(0o750).owner(9, 9),
                Entry::file("d/base-before", "x"),
                Entry::opaque("d"),
                Entry::file("d/base-after", "x"),
                Entry::dir("d/sub"),
                Entry::file("d/sub/deep", "x"),
                Entry::dir("kept"),
                Entry::file("kept/one", "x"),
                Entry::dir("f"),
                Entry::file("f/under", "x"),
            ],
            &[
                Entry::dir("d"),
                Entry::file("d/before-the-mark", "upper"),
                Entry::opaque("d"),
                Entry::file("d/after-the-mark", "upper"),
                Entry::opaque("f"),
            ],
            &[
                Entry::file("d/sub/new", "implicit parent over an opaque one"),
                Entry::file("f/again", "third"),
                Entry::dir("kept"),
                Entry::opaque("kept"),
            ],
            &[Entry::file("kept/last", "fourth")],
        ],
    )
}

fn implicit_parents(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(
        blobs,
        &[
            &[
                Entry::file("first/no/parents", "base").owner(1, 1),
                Entry::dir("p").mode(0o2751).owner(11, 12).xattr("user.kind", "lower"),
                Entry::dir("p/q").mode(0o1700).owner(13, 14).mtime(1_400_000_000, 0),
                Entry::file("p/q/r", "base"),
                Entry::dir("gone").mode(0o700).owner(15, 15),
                Entry::dir("hidden").mode(0o701).owner(16, 16),
                Entry::dir("hidden/deep").mode(0o702).owner(17, 17),
                Entry::symlink("lib", "usr/lib"),
                Entry::dir("usr"),
                Entry::dir("usr/lib").mode(0o755).owner(18, 18),
                Entry::file("usr/lib/a", "base"),
            ],
            &[Entry::whiteout("gone"), Entry::opaque("hidden")],
            &[
                Entry::file("p/q/s", "implicit"),
                Entry::file("gone/back", "over a whiteout"),
                Entry::file("hidden/deep/back", "over an opaque directory"),
                Entry::file("lib/b", "a real directory over a link"),
                Entry::file("new/deep/path", "nothing below"),
            ],
        ],
    )
}

fn names(blobs: &Blobs) -> Result<Vec<Layer>> {
    let long = "n".repeat(255);
    let deep = vec!["level"; 45].join("/");
    let part = "directory-with-a-name-of-some-length";
    let split = format!("{part}/{part}/{part}/{}", "f".repeat(90));
    gzip(
        blobs,
        &[
            &[
                Entry::dir(&long),
                Entry::file(format!("{long}/{long}"), "pax"),
                Entry::file(format!("gnu-{}", "g".repeat(200)), "gnu").long_names(LongNames::Gnu),
                Entry::symlink("gnu-link", "t".repeat(300)).long_names(LongNames::Gnu),
                Entry::symlink("pax-link", "u".repeat(300)),
                Entry::file(&split, "prefix").long_names(LongNames::Prefix),
                Entry::file(format!("{deep}/file"), "deep"),
                Entry::file(b"latin-\xe9\xff", "not UTF-8"),
                Entry::symlink(b"\x80link", b"\xfe\xff"),
                Entry::file("new\nline", "x"),
                Entry::file(" spaces and\ttabs ", "x"),
                Entry::file("back\\slash:colon,comma", "x"),
                Entry::file("nom-é-日本", "UTF-8"),
                Entry::file("with=equals", "x").pax("comment", "a=b"),
                Entry::file("short", "renamed by pax").pax("path", "by-pax"),
            ],
            &[Entry::whiteout(&"n".repeat(240)), Entry::file(format!("{long}/second"), "x")],
        ],
    )
}

/// cap_net_bind_service, permitted and effective, as `setcap` writes it (version 2).
pub const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Reading is for the user 1234 too, as `setfacl -m u:1234:r` writes it to a file that only root may read.
const ACL: &[u8] = b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x04\0\xd2\x04\0\0\
    \x04\0\0\0\xff\xff\xff\xff\x10\0\x04\0\xff\xff\xff\xff\x20\0\0\0\xff\xff\xff\xff";

fn extended_attributes(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(
        blobs,
        &[
            &[
                Entry::dir("d").xattr("user.dir", "yes").xattr("trusted.dropped", "x"),
                Entry::file("d/capable", "x").mode(0o755).xattr("security.capability", CAPABILITY),
                Entry::file("d/shared", "x").mode(0o640).xattr("system.posix_acl_access", ACL),
                Entry::file("d/many", "x")
                    .xattr("user.a", "1")
                    .xattr("user.b", [0, 255, 10])
                    .xattr("user.empty", ""),
                Entry::symlink("d/link", "many").xattr("user.ignored", "x"),
                Entry::fifo("d/pipe").xattr("user.ignored", "x"),
                Entry::file("d/linked", "x").xattr("user.of", "first"),
                Entry::hard_link("d/linked-too", "d/linked")
                    .xattr("user.of", "second")
                    .xattr("user.more", "x"),
                Entry::file("d/twice", "x").xattr("user.once", "1"),
                Entry::file("d/twice", "y").xattr("user.again", "2"),
            ],
            &[Entry::dir("d").xattr("user.upper", "yes"), Entry::file("d/many", "x").xattr("user.c", "3")],
            &[Entry::file("d/implicit", "x")],
        ],
    )
}

fn special_files(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(
        blobs,
        &[
            &[
                Entry::char_device("null", 1, 3).mode(0o666),
                Entry::block_device("disk", 8, 17).mode(0o660).owner(0, 6),
                Entry::char_device("large-minor", 10, 300),
                Entry::fifo("pipe").mode(0o622),
                Entry::file("setuid", "x").mode(0o4755),
                Entry::file("setgid", "x").mode(0o2755).owner(0, 42),
                Entry::dir("sticky").mode(0o1777),
                Entry::dir("setgid-dir").mode(0o2770).owner(0, 43),
                Entry::file("setgid-dir/child", "x"),
                Entry::file("unreadable", "x").mode(0),
                Entry::dir("closed").mode(0),
                Entry::file("empty", ""),
                Entry::symlink("dangling", "/nowhere"),
            ],
            &[
                Entry::file("null", "a file over a device"),
                Entry::fifo("setuid"),
                Entry::dir("pipe"),
                Entry::file("closed/inside", "x"),
            ],
        ],
    )
}

/// A device 0:0 is overlayfs's own whiteout, wherever it comes from.
fn null_devices(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(
        blobs,
        &[
            &[Entry::dir("d"), Entry::char_device("d/in-base", 0, 0).mode(0o600), Entry::file("d/file", "x")],
            &[Entry::char_device("d/file", 0, 0), Entry::char_device("d/upper", 0, 0), Entry::file("e", "x")],
            &[Entry::file("d/third", "x")],
        ],
    )
}

/// PAX forms 0.0, 0.1 and 1.0: data at 512 and at 1 MiB of a file of 1 MiB and 600 bytes, holes elsewhere.
fn sparse_files(blobs: &Blobs) -> Result<Vec<Layer>> {
    let (size, data) = (1_049_176u64, [[b'A'; 512], [b'B'; 512]].concat());
    let map = [(512u64, 512u64), (1_048_576, 512), (size, 0)];
    let pairs = map.iter().map(|(at, n)| format!("{at},{n}")).collect::<Vec<_>>().join(",");
    let mut zero = Entry::file("sparse-0.0", &data)
        .pax("GNU.sparse.size", size.to_string())
        .pax("GNU.sparse.numblocks", map.len().to_string());
    for (at, n) in map {
        zero = zero.pax("GNU.sparse.offset", at.to_string()).pax("GNU.sparse.numbytes", n.to_string());
    }
    let one = Entry::file("GNUSparseFile.0/sparse-0.1", &data)
        .pax("GNU.sparse.size", size.to_string())
        .pax("GNU.sparse.numblocks", map.len().to_string())
        .pax("GNU.sparse.map", &pairs)
        .pax("GNU.sparse.name", "sparse-0.1");
    let mut head = format!("{}\n", map.len());
    map.iter().for_each(|(at, n)| head.push_str(&format!("{at}\n{n}\n")));
    let mut body = head.into_bytes();
    body.resize(512, 0);
    body.extend(&data);
    let two = Entry::file("GNUSparseFile.0/sparse-1.0", body)
        .pax("GNU.sparse.major", "1")
        .pax("GNU.sparse.minor", "0")
        .pax("GNU.sparse.name", "sparse-1.0")
        .pax("GNU.sparse.realsize", size.to_string());
    gzip(blobs, &[&[Entry::file("before", "x"), zero, one, two, Entry::file("after", "x")]])
}

fn duplicates(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(
        blobs,
        &[
            &[
                Entry::file("f", "first").mode(0o600).xattr("user.first", "x"),
                Entry::file("f", "second, longer").mode(0o644),
                Entry::dir("d").mode(0o700).owner(1, 1),
                Entry::file("d/kept", "x"),
                Entry::dir("d").mode(0o755).owner(2, 2).mtime(1_300_000_000, 0),
                Entry::dir("becomes-file"),
                Entry::file("becomes-file/child", "x"),
                Entry::file("becomes-file", "now a file"),
                Entry::file("becomes-dir", "x"),
                Entry::dir("becomes-dir"),
                Entry::file("becomes-dir/child", "x"),
                Entry::symlink("link", "f"),
                Entry::file("link", "now a file, f stays"),
                Entry::file("to-link", "x"),
                Entry::symlink("to-link", "f"),
                Entry::symlink("dir-link", "d"),
                Entry::dir("dir-link"),
                Entry::file("dir-link/in", "in a directory that was a link"),
            ],
            &[
                Entry::file("f", "third"),
                Entry::file("d", "a file over a directory"),
                Entry::whiteout("link"),
                Entry::file("link", "after its whiteout"),
                Entry::dir("to-link"),
            ],
        ],
    )
}

fn symlinked_parents(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(
        blobs,
        &[
            &[
                Entry::dir("usr"),
                Entry::dir("usr/lib"),
                Entry::symlink("lib", "usr/lib"),
                Entry::file("lib/through", "x"),
                Entry::symlink("absolute", "/usr/lib"),
                Entry::file("absolute/also", "x"),
                Entry::symlink("usr/up", "../usr/lib"),
                Entry::file("usr/up/upwards", "x"),
                Entry::symlink("outside", "../../../../usr"),
                Entry::file("outside/confined", "x"),
                Entry::symlink("chain-1", "chain-2"),
                Entry::symlink("chain-2", "lib"),
                Entry::file("chain-1/end", "x"),
                Entry::symlink("dangling", "made/by/entry"),
                Entry::file("dangling/file", "x"),
            ],
            &[
                Entry::dir("opt"),
                Entry::symlink("srv", "opt"),
                Entry::file("srv/within-upper", "x"),
                Entry::whiteout("srv/nothing"),
                Entry::file("lib/only-in-upper", "hides the link below"),
            ],
        ],
    )
}

fn times(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(
        blobs,
        &[
            &[
                Entry::file("subsecond", "x").mtime(1_234_567_890, 123_456_789),
                Entry::file("epoch", "x").mtime(0, 0),
                Entry::file("before-1970", "x").mtime(-86_400, 0),
                Entry::file("far-future", "x").pax("mtime", "9999999999.5"),
                Entry::file("later-access", "x").mtime(1_000_000_000, 0).pax("atime", "1100000000.25"),
                Entry::dir("dir").mtime(1_111_111_111, 5),
                Entry::file("dir/file", "x").mtime(1_222_222_222, 999_999_999),
                Entry::symlink("link", "epoch").mtime(1_333_333_333, 1),
                Entry::fifo("pipe").mtime(1_444_444_444, 1),
            ],
            &[
                Entry::dir("dir").mtime(1_555_555_555, 0),
                Entry::file("dir/later", "x").mtime(1_666_666_666, 6),
            ],
        ],
    )
}

fn owners(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(
        blobs,
        &[
            &[
                Entry::dir("home").owner(1000, 1000),
                Entry::file("home/file", "x").owner(1000, 1000),
                Entry::file("large", "x").owner(3_000_000, 3_000_001),
                Entry::file("nobody", "x").owner(65_534, 65_534),
                Entry::file("setuid-of-other", "x").owner(33, 33).mode(0o6755),
                Entry::symlink("link", "large").owner(7, 8),
            ],
            &[Entry::dir("home").owner(2000, 2000), Entry::file("home/second", "x").owner(2000, 1000)],
        ],
    )
}

fn old_headers(blobs: &Blobs) -> Result<Vec<Layer>> {
    let layer = blobs.layer_with(Packing::Gzip, |out| {
        let mut writer = Writer::new(out);
        writer.entry(&Entry::new(0, "v7-file").data(Data::Bytes(b"x".to_vec())).v7())?;
        writer.entry(&Entry::new(0, "v7-dir/").mode(0o711).v7())?;
        writer.entry(&Entry::file("v7-dir/inner", "x").v7())?;
        writer.pax(b'g', &[(b"comment".to_vec(), b"of all".to_vec()), (b"uid".to_vec(), b"77".to_vec())])?;
        writer.entry(&Entry::file("after-global", "x"))?;
        writer.entry(&Entry::file("signed-sum", "x"))?;
        writer
            .raw(&base256(Entry::file("base-256", "").owner(0, 0)))
            .and_then(|()| writer.entry(&Entry::file("last", "x")))?;
        writer.finish().map(drop)
    })?;
    Ok(vec![layer, blobs.layer(Packing::Gzip, &[Entry::dir("v7-dir/").mode(0o700)])?])
}

/// A header whose owner is a large number in GNU's binary form.
fn base256(entry: Entry) -> Vec<u8> {
    let mut bytes = Vec::new();
    Writer::new(&mut bytes).entry(&entry).expect("memory takes all");
    let mut block: [u8; 512] = bytes[..512].try_into().expect("a header is one block");
    block[108..116].copy_from_slice(&[0x80, 0, 0, 0, 0, 0x40, 0, 1]);
    // GNU's magic: the field is binary in that format only.
    block[257..265].copy_from_slice(b"ustar  \0");
    checksum(&mut block);
    block.to_vec()
}

fn roots(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(
        blobs,
        &[
            &[
                Entry::dir("./").mode(0o700).owner(5, 5),
                Entry::dir("/").mode(0o711),
                Entry::file("/absolute", "x"),
                Entry::file("./dotted", "x"),
                Entry::file("../../escaped", "x"),
                Entry::dir("a//b/./c/../d/"),
                Entry::file("a/b/d//file", "x"),
                Entry::dir(".."),
            ],
            &[Entry::dir(".").mode(0o555), Entry::opaque("a/b"), Entry::file("./a/b/new", "x")],
        ],
    )
}

/// Trailing bytes, an end that is missing, and an end in the middle.
fn ends(blobs: &Blobs) -> Result<Vec<Layer>> {
    let file = |name: &str| Entry::file(name, "x");
    let padded = blobs.layer_with(Packing::Gzip, |out| {
        let mut writer = Writer::new(out);
        writer.entry(&file("padded"))?;
        writer.finish()?.write_all(&[0; 9 * 1024])
    })?;
    let garbage = blobs.layer_with(Packing::Gzip, |out| {
        let mut writer = Writer::new(out);
        writer.entry(&file("garbage"))?;
        writer.finish()?.write_all(b"not a tar header at all")
    })?;
    let endless = blobs.layer_with(Packing::Gzip, |out| {
        let mut writer = Writer::new(out);
        writer.entry(&file("endless"))?;
        let _: &mut dyn Write = writer.unfinished();
        Ok(())
    })?;
    let hidden = blobs.layer_with(Packing::Gzip, |out| {
        let mut writer = Writer::new(out);
        writer.entry(&file("seen"))?;
        writer.raw(&[0; 1024])?;
        writer.entry(&file("behind-the-end"))?;
        writer.finish().map(drop)
    })?;
    Ok(vec![padded, garbage, endless, hidden])
}

fn empty_layers(blobs: &Blobs) -> Result<Vec<Layer>> {
    let none: [Entry; 0] = [];
    let nothing = |_: &mut dyn Write| -> io::Result<()> { Ok(()) };
    Ok(vec![
        blobs.layer(Packing::Gzip, &[Entry::file("base", "x")])?,
        blobs.layer(Packing::Gzip, &none)?,
        blobs.layer_with(Packing::Gzip, nothing)?,
        blobs.layer(Packing::Plain, &none)?,
        blobs.layer(Packing::Gzip, &[Entry::file("top", "x")])?,
    ])
}

fn same_layer_twice(blobs: &Blobs) -> Result<Vec<Layer>> {
    let one = blobs.layer(
        Packing::Gzip,
        &[Entry::dir("d"), Entry::file("d/f", "one"), Entry::hard_link("d/g", "d/f")],
    )?;
    let two = blobs.layer(Packing::Gzip, &[Entry::whiteout("d/f"), Entry::file("d/h", "two")])?;
    Ok(vec![one.clone(), two.clone(), one, two])
}

fn packings(blobs: &Blobs) -> Result<Vec<Layer>> {
    let entries = |name: &str| -> Vec<Entry> {
        let text = format!("{name}\n").repeat(20_000);
        vec![
            Entry::dir(name),
            Entry::file(format!("{name}/file"), text),
            Entry::hard_link(format!("{name}/l"), format!("{name}/file")),
        ]
    };
    Ok(vec![
        blobs.layer(Packing::Plain, &entries("plain"))?,
        blobs.layer(Packing::Zstd, &entries("zstd"))?,
        blobs.layer(Packing::GzipMembers(10_007), &entries("members"))?,
        blobs.layer(Packing::Gzip, &entries("gzip"))?,
    ])
}

fn many_entries(blobs: &Blobs) -> Result<Vec<Layer>> {
    let mut base = vec![Entry::dir("many")];
    base.extend(
        (0..100_000)
            .map(|n| Entry::file(format!("many/entry-{n:06}"), if n % 100 == 0 { "some" } else { "" })),
    );
    gzip(blobs, &[&base, &[Entry::whiteout("many/entry-050000"), Entry::file("many/another", "x")]])
}

fn huge_file(blobs: &Blobs) -> Result<Vec<Layer>> {
    let huge = Entry::new(b'0', "zeros").data(Data::Zeros((4 << 30) + 3)).mode(0o604).owner(5, 6);
    gzip(
        blobs,
        &[&[
            Entry::file("before", "x"),
            huge,
            Entry::hard_link("linked", "zeros"),
            Entry::file("after", "x"),
        ]],
    )
}

fn one_layer(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(blobs, &[&[Entry::dir("only").mode(0o751), Entry::file("only/file", "x"), Entry::dir("only/sub")]])
}

fn forty_layers(blobs: &Blobs) -> Result<Vec<Layer>> {
    (0..40)
        .map(|n| {
            let mut entries = vec![
                Entry::dir("shared").mode(0o700 + n % 8),
                Entry::file(format!("shared/{n}"), format!("{n}")),
            ];
            if n > 2 {
                entries.push(Entry::whiteout(&format!("shared/{}", n - 2)));
            }
            blobs.layer(Packing::Gzip, &entries)
        })
        .collect()
}

fn link_to_a_lower_layer(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(blobs, &[&[Entry::file("low", "x")], &[Entry::hard_link("high", "low")]])
}

fn link_to_nothing(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(blobs, &[&[Entry::hard_link("high", "nothing")]])
}

fn late_whiteout(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(blobs, &[&[Entry::file("f", "x")], &[Entry::file("f", "y"), Entry::whiteout("f")]])
}

fn entry_below_a_file(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(blobs, &[&[Entry::file("f", "x"), Entry::file("f/below", "y")]])
}

fn name_of_256_bytes(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(blobs, &[&[Entry::file("n".repeat(256), "x")]])
}

fn whiteout_of_the_directory(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(blobs, &[&[Entry::dir("d")], &[Entry::file("d/.wh...", "")]])
}

/// One segment of data in a header of GNU's own sparse type.
fn old_gnu_sparse(blobs: &Blobs) -> Result<Vec<Layer>> {
    let layer = blobs.layer_with(Packing::Gzip, |out| {
        let mut bytes = Vec::new();
        Writer::new(&mut bytes).entry(&Entry::new(b'S', "sparse").data(Data::Bytes(vec![b'A'; 512])))?;
        let mut block: [u8; 512] = bytes[..512].try_into().expect("a header is one block");
        block[257..265].copy_from_slice(b"ustar  \0");
        block[345..512].fill(0);
        block[386..398].copy_from_slice(b"00000001000\0");
        block[398..410].copy_from_slice(b"00000001000\0");
        block[483..495].copy_from_slice(b"00000002000\0");
        checksum(&mut block);
        out.write_all(&block)?;
        out.write_all(&bytes[512..])?;
        out.write_all(&[0; 1024])
    })?;
    Ok(vec![layer])
}

fn cut_off_in_a_file(blobs: &Blobs) -> Result<Vec<Layer>> {
    let layer = blobs.layer_with(Packing::Gzip, |out| {
        let mut bytes = Vec::new();
        Writer::new(&mut bytes).entry(&Entry::file("f", vec![b'x'; 5000]))?;
        out.write_all(&bytes[..2048])
    })?;
    Ok(vec![layer])
}
