//! What layers do to one another: links, whiteouts, hidden and implied directories.

use std::io::{self, Write};

use anyhow::Result;

use super::gzip;
use crate::image::{Blobs, Layer, Packing};
use crate::tar::Entry;

pub(super) fn hard_links(blobs: &Blobs) -> Result<Vec<Layer>> {
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

pub(super) fn whiteouts(blobs: &Blobs) -> Result<Vec<Layer>> {
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

pub(super) fn opaque_directories(blobs: &Blobs) -> Result<Vec<Layer>> {
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

pub(super) fn implicit_parents(blobs: &Blobs) -> Result<Vec<Layer>> {
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

pub(super) fn duplicates(blobs: &Blobs) -> Result<Vec<Layer>> {
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

pub(super) fn symlinked_parents(blobs: &Blobs) -> Result<Vec<Layer>> {
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

pub(super) fn roots(blobs: &Blobs) -> Result<Vec<Layer>> {
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

pub(super) fn empty_layers(blobs: &Blobs) -> Result<Vec<Layer>> {
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

pub(super) fn same_layer_twice(blobs: &Blobs) -> Result<Vec<Layer>> {
    let one = blobs.layer(
        Packing::Gzip,
        &[Entry::dir("d"), Entry::file("d/f", "one"), Entry::hard_link("d/g", "d/f")],
    )?;
    let two = blobs.layer(Packing::Gzip, &[Entry::whiteout("d/f"), Entry::file("d/h", "two")])?;
    Ok(vec![one.clone(), two.clone(), one, two])
}

pub(super) fn one_layer(blobs: &Blobs) -> Result<Vec<Layer>> {
    gzip(blobs, &[&[Entry::dir("only").mode(0o751), Entry::file("only/file", "x"), Entry::dir("only/sub")]])
}

pub(super) fn forty_layers(blobs: &Blobs) -> Result<Vec<Layer>> {
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
