//! Decisions that are still open, for people who ask meanwhile: what is known of each layer by now, and who is asked for it.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::{Decider, Image, Key, Plan, Stage, Verdict, above_plain};

/// A decision that is being made.
pub(in crate::lazy) struct Undecided {
    pub image: Arc<Image>,
    /// How long ago containerd has asked.
    asked_for: Duration,
    /// containerd waits no longer: what is undecided counts as lazy.
    is_late: bool,
}

/// What can be said of a layer by now.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::lazy) struct Standing {
    /// `None` while that is open.
    pub lazy: Option<bool>,
    pub reason: String,
}

impl Plan {
    /// Whether somebody still works on it.
    fn is_alive(&self) -> bool {
        self.stage.has_changed().is_ok()
    }

    fn is_about(&self, image: &Image) -> bool {
        match &*self.stage.borrow() {
            Stage::Found(other) | Stage::Decided(other, _) => {
                other.namespace == image.namespace && other.found.manifest == image.found.manifest
            }
            Stage::Looking | Stage::Nothing(_) => false,
        }
    }
}

impl Decider {
    /// Notes that somebody works on the plan. An earlier one for the same layer is told no longer.
    pub(super) fn runs(&self, key: Key, plan: &Plan) {
        let mut running = self.running.lock();
        running.retain(|_, other| other.is_alive());
        running.insert(key, plan.clone());
    }

    /// The plan is about this image: what an earlier one still finds out about it is told no longer.
    pub(super) fn replace_earlier(&self, image: &Image, plan: &Plan) {
        let is_earlier = |other: &Plan| other.started < plan.started && other.is_about(image);
        self.running.lock().retain(|_, other| !is_earlier(other));
    }

    /// For how many layers containerd's content store is being asked which image they belong to.
    pub fn looking(&self) -> usize {
        let running = self.running.lock();
        running
            .values()
            .filter(|plan| plan.is_alive() && matches!(*plan.stage.borrow(), Stage::Looking))
            .count()
    }

    /// The decisions that are being made, one for each image of a namespace, the latest first.
    pub fn undecided(&self) -> Vec<Undecided> {
        let running = self.running.lock();
        let mut open: Vec<_> = running.values().filter_map(|plan| self.open(plan)).collect();
        open.sort_by_key(|one| one.asked_for);
        let mut seen = HashSet::new();
        open.retain(|one| seen.insert((one.image.namespace.clone(), one.image.found.manifest)));
        open
    }

    fn open(&self, plan: &Plan) -> Option<Undecided> {
        let stage = plan.stage.borrow().clone();
        // What is decided is open until it is written down, which the task does last.
        let (Stage::Found(image) | Stage::Decided(image, _)) = stage else { return None };
        let asked_for = plan.started.elapsed();
        plan.is_alive().then(|| Undecided { image, asked_for, is_late: asked_for >= self.wait })
    }
}

impl Undecided {
    /// One for each layer, the lowest first.
    pub fn standings(&self) -> Vec<Standing> {
        let known = self.image.verdicts();
        let lowest_open = known.iter().position(Option::is_none).unwrap_or(known.len());
        let told = above_plain(known.clone()).into_iter().zip(known).enumerate();
        told.map(|(position, (verdict, itself))| self.standing(position, verdict, itself, lowest_open))
            .collect()
    }

    fn standing(
        &self,
        position: usize,
        verdict: Verdict,
        itself: Option<Verdict>,
        lowest_open: usize,
    ) -> Standing {
        if !verdict.lazy || position < lowest_open {
            return Standing { lazy: Some(verdict.lazy), reason: verdict.reason };
        }
        let reason = match itself {
            None => self.asked(position),
            Some(itself) => format!("{}; what lies below it is still being decided", itself.reason),
        };
        Standing { lazy: None, reason }
    }

    /// Who is asked for the layer, and what follows from their silence.
    fn asked(&self, position: usize) -> String {
        let sources = self.image.layers[position].layer_sources();
        let registries: BTreeSet<_> =
            sources.iter().map(|source| source.repository.registry.to_string()).collect();
        let registries = Vec::from_iter(registries).join(", ");
        let seconds = self.asked_for.as_secs_f64();
        match self.is_late {
            false => {
                format!("still being decided: the mesh and {registries} have been asked for {seconds:.1} s")
            }
            true => format!(
                "not decided in time, so it counts as lazy: the mesh and {registries} have been asked for {seconds:.1} s"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Probe;
    use super::super::tests::image;
    use super::*;

    const ORDINARY: &str = "application/vnd.oci.image.layer.v1.tar";

    fn undecided(media_types: &[&str], probes: &[Option<Probe>], is_late: bool) -> Vec<Standing> {
        let image = image(media_types);
        for (said, probe) in image.probes.iter().zip(probes) {
            probe.iter().for_each(|probe| said.set(probe.clone()).unwrap());
        }
        let asked_for = Duration::from_millis(1200);
        Undecided { image: Arc::new(image), asked_for, is_late }.standings()
    }

    fn standing(lazy: Option<bool>, reason: &str) -> Standing {
        Standing { lazy, reason: reason.to_owned() }
    }

    #[test]
    fn a_layer_that_nobody_has_answered_for_is_open_and_says_who_was_asked() {
        let probes = [Some(Probe::Known), None, Some(Probe::Answering)];
        let [lowest, open, above] = undecided(&[ORDINARY; 3], &probes, false).try_into().unwrap();
        assert_eq!(lowest, standing(Some(true), "the mesh has it"));
        let words = "still being decided: the mesh and https://registry.example have been asked for 1.2 s";
        assert_eq!(open, standing(None, words));
        assert_eq!(above, standing(None, "a registry has it; what lies below it is still being decided"));
    }

    #[test]
    fn what_is_open_when_the_time_is_up_counts_as_lazy() {
        let [only] = undecided(&[ORDINARY], &[None], true).try_into().unwrap();
        assert_eq!(only.lazy, None);
        assert!(only.reason.starts_with("not decided in time, so it counts as lazy: "), "{}", only.reason);
    }

    #[test]
    fn what_is_known_to_be_plain_is_told_at_once_with_all_above_it() {
        let probes = [None, Some(Probe::Refused("401".into())), None];
        let [open, refused, above] = undecided(&[ORDINARY; 3], &probes, false).try_into().unwrap();
        assert_eq!(open.lazy, None);
        assert_eq!(refused, standing(Some(false), "401"));
        assert_eq!(above, standing(Some(false), "layer 1 below it is plain"));
        let encrypted = format!("{ORDINARY}+gzip+encrypted");
        let by_itself = undecided(&[ORDINARY, encrypted.as_str()], &[None, None], false);
        assert_eq!(by_itself[1], standing(Some(false), "the layer is encrypted"));
    }

    #[test]
    fn an_answer_for_all_layers_leaves_nothing_open() {
        let probes = [Some(Probe::Known), Some(Probe::Answering)];
        let told = undecided(&[ORDINARY; 2], &probes, true);
        assert_eq!(
            told,
            [standing(Some(true), "the mesh has it"), standing(Some(true), "a registry has it")]
        );
    }
}
