//! The file system as the kernel shows it: each test has a mount of its own, served by a process of its own.

// In a test an unwrap is an assertion.
#![allow(clippy::unwrap_used)]

mod archive;
mod inside;
mod server;
mod tree;
mod world;

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use archive::{Archive, Meta, OPEN, PLAIN, every_kind, noise};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tree::{assert_same, inodes, take_down};
use world::{World, output, run, spawn, wait};

/// A process that was killed has to be gone after so long.
const DEATH_BOUND: Duration = Duration::from_secs(2);

/// What a second pass over files that the kernel knows must not ask for.
const FREE: [&str; 8] =
    ["lookup", "getattr", "readlink", "open", "read", "opendir", "readdir", "readdirplus"];

/// Not a test: the process that serves the mount of one.
#[test]
fn server_process() {
    if let Some(folder) = std::env::var_os(server::SERVE) {
        server::serve(Path::new(&folder));
    }
}

fn one_file(content: &[u8]) -> Vec<u8> {
    Archive::default().file("file", PLAIN, content).finish()
}

fn forty_files() -> Vec<u8> {
    let mut archive = Archive::default();
    for index in 0..40 {
        archive.file(&format!("file-{index}"), PLAIN, format!("content {index}").as_bytes());
    }
    archive.finish()
}

fn kill_all(children: &mut [Child]) {
    children.iter_mut().for_each(|child| child.kill().unwrap());
    for child in children {
        assert!(wait(child, DEATH_BOUND).is_some(), "a killed process is still there");
    }
}

/// What differs between two counts, of those operations that must not.
fn asked(before: &HashMap<String, u64>, after: &HashMap<String, u64>) -> Vec<String> {
    let more = |name: &str| after[name] - before[name];
    FREE.iter().filter(|name| more(name) > 0).map(|name| format!("{name}: {}", more(name))).collect()
}

#[test]
fn mounted_tree_equals_what_tar_unpacks() {
    let mut world = World::new(&[("all", every_kind())]);
    let unpacked = world.unpack("all");
    for (dir, command) in [("1", "add 1 all"), ("2", "add 2 all:far")] {
        world.say(command);
        assert_same(&take_down(&world.mounted(dir)), &take_down(&unpacked));
    }
}

#[test]
fn many_readers_at_once_see_the_same() {
    let mut world = World::new(&[("all", every_kind())]);
    let unpacked = world.unpack("all");
    world.say("add 1 all:far");
    let (ours, theirs) = (world.mounted("1"), take_down(&unpacked));
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| assert_same(&take_down(&ours), &theirs));
        }
    });
}

#[test]
fn an_unmount_from_outside_is_noticed() {
    for place in ["mnt", "bare"] {
        let mut world = World::new(&[("file", one_file(b"content"))]);
        world.say("add 1 file");
        assert_eq!(world.say("ended"), "false");
        umount2(&world.path(place), MntFlags::MNT_DETACH).unwrap();
        assert_eq!(world.say("end"), "ended");
    }
}

#[test]
fn tar_and_find_see_the_same_as_of_an_unpacked_layer() {
    let mut world = World::new(&[("all", every_kind())]);
    let unpacked = world.unpack("all");
    world.say("add 1 all");
    let find = |root: &Path| {
        let format = "%P %y %m %U:%G %n %l\n";
        let found = run(&["find", root.to_str().unwrap(), "-mindepth", "1", "-printf", format]);
        found.lines().map(str::to_owned).collect::<BTreeSet<String>>()
    };
    assert_eq!(find(&world.mounted("1")), find(&unpacked));
    let tar = |root: &Path| {
        // The headers would also name tar's process, and times that no image sets.
        let pax = "exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime";
        let line =
            format!("cd {} && tar --sort=name --xattrs --pax-option={pax} -c * | sha256sum", root.display());
        run(&["sh", "-c", &line])
    };
    assert_eq!(tar(&world.mounted("1")), tar(&unpacked));
}

#[test]
fn second_pass_makes_no_request() {
    let mut world = World::new(&[("all", every_kind())]);
    world.say("add 1 all:far");
    let pass = |world: &World| {
        let root = world.mounted("1");
        run(&["sh", "-c", &format!("cd {} && tar -c . | wc -c", root.display())]);
        run(&["find", root.to_str().unwrap(), "-type", "f", "-exec", "cat", "{}", "+"]);
        let absent = fs::symlink_metadata(root.join("etc/absent")).unwrap_err();
        assert_eq!(absent.kind(), ErrorKind::NotFound);
    };
    pass(&world);
    // A page that the kernel took away for lack of memory is read again, so the best of a few passes counts.
    let later_passes: Vec<_> = (0..3)
        .map(|_| {
            let before = world.stats();
            pass(&world);
            asked(&before, &world.stats())
        })
        .collect();
    assert!(later_passes.iter().any(Vec::is_empty), "asked again: {later_passes:?}");
}

#[test]
fn reader_of_a_piece_that_never_comes_can_be_killed() {
    let mut world = World::new(&[("file", one_file(&noise(1, 500_000)))]);
    world.say("add 1 file:mute");
    let mut readers = [spawn(&["cat", world.mounted("1/file").to_str().unwrap()])];
    world.wait_for("read", 1);
    kill_all(&mut readers);
}

#[test]
fn who_waits_for_a_map_can_be_killed() {
    let mut world = World::new(&[("file", one_file(b"content"))]);
    world.say("add 1 file:hidden");
    let place = world.mounted("1/file");
    let lookups = world.stats()["lookup"];
    let mut waiting = [spawn(&["stat", place.to_str().unwrap()]), spawn(&["stat", place.to_str().unwrap()])];
    world.wait_for("lookup", lookups + 2);
    kill_all(&mut waiting);
    let listings = world.stats()["readdir"] + world.stats()["readdirplus"];
    let mut listing = [spawn(&["ls", world.mounted("1").to_str().unwrap()])];
    while world.stats()["readdir"] + world.stats()["readdirplus"] == listings {
        std::thread::yield_now();
    }
    kill_all(&mut listing);
    assert!(world.stats()["interrupt"] >= 2);
}

#[test]
fn directory_of_a_snapshot_is_known_before_its_map() {
    let mut world = World::new(&[("file", one_file(b"content"))]);
    world.say("add 7 file:hidden");
    let before = fs::symlink_metadata(world.mounted("7")).unwrap();
    assert!(before.is_dir());
    assert_eq!((before.ino(), before.mode() & 0o7777, before.uid()), (1007, 0o755, 0));
    let mut waiting = spawn(&["cat", world.mounted("7/file").to_str().unwrap()]);
    world.wait_for("lookup", 2);
    world.say("give");
    assert!(wait(&mut waiting, DEATH_BOUND).is_some(), "the look-up is not answered");
    assert_eq!(fs::read(world.mounted("7/file")).unwrap(), b"content");
    assert_eq!(fs::symlink_metadata(world.mounted("7")).unwrap().ino(), 1007);
}

#[test]
fn forty_readers_of_a_missing_piece_do_not_delay_others() {
    let mut world = World::new(&[("forty", forty_files()), ("other", every_kind())]);
    world.say("add 1 forty:mute");
    world.say("add 2 other:far");
    fs::symlink_metadata(world.mounted("2/lib/large")).unwrap();
    let place = |index: usize| world.mounted(&format!("1/file-{index}"));
    let mut readers: Vec<Child> =
        (0..40).map(|index| spawn(&["cat", place(index).to_str().unwrap()])).collect();
    world.wait_for("read", 40);
    let start = Instant::now();
    let content = fs::read(world.mounted("2/lib/piece")).unwrap();
    let took = start.elapsed();
    assert_eq!(content, noise(3, 256 * 1024));
    assert!(took < Duration::from_millis(100), "a cold read took {took:?}");
    assert_eq!(world.moved("forty:mute").0, 1, "the piece is asked for once");
    kill_all(&mut readers);
}

#[test]
fn an_impossible_piece_is_an_error_at_once() {
    let mut world = World::new(&[("file", one_file(b"content"))]);
    world.say("add 1 file:lost");
    let error = fs::read(world.mounted("1/file")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::EIO as i32));
}

#[test]
fn overlay_above_is_one_file_system() {
    let mut world = World::new(&[("all", every_kind())]);
    let unpacked = world.unpack("all");
    world.say("add 1 all");
    let overlay = Overlay::over(&world, "mnt");
    let count = |root: &Path| {
        let root = root.to_str().unwrap();
        let blocks = run(&["du", "-x", "-s", "--block-size=512", root]);
        let files = run(&["find", root, "-xdev", "-mindepth", "1"]).lines().count();
        (blocks.split_whitespace().next().unwrap().parse::<u64>().unwrap(), files)
    };
    let ((ours, our_files), (theirs, their_files)) = (count(overlay.root()), count(&unpacked));
    assert_eq!(our_files, their_files);
    // The roots differ by a block or so: ext4 keeps long directories, and its own root is not ours.
    assert!(ours.abs_diff(theirs) <= theirs / 20, "{ours} and {theirs} blocks");
    assert_same(&take_down(overlay.root()), &take_down(&unpacked));
    fs::write(overlay.root().join("etc/hosts"), "changed").unwrap();
    fs::rename(overlay.root().join("lib/piece"), overlay.root().join("lib/moved")).unwrap();
    fs::remove_dir_all(overlay.root().join("many")).unwrap();
    assert_eq!(fs::read(overlay.root().join("lib/moved")).unwrap(), noise(3, 256 * 1024));
    assert_eq!(fs::read(world.mounted("1/etc/hosts")).unwrap(), b"127.0.0.1 localhost\n");
}

#[test]
fn overlay_is_mounted_before_the_map_and_who_waits_in_it_can_be_killed() {
    let mut world = World::new(&[("file", one_file(b"content"))]);
    world.say("add 1 file:hidden");
    let start = Instant::now();
    let overlay = Overlay::over(&world, "mnt");
    assert!(start.elapsed() < Duration::from_secs(1), "mounting waits for the map");
    let place = overlay.root().join("file");
    let lookups = world.stats()["lookup"];
    let mut waiting = [spawn(&["cat", place.to_str().unwrap()])];
    world.wait_for("lookup", lookups + 1);
    kill_all(&mut waiting);
    world.say("give");
    assert_eq!(fs::read(place).unwrap(), b"content");
}

#[test]
fn a_stop_ends_those_who_wait() {
    let mut world = World::new(&[("file", one_file(b"content"))]);
    world.say("add 1 file:mute");
    let mut reader = spawn(&["cat", world.mounted("1/file").to_str().unwrap()]);
    world.wait_for("read", 1);
    drop(world);
    assert!(wait(&mut reader, DEATH_BOUND).is_some(), "the reader still waits");
}

/// An overlay with a mount's `1` below, as containerd mounts it.
struct Overlay(std::path::PathBuf);

impl Overlay {
    /// Over the mount of that name, with an upper directory of its own.
    fn over(world: &World, mounted: &str) -> Overlay {
        let own = tempfile::TempDir::with_prefix_in("overlay-", world.path("")).unwrap().keep();
        let [upper, work, merged] = ["upper", "work", "merged"].map(|name| own.join(name));
        for path in [&upper, &work, &merged] {
            fs::create_dir(path).unwrap();
        }
        let lower = world.path(mounted).join("1");
        let options = format!(
            "lowerdir={},upperdir={},workdir={},index=off,xino=on",
            lower.display(),
            upper.display(),
            work.display()
        );
        mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(options.as_str())).unwrap();
        Overlay(merged)
    }

    fn root(&self) -> &Path {
        &self.0
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

/// How many requests of each kind `work` costs.
fn cost(world: &mut World, work: impl FnOnce(&World)) -> HashMap<String, u64> {
    let before = world.stats();
    work(world);
    world.stats().into_iter().map(|(name, count)| (name.clone(), count - before[&name])).collect()
}

#[test]
fn the_bare_mount_shows_the_same_files_without_extended_attributes() {
    let mut world = World::new(&[("all", every_kind())]);
    world.say("add 1 all");
    let (full, bare) = (world.path("mnt/1"), world.path("bare/1"));
    assert_same(&inodes(&bare), &inodes(&full));
    let capability = |root: &Path| xattr::get(root.join("bin/ping"), "security.capability");
    assert!(capability(&full).unwrap().is_some());
    assert_eq!(capability(&bare).unwrap_err().raw_os_error(), Some(Errno::EOPNOTSUPP as i32));
    assert_eq!(xattr::list(bare.join("bin/ping")).unwrap().count(), 0, "listing them is no error");
}

#[test]
fn the_bare_mount_is_asked_once_for_an_extended_attribute_and_never_again() {
    let mut world = World::new(&[("forty", forty_files())]);
    world.say("add 1 forty:far");
    let pass = |world: &World, mounted: &str| {
        let overlay = Overlay::over(world, mounted);
        run(&["tar", "-C", overlay.root().to_str().unwrap(), "-cf", "/dev/null", "."]);
    };
    assert_eq!(cost(&mut world, |world| pass(world, "bare"))["getxattr"], 1);
    assert_eq!(cost(&mut world, |world| pass(world, "bare"))["getxattr"], 0);
    pass(&world, "mnt");
    assert!(
        cost(&mut world, |world| pass(world, "mnt"))["getxattr"] >= 40,
        "where there may be some it asks"
    );
}

#[test]
fn a_second_overlay_over_the_bare_mount_makes_no_request() {
    let mut world = World::new(&[("all", every_kind())]);
    world.say("add 1 all:far");
    let pass = |world: &World| {
        let overlay = Overlay::over(world, "bare");
        let root = overlay.root().to_str().unwrap();
        run(&[
            "sh",
            "-c",
            &format!("cd {root} && tar -c . | wc -c && find . -type f -exec cat {{}} + | wc -c"),
        ]);
    };
    pass(&world);
    // As above: pages that the kernel took away are read again.
    let later: Vec<_> = (0..3)
        .map(|_| {
            let cost = cost(&mut world, pass);
            let asked = FREE.iter().chain(&["getxattr", "listxattr"]).filter(|name| cost[**name] > 0);
            asked.map(|name| format!("{name}: {}", cost[*name])).collect::<Vec<_>>()
        })
        .collect();
    assert!(later.iter().any(Vec::is_empty), "asked again: {later:?}");
}

#[test]
fn an_access_control_list_of_the_image_is_heeded() {
    // As `setfacl -m u:1234:r` writes it to a file that only root may read.
    let list: &[u8] = b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x04\0\xd2\x04\0\0\
        \x04\0\0\0\xff\xff\xff\xff\x10\0\x04\0\xff\xff\xff\xff\x20\0\0\0\xff\xff\xff\xff";
    let mut archive = Archive::default();
    archive.pax(&[("SCHILY.xattr.system.posix_acl_access", list)]);
    let layer = archive.file("shared", Meta { mode: 0o640, ..PLAIN }, b"content").finish();
    let mut world = World::new(&[("acl", layer)]);
    world.say("add 1 acl");
    let overlay = Overlay::over(&world, "mnt");
    for folder in [&world.path(""), overlay.root().parent().unwrap(), overlay.root()] {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let file = overlay.root().join("shared");
    let reads = |user: &str| {
        let drop_rights = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", "cat"];
        output(&[&drop_rights[..], &[file.to_str().unwrap()]].concat()).status.success()
    };
    assert_eq!([reads("1234"), reads("1235")], [true, false]);
}

#[test]
fn inode_numbers_are_the_same_after_a_restart() {
    let mut world = World::new(&[("all", every_kind()), ("file", one_file(b"content"))]);
    world.say("add 1 all");
    world.say("add 2 all file");
    let look = |world: &World| [inodes(&world.mounted("1")), inodes(&world.mounted("2"))];
    let before = look(&world);
    world.crash();
    world.start();
    world.say("add 2 all file");
    world.say("add 1 all");
    assert_same(&look(&world)[0], &before[0]);
    assert_same(&look(&world)[1], &before[1]);
}

#[test]
fn images_that_share_a_layer_share_its_files() {
    let mut world = World::new(&[("all", every_kind()), ("file", one_file(b"content"))]);
    world.say("add 1 all:far");
    world.say("add 2 all:far file");
    let ino = |name: &str| fs::symlink_metadata(world.mounted(name)).unwrap().ino();
    assert_eq!(ino("1/lib/large"), ino("2/lib/large"));
    assert_ne!(ino("1/lib"), ino("2/lib"));
    assert_eq!(ino("1/bin/su"), ino("1/bin/su-again"));
    let content = fs::read(world.mounted("1/lib/large")).unwrap();
    let before = world.stats();
    assert_eq!(fs::read(world.mounted("2/lib/large")).unwrap(), content);
    assert_eq!(world.stats()["read"], before["read"], "the page cache is shared");
}

#[test]
fn two_directories_of_the_same_layers_stay_apart() {
    let mut world = World::new(&[("all", every_kind())]);
    world.say("add 1 all");
    world.say("add 2 all");
    let first = fs::File::open(world.mounted("1/etc")).unwrap();
    assert_eq!(inodes(&world.mounted("1")).len(), inodes(&world.mounted("2")).len());
    let through =
        fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&first))).unwrap();
    assert_eq!(through, world.mounted("1/etc"), "a look-up in one moved the other's directory");
}

#[test]
fn whiteouts_hide_and_never_show() {
    let mut upper = Archive::default();
    upper.directory("etc", OPEN).file("etc/.wh.hosts", PLAIN, b"");
    upper.directory("many", OPEN).file("many/.wh..wh..opq", PLAIN, b"").file("many/new", PLAIN, b"new");
    let mut world = World::new(&[("all", every_kind()), ("upper", upper.finish())]);
    world.say("add 1 all upper");
    let names = |dir: &str| {
        let mut names: Vec<_> =
            fs::read_dir(world.mounted(dir)).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names("1/etc"), ["empty", "up"]);
    assert_eq!(names("1/many"), ["new"]);
    assert_eq!(fs::read(world.mounted("1/etc/hosts")).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_removed_directory_is_gone_and_others_stay() {
    let mut world = World::new(&[("all", every_kind()), ("file", one_file(b"content"))]);
    world.say("add 1 all");
    world.say("add 2 file");
    let held = fs::File::open(world.mounted("1/etc")).unwrap();
    fs::symlink_metadata(world.path("bare/1")).unwrap();
    assert_eq!(fs::read_dir(world.path("mnt")).unwrap().count(), 2);
    world.say("remove 1");
    let deadline = Instant::now() + DEATH_BOUND;
    let seen =
        |world: &World| ["mnt/1", "bare/1"].map(|place| fs::symlink_metadata(world.path(place)).is_ok());
    while seen(&world) != [false; 2] {
        assert!(Instant::now() < deadline, "it is still there: {:?}", seen(&world));
    }
    assert_eq!(fs::read_dir(world.path("mnt")).unwrap().count(), 1);
    let below = format!("/proc/self/fd/{}/never-seen", std::os::fd::AsRawFd::as_raw_fd(&held));
    assert_eq!(fs::read(below).unwrap_err().raw_os_error(), Some(Errno::ESTALE as i32));
    assert_eq!(fs::read(world.mounted("2/file")).unwrap(), b"content");
}

#[test]
fn nothing_can_be_changed() {
    let mut world = World::new(&[("all", every_kind())]);
    world.say("add 1 all");
    let refused = |result: std::io::Result<()>| result.unwrap_err().raw_os_error();
    let read_only = Some(Errno::EROFS as i32);
    assert_eq!(refused(fs::write(world.mounted("1/new"), "x")), read_only);
    assert_eq!(refused(fs::remove_file(world.mounted("1/etc/hosts"))), read_only);
    assert_eq!(refused(fs::create_dir(world.mounted("5"))), read_only);
    assert_eq!(refused(xattr::set(world.mounted("1/bin/su"), "user.x", b"y")), read_only);
}

#[test]
fn reading_in_order_is_read_ahead_and_at_random_is_not() {
    let large = Archive::default().file("large", PLAIN, &noise(1, 64 * 256 * 1024)).finish();
    let mut world = World::new(&[("large", large)]);
    world.say("add 1 large:far");
    let file = fs::File::open(world.mounted("1/large")).unwrap();
    let mut block = [0; 4096];
    for piece in [40, 11, 55, 23, 7] {
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut block, piece * 256 * 1024).unwrap();
    }
    assert_eq!(world.moved("large:far").1, 0);
    fs::read(world.mounted("1/large")).unwrap();
    assert!(world.moved("large:far").1 >= 50);
    let failed = output(&["cat", world.mounted("1/none").to_str().unwrap()]);
    assert!(!failed.status.success());
}
