//! Why images were decided as they were, for `darter why`: one row for each image of each of containerd's namespaces.
//!
//! Earlier builds had one row for an image, under the digest of its manifest alone. Such a row counts for the namespace that
//! it names until there is another one for that, which takes its place. An earlier build reads both kinds.

use std::collections::HashSet;

use darter_types::DiffId;
use rusqlite::params;

use super::{Decision, Result, Tx, seal};

/// So many decisions are remembered; the oldest go.
const DECISIONS_MAX: u32 = 1000;

impl Decision {
    fn key(&self) -> String {
        format!("{} {}", self.namespace, self.image)
    }
}

impl Tx<'_> {
    /// What was decided for images, the newest first; of an image in a namespace the last decision.
    pub fn decisions(&self) -> Result<Vec<Decision>> {
        let mut all: Vec<Decision> =
            self.rows("SELECT image, body, sum FROM decisions ORDER BY decided DESC", [])?;
        let mut seen = HashSet::new();
        all.retain(|decision| seen.insert(decision.key()));
        Ok(all)
    }

    pub fn save_decision(&self, decision: &Decision) -> Result<()> {
        self.forget_unscoped(decision)?;
        let key = decision.key();
        let (body, sum) = seal(&key, decision);
        self.0.execute(
            "INSERT OR REPLACE INTO decisions (image, decided, body, sum) VALUES (?1, ?2, ?3, ?4)",
            params![key, decision.decided_ns, body, sum],
        )?;
        self.0.execute(
            "DELETE FROM decisions WHERE image NOT IN (SELECT image FROM decisions ORDER BY decided DESC LIMIT ?1)",
            [DECISIONS_MAX],
        )?;
        Ok(())
    }

    /// Takes away what an earlier build wrote down for the same image in the same namespace.
    fn forget_unscoped(&self, decision: &Decision) -> Result<()> {
        let sql = "SELECT image, body, sum FROM decisions WHERE image = ?1";
        let unscoped: Option<Decision> = self.row(sql, [&decision.image])?;
        if unscoped.is_some_and(|unscoped| unscoped.namespace == decision.namespace) {
            self.0.execute("DELETE FROM decisions WHERE image = ?1", [&decision.image])?;
        }
        Ok(())
    }

    /// The layer turned out not to be lazy after all, in whichever image of the namespace has it: others have it from elsewhere.
    pub fn amend_decisions(&self, namespace: &str, diff_id: DiffId, reason: &str) -> Result<()> {
        let decisions = self.decisions()?;
        for mut decision in decisions.into_iter().filter(|decision| decision.namespace == namespace) {
            let layers = decision.layers.iter_mut().filter(|layer| layer.diff_id == diff_id && layer.lazy);
            let changed = layers.map(|layer| (layer.lazy, layer.reason) = (false, reason.to_owned())).count();
            if changed > 0 {
                self.save_decision(&decision)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{DecidedLayer, Records};
    use darter_types::{BlobDigest, Digest};

    fn diff_id() -> DiffId {
        DiffId(Digest::of(b"layer"))
    }

    fn decision(namespace: &str, decided_ns: i64) -> Decision {
        let layer = DecidedLayer {
            diff_id: diff_id(),
            blob: BlobDigest(Digest::of(b"blob")),
            size: 1,
            lazy: true,
            reason: "the mesh has it".into(),
        };
        Decision {
            image: Digest::of(b"manifest").to_string(),
            config: Digest::of(b"config").to_string(),
            namespace: namespace.into(),
            names: vec!["r.example/app".into()],
            decided_ns,
            layers: vec![layer],
        }
    }

    fn save(records: &Records, decision: &Decision) {
        records.write(|tx| tx.save_decision(decision)).unwrap();
    }

    /// As builds did before decisions had a namespace in their key.
    fn save_unscoped(records: &Records, decision: &Decision) {
        let (body, sum) = seal(&decision.image, decision);
        let sql = "INSERT OR REPLACE INTO decisions (image, decided, body, sum) VALUES (?1, ?2, ?3, ?4)";
        records.db.lock().execute(sql, params![decision.image, decision.decided_ns, body, sum]).unwrap();
    }

    fn known(records: &Records) -> Vec<Decision> {
        records.read(|tx| tx.decisions()).unwrap()
    }

    #[test]
    fn an_image_in_two_namespaces_has_two_decisions() {
        let dir = tempfile::tempdir().unwrap();
        let (default, k8s) = (decision("default", 1), decision("k8s.io", 2));
        {
            let (records, _) = Records::open(dir.path()).unwrap();
            save(&records, &default);
            save(&records, &k8s);
            assert_eq!(known(&records), [k8s.clone(), default.clone()]);
        }
        let (records, is_new) = Records::open(dir.path()).unwrap();
        assert!(!is_new);
        assert_eq!(known(&records), [k8s, default]);
    }

    #[test]
    fn a_later_decision_takes_the_place_of_the_one_in_its_namespace() {
        let dir = tempfile::tempdir().unwrap();
        let (records, _) = Records::open(dir.path()).unwrap();
        [decision("default", 1), decision("k8s.io", 2), decision("default", 3)]
            .iter()
            .for_each(|one| save(&records, one));
        assert_eq!(known(&records), [decision("default", 3), decision("k8s.io", 2)]);
    }

    #[test]
    fn a_layer_that_is_demoted_in_one_namespace_stays_lazy_in_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let (records, _) = Records::open(dir.path()).unwrap();
        save(&records, &decision("default", 1));
        save(&records, &decision("k8s.io", 2));
        records.write(|tx| tx.amend_decisions("default", diff_id(), "demoted")).unwrap();
        let found: Vec<_> =
            known(&records).into_iter().map(|one| (one.namespace, one.layers[0].lazy)).collect();
        assert_eq!(found, [("k8s.io".to_owned(), true), ("default".to_owned(), false)]);
    }

    #[test]
    fn decisions_of_an_earlier_build_are_read_amended_and_replaced() {
        let dir = tempfile::tempdir().unwrap();
        save_unscoped(&Records::open(dir.path()).unwrap().0, &decision("default", 1));
        let (records, is_new) = Records::open(dir.path()).unwrap();
        assert!(!is_new, "the state of an earlier build was taken for damaged");
        assert_eq!(known(&records), [decision("default", 1)]);
        save(&records, &decision("k8s.io", 2));
        assert_eq!(known(&records), [decision("k8s.io", 2), decision("default", 1)]);
        records.write(|tx| tx.amend_decisions("default", diff_id(), "demoted")).unwrap();
        assert_eq!(known(&records).len(), 2, "the row of the earlier build is still there");
        assert_eq!(known(&records)[1].layers[0].reason, "demoted");
        save(&records, &decision("default", 3));
        assert_eq!(known(&records), [decision("default", 3), decision("k8s.io", 2)]);
    }

    /// Somebody goes back to an earlier build and on again: what that one decided last counts.
    #[test]
    fn of_two_rows_for_one_namespace_the_newer_counts() {
        let dir = tempfile::tempdir().unwrap();
        let (records, _) = Records::open(dir.path()).unwrap();
        save(&records, &decision("default", 1));
        save_unscoped(&records, &decision("default", 2));
        assert_eq!(known(&records), [decision("default", 2)]);
        records.write(|tx| tx.amend_decisions("default", diff_id(), "demoted")).unwrap();
        let found = known(&records).remove(0);
        assert_eq!((found.decided_ns, found.layers[0].lazy), (2, false));
    }
}
