//! What containerd's own test suite doesn't ask: lazy snapshots, restarts, damage.

use super::*;
use darter_types::{DiffId, Digest};

fn open(dir: &tempfile::TempDir) -> Snapshots {
    Snapshots::open(dir.path(), Overlay::NEITHER).unwrap()
}

fn active(key: &str, parent: &str) -> NewSnapshot {
    NewSnapshot { kind: Kind::Active, key: key.into(), parent: parent.into(), labels: Labels::new() }
}

fn layer(name: &str) -> ChainLayer {
    ChainLayer { diff_id: DiffId(Digest::of(name.as_bytes())), media_type: String::new(), sources: vec![] }
}

fn commit_lazy(snapshots: &Snapshots, name: &str, parent: &str, layers: &[ChainLayer]) -> Chain {
    let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id).collect();
    let chain_id = *ChainId::chain(&diff_ids).last().unwrap();
    let labels = Labels::new();
    let lazy = LazySnapshot { name, parent, labels: &labels, namespace: "test", chain_id, layers };
    snapshots.commit_lazy(&lazy).unwrap()
}

#[test]
fn a_lazy_snapshot_hides_all_that_is_below_it() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = open(&dir);
    snapshots.create(&active("a", "")).unwrap();
    snapshots.commit("base", "a", "", Labels::new()).unwrap();
    let chain = commit_lazy(&snapshots, "lazy", "base", &[layer("base"), layer("top")]);
    let plan = snapshots.create(&active("c", "lazy")).unwrap();
    assert_eq!(plan.chain, Some(chain.dir));
    let mounts = plan.mounts(Via::Full);
    let lower = mounts[0].options.last().unwrap();
    assert_eq!(*lower, format!("lowerdir={}", dir.path().join("s/m").join(chain.dir.to_string()).display()));
}

#[test]
fn the_same_chain_over_another_parent_shares_its_directory() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = open(&dir);
    let layers = [layer("one")];
    let first = commit_lazy(&snapshots, "x", "", &layers);
    let second = commit_lazy(&snapshots, "y", "", &layers);
    assert_eq!(first.dir, second.dir);
    assert_eq!(snapshots.remove("x").unwrap(), None);
    assert_eq!(snapshots.remove("y").unwrap(), Some(first.dir));
    assert!(commit_lazy(&snapshots, "z", "", &layers).dir > first.dir);
}

#[test]
fn all_is_as_it_was_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let before = {
        let snapshots = open(&dir);
        commit_lazy(&snapshots, "lazy", "", &[layer("one")]);
        snapshots.create(&active("c", "lazy")).unwrap();
        (snapshots.list(&[]).unwrap(), snapshots.mounts("c").unwrap())
    };
    let snapshots = open(&dir);
    assert_eq!((snapshots.list(&[]).unwrap(), snapshots.mounts("c").unwrap()), before);
    assert_eq!(snapshots.records().read(|tx| tx.chains()).unwrap()[0].layers, [layer("one")]);
}

#[test]
fn a_demoted_snapshot_is_an_ordinary_one() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = open(&dir);
    let lower = commit_lazy(&snapshots, "l0", "", &[layer("0")]);
    let upper = commit_lazy(&snapshots, "l1", "l0", &[layer("0"), layer("1")]);
    let row = snapshots.records().read(|tx| tx.snapshot("l1")).unwrap().unwrap();
    let plan = snapshots.private_directory(row.id).unwrap();
    assert_eq!(plan.chain, Some(lower.dir));
    assert_eq!(snapshots.make_plain(row.id).unwrap(), Some(upper.dir));
    let plan = snapshots.create(&active("c", "l1")).unwrap();
    assert_eq!(plan.chain, Some(lower.dir));
    assert!(plan.mounts(Via::Full)[0].options.last().unwrap().contains(&format!("/{}/fs:", row.id)));
    assert!(matches!(snapshots.usage("l1").unwrap(), UsageOf::Known(usage) if usage.inodes == 1));
}

#[test]
fn directories_without_a_record_go_at_cleanup() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = open(&dir);
    snapshots.create(&active("a", "")).unwrap();
    snapshots.create(&active("b", "")).unwrap();
    snapshots.remove("a").unwrap();
    assert!(dir.path().join("s/1").exists());
    snapshots.cleanup().unwrap();
    assert!(!dir.path().join("s/1").exists() && dir.path().join("s/2").exists());
}

#[test]
fn files_of_lost_snapshots_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    open(&dir).create(&active("a", "")).unwrap();
    fs::write(dir.path().join("s/1/fs/work"), "precious").unwrap();
    fs::write(dir.path().join("records.db"), vec![0x55; 8192]).unwrap();
    let snapshots = open(&dir);
    assert!(snapshots.list(&[]).unwrap().is_empty());
    let lost = fs::read_dir(dir.path().join("lost")).unwrap().next().unwrap().unwrap().path();
    assert_eq!(fs::read_to_string(lost.join("1/fs/work")).unwrap(), "precious");
}

#[test]
fn a_parent_that_is_not_committed_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = open(&dir);
    snapshots.create(&active("a", "")).unwrap();
    assert!(matches!(snapshots.create(&active("b", "a")), Err(SnapshotError::Invalid(_))));
    assert!(matches!(snapshots.create(&active("b", "none")), Err(SnapshotError::NotFound(_))));
    assert!(matches!(snapshots.create(&active("a", "")), Err(SnapshotError::AlreadyExists(_))));
}

#[test]
fn commit_may_give_a_parent_only_to_one_without() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = open(&dir);
    for name in ["a", "b"] {
        snapshots.create(&active("tmp", "")).unwrap();
        snapshots.commit(name, "tmp", "", Labels::new()).unwrap();
    }
    snapshots.create(&active("on-a", "a")).unwrap();
    assert!(matches!(snapshots.commit("x", "on-a", "b", Labels::new()), Err(SnapshotError::Invalid(_))));
    snapshots.commit("x", "on-a", "a", Labels::new()).unwrap();
    snapshots.create(&active("free", "")).unwrap();
    snapshots.commit("y", "free", "b", Labels::new()).unwrap();
    assert_eq!(snapshots.stat("y").unwrap().parent, "b");
}
