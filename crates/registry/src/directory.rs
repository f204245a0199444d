//! The folder of `hosts.toml` files (`/etc/containerd/certs.d`), and what follows from it: which endpoints stand for
//! a repository, and which repositories a host's name may mean.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use darter_types::{Registry, Repository, Scheme};
use http::HeaderMap;
use parking_lot::Mutex;
use url::Url;

use crate::error::RegistryError;
use crate::hosts::{self, Capabilities, Host, Place, TlsSettings};

/// How long a changed file may go unnoticed: an image has many layers, and one reading serves them all.
const FRESH: Duration = Duration::from_secs(2);
/// More folders than this are not read; nobody has so many registries.
const FOLDERS_MAX: usize = 4096;
const DEFAULT: &str = "_default";

/// One place to send requests to.
#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    pub place: Place,
    pub can: Capabilities,
    pub tls: TlsSettings,
    pub headers: HeaderMap,
    /// What a mirror is told in `ns=`: the registry that it stands for.
    pub namespace: Option<String>,
    /// It has the registry's name, or is what the registry's own file calls its server: not just somebody who stands in for it.
    pub is_registry: bool,
}

impl Endpoint {
    /// The address of `rest`, for example `manifests/latest`, in the repository `name`.
    pub fn url(&self, name: &str, rest: &str) -> Result<Url, RegistryError> {
        self.parse(&format!("{}{}/{name}/{rest}", self.place.registry, self.place.path))
    }

    /// Where a registry says how it wants to be spoken to.
    pub fn ping_url(&self) -> Result<Url, RegistryError> {
        self.parse(&format!("{}{}/", self.place.registry, self.place.path))
    }

    fn parse(&self, text: &str) -> Result<Url, RegistryError> {
        let refuse =
            |e: url::ParseError| RegistryError::Protocol { url: text.to_owned(), reason: e.to_string() };
        let mut url = Url::parse(text).map_err(refuse)?;
        if let Some(namespace) = &self.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        Ok(url)
    }
}

pub(crate) struct Directory {
    root: Option<PathBuf>,
    cached: Mutex<Option<(Instant, Arc<Folders>)>>,
}

impl Directory {
    pub fn new(root: Option<PathBuf>) -> Self {
        Self { root, cached: Mutex::new(None) }
    }

    /// What the folder says now, or said a moment ago.
    pub fn read(&self) -> Arc<Folders> {
        let mut cached = self.cached.lock();
        match &*cached {
            Some((at, folders)) if at.elapsed() < FRESH => folders.clone(),
            _ => {
                let folders = Arc::new(self.root.as_deref().map(Folders::load).unwrap_or_default());
                *cached = Some((Instant::now(), folders.clone()));
                folders
            }
        }
    }
}

/// The hosts of each folder, by the registry that the folder is named after.
#[derive(Default)]
pub(crate) struct Folders(BTreeMap<String, Vec<Host>>);

impl Folders {
    fn load(root: &Path) -> Self {
        let Ok(entries) = std::fs::read_dir(root) else { return Self::default() };
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .take(FOLDERS_MAX)
            .collect();
        // `host_5000_` sorts behind `host:5000` and takes its place, as in containerd.
        names.sort();
        let folders = names.into_iter().filter(|name| root.join(name).is_dir());
        Self(folders.map(|name| (authority_of_folder(&name), load_folder(&root.join(&name)))).collect())
    }

    /// The endpoints to try for this repository, in order; the last one is the registry itself.
    pub fn endpoints(&self, repository: &Repository) -> Vec<Endpoint> {
        let registry = &repository.registry;
        if let Some(hosts) = self.own(registry) {
            let server = hosts.last().and_then(|server| server.place.as_ref()).map(|place| &place.registry);
            return hosts.iter().map(|host| endpoint(host, registry, server)).collect();
        }
        if let Some(host) = self.listed(registry) {
            return vec![endpoint(host, registry, None)].into_iter().map(without_namespace).collect();
        }
        match self.0.get(DEFAULT) {
            // Its server stands in for all registries and is none of them.
            Some(hosts) => hosts.iter().map(|host| endpoint(host, registry, None)).collect(),
            None => vec![direct(registry)],
        }
    }

    /// The repositories that `name` at `authority` may be, in the order to try them. An authority without a port may
    /// have lost it (containerd's `distribution.source` label has none): folders and `known` registries of that host
    /// come first then, unless it has a folder as it is.
    pub fn candidates(
        &self,
        authority: &str,
        name: &str,
        plain_http: bool,
        known: &[String],
    ) -> Vec<Repository> {
        let authority = authority.to_ascii_lowercase();
        let mut found = Vec::new();
        let (host, port) = split_authority(&authority);
        if self.0.contains_key(&authority) {
            self.add_candidates(&authority, name, plain_http, &mut found);
        }
        if port.is_none() {
            let same_host = |other: &&String| {
                let (other_host, other_port) = split_authority(other);
                other_host == host && other_port.is_some()
            };
            let folders = self.0.keys().filter(same_host).cloned();
            let lower = known.iter().map(|other| other.to_ascii_lowercase()).collect::<Vec<_>>();
            let others: Vec<String> = folders.chain(lower.iter().filter(same_host).cloned()).collect();
            for other in others {
                self.add_candidates(&other, name, plain_http, &mut found);
            }
        }
        self.add_candidates(&authority, name, plain_http, &mut found);
        let mut seen = BTreeSet::new();
        found.retain(|repository| seen.insert(repository.clone()));
        found
    }

    /// The mirrors of `authority`, as repositories of their own, and then the repository by its own name.
    fn add_candidates(&self, authority: &str, name: &str, plain_http: bool, found: &mut Vec<Repository>) {
        let scheme = if plain_http || prefers_http(authority) { Scheme::Http } else { Scheme::Https };
        let Ok(registry) = Registry::new(scheme, authority) else { return };
        let hosts =
            self.own(&registry).or_else(|| self.0.get(DEFAULT).map(Vec::as_slice)).unwrap_or_default();
        for place in hosts.iter().filter(|host| host.can.pull).filter_map(|host| host.place.as_ref()) {
            if place.registry.authority == registry.authority {
                // Its path is added when it is asked: it keeps its own name, and the file says the scheme.
                found.extend(Repository::new(place.registry.clone(), name));
                return;
            }
            found.extend(repository_at(place, name));
        }
        found.extend(Repository::new(registry, name));
    }

    fn own(&self, registry: &Registry) -> Option<&[Host]> {
        let port = match registry.scheme {
            Scheme::Http => 80,
            Scheme::Https => 443,
        };
        let with_port = format!("{}:{port}", registry.authority);
        self.0.get(&registry.authority).or_else(|| self.0.get(&with_port)).map(Vec::as_slice)
    }

    /// A host that some file names as a mirror or server: its TLS settings hold for it when it is asked directly.
    fn listed(&self, registry: &Registry) -> Option<&Host> {
        let is_it = |host: &&Host| host.place.as_ref().is_some_and(|place| place.registry == *registry);
        self.0.values().flatten().find(is_it)
    }
}

fn load_folder(folder: &Path) -> Vec<Host> {
    let path = folder.join("hosts.toml");
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    if text.is_empty() {
        return vec![hosts::from_certificates(folder)];
    }
    hosts::parse(folder, &text).unwrap_or_else(|error| {
        // As containerd does: say so, and go on with the certificates.
        tracing::warn!(path = %path.display(), error, "hosts.toml can't be read");
        vec![hosts::from_certificates(folder)]
    })
}

/// `host_5000_` is how a port is written where a colon can't stand in a file's name.
fn authority_of_folder(name: &str) -> String {
    let port = name.strip_suffix('_').and_then(|rest| rest.rsplit_once('_'));
    match port {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
            format!("{host}:{port}").to_ascii_lowercase()
        }
        _ => name.to_ascii_lowercase(),
    }
}

/// `server` is what the file says that the registry is.
fn endpoint(host: &Host, registry: &Registry, server: Option<&Registry>) -> Endpoint {
    let Some(place) = &host.place else {
        let itself = direct(registry);
        let tls = if host.tls == TlsSettings::default() { itself.tls.clone() } else { host.tls.clone() };
        return Endpoint { tls, headers: host.headers.clone(), ..itself };
    };
    let same = place.registry.authority == registry.authority;
    let hub = registry.authority == "docker.io" && place.registry.authority == "registry-1.docker.io";
    let namespace = (!same && !hub).then(|| registry.authority.clone());
    Endpoint {
        place: place.clone(),
        can: host.can,
        tls: host.tls.clone(),
        headers: host.headers.clone(),
        namespace,
        is_registry: ((same || hub) && is_meant(&place.registry, server)) || server == Some(&place.registry),
    }
}

/// Whether a host of the registry's name is the registry, as far as the scheme goes. A name means TLS; plain HTTP may be another port,
/// and is in the clear, so it is meant only where the file names no server that says otherwise.
fn is_meant(host: &Registry, server: Option<&Registry>) -> bool {
    host.scheme == Scheme::Https || server.is_none()
}

fn without_namespace(endpoint: Endpoint) -> Endpoint {
    Endpoint { namespace: None, place: Place { path: "/v2".to_owned(), ..endpoint.place }, ..endpoint }
}

/// A registry of which no file says anything.
fn direct(registry: &Registry) -> Endpoint {
    let registry = match registry.authority.as_str() {
        "docker.io" => Registry { scheme: Scheme::Https, authority: "registry-1.docker.io".to_owned() },
        _ => registry.clone(),
    };
    // Nobody stands between this machine and itself; containerd doesn't verify it either.
    let skip_verify = is_loopback(&registry.authority);
    Endpoint {
        place: Place { registry, path: "/v2".to_owned() },
        can: Capabilities::ALL,
        tls: TlsSettings { skip_verify, ..TlsSettings::default() },
        headers: HeaderMap::new(),
        namespace: None,
        is_registry: true,
    }
}

/// A mirror's repository under its own name; `None` if its path is not one that a repository can have.
fn repository_at(place: &Place, name: &str) -> Option<Repository> {
    let prefix = place.path.strip_prefix("/v2")?;
    let full = match prefix.strip_prefix('/') {
        Some(prefix) => format!("{prefix}/{name}"),
        None if prefix.is_empty() => name.to_owned(),
        None => return None,
    };
    Repository::new(place.registry.clone(), &full).ok()
}

/// Host and port. An IPv6 address keeps its brackets.
fn split_authority(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (authority, None),
    }
}

pub(crate) fn is_loopback(authority: &str) -> bool {
    let host = split_authority(authority).0;
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// A registry on this machine with a port of its own speaks plain http, as containerd presumes.
fn prefers_http(authority: &str) -> bool {
    is_loopback(authority) && !matches!(split_authority(authority).1, None | Some("443"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folders(files: &[(&str, &str)]) -> (tempfile::TempDir, Folders) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join("hosts.toml"), text).unwrap();
        }
        let folders = Folders::load(dir.path());
        (dir, folders)
    }

    fn urls(folders: &Folders, repository: &str) -> Vec<String> {
        let repository: Repository = repository.parse().unwrap();
        let endpoints = folders.endpoints(&repository);
        endpoints.iter().map(|e| e.url(&repository.name, "x").unwrap().to_string()).collect()
    }

    fn candidates(folders: &Folders, authority: &str, known: &[&str]) -> Vec<String> {
        let known: Vec<String> = known.iter().map(|text| (*text).to_owned()).collect();
        folders.candidates(authority, "a", false, &known).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn only_mirrors_are_told_the_namespace() {
        let text = "server = \"https://registry-1.docker.io\"\n[host.\"http://m.example:5000\"]\n";
        let (_dir, folders) = folders(&[("docker.io", text)]);
        let expected = ["http://m.example:5000/v2/a/x?ns=docker.io", "https://registry-1.docker.io/v2/a/x"];
        assert_eq!(urls(&folders, "https://docker.io/a"), expected);
        // Asked by its own name, the mirror is a registry like others.
        assert_eq!(urls(&folders, "http://m.example:5000/a"), ["http://m.example:5000/v2/a/x"]);
    }

    #[test]
    fn only_the_registrys_own_file_says_who_it_is() {
        let mirror = "[host.\"http://m.example\"]\n";
        let files = [
            ("docker.io", mirror.to_owned()),
            ("named.example", format!("server = \"http://10.0.0.1:5000\"\n{mirror}")),
            (
                "only.example",
                "server = \"http://10.0.0.1:5000\"\n[host.\"http://10.0.0.1:5000\"]\n".to_owned(),
            ),
            ("_default", format!("server = \"https://all.example\"\n{mirror}[host.\"https://r.example\"]\n")),
        ];
        let (_dir, folders) = folders(&files.each_ref().map(|(name, text)| (*name, text.as_str())));
        let is_registry = |repository: &str| -> Vec<bool> {
            let endpoints = folders.endpoints(&repository.parse().unwrap());
            endpoints.iter().map(|endpoint| endpoint.is_registry).collect()
        };
        assert_eq!(is_registry("https://docker.io/a"), [false, true]);
        assert_eq!(is_registry("https://named.example/a"), [false, true]);
        assert_eq!(is_registry("https://only.example/a"), [true, true]);
        assert_eq!(is_registry("https://r.example/a"), [true]);
        assert_eq!(is_registry("https://other.example/a"), [false, false, false]);
        // Asked by its own name, it is no mirror.
        assert_eq!(is_registry("http://m.example/a"), [true]);
    }

    #[test]
    fn a_host_of_the_registrys_name_is_a_mirror_over_plain_http_where_the_server_speaks_tls() {
        let file = |server: &str, host: &str| format!("server = \"{server}\"\n[host.\"{host}\"]\n");
        let is_registry = |name: &str, text: String| -> Vec<bool> {
            let (_dir, folders) = folders(&[(name, text.as_str())]);
            let asked = folders.candidates(name, "a", false, &[]);
            folders.endpoints(&asked[0]).iter().map(|endpoint| endpoint.is_registry).collect()
        };
        let (tls, clear) = ("https://r.example", "http://r.example");
        assert_eq!(is_registry("r.example", file(tls, clear)), [false, true]);
        assert_eq!(is_registry("r.example", file("https://10.0.0.1", clear)), [false, true]);
        assert_eq!(is_registry("r.example", file(clear, clear)), [true, true]);
        assert_eq!(is_registry("r.example", file("http://10.0.0.1", tls)), [true, true]);
        let (tls, clear) = ("https://r.example:5000", "http://r.example:5000");
        assert_eq!(is_registry("r.example:5000", file(tls, clear)), [false, true]);
        // Nothing else says how the registry is spoken to.
        assert_eq!(is_registry("r.example:5000", format!("[host.\"{clear}\"]\n")), [true, true]);
        let hub = file("https://registry-1.docker.io", "http://registry-1.docker.io");
        let (_dir, folders) = folders(&[("docker.io", hub.as_str())]);
        let endpoints = folders.endpoints(&"https://docker.io/a".parse().unwrap());
        assert!(!endpoints[0].is_registry && endpoints[1].is_registry);
    }

    #[test]
    fn default_folder_holds_for_the_rest() {
        let files =
            [("_default", "[host.\"https://m.example\"]"), ("r.example", "server = \"http://r.example\"")];
        let (_dir, folders) = folders(&files);
        assert_eq!(urls(&folders, "https://r.example/a"), ["http://r.example/v2/a/x"]);
        let expected = ["https://m.example/v2/a/x?ns=other.example", "https://other.example/v2/a/x"];
        assert_eq!(urls(&folders, "https://other.example/a"), expected);
    }

    #[test]
    fn no_folder_means_the_registry_itself() {
        let folders = Folders::default();
        assert_eq!(urls(&folders, "https://docker.io/a"), ["https://registry-1.docker.io/v2/a/x"]);
        assert_eq!(urls(&folders, "http://10.0.0.1:5000/a"), ["http://10.0.0.1:5000/v2/a/x"]);
    }

    #[test]
    fn lost_port_is_found_in_folders_and_known_registries() {
        let files = [("10.0.0.1_5000_", "server = \"http://10.0.0.1:5000\""), ("10.0.0.2:5000", "")];
        let (_dir, folders) = folders(&files);
        let expected = ["http://10.0.0.1:5000/a", "https://10.0.0.1:6000/a", "https://10.0.0.1/a"];
        assert_eq!(candidates(&folders, "10.0.0.1", &["10.0.0.1:6000", "10.0.0.9:1"]), expected);
        assert_eq!(candidates(&folders, "10.0.0.1:5000", &["10.0.0.1:6000"]), ["http://10.0.0.1:5000/a"]);
    }

    #[test]
    fn folder_without_port_comes_before_those_with_one() {
        let files = [("r.example:5000", "server = \"http://r.example:5000\""), ("r.example", "")];
        let (_dir, folders) = folders(&files);
        assert_eq!(
            candidates(&folders, "r.example", &[]),
            ["https://r.example/a", "http://r.example:5000/a"]
        );
    }

    #[test]
    fn servers_own_path_is_no_part_of_the_name() {
        let text = "server = \"https://r.example/v2/prefix\"\noverride_path = true\n";
        let (_dir, folders) = folders(&[("r.example", text)]);
        assert_eq!(candidates(&folders, "r.example", &[]), ["https://r.example/a"]);
        assert_eq!(urls(&folders, "https://r.example/a"), ["https://r.example/v2/prefix/a/x"]);
    }

    #[test]
    fn loopback_with_a_port_is_plain_http() {
        let folders = Folders::default();
        assert_eq!(candidates(&folders, "127.0.0.1:5000", &[]), ["http://127.0.0.1:5000/a"]);
        assert_eq!(
            candidates(&folders, "localhost", &["localhost:5000"]),
            ["http://localhost:5000/a", "https://localhost/a"]
        );
        assert_eq!(candidates(&folders, "[::1]:5000", &[]), ["http://[::1]:5000/a"]);
        assert_eq!(candidates(&folders, "r.example:5000", &[]), ["https://r.example:5000/a"]);
        let plain = folders.candidates("r.example:5000", "a", true, &[]);
        assert_eq!(plain[0].to_string(), "http://r.example:5000/a");
    }

    #[test]
    fn mirror_with_a_path_is_a_repository_of_its_own() {
        let text =
            "[host.\"https://m.example/v2/hub\"]\noverride_path = true\n[host.\"https://o.example/odd\"]\n";
        let (_dir, folders) = folders(&[("docker.io", text)]);
        let expected = ["https://m.example/hub/a", "https://docker.io/a"];
        assert_eq!(candidates(&folders, "docker.io", &[]), expected);
    }

    #[test]
    fn unreadable_file_leaves_the_registry_itself() {
        let (_dir, folders) = folders(&[("r.example", "server = [")]);
        assert_eq!(urls(&folders, "https://r.example/a"), ["https://r.example/v2/a/x"]);
    }
}
