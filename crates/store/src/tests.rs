//! What the store promises about crashes and damage: what it returns is right, or absent.

use super::*;

fn hash(data: &[u8]) -> PieceHash {
    PieceHash::from_bytes(*blake3::hash(data).as_bytes())
}

fn open(dir: &Path) -> Store {
    Store::open(dir, Options { pack_bytes_max: 20_000 }).unwrap()
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

#[test]
fn second_process_is_kept_out() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    assert!(matches!(Store::open(dir.path(), Options::default()), Err(StoreError::Locked { .. })));
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
    let error = StoreError::io(Path::new("/data/packs/000001.pack"), std::io::ErrorKind::StorageFull.into());
    assert_eq!(error.to_string(), "no space is left in /data/packs");
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
