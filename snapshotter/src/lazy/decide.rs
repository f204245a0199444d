//! Lazy or plain? Decided for a whole image at the first Prepare of one of its layers, within a bound that counts from there.
//!
//! containerd holds a lock while it waits for the answer, so nothing here waits for a map. A layer is plain for a reason
//! only, and with it all above it: their tree would need its map. What is undecided when the time is up is lazy.

mod undecided;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use darter_daemon::tasks::Tasks;
use darter_daemon::traces::Step;
use darter_types::{ChainId, LayerSource, LayerTask};
use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;

use super::Wanted;
use super::ports::{Containerd, FoundImage, FoundLayer, LayerMesh, LayerRequest, Probe, Registries};
use super::pull::{Held, Pull};
use crate::snapshot::{ChainLayer, DecidedLayer, Decision};

pub(super) use undecided::Undecided;

/// How long a decision is taken again for the layers of the same pull; after that, or if no image was found, it is made anew.
const PLAN_LIFE: Duration = Duration::from_secs(20);

/// So many images are decided at a time or were lately; more make older ones be decided again.
const PLANS_MAX: usize = 256;

/// The label with which some clients tell the image's reference.
pub(super) const REFERENCE_LABEL: &str = "containerd.io/snapshot/cri.image-ref";

/// Lazy or not, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Verdict {
    pub lazy: bool,
    pub reason: String,
}

impl Verdict {
    fn lazy(reason: &str) -> Verdict {
        Verdict { lazy: true, reason: reason.to_owned() }
    }
    fn plain(reason: impl Into<String>) -> Verdict {
        Verdict { lazy: false, reason: reason.into() }
    }
}

/// An image, with the places of its layers as this node reaches them.
#[derive(Debug)]
pub(super) struct Image {
    pub found: FoundImage,
    pub namespace: String,
    pub reference: Option<String>,
    /// One for each layer, the lowest first.
    pub layers: Vec<ChainLayer>,
    /// That led to it.
    pub pull: Pull,
    chain_ids: Vec<ChainId>,
    /// What the mesh said to each layer that it was asked for.
    probes: Vec<OnceLock<Probe>>,
}

impl Image {
    pub fn new(found: FoundImage, wanted: &Wanted, registries: &dyn Registries, pull: Pull) -> Image {
        let reference = wanted.labels.get(REFERENCE_LABEL).cloned();
        let place = |layer: &FoundLayer| ChainLayer {
            diff_id: layer.diff_id,
            media_type: layer.media_type.clone(),
            sources: sources(layer, reference.as_deref(), registries).into_iter().map(Into::into).collect(),
        };
        let layers = share_places(found.layers.iter().map(place).collect());
        let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id).collect();
        let chain_ids = ChainId::chain(&diff_ids);
        let probes = layers.iter().map(|_| OnceLock::new()).collect();
        Image { namespace: wanted.namespace.clone(), reference, layers, pull, chain_ids, probes, found }
    }

    pub fn position(&self, target: ChainId) -> Option<usize> {
        self.chain_ids.iter().position(|chain_id| *chain_id == target)
    }

    pub fn chain_id(&self, position: usize) -> ChainId {
        self.chain_ids[position]
    }

    /// The reference if a client told it, and the repositories.
    pub fn names(&self) -> Vec<String> {
        self.reference.iter().chain(&self.found.names).cloned().collect()
    }

    pub fn requests(&self) -> Vec<LayerRequest> {
        let request = |layer: &ChainLayer| LayerRequest {
            task: LayerTask::current(layer.diff_id),
            sources: layer.layer_sources(),
        };
        self.layers.iter().map(request).collect()
    }

    /// What speaks for or against each layer by itself, as far as that is known.
    fn verdicts(&self) -> Vec<Option<Verdict>> {
        let said = self.probes.iter().map(|probe| probe.get().cloned().map(by_probe));
        self.layers.iter().zip(said).map(|(layer, said)| by_itself(layer).or(said)).collect()
    }

    /// The decision as it is written down.
    pub fn decision(&self, decided_ns: i64, verdicts: &[Verdict]) -> Decision {
        let layers = self.found.layers.iter().zip(verdicts).map(|(layer, verdict)| DecidedLayer {
            diff_id: layer.diff_id,
            blob: layer.blob,
            size: layer.size,
            lazy: verdict.lazy,
            reason: verdict.reason.clone(),
        });
        Decision {
            image: self.found.manifest.to_string(),
            config: self.found.config.to_string(),
            namespace: self.namespace.clone(),
            names: self.names(),
            decided_ns,
            layers: layers.collect(),
        }
    }
}

/// An image may have a layer twice, in two compressions: each can be had from the places of both, its own first.
fn share_places(layers: Vec<ChainLayer>) -> Vec<ChainLayer> {
    let all = layers.clone();
    let shared = layers.into_iter().map(|mut layer| {
        for twin in all.iter().filter(|other| other.diff_id == layer.diff_id) {
            let new: Vec<_> =
                twin.sources.iter().filter(|source| !layer.sources.contains(source)).cloned().collect();
            layer.sources.extend(new);
        }
        layer
    });
    shared.collect()
}

/// All places where the blobs said to hold this layer can be read, each once.
fn sources(layer: &FoundLayer, reference: Option<&str>, registries: &dyn Registries) -> Vec<LayerSource> {
    let mut seen = HashSet::new();
    let all = layer.places.iter().flat_map(|place| {
        let repositories = registries.repositories(&place.host, &place.name, reference);
        repositories.into_iter().map(|repository| LayerSource {
            repository,
            blob: place.blob,
            size: place.size,
        })
    });
    all.filter(|source| seen.insert(source.clone())).collect()
}

/// How far the decision for an image is.
#[derive(Debug, Clone)]
enum Stage {
    Looking,
    Nothing(String),
    Found(Arc<Image>),
    Decided(Arc<Image>, Arc<Vec<Verdict>>),
}

#[derive(Clone)]
struct Plan {
    started: Instant,
    stage: watch::Receiver<Stage>,
    pull: Pull,
}

/// What Prepare is to do with a layer.
#[derive(Debug)]
pub(super) struct Decided {
    /// The image and the layer's position in it; `None` if it wasn't found.
    pub image: Option<(Arc<Image>, usize)>,
    pub verdict: Verdict,
    /// It ends with the answer.
    pub step: Step,
    /// The pull lasts longer than each of its answers.
    pub _pull: Option<Held>,
}

type Key = (String, ChainId);

/// Decides, once for each image at a time.
pub(super) struct Decider {
    containerd: Arc<dyn Containerd>,
    registries: Arc<dyn Registries>,
    mesh: Arc<dyn LayerMesh>,
    wait: Duration,
    tasks: Tasks,
    plans: Mutex<HashMap<Key, Plan>>,
    /// Plans whose tasks still work on them, however long: for people, who would else hear of no image whose decision outlives its
    /// plan. One for each task at most; whose task has ended goes with the next plan.
    running: Mutex<HashMap<Key, Plan>>,
}

impl Decider {
    pub fn new(
        containerd: Arc<dyn Containerd>,
        registries: Arc<dyn Registries>,
        mesh: Arc<dyn LayerMesh>,
        wait: Duration,
        tasks: Tasks,
    ) -> Arc<Self> {
        let (plans, running) = (Mutex::default(), Mutex::default());
        Arc::new(Self { containerd, registries, mesh, wait, tasks, plans, running })
    }

    /// `report` is called once for each image, when it is decided.
    pub async fn decide(
        self: &Arc<Self>,
        wanted: &Wanted,
        report: impl FnOnce(Arc<Image>, Arc<Vec<Verdict>>) + Send + 'static,
    ) -> Decided {
        let mut plan = self.plan(wanted, report);
        let mut step = plan.pull.trail().step("prepare").answering();
        step.say("darter.chain", || wanted.target.to_string());
        let pull = plan.pull.hold();
        let last = |stage: &Stage| matches!(stage, Stage::Decided(..) | Stage::Nothing(_));
        let deadline = plan.started + self.wait;
        // Neither the end of the time nor that of the deciding task is an error: what is known then counts.
        let _ = tokio::time::timeout_at(deadline, plan.stage.wait_for(last)).await;
        let (image, verdict) = judge(plan.stage.borrow().clone(), wanted.target);
        Decided { image, verdict, step, _pull: pull }
    }

    /// The next question about this image is a new one.
    pub fn forget(&self, image: &Image) {
        let of_image = |(namespace, chain_id): &Key| {
            *namespace == image.namespace && image.position(*chain_id).is_some()
        };
        self.plans.lock().retain(|key, _| !of_image(key));
    }

    fn plan(
        self: &Arc<Self>,
        wanted: &Wanted,
        report: impl FnOnce(Arc<Image>, Arc<Vec<Verdict>>) + Send + 'static,
    ) -> Plan {
        let mut plans = self.plans.lock();
        let now = Instant::now();
        plans.retain(|_, plan| now < plan.started + PLAN_LIFE);
        let key = (wanted.namespace.clone(), wanted.target);
        // That nothing was found says nothing about a later pull: an earlier one may have been cancelled, and what it had brought
        // was collected before it was looked at.
        let known = plans.get(&key).filter(|plan| !matches!(*plan.stage.borrow(), Stage::Nothing(_)));
        if let Some(plan) = known {
            return plan.clone();
        }
        if plans.len() >= PLANS_MAX {
            plans.clear();
        }
        let (sender, stage) = watch::channel(Stage::Looking);
        let (pull, held) = Pull::begin(&wanted.namespace, &wanted.target);
        let plan = Plan { started: now, stage, pull };
        plans.insert(key.clone(), plan.clone());
        self.runs(key, &plan);
        let (decider, wanted, kept) = (self.clone(), wanted.clone(), plan.clone());
        // Not bound to the request: the other layers of the image wait for the same answer.
        self.tasks.spawn_alone("decide", async move {
            decider.run(wanted, kept, sender, report, &held).await;
        });
        plan
    }

    async fn run(
        &self,
        wanted: Wanted,
        plan: Plan,
        stage: watch::Sender<Stage>,
        report: impl FnOnce(Arc<Image>, Arc<Vec<Verdict>>),
        pull: &Held,
    ) {
        let mut step = plan.pull.trail().step("decide");
        let found = match self.containerd.find_image(&wanted.namespace, wanted.target).await {
            Ok(Some(found)) => found,
            Ok(None) => {
                let reason = "no manifest in containerd's content store has this layer";
                step.fail(reason);
                stage.send_replace(Stage::Nothing(reason.to_owned()));
                return;
            }
            Err(error) => {
                step.fail(&error);
                stage.send_replace(Stage::Nothing(format!("containerd's content store: {error}")));
                return;
            }
        };
        pull.lock().say("darter.image", || found.manifest.to_string());
        step.say("darter.layers", || found.layers.len());
        let image = Arc::new(Image::new(found, &wanted, &*self.registries, plan.pull.clone()));
        self.share(&image, &plan);
        self.replace_earlier(&image, &plan);
        stage.send_replace(Stage::Found(image.clone()));
        let verdicts = Arc::new(self.verdicts(&image).await);
        step.say("darter.lazy", || verdicts.iter().filter(|verdict| verdict.lazy).count());
        stage.send_replace(Stage::Decided(image.clone(), verdicts.clone()));
        report(image, verdicts);
    }

    /// The image's other layers shall find this decision.
    fn share(&self, image: &Image, plan: &Plan) {
        let mut plans = self.plans.lock();
        for chain_id in &image.chain_ids {
            let known = plans.entry((image.namespace.clone(), *chain_id)).or_insert_with(|| plan.clone());
            if matches!(*known.stage.borrow(), Stage::Nothing(_)) {
                *known = plan.clone();
            }
        }
    }

    async fn verdicts(&self, image: &Image) -> Vec<Verdict> {
        // What lies above a plain layer is plain: the mesh need not be asked about it.
        let below = image.layers.iter().take_while(|layer| by_itself(layer).is_none()).count();
        let requests = image.requests();
        let asking = requests[..below].iter().zip(&image.probes).map(|(request, said)| async move {
            let probe = self.mesh.probe(request).await;
            // Nobody else sets it.
            let _ = said.set(probe);
        });
        join_all(asking).await;
        above_plain(image.verdicts())
    }
}

/// What the manifest alone says against a layer.
fn by_itself(layer: &ChainLayer) -> Option<Verdict> {
    if layer.media_type.ends_with("+encrypted") {
        return Some(Verdict::plain("the layer is encrypted"));
    }
    if !is_ordinary(&layer.media_type) {
        return Some(Verdict::plain(format!("unknown media type {:?}", layer.media_type)));
    }
    let reason = "no registry is known for the layer (it was imported or built here, or the registry's port is unknown)";
    layer.sources.is_empty().then(|| Verdict::plain(reason))
}

/// Layers that a registry may not have (foreign, non-distributable ones) are not ordinary.
fn is_ordinary(media_type: &str) -> bool {
    const PREFIXES: [&str; 2] =
        ["application/vnd.oci.image.layer.v1.tar", "application/vnd.docker.image.rootfs.diff.tar"];
    const COMPRESSIONS: [&str; 5] = ["", "+gzip", "+zstd", ".gzip", ".zstd"];
    let rest = PREFIXES.iter().find_map(|prefix| media_type.strip_prefix(prefix));
    rest.is_some_and(|rest| COMPRESSIONS.contains(&rest))
}

fn by_probe(probe: Probe) -> Verdict {
    match probe {
        Probe::Known => Verdict::lazy("the mesh has it"),
        Probe::Answering => Verdict::lazy("a registry has it"),
        Probe::Refused(reason) => Verdict::plain(reason),
    }
}

fn above_plain(verdicts: Vec<Option<Verdict>>) -> Vec<Verdict> {
    let mut below: Option<usize> = None;
    let settle = |(position, verdict): (usize, Option<Verdict>)| {
        let verdict = match (below, verdict) {
            (None, verdict) => verdict.unwrap_or_else(|| Verdict::lazy("nothing is known against it")),
            (Some(_), Some(verdict)) if !verdict.lazy => verdict,
            (Some(plain), _) => Verdict::plain(format!("layer {plain} below it is plain")),
        };
        if !verdict.lazy {
            below.get_or_insert(position);
        }
        verdict
    };
    verdicts.into_iter().enumerate().map(settle).collect()
}

/// The image with the layer's position in it, and what is to be done with the layer.
fn judge(stage: Stage, target: ChainId) -> (Option<(Arc<Image>, usize)>, Verdict) {
    let at = |image: Arc<Image>| image.position(target).map(|position| (image, position));
    match stage {
        Stage::Looking => (None, Verdict::plain("containerd's content store did not answer in time")),
        Stage::Nothing(reason) => (None, Verdict::plain(reason)),
        Stage::Found(image) => {
            let itself = image
                .position(target)
                .map(|position| above_plain(image.layers[..=position].iter().map(by_itself).collect()));
            let verdict = itself.and_then(|mut verdicts| verdicts.pop()).filter(|verdict| !verdict.lazy);
            let verdict = verdict.unwrap_or_else(|| Verdict::lazy("undecided in time"));
            (at(image), verdict)
        }
        Stage::Decided(image, verdicts) => {
            let image = at(image);
            let verdict = image.as_ref().map(|(_, position)| verdicts[*position].clone());
            let verdict = verdict.unwrap_or_else(|| Verdict::plain("the layer is not in the image"));
            (image, verdict)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(media_type: &str, sources: usize) -> ChainLayer {
        let source = LayerSource {
            repository: "https://registry.example/app".parse().unwrap(),
            blob: darter_types::BlobDigest(darter_types::Digest::of(b"blob")),
            size: 1,
        };
        ChainLayer {
            diff_id: darter_types::DiffId(darter_types::Digest::of(b"diff")),
            media_type: media_type.to_owned(),
            sources: vec![source.into(); sources],
        }
    }

    /// One with layers of these media types, of which the mesh has said nothing yet.
    pub(super) fn image(media_types: &[&str]) -> Image {
        let found = FoundImage {
            manifest: darter_types::Digest::of(b"manifest"),
            config: darter_types::Digest::of(b"config"),
            names: Vec::new(),
            layers: Vec::new(),
        };
        let layers: Vec<_> = media_types.iter().map(|media_type| layer(media_type, 1)).collect();
        Image {
            found,
            namespace: "default".to_owned(),
            reference: None,
            pull: Pull::default(),
            chain_ids: Vec::new(),
            probes: layers.iter().map(|_| OnceLock::new()).collect(),
            layers,
        }
    }

    #[test]
    fn ordinary_layers_with_a_source_have_nothing_against_them() {
        for media_type in [
            "application/vnd.oci.image.layer.v1.tar",
            "application/vnd.oci.image.layer.v1.tar+zstd",
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
        ] {
            assert_eq!(by_itself(&layer(media_type, 1)), None);
        }
    }

    #[test]
    fn encrypted_foreign_and_sourceless_layers_are_plain() {
        for (media_type, sources) in [
            ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", 1),
            ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", 1),
            ("application/vnd.erofs.layer", 1),
            ("application/vnd.oci.image.layer.v1.tar+gzip", 0),
        ] {
            assert!(!by_itself(&layer(media_type, sources)).unwrap().lazy, "{media_type}");
        }
    }

    #[test]
    fn what_lies_above_a_plain_layer_is_plain() {
        let verdicts = above_plain(vec![
            None,
            Some(by_probe(Probe::Refused("401".into()))),
            Some(by_probe(Probe::Known)),
        ]);
        assert!(verdicts[0].lazy && !verdicts[1].lazy && !verdicts[2].lazy);
        assert_eq!(verdicts[1].reason, "401");
        assert!(verdicts[2].reason.contains("layer 1"));
    }

    #[test]
    fn a_layer_in_two_compressions_has_the_places_of_both_its_own_first() {
        let blob = |text: &str| darter_types::BlobDigest(darter_types::Digest::of(text.as_bytes()));
        let of = |text: &str| {
            let mut layer = layer("", 1);
            layer.sources[0].blob = blob(text);
            layer
        };
        let other =
            ChainLayer { diff_id: darter_types::DiffId(darter_types::Digest::of(b"other")), ..of("o") };
        let layers = share_places(vec![of("gzip"), other, of("plain")]);
        let blobs = |at: usize| layers[at].sources.iter().map(|source| source.blob).collect::<Vec<_>>();
        assert_eq!(blobs(0), [blob("gzip"), blob("plain")]);
        assert_eq!(blobs(1), [blob("o")]);
        assert_eq!(blobs(2), [blob("plain"), blob("gzip")]);
    }
}
