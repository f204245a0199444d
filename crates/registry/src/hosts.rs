//! `hosts.toml`, read as containerd reads it (its `docs/hosts.md`): which hosts to ask for a registry, and how.

use std::collections::BTreeMap;
use std::path::Path;

use darter_types::{Registry, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;
use toml::Spanned;
use url::Url;

/// One host of a `hosts.toml`, or the server at its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    /// `None`: the registry that was asked for itself, because the file names no server.
    pub place: Option<Place>,
    pub can: Capabilities,
    pub tls: TlsSettings,
    /// Sent with every request to this host; marked as sensitive.
    pub headers: HeaderMap,
}

/// Where a host's API starts, `path` without a slash at its end; as a rule `/v2`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub registry: Registry,
    pub path: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Capabilities {
    pub pull: bool,
    pub resolve: bool,
    pub push: bool,
}

impl Capabilities {
    pub const ALL: Self = Self { pull: true, resolve: true, push: true };
}

/// How to speak TLS to a host. It holds the files' contents, so that new files make new connections.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub(crate) struct TlsSettings {
    pub skip_verify: bool,
    /// PEM, each with one or more certificates.
    pub ca: Vec<Vec<u8>>,
    /// PEM of a certificate chain and its key.
    pub client: Option<Vec<u8>>,
}

impl std::fmt::Debug for TlsSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (ca, client) = (self.ca.len(), self.client.is_some());
        write!(f, "TlsSettings {{ skip_verify: {}, ca: {ca}, client: {client} }}", self.skip_verify)
    }
}

#[derive(Deserialize)]
struct File {
    server: Option<String>,
    #[serde(flatten)]
    root: Entry,
}

/// A registry's table by its address. The file's order decides, so the addresses keep their positions.
#[derive(Deserialize)]
struct Ordered {
    #[serde(default)]
    host: BTreeMap<Spanned<String>, Entry>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    capabilities: Vec<String>,
    ca: Option<OneOrMany>,
    client: Option<Client>,
    skip_verify: bool,
    header: BTreeMap<String, OneOrMany>,
    override_path: bool,
}

#[derive(Deserialize, Clone)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Client {
    /// A file with certificate and key.
    One(String),
    Files(Vec<String>),
    /// Certificate, then key.
    Pairs(Vec<Vec<String>>),
}

/// Reads a `hosts.toml` that lies in `folder`: mirrors in the file's order, then the server. The error is for a log.
pub(crate) fn parse(folder: &Path, text: &str) -> Result<Vec<Host>, String> {
    let file: File = toml::from_str(text).map_err(|e| e.message().to_owned())?;
    let ordered: Ordered = toml::from_str(text).map_err(|e| e.message().to_owned())?;
    let mut entries: Vec<(Spanned<String>, Entry)> = ordered.host.into_iter().collect();
    entries.sort_by_key(|(address, _)| address.span().start);
    let mut hosts = Vec::with_capacity(entries.len() + 1);
    for (address, entry) in entries {
        hosts.push(entry.host(folder, Some(address.get_ref()))?);
    }
    hosts.push(file.root.host(folder, file.server.as_deref().filter(|server| !server.is_empty()))?);
    Ok(hosts)
}

impl Entry {
    fn host(self, folder: &Path, address: Option<&str>) -> Result<Host, String> {
        let place = address.map(|address| parse_place(address, self.override_path)).transpose()?;
        let can = parse_capabilities(&self.capabilities)?;
        let headers = parse_headers(self.header)?;
        let ca = self.ca.map(OneOrMany::into_vec).unwrap_or_default();
        let tls = TlsSettings {
            skip_verify: self.skip_verify,
            ca: ca.iter().filter_map(|name| read_pem(folder, name)).collect(),
            client: self.client.and_then(|client| read_client(folder, client)),
        };
        Ok(Host { place, can, tls, headers })
    }
}

fn parse_place(address: &str, override_path: bool) -> Result<Place, String> {
    let full = if address.starts_with("http") { address.to_owned() } else { format!("https://{address}") };
    let url = Url::parse(&full).map_err(|e| format!("{address:?}: {e}"))?;
    let scheme = match url.scheme() {
        "http" => Scheme::Http,
        "https" => Scheme::Https,
        other => return Err(format!("{address:?}: unknown scheme {other:?}")),
    };
    let host = url.host_str().unwrap_or_default();
    let authority = url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
    let registry = Registry::new(scheme, &authority).map_err(|e| e.to_string())?;
    let mut path = url.path().trim_end_matches('/').to_owned();
    if !override_path && !path.ends_with("/v2") {
        path.push_str("/v2");
    }
    Ok(Place { registry, path })
}

fn parse_capabilities(names: &[String]) -> Result<Capabilities, String> {
    if names.is_empty() {
        return Ok(Capabilities::ALL);
    }
    let mut can = Capabilities { pull: false, resolve: false, push: false };
    for name in names {
        match name.to_ascii_lowercase().as_str() {
            "pull" => can.pull = true,
            "resolve" => can.resolve = true,
            "push" => can.push = true,
            // Newer containerds have more; those are about other things than we ask for.
            "referrers" | "dial" => {}
            other => return Err(format!("unknown capability {other}")),
        }
    }
    Ok(can)
}

fn parse_headers(headers: BTreeMap<String, OneOrMany>) -> Result<HeaderMap, String> {
    let mut map = HeaderMap::new();
    for (name, values) in headers {
        let name = HeaderName::try_from(&name).map_err(|_| format!("{name:?} is no header"))?;
        for value in values.into_vec() {
            // The value may be secret: the error does not show it.
            let mut value = HeaderValue::try_from(value)
                .map_err(|_| format!("the value of header {name} can't be sent"))?;
            value.set_sensitive(true);
            map.append(name.clone(), value);
        }
    }
    Ok(map)
}

fn read_pem(folder: &Path, name: &str) -> Option<Vec<u8>> {
    let path = folder.join(name);
    std::fs::read(&path)
        .inspect_err(|error| tracing::warn!(path = %path.display(), %error, "a file that hosts.toml names"))
        .ok()
}

/// The first client certificate; we have no way to offer several.
fn read_client(folder: &Path, client: Client) -> Option<Vec<u8>> {
    let files = match client {
        Client::One(file) => vec![file],
        Client::Files(files) => files.into_iter().take(1).collect(),
        Client::Pairs(pairs) => pairs.into_iter().next()?,
    };
    let mut pem = Vec::new();
    for file in files.iter().filter(|file| !file.is_empty()) {
        pem.extend(read_pem(folder, file)?);
        pem.push(b'\n');
    }
    Some(pem)
}

/// Docker's older way, for a folder without `hosts.toml`: `*.crt` are CAs, `x.cert` with `x.key` is the client's.
pub(crate) fn from_certificates(folder: &Path) -> Host {
    let mut tls = TlsSettings::default();
    let mut names: Vec<_> = std::fs::read_dir(folder)
        .map(|entries| entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
        .unwrap_or_default();
    names.sort();
    for name in &names {
        if name.ends_with(".crt") {
            tls.ca.extend(read_pem(folder, name));
        } else if let Some(stem) = name.strip_suffix(".cert") {
            let pair = vec![name.clone(), format!("{stem}.key")];
            tls.client = tls.client.or_else(|| read_client(folder, Client::Pairs(vec![pair])));
        }
    }
    Host { place: None, can: Capabilities::ALL, tls, headers: HeaderMap::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Vec<Host> {
        parse(Path::new("/nonexistent"), text).unwrap()
    }

    fn places(hosts: &[Host]) -> Vec<String> {
        let text = |host: &Host| host.place.as_ref().map(|place| format!("{}{}", place.registry, place.path));
        hosts.iter().map(|host| text(host).unwrap_or_else(|| "itself".to_owned())).collect()
    }

    #[test]
    fn mirrors_come_in_the_files_order_and_the_server_last() {
        let hosts = read(
            "server = \"https://registry-1.docker.io\"\n\
             [host.\"http://z.example:5000\"]\ncapabilities = [\"pull\"]\n\
             [host.\"https://a.example/proxy\"]\n\
             [host.\"m.example/v2/hub\"]\noverride_path = true\n",
        );
        let expected = [
            "http://z.example:5000/v2",
            "https://a.example/proxy/v2",
            "https://m.example/v2/hub",
            "https://registry-1.docker.io/v2",
        ];
        assert_eq!(places(&hosts), expected);
        assert_eq!(hosts[0].can, Capabilities { pull: true, resolve: false, push: false });
        assert_eq!(hosts[1].can, Capabilities::ALL);
    }

    #[test]
    fn file_without_server_ends_with_the_registry_itself() {
        assert_eq!(places(&read("")), ["itself"]);
        assert_eq!(
            places(&read("[host.\"http://m:1\"]\n[host.\"http://m:1\".header]\nx = [\"a\", \"b\"]")),
            ["http://m:1/v2", "itself"]
        );
    }

    #[test]
    fn roots_settings_belong_to_the_server() {
        let hosts = read(
            "server = \"https://s\"\nskip_verify = true\n[host.\"https://m\"]\n[host.\"https://m\".header]\nX-K = \"v\"\n",
        );
        assert!(!hosts[0].tls.skip_verify && hosts[1].tls.skip_verify);
        assert_eq!(hosts[0].headers["x-k"], "v");
        assert!(!format!("{:?}", hosts[0].headers).contains("\"v\""));
        assert!(hosts[1].headers.is_empty());
    }

    #[test]
    fn certificates_are_found_beside_the_file() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.pem"), "A").unwrap();
        std::fs::write(dir.path().join("k.pem"), "K").unwrap();
        let text = "server = \"https://s\"\nca = \"a.pem\"\nclient = [[\"a.pem\", \"k.pem\"]]\n";
        let hosts = parse(dir.path(), text).unwrap();
        assert_eq!(hosts[0].tls.ca, [b"A".to_vec()]);
        assert_eq!(hosts[0].tls.client.as_deref(), Some(b"A\nK\n".as_slice()));
    }

    #[test]
    fn dockers_certificate_files_count_without_hosts_toml() {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in [("ca.crt", "CA"), ("me.cert", "C"), ("me.key", "K")] {
            std::fs::write(dir.path().join(name), content).unwrap();
        }
        let host = from_certificates(dir.path());
        assert_eq!(host.tls.ca, [b"CA".to_vec()]);
        assert_eq!(host.tls.client.as_deref(), Some(b"C\nK\n".as_slice()));
    }

    #[test]
    fn mistakes_are_errors() {
        for bad in ["server = 3", "server = \"httpx://s\"", "capabilities = [\"fly\"]", "[host.\"ht tp://\"]"]
        {
            assert!(parse(Path::new("/"), bad).is_err(), "{bad} was taken");
        }
    }
}
