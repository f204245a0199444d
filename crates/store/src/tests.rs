//! What the store promises about crashes and damage: what it returns is right, or absent.

use super::*;

fn hash(data: &[u8]) -> PieceHash {
    PieceHash::from_bytes(*blake3::hash(data).as_bytes())
}

fn open(dir: &Path) -> Store {
    Store::open(dir, Options { pack_bytes_max: 20_000, ..Options::default() }).unwrap()
}

fn content(number: u32, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut out);
    // Half of it compresses.
    out[len / 2..].fill(7);
    out
}

fn fill(store: &Store, count: u32, len: usize) -> Vec<Vec<u8>> {
    let all: Vec<_> = (0..count).map(|number| content(number, len)).collect();
    for plain in &all {
        store.put_plain(&hash(plain), plain).unwrap();
    }
    all
}

/// Every piece is what it was or absent; returns how many are there.
fn survivors(store: &Store, all: &[Vec<u8>]) -> usize {
    all.iter()
        .filter(|plain| match store.read(&hash(plain)).unwrap() {
            Some(found) => {
                assert!(found == **plain, "a wrong byte was read");
                true
            }
            None => false,
        })
        .count()
}

fn pack_files(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> =
        fs::read_dir(dir.join("packs")).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.sort();
    all
}

#[test]
fn pieces_survive_a_restart_over_several_packs() {
    let dir = tempfile::tempdir().unwrap();
    let all = fill(&open(dir.path()), 40, 3000);
    assert!(pack_files(dir.path()).len() > 1);
    let store = open(dir.path());
    assert_eq!(survivors(&store, &all), 40);
    assert_eq!(store.stats().pieces, 40);
}

#[test]
fn same_piece_takes_space_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    fill(&store, 3, 1000);
    let before = store.stats();
    fill(&store, 3, 1000);
    assert_eq!(store.stats(), before);
}

/// Text that a higher level makes smaller: lines that are alike, in no order.
fn words(count: u64) -> Vec<u8> {
    let line = |n: u64| {
        let mixed = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        format!("key_{:x} = value_{:x};\n", mixed >> 58, mixed >> 54)
    };
    (0..count).flat_map(|n| line(n * n).into_bytes()).collect()
}

#[test]
fn piece_packed_anew_is_smaller_and_the_same_also_when_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let plain = words(10_000);
    let quick = StoredPiece::encode(&plain, 1);
    store.put_stored(&hash(&plain), &quick).unwrap();
    assert!(store.pack_anew(&hash(&plain), 15).unwrap());
    assert!(!store.pack_anew(&hash(&plain), 15).unwrap(), "it does not grow smaller again");
    assert!(!store.pack_anew(&hash(b"nothing"), 15).unwrap());
    let check = |store: &Store| {
        let stored = store.read_stored(&hash(&plain)).unwrap().unwrap();
        assert!(stored.bytes.len() < quick.bytes.len());
        assert_eq!(store.read(&hash(&plain)).unwrap().unwrap(), plain);
        assert_eq!((store.stats().pieces, store.stats().damaged), (1, 0));
    };
    check(&store);
    drop(store);
    check(&open(dir.path()));
}

#[test]
fn who_reads_while_pieces_are_packed_anew_misses_none() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let all: Vec<_> = (0..30).map(|n| words(2000 + n)).collect();
    for plain in &all {
        store.put_stored(&hash(plain), &StoredPiece::encode(plain, 1)).unwrap();
    }
    std::thread::scope(|scope| {
        let packing =
            scope.spawn(|| all.iter().filter(|plain| store.pack_anew(&hash(plain), 9).unwrap()).count());
        while !packing.is_finished() {
            for plain in &all {
                assert_eq!(store.read(&hash(plain)).unwrap().unwrap(), *plain);
                assert!(store.read_stored(&hash(plain)).unwrap().is_some());
            }
        }
        assert!(packing.join().unwrap() > 0);
    });
    assert_eq!(store.stats().damaged, 0);
}

#[test]
fn second_process_is_kept_out() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let error = Store::open(dir.path(), Options::default()).map(|_| ()).unwrap_err();
    assert!(matches!(error, StoreError::Locked { .. }), "{error}");
    let holder = format!(" (process {}): stop it first", std::process::id());
    assert!(error.to_string().ends_with(&holder), "{error}");
    drop(store);
    open(dir.path());
}

#[test]
fn write_cut_off_at_any_byte_loses_only_that_piece() {
    let dir = tempfile::tempdir().unwrap();
    let all = fill(&open(dir.path()), 4, 300);
    let pack = pack_files(dir.path()).remove(0);
    let whole = fs::read(&pack).unwrap();
    let last = StoredPiece::encode(&all[3], piece::DEFAULT_LEVEL).bytes.len() + pack::HEADER_LEN;
    for cut in whole.len() - last..whole.len() {
        fs::write(&pack, &whole[..cut]).unwrap();
        let store = open(dir.path());
        assert_eq!(survivors(&store, &all), 3, "cut at {cut}");
        store.put_plain(&hash(&all[3]), &all[3]).unwrap();
        drop(store);
        assert_eq!(survivors(&open(dir.path()), &all), 4, "cut at {cut}");
    }
}

#[test]
fn flipped_bit_costs_one_piece_and_never_a_wrong_byte() {
    let dir = tempfile::tempdir().unwrap();
    let all = fill(&open(dir.path()), 5, 200);
    let pack = pack_files(dir.path()).remove(0);
    let whole = fs::read(&pack).unwrap();
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << (at % 8);
        fs::write(&pack, &damaged).unwrap();
        assert!(survivors(&open(dir.path()), &all) >= 4, "flipped byte {at}");
        assert!(survivors(&open(dir.path()), &all) >= 4, "flipped byte {at}, opened again");
    }
}

#[test]
fn piece_damaged_under_an_open_store_is_dropped_once_and_can_be_put_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let all = fill(&store, 3, 400);
    let pack = pack_files(dir.path()).remove(0);
    let mut bytes = fs::read(&pack).unwrap();
    bytes[pack::HEADER_LEN + 5] ^= 0x10;
    fs::write(&pack, &bytes).unwrap();
    assert_eq!(store.read_stored(&hash(&all[0])).unwrap(), None);
    assert!(!store.has(&hash(&all[0])));
    assert_eq!(store.stats().damaged, 1);
    store.put_plain(&hash(&all[0]), &all[0]).unwrap();
    drop(store);
    let store = open(dir.path());
    assert_eq!(survivors(&store, &all), 3);
    assert_eq!(store.stats().damaged, 0);
}

#[test]
fn piece_is_served_after_its_first_check_by_its_sum_and_not_when_it_was_spoiled_since() {
    let dir = tempfile::tempdir().unwrap();
    let all = fill(&open(dir.path()), 2, 400);
    let store = open(dir.path());
    let served = |store: &Store| store.read_stored(&hash(&all[0])).unwrap();
    let first = served(&store).unwrap();
    assert_eq!(first.decode(&hash(&all[0])).unwrap(), all[0]);
    assert_eq!(served(&store), Some(first));
    let pack = pack_files(dir.path()).remove(0);
    let mut bytes = fs::read(&pack).unwrap();
    bytes[pack::HEADER_LEN] ^= 1;
    fs::write(&pack, &bytes).unwrap();
    assert_eq!(served(&store), None);
    assert_eq!(store.stats().damaged, 1);
}

#[test]
fn piece_put_unchecked_is_checked_when_it_is_read_and_its_giver_is_told_from_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let all: Vec<_> = (0..4).map(|number| content(number, 400)).collect();
    let put = |named: usize, given: usize| {
        store.put_unchecked(&hash(&all[named]), &StoredPiece::encode(&all[given], 3)).unwrap();
        assert!(store.has(&hash(&all[named])));
    };
    put(0, 0);
    assert_eq!(store.read(&hash(&all[0])).unwrap().unwrap(), all[0]);
    for read_stored in [true, false] {
        put(1, 2);
        match read_stored {
            true => assert_eq!(store.read_stored(&hash(&all[1])).unwrap(), None),
            false => assert_eq!(store.read(&hash(&all[1])).unwrap(), None),
        }
        assert!(!store.has(&hash(&all[1])));
        assert!(store.was_wrong(&hash(&all[1])) && !store.was_wrong(&hash(&all[1])));
    }
    put(3, 3);
    let pack = pack_files(dir.path()).remove(0);
    let mut bytes = fs::read(&pack).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&pack, &bytes).unwrap();
    assert_eq!(store.read(&hash(&all[3])).unwrap(), None);
    assert!(!store.was_wrong(&hash(&all[3])), "the disk has spoilt it");
}

#[test]
fn pack_of_rubbish_is_no_reason_to_fail() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    fs::write(dir.path().join("packs/000003.pack"), content(1, 5000)).unwrap();
    let store = open(dir.path());
    let all = fill(&store, 30, 2000);
    drop(store);
    assert_eq!(survivors(&open(dir.path()), &all), 30);
}

#[test]
fn over_long_piece_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let plain = vec![0; MAX_PIECE_LEN + 1];
    assert!(matches!(open(dir.path()).put_plain(&hash(&plain), &plain), Err(StoreError::TooLong { .. })));
}

#[test]
fn full_disk_names_the_directory() {
    let error = StoreError::write(
        Path::new("/data/packs/000001.pack"),
        std::io::ErrorKind::StorageFull.into(),
        2_000,
    );
    assert_eq!(error.to_string(), "no space is left in /data/packs: 2.0 kB needed, 2.0 kB missing");
    assert!(error.is_full());
}

fn some_map() -> StoredMap {
    StoredMap {
        task: LayerTask::current(darter_types::DiffId(darter_types::Digest::of(b"layer"))),
        root: RootHash::from_bytes([3; 32]),
        core: content(1, 500).into(),
        tar: Some(content(2, 300).into()),
        proof: b"proof".to_vec(),
        access: b"access".to_vec(),
    }
}

#[test]
fn map_and_its_parts_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let map = some_map();
    open(dir.path()).put_map(&map).unwrap();
    let store = open(dir.path());
    assert_eq!(store.maps(), [map.task]);
    assert_eq!(store.map(map.task).unwrap(), Some(StoredMap { tar: None, ..map.clone() }));
    assert_eq!(store.tar(map.task).unwrap(), map.tar);
    store.set_access(map.task, b"others").unwrap();
    assert_eq!(store.map(map.task).unwrap().unwrap().access, b"others");
    store.remove_map(map.task).unwrap();
    assert_eq!((store.map(map.task).unwrap(), store.maps().len()), (None, 0));
}

#[test]
fn map_with_any_flipped_or_missing_byte_is_absent() {
    let dir = tempfile::tempdir().unwrap();
    let map = some_map();
    let store = open(dir.path());
    store.put_map(&map).unwrap();
    let path = fs::read_dir(dir.path().join("maps")).unwrap().map(|entry| entry.unwrap().path());
    let path = path.into_iter().find(|path| path.extension().unwrap() == "map").unwrap();
    let whole = fs::read(&path).unwrap();
    for at in 0..whole.len() {
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << (at % 8);
        for damaged in [&flipped[..], &whole[..at]] {
            fs::write(&path, damaged).unwrap();
            assert_eq!(store.map(map.task).unwrap(), None, "byte {at}");
            assert!(!path.exists());
        }
    }
    assert_eq!(store.stats().damaged, 2 * whole.len() as u64);
}

#[test]
fn damaged_word_on_access_leaves_the_map_and_opens_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let map = some_map();
    let store = open(dir.path());
    store.put_map(&map).unwrap();
    let path = dir.path().join("maps").join(format!("{}-v1.access", map.task.diff_id.0.hex()));
    fs::write(path, b"rubbish").unwrap();
    assert_eq!(store.map(map.task).unwrap().unwrap().access, b"");
}

#[test]
fn quarantined_map_is_gone_and_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let map = some_map();
    let store = open(dir.path());
    store.put_map(&map).unwrap();
    store.quarantine(map.task, map.root, "its tar has another digest").unwrap();
    assert_eq!(store.map(map.task).unwrap(), None);
    drop(store);
    let store = open(dir.path());
    assert_eq!(store.quarantined(map.task, map.root).unwrap(), "its tar has another digest");
    assert_eq!(store.quarantined(map.task, RootHash::from_bytes([4; 32])), None);
}

/// Bytes of the packs that are really on the disk.
fn on_disk(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    pack_files(dir).iter().map(|path| fs::metadata(path).unwrap().blocks() * 512).sum()
}

fn sweep_all_but(store: &Store, kept: &[Vec<u8>]) -> Swept {
    let sweep = store.sweep();
    let hashes: Vec<_> = kept.iter().map(|plain| hash(plain)).collect();
    sweep.keep(hashes.iter());
    sweep.end()
}

#[test]
fn what_nobody_needs_is_swept_and_its_space_is_free() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Options::default()).unwrap();
    let all = fill(&store, 40, 60_000);
    let before = (on_disk(dir.path()), store.stats().bytes);
    let swept = sweep_all_but(&store, &all[10..15]);
    assert_eq!(swept.pieces, 35);
    assert_eq!((store.stats().bytes, store.stats().evicted), (before.1 - swept.bytes, swept.bytes));
    assert!(on_disk(dir.path()) < before.0 / 6, "{} of {} bytes are left", on_disk(dir.path()), before.0);
    assert_eq!(survivors(&store, &all), 5);
    drop(store);
    let store = Store::open(dir.path(), Options::default()).unwrap();
    assert_eq!(survivors(&store, &all), 5);
    fill(&store, 40, 60_000);
    assert_eq!(survivors(&store, &all), 40);
    assert_eq!(store.stats().damaged, 0);
}

#[test]
fn a_pack_without_pieces_goes() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let all = fill(&store, 40, 3000);
    let packs = pack_files(dir.path()).len();
    assert!(packs > 3);
    sweep_all_but(&store, &all[..1]);
    assert_eq!(pack_files(dir.path()).len(), 2, "the first, and the one that is appended to");
    assert_eq!(survivors(&store, &all), 1);
    drop(store);
    let store = open(dir.path());
    fill(&store, 40, 3000);
    assert_eq!(survivors(&store, &all), 40);
}

/// A kill between the three steps: whatever of headers and holes is on the disk, what is read is right.
#[test]
fn a_sweep_cut_off_anywhere_shows_no_wrong_byte() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Options::default()).unwrap();
    let all = fill(&store, 6, 20_000);
    let pack = pack_files(dir.path()).remove(0);
    let before = fs::read(&pack).unwrap();
    sweep_all_but(&store, &all[5..]);
    drop(store);
    let after = fs::read(&pack).unwrap();
    for step in 0..=20 {
        let cut = after.len() * step / 20;
        for (head, tail) in [(&before, &after), (&after, &before)] {
            fs::write(&pack, [&head[..cut], &tail[cut..]].concat()).unwrap();
            let store = Store::open(dir.path(), Options::default()).unwrap();
            assert!(survivors(&store, &all) >= 1, "cut at {cut}");
        }
    }
}

#[test]
fn pieces_of_a_layer_that_is_being_made_survive_a_sweep() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let all = fill(&store, 6, 1000);
    let fresh = store.fresh();
    assert!(store.claim(&hash(&all[2])) && !store.claim(&hash(b"nothing")));
    let more = content(77, 1000);
    store.put_plain(&hash(&more), &more).unwrap();
    let sweep = store.sweep();
    // It came with the map that is there by now; the sweep has not seen it.
    drop(fresh);
    assert_eq!(sweep.end().pieces, 5);
    assert!(store.has(&hash(&more)) && store.has(&hash(&all[2])));
    assert_eq!(store.sweep().end().pieces, 2);
}

#[test]
fn a_piece_that_comes_during_a_sweep_stays() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    fill(&store, 3, 1000);
    let sweep = store.sweep();
    let more = content(77, 1000);
    store.put_plain(&hash(&more), &more).unwrap();
    assert_eq!(sweep.end().pieces, 3);
    assert_eq!(survivors(&store, &[more]), 1);
}

#[test]
fn a_dropped_sweep_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let all = fill(&store, 3, 1000);
    drop(store.sweep());
    assert_eq!(survivors(&store, &all), 3);
}

#[test]
fn the_quota_refuses_with_words_until_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { quota: Some(2_500), ..Limits::default() };
    let store = Store::open(dir.path(), Options { limits, ..Options::default() }).unwrap();
    let all: Vec<_> = (0..4).map(|number| content(number, 2_000)).collect();
    let put = |plain: &Vec<u8>| store.put_plain(&hash(plain), plain).map(drop);
    put(&all[0]).unwrap();
    put(&all[1]).unwrap();
    let words = put(&all[2]).unwrap_err().to_string();
    assert!(words.contains("no space is left in") && words.contains("missing"), "{words}");
    put(&all[1]).expect("what is there takes no room");
    sweep_all_but(&store, &[]);
    put(&all[2]).unwrap();
    assert_eq!(survivors(&store, &all), 1);
}

#[test]
fn when_a_layer_was_used_is_known_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let map = some_map();
    let store = open(dir.path());
    assert_eq!(store.last_used(map.task), None);
    store.put_map(&map).unwrap();
    let then = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000);
    store.set_last_used(map.task, then);
    drop(store);
    let store = open(dir.path());
    assert_eq!(store.last_used(map.task), Some(then));
    assert!(store.map(map.task).unwrap().is_some());
}
