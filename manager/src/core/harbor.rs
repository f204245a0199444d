//! Jobs as Harbor orders them from a Dragonfly manager (`POST /oapi/v1/jobs`), in the words of a preheat order.
//!
//! Harbor sends zero values and nulls for what it doesn't set, and fields that no manager reads any more: they all mean the
//! default. Times are nanoseconds.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use darter_types::Role;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::job::State;
use super::order::{LISTED_MAX, Scope, TIMEOUT_MAX, checked_image, checked_platform};

const NANOSECONDS: u64 = 1_000_000_000;

/// Characters of a manifest's URL, of an `Authorization`, of a name or a password.
const URL_MAX: usize = 400;
const HEADER_MAX: usize = 16_384;
const SECRET_MAX: usize = 4_096;

/// Why a job can't be taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum JobError {
    #[error("type: only preheat is known, not {0:?}")]
    Kind(String),
    #[error("args.type: only image can be preheated, not {0:?}")]
    Content(String),
    #[error("args.url must read https://REGISTRY/v2/REPOSITORY/manifests/TAG")]
    Url,
    #[error("args.platform must be os/architecture")]
    Platform,
    #[error("args.scope: {0:?} is not known: single_seed_peer, all_seed_peers or all_peers")]
    Scope(String),
    #[error("args.ips: {LISTED_MAX} at most")]
    Ips,
    #[error("args.ips: no such peer has joined from {0:?}")]
    Ip(String),
    #[error("args.count must be 1 to 200, and args.percentage 1 to 100")]
    Share,
    #[error("args.timeout is in nanoseconds, up to a day")]
    Timeout,
    #[error("args.headers.Authorization must read `Bearer TOKEN` or `Basic ...`, in {HEADER_MAX} characters")]
    Authorization,
    #[error("args.username and args.password may have {SECRET_MAX} characters each")]
    Secret,
}

impl JobError {
    /// The job is well-formed, but the cluster is not as it says.
    pub(crate) fn is_conflict(&self) -> bool {
        matches!(self, JobError::Ip(_))
    }
}

/// The body of a request. What is not read here is not refused.
#[derive(Debug, Deserialize)]
pub(crate) struct JobRequest {
    #[serde(rename = "type", default)]
    kind: Option<String>,
    #[serde(default)]
    pub(crate) bio: Option<String>,
    #[serde(default)]
    pub(crate) user_id: Option<u32>,
    #[serde(default)]
    args: Option<Args>,
}

#[derive(Debug, Default, Deserialize)]
struct Args {
    #[serde(rename = "type", default)]
    content: Option<String>,
    #[serde(default)]
    url: Option<String>,
    #[serde(default)]
    headers: Option<BTreeMap<String, Value>>,
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    password: Option<String>,
    #[serde(default)]
    platform: Option<String>,
    #[serde(default)]
    scope: Option<String>,
    #[serde(default)]
    ips: Option<Vec<String>>,
    #[serde(default)]
    count: Option<u32>,
    #[serde(default)]
    percentage: Option<u8>,
    #[serde(default)]
    timeout: Option<u64>,
}

/// What is shown of a job's arguments later: no credential.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Shown {
    #[serde(rename = "type")]
    content: String,
    pub(crate) url: String,
    platform: String,
    scope: String,
    ips: Vec<String>,
    count: u32,
    percentage: u8,
    timeout: u64,
}

/// What a registry is shown.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Login {
    Bearer(String),
    Basic { username: String, password: String },
}

/// A job in our words.
pub(crate) struct HarborJob {
    pub(crate) image: String,
    pub(crate) platform: Option<String>,
    pub(crate) scope: Scope,
    pub(crate) timeout_seconds: Option<u64>,
    pub(crate) login: Option<Login>,
    pub(crate) shown: Shown,
}

/// A seed or node that joined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) role: Role,
    pub(crate) name: String,
    /// Its address without the port.
    pub(crate) host: String,
}

impl JobRequest {
    /// `peers` are those that joined.
    pub(crate) fn read(&self, peers: &[Peer]) -> Result<HarborJob, JobError> {
        let kind = self.kind.as_deref().unwrap_or_default();
        if kind != "preheat" {
            return Err(JobError::Kind(kind.chars().take(40).collect()));
        }
        let none = Args::default();
        let args = self.args.as_ref().unwrap_or(&none);
        let content = args.content.as_deref().unwrap_or_default();
        if !matches!(content, "" | "image") {
            return Err(JobError::Content(content.chars().take(40).collect()));
        }
        let platform = args.platform.clone().filter(|platform| !platform.is_empty());
        if platform.as_deref().is_some_and(|platform| checked_platform(platform).is_err()) {
            return Err(JobError::Platform);
        }
        Ok(HarborJob {
            image: image(args.url.as_deref().unwrap_or_default())?,
            platform,
            scope: args.scope(peers)?,
            timeout_seconds: args.timeout_seconds()?,
            login: args.login()?,
            shown: args.shown(),
        })
    }
}

impl Args {
    /// Addresses count before a number, and a number before a share.
    fn scope(&self, peers: &[Peer]) -> Result<Scope, JobError> {
        let ips = self.ips.as_deref().unwrap_or_default();
        let (count, share) = (self.count.unwrap_or_default(), self.percentage.unwrap_or_default());
        if count > 200 || share > 100 {
            return Err(JobError::Share);
        }
        if ips.len() > LISTED_MAX {
            return Err(JobError::Ips);
        }
        match self.scope.as_deref().unwrap_or_default() {
            "" | "single_seed_peer" => Ok(Scope::OneSeed),
            "all_seed_peers" if !ips.is_empty() => {
                at(ips, peers.iter().filter(|peer| peer.role == Role::Seed))
            }
            "all_seed_peers" if count > 0 => Ok(Scope::Count(count)),
            "all_seed_peers" if share > 0 => Ok(Scope::Percent(share)),
            "all_seed_peers" => Ok(Scope::AllSeeds),
            "all_peers" if !ips.is_empty() => at(ips, peers.iter()),
            "all_peers" if count > 0 => Ok(Scope::CountOfNodes(count)),
            "all_peers" if share > 0 => Ok(Scope::PercentOfNodes(share)),
            "all_peers" => Ok(Scope::AllPeers),
            other => Err(JobError::Scope(other.chars().take(40).collect())),
        }
    }

    fn timeout_seconds(&self) -> Result<Option<u64>, JobError> {
        match self.timeout.unwrap_or_default().div_ceil(NANOSECONDS) {
            0 => Ok(None),
            seconds @ 1..=TIMEOUT_MAX => Ok(Some(seconds)),
            _ => Err(JobError::Timeout),
        }
    }

    /// The header counts before a user's name.
    fn login(&self) -> Result<Option<Login>, JobError> {
        let username = self.username.clone().unwrap_or_default();
        let password = self.password.clone().unwrap_or_default();
        if username.chars().count().max(password.chars().count()) > SECRET_MAX {
            return Err(JobError::Secret);
        }
        let mut headers = self.headers.iter().flatten();
        match headers.find(|(name, _)| name.eq_ignore_ascii_case("authorization")) {
            Some((_, Value::String(header))) if !header.is_empty() => {
                login(header).ok_or(JobError::Authorization).map(Some)
            }
            Some((_, value)) if !matches!(value, Value::String(_) | Value::Null) => {
                Err(JobError::Authorization)
            }
            _ if username.is_empty() => Ok(None),
            _ => Ok(Some(Login::Basic { username, password })),
        }
    }

    fn shown(&self) -> Shown {
        Shown {
            content: "image".to_owned(),
            url: self.url.clone().unwrap_or_default(),
            platform: self.platform.clone().unwrap_or_default(),
            scope: self.scope.clone().unwrap_or_default(),
            ips: self.ips.clone().unwrap_or_default(),
            count: self.count.unwrap_or_default(),
            percentage: self.percentage.unwrap_or_default(),
            timeout: self.timeout.unwrap_or_default(),
        }
    }
}

/// What an `Authorization` header says (RFC 6750, section 2.1, and RFC 7617).
fn login(header: &str) -> Option<Login> {
    let (scheme, value) = header.split_once(' ').filter(|_| header.len() <= HEADER_MAX)?;
    if scheme.eq_ignore_ascii_case("bearer") {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~+/=".contains(&b);
        return (!value.is_empty() && value.bytes().all(plain)).then(|| Login::Bearer(value.to_owned()));
    }
    let (username, password) = basic(header)?;
    Some(Login::Basic { username, password })
}

/// The user's name and the password of an `Authorization: Basic`.
pub(crate) fn basic(header: &str) -> Option<(String, String)> {
    let (scheme, value) = header.split_once(' ')?;
    let bytes = STANDARD.decode(value.trim()).ok().filter(|_| scheme.eq_ignore_ascii_case("basic"))?;
    let text = String::from_utf8(bytes).ok()?;
    text.split_once(':').map(|(username, password)| (username.to_owned(), password.to_owned()))
}

/// The peers at these addresses; several may be at one.
fn at<'a>(ips: &[String], peers: impl Iterator<Item = &'a Peer>) -> Result<Scope, JobError> {
    let peers: Vec<&Peer> = peers.collect();
    let (mut seeds, mut nodes) = (Vec::new(), Vec::new());
    for ip in ips {
        let mut found = peers.iter().filter(|peer| peer.host == *ip).peekable();
        found.peek().ok_or_else(|| JobError::Ip(ip.chars().take(64).collect()))?;
        for peer in found {
            let list = if peer.role == Role::Seed { &mut seeds } else { &mut nodes };
            list.push(peer.name.clone());
        }
    }
    Ok(if nodes.is_empty() { Scope::Seeds(seeds) } else { Scope::Members { seeds, nodes } })
}

/// `host` of `host:port`, without the brackets of IPv6.
pub(crate) fn host(address: &str) -> &str {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.trim_start_matches('[').trim_end_matches(']')
}

/// The parts of a manifest's URL: registry, repository, tag or digest. It is as strict as the document of the API.
fn url_parts(url: &str) -> Option<(&str, &str, &str)> {
    let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"))?;
    let (registry, path) = rest.split_once("/v2/").filter(|_| url.len() <= URL_MAX)?;
    let (repository, reference) = path.rsplit_once("/manifests/")?;
    let (host, port) = registry.split_once(':').unwrap_or((registry, "0"));
    let (name, hash) = reference.split_once(':').unwrap_or((reference, "0"));
    let good = word(host, b".-")
        && host.as_bytes()[0].is_ascii_alphanumeric()
        && !port.is_empty()
        && port.bytes().all(|b| b.is_ascii_digit())
        && repository.split('/').all(|part| word(part, b"._-"))
        && word(name, b"._-")
        && !hash.is_empty()
        && hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    good.then_some((registry, repository, reference))
}

/// Letters, digits and these marks, one at least.
fn word(text: &str, marks: &[u8]) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || marks.contains(&b))
}

fn image(url: &str) -> Result<String, JobError> {
    let (registry, repository, reference) = url_parts(url).ok_or(JobError::Url)?;
    let mark = if reference.contains(':') { '@' } else { ':' };
    let image = format!("{registry}/{repository}{mark}{reference}");
    checked_image(&image).map(|()| image).map_err(|_| JobError::Url)
}

/// Where the blob is that belongs to the manifest at `url`.
pub(crate) fn blob_url(url: &str, blob: &str) -> String {
    let before = url.rsplit_once("/manifests/").map_or(url, |(before, _)| before);
    format!("{before}/blobs/{blob}")
}

/// Harbor takes any other word for a failure.
pub(crate) fn state(state: State) -> &'static str {
    match state {
        State::Pending | State::Running => "PENDING",
        State::Succeeded => "SUCCESS",
        State::Failed | State::Cancelled => "FAILURE",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(body: Value) -> Result<HarborJob, JobError> {
        let peer =
            |role, name: &str, address| Peer { role, name: name.to_owned(), host: host(address).to_owned() };
        let peers = [
            peer(Role::Seed, "seed-1", "10.0.0.1:7420"),
            peer(Role::Seed, "seed-2", "[::1]:1"),
            peer(Role::Node, "node-1", "[::1]:2"),
        ];
        serde_json::from_value::<JobRequest>(body).unwrap().read(&peers)
    }

    fn with(args: Value) -> Result<HarborJob, JobError> {
        let mut all = json!({ "type": "image", "url": "https://h.example:8443/v2/p/app/manifests/1.0" });
        all.as_object_mut().unwrap().extend(args.as_object().unwrap().clone());
        read(json!({ "type": "preheat", "args": all }))
    }

    #[test]
    fn request_as_harbor_writes_it_is_understood() {
        let job = read(json!({
            "type": "preheat",
            "args": {
                "type": "image", "url": "https://h.example/v2/library/app/manifests/v1", "tag": "",
                "filtered_query_params": "", "headers": {"Authorization": "Bearer abc"},
                "scope": "single_seed_peer", "concurrent_count": 0, "timeout": 0
            },
            "scheduler_cluster_ids": null
        }))
        .unwrap();
        assert_eq!((job.image.as_str(), &job.scope), ("h.example/library/app:v1", &Scope::OneSeed));
        assert!(job.login == Some(Login::Bearer("abc".to_owned())) && job.timeout_seconds.is_none());
        assert!(!serde_json::to_string(&job.shown).unwrap().contains("abc"));
    }

    #[test]
    fn zeros_and_nulls_mean_the_default() {
        let zeros = json!({
            "scope": "", "platform": "", "ips": [], "count": 0, "percentage": 0, "timeout": 0,
            "username": "", "password": "", "headers": {}
        });
        let nulls = json!({
            "scope": null, "platform": null, "ips": null, "count": null, "percentage": null, "timeout": null,
            "username": null, "password": null, "headers": null, "type": null
        });
        for args in [zeros, nulls] {
            let job = with(args).unwrap();
            assert_eq!((job.scope, job.platform, job.timeout_seconds), (Scope::OneSeed, None, None));
            assert!(job.login.is_none());
        }
    }

    #[test]
    fn scopes_of_seeds_are_ours_and_addresses_count_first() {
        let scope = |args: Value| with(args).map(|job| job.scope);
        assert_eq!(scope(json!({ "scope": "all_seed_peers" })), Ok(Scope::AllSeeds));
        let all = json!({ "scope": "all_seed_peers", "ips": ["::1"], "count": 2, "percentage": 50 });
        assert_eq!(scope(all), Ok(Scope::Seeds(vec!["seed-2".to_owned()])));
        assert_eq!(
            scope(json!({ "scope": "all_seed_peers", "count": 2, "percentage": 50 })),
            Ok(Scope::Count(2))
        );
        assert_eq!(scope(json!({ "scope": "all_seed_peers", "percentage": 50 })), Ok(Scope::Percent(50)));
        assert_eq!(scope(json!({ "scope": "all_peers" })), Ok(Scope::AllPeers));
        assert_eq!(scope(json!({ "scope": "all_peers", "count": 0, "percentage": 0 })), Ok(Scope::AllPeers));
        assert_eq!(
            scope(json!({ "scope": "all_peers", "count": 2, "percentage": 5 })),
            Ok(Scope::CountOfNodes(2))
        );
        assert_eq!(scope(json!({ "scope": "all_peers", "percentage": 5 })), Ok(Scope::PercentOfNodes(5)));
        let both = Scope::Members { seeds: vec!["seed-2".to_owned()], nodes: vec!["node-1".to_owned()] };
        assert_eq!(scope(json!({ "scope": "all_peers", "ips": ["::1"] })), Ok(both));
        let strange = scope(json!({ "scope": "all_seed_peers", "ips": ["10.9.9.9"] }));
        assert!(strange.unwrap_err().is_conflict());
        assert_eq!(scope(json!({ "ips": vec!["10.0.0.1"; 101] })), Err(JobError::Ips));
        assert!(scope(json!({ "scope": "nobody" })).is_err());
        assert!(scope(json!({ "scope": "all_seed_peers", "percentage": 101 })).is_err());
    }

    #[test]
    fn image_is_read_from_the_manifests_url() {
        let of = |url: &str| image(url).ok();
        assert_eq!(of("https://h:1/v2/a/b/manifests/t").as_deref(), Some("h:1/a/b:t"));
        let digest = format!("sha256:{}", "0".repeat(64));
        assert_eq!(of(&format!("http://h/v2/a/manifests/{digest}")), Some(format!("h/a@{digest}")));
        for bad in [
            "",
            "h/v2/a/manifests/t",
            "https://h/a",
            "https:///v2/a/manifests/t",
            "https://h/v2/a/manifests/",
        ] {
            assert_eq!(of(bad), None, "{bad:?} was taken");
        }
        assert_eq!(blob_url("https://h/v2/a/manifests/t", "sha256:0"), "https://h/v2/a/blobs/sha256:0");
    }

    #[test]
    fn timeout_is_in_nanoseconds() {
        assert_eq!(with(json!({ "timeout": 1 })).unwrap().timeout_seconds, Some(1));
        assert_eq!(with(json!({ "timeout": 60_000_000_000_u64 })).unwrap().timeout_seconds, Some(60));
        assert_eq!(
            with(json!({ "timeout": u64::MAX })).map(|job| job.timeout_seconds),
            Err(JobError::Timeout)
        );
    }

    #[test]
    fn header_counts_before_name_and_password() {
        let basic = Login::Basic { username: "u".to_owned(), password: "p:q".to_owned() };
        let headers = json!({ "headers": { "authorization": "Basic dTpwOnE=" }, "username": "x" });
        assert!(with(headers).unwrap().login == Some(basic.clone()));
        assert!(with(json!({ "username": "u", "password": "p:q" })).unwrap().login == Some(basic));
        for bad in [json!("Digest x"), json!("Bearer "), json!("Bearer a b"), json!(5), json!(["Bearer x"])] {
            assert!(with(json!({ "headers": { "Authorization": bad } })).is_err(), "{bad} was taken");
        }
        assert!(with(json!({ "headers": { "X-Other": 5, "Authorization": null } })).unwrap().login.is_none());
        assert!(with(json!({ "username": "x".repeat(4097) })).is_err());
    }

    #[test]
    fn other_jobs_are_refused() {
        assert!(read(json!({ "type": "delete_task" })).is_err());
        assert!(read(json!({})).is_err());
        assert!(with(json!({ "type": "file" })).is_err());
    }
}
