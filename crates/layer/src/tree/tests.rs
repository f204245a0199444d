//! The rules of `apply` and `merge`, each on a small image.

use std::sync::Arc;

use super::*;
use crate::testing::{Item, Tar, made};

fn maps(layers: Vec<Tar>) -> Vec<Arc<LayerMap>> {
    layers.into_iter().map(|tar| Arc::new(made(&tar.end()).0.map)).collect()
}

fn merged(layers: Vec<Tar>, memory: u64) -> Result<Tree, ApplyError> {
    Tree::merge(&maps(layers), memory)
}

fn tree(layers: Vec<Tar>) -> Tree {
    merged(layers, Tree::MEMORY_DEFAULT).unwrap()
}

fn refusal(layers: Vec<Tar>) -> String {
    merged(layers, Tree::MEMORY_DEFAULT).unwrap_err().reason
}

fn find(tree: &Tree, path: &str) -> Option<NodeIndex> {
    path.split('/').try_fold(Tree::ROOT, |dir, name| tree.lookup(dir, name.as_bytes()))
}

fn attr(tree: &Tree, path: &str) -> Attr {
    tree.attr(find(tree, path).unwrap_or_else(|| panic!("{path} is missing")))
}

fn names(tree: &Tree, path: &str) -> Vec<String> {
    let dir = if path.is_empty() { Tree::ROOT } else { find(tree, path).unwrap() };
    tree.children(dir, 0).map(|(_, name, _)| String::from_utf8_lossy(name).into_owned()).collect()
}

fn new() -> Tar {
    Tar::default()
}

fn dir_of(name: &str, mode: u32, uid: u32, gid: u32) -> Item<'_> {
    Item { type_flag: b'5', name: name.as_bytes(), mode, uid, gid, ..Item::default() }
}

fn char_device(name: &str, device: (u32, u32)) -> Item<'_> {
    Item { type_flag: b'3', name: name.as_bytes(), device, ..Item::default() }
}

#[test]
fn no_layer_gives_an_empty_root() {
    let tree = Tree::merge(&[], Tree::MEMORY_DEFAULT).unwrap();
    assert_eq!(tree.node_count(), 1);
    assert_eq!((tree.attr(Tree::ROOT).mode, tree.attr(Tree::ROOT).nlink), (0o755, 2));
}

#[test]
fn upper_file_hides_lower_one_and_directories_merge() {
    let tree = tree(vec![
        new().dir("d").file("d/a", b"old").file("d/b", b"b").dir("only"),
        new().dir("d").file("d/a", b"newer"),
    ]);
    assert_eq!(names(&tree, ""), ["d", "only"]);
    assert_eq!(names(&tree, "d"), ["a", "b"]);
    assert_eq!(attr(&tree, "d/a").size, 5);
    assert_eq!(attr(&tree, "d").nlink, 1);
    assert_eq!(attr(&tree, "only").nlink, 2);
}

#[test]
fn every_node_has_the_path_that_leads_to_it() {
    let tree = tree(vec![
        new()
            .dir("empty")
            .dir("d")
            .file("d/a", b"x")
            .dir("d/hollow")
            .file("d/sub/b", b"y")
            .link("d/l", "d/a"),
        new().dir("z").file("z/c", b"z").file("top", b""),
    ]);
    assert_eq!(tree.path(Tree::ROOT), b"");
    for node in (1..tree.node_count()).map(NodeIndex) {
        let path = tree.path(node);
        let mut names = path.split(|byte| *byte == b'/');
        assert_eq!(names.next(), Some(&b""[..]), "{path:?} begins with a slash");
        let found = names.try_fold(Tree::ROOT, |dir, name| tree.lookup(dir, name));
        assert_eq!(found, Some(node), "{}", String::from_utf8_lossy(&path));
    }
}

#[test]
fn whiteout_hides_in_upper_layers_and_removes_in_the_base() {
    let tree = tree(vec![
        new().file("gone", b"x").file("a", b"x").file(".wh.gone", b"").file("back", b"x"),
        new().file(".wh.a", b"").file(".wh.back", b""),
        new().file("back", b"again"),
    ]);
    assert_eq!(names(&tree, ""), ["back"]);
    assert_eq!(attr(&tree, "back").size, 5);
}

#[test]
fn opaque_directory_hides_what_is_below() {
    let tree = tree(vec![
        new().dir("d").file("d/a", b"x").dir("d/sub").file("d/sub/deep", b""),
        new().dir("d").file("d/.wh..wh..opq", b"").file("d/b", b"x"),
        new().file("d/sub/c", b""),
    ]);
    assert_eq!(names(&tree, "d"), ["b", "sub"]);
    assert_eq!(names(&tree, "d/sub"), ["c"]);
}

#[test]
fn opaque_root_hides_nothing() {
    let tree = tree(vec![new().file("a", b""), new().file(".wh..wh..opq", b"").file("b", b"")]);
    assert_eq!(names(&tree, ""), ["a", "b"]);
}

#[test]
fn opaque_marker_in_the_base_keeps_what_has_an_entry_of_its_own() {
    let base = new()
        .dir("d")
        .file("d/keep", b"")
        .file("d/implied/x", b"")
        .file("d/.wh..wh..opq", b"")
        .file("d/late", b"");
    assert_eq!(names(&tree(vec![base]), "d"), ["keep", "late"]);
}

#[test]
fn every_opaque_marker_in_the_base_counts() {
    let base =
        new().dir("d").file("d/.wh..wh..opq", b"").file("d/implied/x", b"").file("d/.wh..wh..opq", b"");
    assert_eq!(names(&tree(vec![base]), "d"), [""; 0]);
}

#[test]
fn directory_after_its_whiteout_is_not_opaque() {
    let tree =
        tree(vec![new().dir("d").file("d/a", b""), new().file(".wh.d", b"").dir("d").file("d/b", b"")]);
    assert_eq!(names(&tree, "d"), ["a", "b"]);
}

#[test]
fn whiteout_after_its_entry_is_refused_above_the_base() {
    let words = refusal(vec![new(), new().file("a", b"").file(".wh.a", b"")]);
    assert_eq!(words, "failed to convert whiteout file \".wh.a\": file exists");
}

#[test]
fn whiteouts_without_a_name_are_refused() {
    for name in [".wh.", ".wh..", "d/.wh..."] {
        assert!(refusal(vec![new().file(name, b"")]).starts_with("invalid whiteout name"), "{name}");
    }
}

#[test]
fn implied_directory_takes_after_the_first_layer_below_that_has_it() {
    let tree = tree(vec![
        new().item(&dir_of("etc", 0o700, 5, 6)).item(&dir_of("etc/x", 0o1777, 7, 8)),
        new().dir("etc").file("etc/.wh..wh..opq", b""),
        new().file("etc/x/file", b""),
    ]);
    let x = attr(&tree, "etc/x");
    assert_eq!((x.mode, x.uid, x.gid), (0o1777, 7, 8));
    assert_eq!((attr(&tree, "etc").mode, attr(&tree, "etc").uid), (0o755, 0));
}

#[test]
fn implied_directory_over_a_whiteout_has_the_defaults() {
    let tree = tree(vec![
        new().item(&dir_of("d", 0o700, 5, 6)),
        new().file(".wh.d", b""),
        new().file("d/file", b""),
    ]);
    assert_eq!((attr(&tree, "d").mode, attr(&tree, "d").uid), (0o755, 0));
    let words = refusal(vec![new().dir("d/e"), new().file(".wh.d", b""), new().file("d/e/file", b"")]);
    assert_eq!(words, "lstat d/e: not a directory");
}

#[test]
fn implied_directory_follows_links_of_the_layer_below() {
    let tree = tree(vec![
        new().item(&dir_of("usr/lib", 0o711, 3, 4)).symlink("lib", "usr/lib"),
        new().file("lib/x", b""),
    ]);
    assert_eq!(attr(&tree, "lib").kind, FileKind::Directory);
    assert_eq!((attr(&tree, "lib").mode, attr(&tree, "lib").uid), (0o711, 3));
}

#[test]
fn implied_directory_inherits_the_group_of_a_set_group_id_directory() {
    let tree = tree(vec![new().item(&dir_of("local", 0o2775, 0, 50)).file("local/new/file", b"")]);
    assert_eq!((attr(&tree, "local/new").mode, attr(&tree, "local/new").gid), (0o755, 50));
}

#[test]
fn links_among_the_components_are_followed_within_the_layer() {
    let tree = tree(vec![
        new()
            .dir("usr/lib")
            .symlink("lib", "usr/lib")
            .symlink("l2", "/lib")
            .file("l2/x", b"1")
            .file("lib/../y", b""),
    ]);
    assert!(find(&tree, "usr/lib/x").is_some());
    assert_eq!(attr(&tree, "lib").kind, FileKind::Symlink);
    // The path is cleaned as text before anything is followed.
    assert!(find(&tree, "y").is_some());
}

#[test]
fn link_loops_and_files_as_parents_are_refused() {
    assert!(
        refusal(vec![new().symlink("a", "b").symlink("b", "a").file("a/x", b"")]).contains("too many links")
    );
    assert!(refusal(vec![new().file("a", b"").file("a/x", b"")]).contains("not a directory"));
    assert!(refusal(vec![new().file("a", b"").file("a/b/x", b"")]).contains("not a directory"));
}

#[test]
fn paths_stay_within_the_root() {
    let tree = tree(vec![
        new().file("../../etc/a", b"").symlink("up", "../../..").file("up/b", b"").dir("./").dir(".."),
    ]);
    assert_eq!(names(&tree, ""), ["b", "etc", "up"]);
    assert_eq!(names(&tree, "etc"), ["a"]);
}

#[test]
fn the_last_of_several_entries_counts() {
    let tree = tree(vec![
        new()
            .dir("d")
            .file("d/kept", b"")
            .item(&dir_of("d", 0o700, 1, 2))
            .file("f", b"1")
            .file("f", b"22")
            .dir("e")
            .file("e", b""),
    ]);
    assert_eq!(names(&tree, "d"), ["kept"]);
    assert_eq!((attr(&tree, "d").mode, attr(&tree, "d").gid), (0o700, 2));
    assert_eq!((attr(&tree, "f").size, attr(&tree, "f").nlink), (2, 1));
    assert_eq!(attr(&tree, "e").kind, FileKind::File);
}

#[test]
fn hard_links_share_a_node_and_count_hidden_names() {
    let tree = tree(vec![new().file("a", b"123").link("b", "./a").link("c", "/b"), new().file(".wh.b", b"")]);
    assert_eq!(find(&tree, "a"), find(&tree, "c"));
    assert_eq!(find(&tree, "b"), None);
    assert_eq!(attr(&tree, "a").nlink, 3);
    assert_eq!(tree.origin(find(&tree, "c").unwrap()), Origin::Entry { layer: 0, base: true, entry: 0 });
}

#[test]
fn link_entry_sets_the_attributes_of_all_names() {
    let pax: &[(&str, &[u8])] =
        &[("SCHILY.xattr.user.k", b"v"), ("SCHILY.xattr.security.capability", CAPABILITY)];
    let tree = tree(vec![new().item(&Item { name: b"a", data: b"x", pax, ..Item::default() }).item(&Item {
        type_flag: b'1',
        name: b"b",
        link: b"a",
        mode: 0o4755,
        uid: 9,
        mtime: 5,
        ..Item::default()
    })]);
    let a = attr(&tree, "a");
    assert_eq!((a.mode, a.uid, a.mtime), (0o4755, 9, (5, 0)));
    // The change of owner takes the capabilities away.
    let xattrs: Vec<_> = tree.xattrs(find(&tree, "a").unwrap()).collect();
    assert_eq!(xattrs, [(&b"user.k"[..], &b"v"[..])]);
}

const CAPABILITY: &[u8] = &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn replaced_target_leaves_its_link_alone() {
    let tree = tree(vec![new().file("a", b"old").link("b", "a").file("a", b"newer")]);
    assert_eq!((attr(&tree, "b").size, attr(&tree, "b").nlink), (3, 1));
    assert_eq!((attr(&tree, "a").size, attr(&tree, "a").nlink), (5, 1));
}

#[test]
fn links_to_what_is_not_in_the_layer_are_refused() {
    assert!(refusal(vec![new().link("b", "a")]).contains("no such file"));
    assert!(refusal(vec![new().file("a", b""), new().link("b", "a")]).contains("no such file"));
    assert!(refusal(vec![new().file("a", b"").link("a", "a")]).contains("no such file"));
    assert!(refusal(vec![new().dir("d").link("b", "d")]).contains("operation not permitted"));
}

#[test]
fn link_to_a_symbolic_link_is_that_link() {
    let tree = tree(vec![new().file("f", b"").symlink("s", "f").link("l", "s")]);
    assert_eq!(tree.readlink(find(&tree, "l").unwrap()), b"f");
    assert_eq!((attr(&tree, "l").nlink, attr(&tree, "f").nlink), (2, 1));
}

#[test]
fn directory_times_are_set_last_and_others_when_met() {
    let item = |name: &'static str, mtime| Item { mtime, ..dir_of(name, 0o755, 0, 0) };
    let tree = tree(vec![new().item(&item("d", 10)).file("d/x", b"").item(&item("d/e", 20))]);
    assert_eq!((attr(&tree, "d").mtime, attr(&tree, "d/e").mtime), ((10, 0), (20, 0)));
    assert!(refusal(vec![new().dir("d").file(".wh.d", b"")]).contains("no such file"));
}

#[test]
fn real_device_0_0_is_a_whiteout() {
    let tree = tree(vec![
        new().file("a", b"").file("b", b"").item(&char_device("null", (1, 3))),
        new().item(&char_device("a", (0, 0))),
    ]);
    assert_eq!(names(&tree, ""), ["b", "null"]);
    assert_eq!(attr(&tree, "null").rdev, 0x103);
    let base = merged(vec![new().item(&char_device("zero", (0, 0)))], Tree::MEMORY_DEFAULT).unwrap();
    assert_eq!(names(&base, ""), ["zero"]);
}

#[test]
fn whiteout_in_a_directory_of_one_layer_is_listed_for_overlayfs_to_hide() {
    let tree = tree(vec![new().file("a", b""), new().dir("d").file("d/.wh.x", b"").file("d/y", b"")]);
    assert_eq!(names(&tree, "d"), ["x", "y"]);
    assert_eq!((attr(&tree, "d/x").kind, attr(&tree, "d/x").rdev), (FileKind::Char, 0));
}

#[test]
fn paths_of_4095_bytes_fit_and_longer_ones_are_refused() {
    let long = |bytes: usize| {
        format!("{}{}", "d/".repeat(bytes / 2), if bytes.is_multiple_of(2) { "" } else { "f" })
    };
    let layer = |name: &str| {
        let path: &[(&str, &[u8])] = &[("path", name.as_bytes())];
        new().item(&Item { type_flag: b'0', name: b"short", pax: path, ..Item::default() })
    };
    assert!(find(&tree(vec![layer(&long(4095))]), &long(4095)).is_some());
    for bytes in [4097, 1 << 19] {
        assert!(refusal(vec![layer(&long(bytes + 1 - bytes % 2))]).contains("file name too long"), "{bytes}");
    }
}

#[test]
fn names_of_255_bytes_fit_and_longer_ones_are_refused() {
    let name = "n".repeat(256);
    let item = |name: &str| {
        let path: &[(&str, &[u8])] = &[("path", name.as_bytes())];
        new().item(&Item { name: b"short", pax: path, ..Item::default() })
    };
    assert_eq!(names(&tree(vec![item(&name[1..])]), ""), [&name[1..]]);
    assert!(refusal(vec![item(&name)]).contains("file name too long"));
}

#[test]
fn global_header_makes_the_parents_of_its_name() {
    let global =
        Item { type_flag: b'g', name: b"tmp/GlobalHead.1", data: b"12 comment=\n", ..Item::default() };
    let tree = tree(vec![new().item(&global).file("a", b"")]);
    assert_eq!(names(&tree, ""), ["a", "tmp"]);
    assert_eq!(names(&tree, "tmp"), [""; 0]);
}

#[test]
fn sparse_file_has_its_segments() {
    let pax: &[(&str, &[u8])] = &[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"sparse"),
        ("GNU.sparse.realsize", b"10000"),
    ];
    let mut data = b"2\n100\n3\n9000\n2\n".to_vec();
    data.resize(512, 0);
    data.extend(b"abcde");
    let tar = new().file("before", b"1234").item(&Item {
        name: b"GNUSparse/x",
        data: &data,
        pax,
        ..Item::default()
    });
    let tree = tree(vec![tar]);
    let file = tree.file(find(&tree, "sparse").unwrap()).unwrap();
    let segments = [Segment { offset: 100, len: 3 }, Segment { offset: 9000, len: 2 }];
    assert_eq!(file.size, 10000);
    assert_eq!(file.content, Content::Sparse { start: 4, segments: &segments });
}

#[test]
fn children_go_on_from_any_cookie() {
    let tree = tree(vec![(0..1000).fold(new(), |tar, i| tar.file(&format!("d/f{i:04}"), b""))]);
    let dir = find(&tree, "d").unwrap();
    let all: Vec<_> = tree.children(dir, 0).collect();
    assert_eq!(all.len(), 1000);
    let (cookie, ..) = all[499];
    assert_eq!(tree.children(dir, cookie).next(), Some(all[500]));
    assert_eq!(tree.children(dir, 5000).next(), None);
}

#[test]
fn every_node_is_found_by_its_origin() {
    let tree = tree(vec![
        new().dir("d").file("d/a", b"").link("d/b", "d/a").symlink("s", "d"),
        new().file("d/e/f", b"").file("x", b""),
    ]);
    for node in (0..tree.node_count()).map(NodeIndex) {
        assert_eq!(tree.find(tree.origin(node)), Some(node));
    }
    assert_eq!(tree.find(Origin::Entry { layer: 0, base: true, entry: 2 }), None);
}

#[test]
fn fingerprint_depends_on_layers_and_their_order() {
    let layers = maps(vec![new().file("a", b""), new().file("b", b"")]);
    let of = |layers: &[Arc<LayerMap>]| Tree::merge(layers, Tree::MEMORY_DEFAULT).unwrap().fingerprint();
    let swapped = [layers[1].clone(), layers[0].clone()];
    assert_eq!(of(&layers), of(&layers.clone()));
    assert_ne!(of(&layers), of(&swapped));
    assert_ne!(of(&layers), of(&layers[..1]));
}

#[test]
fn the_same_layer_may_appear_twice() {
    let layer = maps(vec![new().file("a", b"").dir("d")]).remove(0);
    let tree = Tree::merge(&[layer.clone(), layer], Tree::MEMORY_DEFAULT).unwrap();
    assert_eq!(tree.origin(find(&tree, "a").unwrap()), Origin::Entry { layer: 1, base: false, entry: 0 });
}

/// Directories with names of their own, so many.
fn many(prefix: &str, count: usize) -> Tar {
    (0..count).fold(new(), |tar, i| tar.dir(&format!("{prefix}{i}")))
}

#[test]
fn layers_that_take_more_memory_than_a_tree_may_are_impossible() {
    let error = merged(vec![many("d", 1000)], 100_000).unwrap_err();
    assert_eq!((error.layer, &*error.reason), (0, "the merged layers take more memory than a tree may"));
    let implied: String = (0..1000).map(|_| "d/").collect();
    let implied =
        Item { type_flag: b'5', name: b"short", pax: &[("path", implied.as_bytes())], ..Item::default() };
    assert!(merged(vec![new().item(&implied)], 100_000).is_err());
}

#[test]
fn layers_of_a_chain_count_together_and_the_one_that_is_too_much_is_named() {
    let layers = || vec![many("a", 200), many("b", 200), many("c", 200)];
    let alone = |layer: Tar| merged(vec![layer], 150_000).is_ok();
    assert!(layers().into_iter().all(alone));
    assert_eq!(merged(layers(), 150_000).unwrap_err().layer, 2);
}

#[test]
fn what_is_removed_again_counts() {
    let again = (0..1000).fold(new(), |tar, _| tar.file("f", b"").file(".wh.f", b""));
    assert!(merged(vec![again], 100_000).is_err());
}

#[test]
fn extended_attributes_that_many_entries_share_are_held_once() {
    let value = [7; 60_000];
    let files = |own: bool| {
        (0..100).fold(new(), |tar, i| {
            let (name, number) = (format!("f{i}"), i.to_string());
            let pax: &[(&str, &[u8])] = &[
                ("SCHILY.xattr.user.a", &value),
                ("SCHILY.xattr.user.b", if own { number.as_bytes() } else { b"" }),
            ];
            tar.item(&Item { name: name.as_bytes(), pax, ..Item::default() })
        })
    };
    let shared = merged(vec![files(false)], 200_000).unwrap();
    let file = find(&shared, "f99").unwrap();
    assert_eq!(shared.xattrs(file).map(|(_, value)| value.len()).collect::<Vec<_>>(), [60_000, 0]);
    assert!(merged(vec![files(true)], 200_000).is_err());
}

#[test]
fn segments_of_sparse_files_count() {
    let map: String = (0..5000).map(|i| format!("{i},1,").replace(',', "\n")).collect();
    let mut data = format!("5000\n{map}").into_bytes();
    data.resize(data.len().next_multiple_of(512), 0);
    data.extend([1; 5000]);
    let pax: &[(&str, &[u8])] = &[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"sparse"),
        ("GNU.sparse.realsize", b"10000"),
    ];
    let layer = || vec![new().item(&Item { name: b"x", data: &data, pax, ..Item::default() })];
    assert!(merged(layer(), 100_000).is_ok());
    assert!(merged(layer(), 50_000).is_err());
}

#[test]
fn names_that_were_removed_take_steps_whenever_they_are_passed() {
    let removed =
        (0..1000).fold(new(), |tar, i| tar.file(&format!("d/{i}"), b"").file(&format!("d/.wh.{i}"), b""));
    let again = (0..2000).fold(removed.clone(), |tar, _| tar.file("d/.wh..wh..opq", b""));
    assert!(merged(vec![removed], 1 << 20).is_ok());
    let error = merged(vec![again], 1 << 20).unwrap_err();
    assert_eq!(
        error.reason,
        "failed to convert whiteout file \"d/.wh..wh..opq\": the merged layers take more steps than a tree may"
    );
}

#[test]
fn paths_that_are_walked_again_and_again_take_steps() {
    let deep = "d/".repeat(2000);
    let pax: &[(&str, &[u8])] = &[("path", deep.as_bytes())];
    let walks = |count: usize| {
        let entry = Item { type_flag: b'5', name: b"short", pax, ..Item::default() };
        // The second entry makes the tree forget which parent was the last.
        (0..count).fold(new(), |tar, i| tar.item(&entry).file(&format!("other/{i}"), b""))
    };
    assert!(merged(vec![walks(10)], 1 << 20).is_ok());
    let error = merged(vec![walks(10), walks(400)], 1 << 21).unwrap_err();
    assert!(error.reason.contains("more steps"), "{error}");
}
