//! Single entries: names, attributes, kinds, headers, and how a layer is packed.

use std::io::Write;

use anyhow::Result;

use super::gzip;
use crate::image::{Blobs, Layer, Packing};
use crate::tar::{Data, Entry, LongNames, Writer, checksum};

pub(super) fn names(blobs: &Blobs) -> Result<Vec<Layer>> {
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

pub(super) fn extended_attributes(blobs: &Blobs) -> Result<Vec<Layer>> {
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

pub(super) fn special_files(blobs: &Blobs) -> Result<Vec<Layer>> {
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
pub(super) fn null_devices(blobs: &Blobs) -> Result<Vec<Layer>> {
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
pub(super) fn sparse_files(blobs: &Blobs) -> Result<Vec<Layer>> {
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

pub(super) fn times(blobs: &Blobs) -> Result<Vec<Layer>> {
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

pub(super) fn owners(blobs: &Blobs) -> Result<Vec<Layer>> {
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

pub(super) fn old_headers(blobs: &Blobs) -> Result<Vec<Layer>> {
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

/// Trailing bytes, an end that is missing, and an end in the middle.
pub(super) fn ends(blobs: &Blobs) -> Result<Vec<Layer>> {
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

pub(super) fn packings(blobs: &Blobs) -> Result<Vec<Layer>> {
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

pub(super) fn many_entries(blobs: &Blobs) -> Result<Vec<Layer>> {
    let mut base = vec![Entry::dir("many")];
    base.extend(
        (0..100_000)
            .map(|n| Entry::file(format!("many/entry-{n:06}"), if n % 100 == 0 { "some" } else { "" })),
    );
    gzip(blobs, &[&base, &[Entry::whiteout("many/entry-050000"), Entry::file("many/another", "x")]])
}

pub(super) fn huge_file(blobs: &Blobs) -> Result<Vec<Layer>> {
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
