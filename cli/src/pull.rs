//! `darter pull`: drives a containerd of any version the lazy way.
//!
//! It does what containerd's own client does from 2.1 on: manifest and config go into the content store, each layer is
//! prepared with `containerd.io/snapshot.ref`, and only a layer that the snapshotter does not take is downloaded and
//! unpacked. It is there because `ctr` of 1.6 and 1.7 never sends that label.

use std::fmt;
use std::io::BufRead;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use containerd_client::types::Descriptor;
use darter_mesh::credential_to_wire;
use darter_proto::v1::GrantRequest;
use darter_proto::v1::local_client::LocalClient;
use darter_registry::{
    Client, Credential, Document, Image, ImageRef, Manifest, Platform, default_docker_config,
};
use darter_types::{BlobDigest, ChainId, DiffId, Digest, PROTOCOL_VERSION, Repository};
use futures_util::{StreamExt, stream};

use crate::containerd::{Containerd, Labels, Prepared};
use crate::progress::{LayerState, Progress};
use crate::socket::Socket;

#[derive(Debug, clap::Args)]
pub struct Options {
    /// The image, as docker and nerdctl write it
    image: String,
    #[command(flatten)]
    containerd: Socket,
    /// containerd's namespace: "k8s.io" is kubelet's
    #[arg(long, short, default_value = "default", env = "CONTAINERD_NAMESPACE")]
    namespace: String,
    /// The name that containerd's configuration gives to Darter
    #[arg(long, default_value = "darter")]
    snapshotter: String,
    /// User and password for the registry; default: ~/.docker/config.json. Other users of this machine can see what is typed
    /// here: better USER alone, with --password-stdin
    #[arg(long, short, value_name = "USER[:PASSWORD]")]
    user: Option<String>,
    /// Read the password for --user from standard input, up to the end of the line
    #[arg(long, requires = "user")]
    password_stdin: bool,
    /// Speak http, not https, with the registry
    #[arg(long)]
    plain_http: bool,
    /// Folder with a hosts.toml per registry, as containerd reads it
    #[arg(long, default_value = "/etc/containerd/certs.d")]
    hosts_dir: PathBuf,
    /// Which image of an index, as OS/ARCHITECTURE[/VARIANT]; default: this machine's
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<Platform>,
    /// Print nothing but errors
    #[arg(long, short)]
    quiet: bool,
}

/// One layer of the image, as manifest and config describe it together.
struct Layer {
    blob: BlobDigest,
    size: u64,
    media: String,
    diff_id: DiffId,
    chain: ChainId,
}

/// How many tries a layer gets whose snapshot was reported, but not found a moment later; containerd's client does as many.
const PREPARE_TRIES: usize = 3;

/// How many times the layers are gone through when garbage collections take some of them meanwhile.
const CHAIN_TRIES: usize = 5;

/// The layer below went while the one above was prepared.
#[derive(Debug)]
struct Collected;

impl fmt::Display for Collected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the layer below was removed meanwhile")
    }
}

/// How long Darter may take to take note of a pull.
const GRANT_MAX: Duration = Duration::from_secs(10);

pub async fn run(options: Options) -> Result<()> {
    let started = Instant::now();
    let image: ImageRef = options.image.parse()?;
    let registry = darter_registry::Options {
        hosts_dir: Some(options.hosts_dir.clone()),
        docker_config: default_docker_config(),
        ..Default::default()
    };
    let client = Client::new(registry)?;
    let credential = match &options.user {
        Some(user) if options.password_stdin => Some(with_password(user, std::io::stdin().lock())?),
        Some(user) => Some(basic(user)?),
        None => client.credential_for(&image.registry_authority, &image.name).await,
    };
    if let Some(named) = credential.as_ref().filter(|_| options.user.is_some()) {
        client.lend(&image.registry_authority, named);
    }
    let containerd = Containerd::connect(&options.containerd.path(), &options.namespace).await?;
    let mut containerd = containerd.with_lease(format!("darter-pull-{}-{}", std::process::id(), nanos()));
    let pull = Pull { options: &options, image, client, credential, containerd: containerd.clone() };
    let outcome = tokio::select! {
        outcome = pull.all() => outcome,
        () = darter_daemon::shutdown::signal() => Err(anyhow::anyhow!("interrupted; pull again to go on")),
    };
    // What a pull that failed has brought is gone with its lease.
    let released = containerd.drop_lease(outcome.is_err()).await;
    let summary = outcome?;
    released?;
    if !options.quiet {
        println!(
            "{}: {} of {} layers lazy, {:.1} s",
            pull.image,
            summary.lazy,
            summary.layers,
            started.elapsed().as_secs_f64()
        );
    }
    Ok(())
}

fn basic(user: &str) -> Result<Credential> {
    Credential::from_user(user)
        .context("--user takes USER:PASSWORD; without a password use ~/.docker/config.json")
}

/// Longer than any password or token of a registry.
const PASSWORD_MAX: u64 = 64 << 10;

/// The credential of `user` with the first line of `input`.
fn with_password(user: &str, input: impl BufRead) -> Result<Credential> {
    if user.contains(':') {
        bail!("with --password-stdin --user takes the name alone");
    }
    let mut password = String::new();
    input.take(PASSWORD_MAX).read_line(&mut password).context("the password can't be read")?;
    let password = password.trim_end_matches(['\r', '\n']);
    if password.is_empty() {
        bail!("there is no password on standard input");
    }
    Ok(Credential::Basic { username: user.to_owned(), password: password.to_owned() })
}

fn nanos() -> u128 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_nanos()
}

struct Summary {
    layers: usize,
    lazy: usize,
}

struct Pull<'a> {
    options: &'a Options,
    image: ImageRef,
    client: Client,
    credential: Option<Credential>,
    containerd: Containerd,
}

impl Pull<'_> {
    async fn all(&self) -> Result<Summary> {
        self.containerd.take_lease().await?;
        let credential = self.credential.as_ref();
        let resolved = self.client.resolve(&self.image, self.options.plain_http, credential).await?;
        let (repository, root) = (resolved.repository, resolved.manifest);
        let platform = self.options.platform.clone().unwrap_or_else(Platform::host);
        let image = self.client.image(&repository, root.clone(), &platform, credential).await;
        let image = image.with_context(|| format!("{} for {platform}", self.image))?;
        let layers = layers(&image)?;
        self.grant(&repository).await?;
        self.store_metadata(&image, &layers).await?;
        let progress = Progress::new(layers.len(), self.options.quiet);
        let mut tries = CHAIN_TRIES;
        let lazy = loop {
            tries -= 1;
            match self.chain(&repository, &image.manifest, &layers, &progress).await {
                // What is prepared now is under our lease.
                Err(error) if error.is::<Collected>() && tries > 0 => {}
                lazy => break lazy?,
            }
        };
        progress.finish();
        self.containerd.put_image(&self.image.to_string(), descriptor(&root)).await?;
        Ok(Summary { layers: layers.len(), lazy })
    }

    /// All layers, from the lowest up; returns how many are lazy.
    async fn chain(
        &self,
        repository: &Repository,
        manifest: &Manifest,
        layers: &[Layer],
        progress: &Progress,
    ) -> Result<usize> {
        let mut lazy = 0;
        for (index, layer) in layers.iter().enumerate() {
            let parent = index.checked_sub(1).map(|below| layers[below].chain);
            progress.layer(index, &layer.blob, LayerState::Preparing);
            let report = |state| progress.layer(index, &layer.blob, state);
            let state = self.layer(repository, manifest, layer, parent, report).await;
            let state = state.with_context(|| format!("layer {} ({})", index + 1, layer.blob))?;
            lazy += usize::from(state == LayerState::Lazy);
            report(state);
        }
        Ok(lazy)
    }

    /// Tells the node daemon how this pull reaches the repository: containerd passes neither scheme nor credentials on.
    async fn grant(&self, repository: &Repository) -> Result<()> {
        let socket = self.containerd.snapshotter_socket(&self.options.snapshotter).await?;
        let request = GrantRequest {
            protocol: PROTOCOL_VERSION,
            image: self.image.to_string(),
            repository: repository.to_string(),
            credential: self.credential.as_ref().map(credential_to_wire),
            named: self.options.user.is_some(),
        };
        let silent = || {
            let socket = socket.display();
            format!(
                "Darter does not answer at {socket}, where containerd's configuration has it: is it running?"
            )
        };
        let granting = async {
            let channel = containerd_client::connect(&socket).await.with_context(silent)?;
            Ok::<_, anyhow::Error>(LocalClient::new(channel).grant(request).await)
        };
        match tokio::time::timeout(GRANT_MAX, granting).await.with_context(silent)?? {
            Ok(_) => Ok(()),
            // Another snapshotter than Darter: it has its own ways.
            Err(status) if status.code() == tonic::Code::Unimplemented => Ok(()),
            Err(status) => Err(anyhow::anyhow!("Darter refused the pull: {}", status.message())),
        }
    }

    /// Writes config, manifest and indexes, innermost first, each with the labels that keep what it names.
    async fn store_metadata(&self, image: &Image, layers: &[Layer]) -> Result<()> {
        let mut labels = self.source_labels();
        if let Some(top) = layers.last() {
            labels.insert(
                format!("containerd.io/gc.ref.snapshot.{}", self.options.snapshotter),
                top.chain.to_string(),
            );
        }
        self.put(&image.document.config.digest, &image.config_bytes, labels).await?;
        let mut labels = self.source_labels();
        labels.insert(
            "containerd.io/gc.ref.content.config".to_owned(),
            image.document.config.digest.to_string(),
        );
        for (index, layer) in image.document.layers.iter().enumerate() {
            labels.insert(format!("containerd.io/gc.ref.content.l.{index}"), layer.digest.to_string());
        }
        self.put(&image.manifest.digest, &image.manifest.bytes, labels).await?;
        for index in image.indexes.iter().rev() {
            self.put(&index.digest, &index.bytes, self.index_labels(index)?).await?;
        }
        Ok(())
    }

    fn index_labels(&self, index: &Manifest) -> Result<Labels> {
        let mut labels = self.source_labels();
        if let Document::Index(document) = index.document()? {
            for (position, child) in document.manifests.iter().enumerate() {
                labels.insert(format!("containerd.io/gc.ref.content.m.{position}"), child.digest.to_string());
            }
        }
        Ok(labels)
    }

    fn source_labels(&self) -> Labels {
        // containerd itself drops the port here.
        let authority = &self.image.registry_authority;
        let host = authority.rsplit_once(':').map_or(authority.as_str(), |(host, _)| host);
        Labels::from([(format!("containerd.io/distribution.source.{host}"), self.image.name.clone())])
    }

    async fn put(&self, digest: &Digest, bytes: &Bytes, labels: Labels) -> Result<()> {
        let data = stream::iter([Ok(bytes.clone())]);
        self.containerd.write_blob(&digest.to_string(), bytes.len() as u64, labels, data).await
    }

    async fn layer(
        &self,
        repository: &Repository,
        manifest: &Manifest,
        layer: &Layer,
        parent: Option<ChainId>,
        report: impl Fn(LayerState),
    ) -> Result<LayerState> {
        let snapshotter = &self.options.snapshotter;
        // Only a Prepare puts what is there under our lease; a collection could take it before the next layer otherwise.
        let present = self.containerd.has_snapshot(snapshotter, &layer.chain).await?;
        let labels = self.snapshot_labels(manifest, layer);
        for _ in 0..PREPARE_TRIES {
            let key = format!("extract-{} {}", nanos(), layer.chain);
            match self.containerd.prepare(snapshotter, &key, parent, labels.clone()).await? {
                Prepared::Mounts(mounts) => {
                    let unpacked = self.unpack(repository, layer, mounts, report).await;
                    return self.conclude(&key, layer, labels, unpacked).await;
                }
                // With the label, "exists" means that the snapshotter serves the layer.
                Prepared::Exists if self.containerd.has_snapshot(snapshotter, &layer.chain).await? => {
                    return Ok(if present { LayerState::Present } else { LayerState::Lazy });
                }
                Prepared::Exists => {}
                Prepared::NoParent(error) => return Err(error.context(Collected)),
            }
        }
        bail!("the snapshotter says that it has the layer, and does not show it; `darter why` may say more")
    }

    fn snapshot_labels(&self, manifest: &Manifest, layer: &Layer) -> Labels {
        Labels::from([
            ("containerd.io/snapshot.ref".to_owned(), layer.chain.to_string()),
            ("containerd.io/snapshot/cri.image-ref".to_owned(), self.image.to_string()),
            ("containerd.io/snapshot/cri.manifest-digest".to_owned(), manifest.digest.to_string()),
            ("containerd.io/snapshot/cri.layer-digest".to_owned(), layer.blob.to_string()),
        ])
    }

    /// The plain way: download the blob into the content store, let containerd unpack it.
    async fn unpack(
        &self,
        repository: &Repository,
        layer: &Layer,
        mounts: Vec<containerd_client::types::Mount>,
        report: impl Fn(LayerState),
    ) -> Result<()> {
        if !self.containerd.has_blob(&layer.blob.to_string()).await? {
            report(LayerState::Downloading);
            let blob = self.client.blob(repository, layer.blob.0, self.credential.as_ref(), 0).await?;
            let data = blob.stream.map(|chunk| chunk.map_err(anyhow::Error::from));
            let labels = self.source_labels();
            self.containerd.write_blob(&layer.blob.to_string(), layer.size, labels, Box::pin(data)).await?;
        }
        report(LayerState::Unpacking);
        self.containerd.apply(&layer.blob, layer.size, &layer.media, mounts, &layer.diff_id).await
    }

    async fn conclude(
        &self,
        key: &str,
        layer: &Layer,
        labels: Labels,
        unpacked: Result<()>,
    ) -> Result<LayerState> {
        let snapshotter = &self.options.snapshotter;
        let committed = match unpacked {
            Ok(()) => self.containerd.commit(snapshotter, key, &layer.chain, labels).await,
            Err(error) => Err(error),
        };
        if committed.is_err() {
            // The half-unpacked snapshot is of no use; why it is so is the error to show.
            let _ = self.containerd.remove(snapshotter, key).await;
        }
        committed.map(|()| LayerState::Plain)
    }
}

/// Joins manifest and config: layer by layer, lowest first.
fn layers(image: &Image) -> Result<Vec<Layer>> {
    let (described, diff_ids) = (&image.document.layers, &image.config.diff_ids);
    if described.len() != diff_ids.len() {
        bail!("the image's config names {} layers, its manifest {}", diff_ids.len(), described.len());
    }
    let chains = ChainId::chain(diff_ids);
    let joined = described.iter().zip(diff_ids).zip(chains);
    Ok(joined
        .map(|((layer, diff_id), chain)| Layer {
            blob: BlobDigest(layer.digest),
            size: layer.size,
            media: layer.media_type.clone(),
            diff_id: *diff_id,
            chain,
        })
        .collect())
}

fn descriptor(manifest: &Manifest) -> Descriptor {
    Descriptor {
        media_type: manifest.media_type.clone(),
        digest: manifest.digest.to_string(),
        size: manifest.bytes.len() as i64,
        annotations: Labels::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn password_is_the_first_line_of_the_input() {
        for (input, wanted) in
            [("secret\n", "secret"), ("with: and space\r\nmore\n", "with: and space"), ("x", "x")]
        {
            let found = with_password("me", input.as_bytes()).unwrap();
            let Credential::Basic { username, password } = found else { panic!("of another kind") };
            assert_eq!((username.as_str(), password.as_str()), ("me", wanted));
        }
        assert!(with_password("me", "\n".as_bytes()).is_err());
        let error = with_password("me:other", "secret\n".as_bytes()).unwrap_err().to_string();
        assert!(error.contains("the name alone"), "{error}");
    }
}
