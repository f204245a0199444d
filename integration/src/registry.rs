//! Debian's docker-registry with a password, and a push by curl.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::command::{Daemon, Run};
use crate::image::{Blobs, Descriptor, Image};
use crate::world::{Host, World};

pub const USER: &str = "reader";
pub const PASSWORD: &str = "correct-horse";
const PORT: u16 = 5000;

/// A registry that is running on a host of its own.
pub struct Registry {
    host: Host,
    daemon: Daemon,
}

/// One request as the registry logged it when it had answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub from: String,
    pub method: String,
    pub path: String,
    pub status: u16,
    pub bytes: u64,
}

impl Request {
    /// A successful read of a blob that is a layer of `image`.
    pub fn is_layer_of(&self, image: &Image) -> bool {
        self.method == "GET"
            && self.status < 300
            && image.layers.iter().any(|layer| self.path.ends_with(&format!("/blobs/{}", layer.blob.digest)))
    }
}

impl Registry {
    /// Starts it on a host named `role`, with its own storage.
    pub fn start(world: &World, role: &str) -> Result<Self> {
        let (host, folder) = (world.host(role)?, world.folder(role)?);
        let passwords = folder.join("htpasswd");
        let line = Run::new("htpasswd").args(["-Bbn", USER, PASSWORD]).check()?;
        fs::write(&passwords, line)?;
        let config = folder.join("config.yml");
        fs::write(&config, configuration(&folder.join("storage"), &passwords))?;
        let run = host.run("docker-registry").arg("serve").arg(config.display());
        let mut daemon = Daemon::start(role, run, &folder.join("log"))?;
        daemon.wait_ready(20, || answers(&host, PORT))?;
        Ok(Self { host, daemon })
    }

    pub fn host(&self) -> &Host {
        &self.host
    }

    pub fn authority(&self) -> String {
        format!("{}:{PORT}", self.host.address())
    }

    /// `host:port/name:tag`, as clients take it.
    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}:latest", self.authority())
    }

    pub fn push(&self, blobs: &Blobs, image: &Image, name: &str) -> Result<()> {
        self.push_as(blobs, image, name, "latest")
    }

    pub fn push_as(&self, blobs: &Blobs, image: &Image, name: &str, tag: &str) -> Result<()> {
        for layer in &image.layers {
            self.push_blob(blobs, &layer.blob, name)?;
        }
        self.push_blob(blobs, &image.config, name)?;
        let url = format!("{}/v2/{name}/manifests/{tag}", self.url());
        let kind = format!("Content-Type: {}", image.manifest.media_type);
        let body = blobs.path(&image.manifest.digest);
        self.curl()
            .args(["-X", "PUT", "-H", &kind, "--data-binary"])
            .arg(format!("@{}", body.display()))
            .arg(url)
            .check()?;
        Ok(())
    }

    /// Pushes the image of an OCI layout as people do, with skopeo.
    pub fn push_layout(&self, layout: &Path, name: &str) -> Result<()> {
        let login = format!("{USER}:{PASSWORD}");
        let copy = ["--insecure-policy", "copy", "-q", "--dest-tls-verify=false", "--dest-creds", &login];
        let skopeo = self.host.run("skopeo").args(copy).arg(format!("oci:{}:latest", layout.display()));
        skopeo.arg(format!("docker://{}", self.reference(name))).timeout(120).check().map(drop)
    }

    pub fn push_blob(&self, blobs: &Blobs, blob: &Descriptor, name: &str) -> Result<()> {
        let uploads = format!("{}/v2/{name}/blobs/uploads/", self.url());
        let head = self.curl().args(["-X", "POST", "-D", "-", "-o", "/dev/null", &uploads]).check()?;
        let place = header(&head, "location").context("the registry named no place for the upload")?;
        let url = format!("{place}{}digest={}", if place.contains('?') { "&" } else { "?" }, blob.digest);
        let file = blobs.path(&blob.digest);
        self.curl()
            .args(["-X", "PUT", "-H", "Content-Type: application/octet-stream", "-T"])
            .arg(file.display())
            .arg(url)
            .timeout(300)
            .check()?;
        Ok(())
    }

    /// Fails unless it has the image whole: manifest, configuration, each layer.
    pub fn must_have(&self, image: &Image, name: &str) -> Result<()> {
        let layers = image.layers.iter().map(|layer| &layer.blob);
        let blobs = layers.chain([&image.config]).map(|blob| format!("blobs/{}", blob.digest));
        for what in blobs.chain([format!("manifests/{}", image.manifest.digest)]) {
            let accept = format!("Accept: {}", image.manifest.media_type);
            let head =
                self.curl().args(["-I", "-H", &accept]).arg(format!("{}/v2/{name}/{what}", self.url()));
            head.check().with_context(|| format!("the registry lacks {what} of {name}"))?;
        }
        Ok(())
    }

    /// Takes a blob away from below the registry, as a garbage collection there would.
    pub fn forget_blob(&self, world: &World, digest: &str) -> Result<()> {
        let hex = digest.strip_prefix("sha256:").context("not a digest")?;
        let blobs = self.storage(world)?.join("docker/registry/v2/blobs/sha256");
        Ok(fs::remove_dir_all(blobs.join(&hex[..2]).join(hex))?)
    }

    /// Every request so far that was answered to its end.
    pub fn requests(&self) -> Vec<Request> {
        requests_in(&self.daemon.log_text())
    }

    /// Where it keeps what was pushed.
    pub(crate) fn storage(&self, world: &World) -> Result<PathBuf> {
        Ok(world.folder(self.host.role())?.join("storage"))
    }

    pub fn stop(&mut self) {
        self.daemon.kill();
    }

    fn url(&self) -> String {
        format!("http://{}", self.authority())
    }

    fn curl(&self) -> Run {
        self.host.run("curl").args(["-sSf", "-u", &format!("{USER}:{PASSWORD}")])
    }
}

/// Whether a registry at this port of the host asks who is there.
pub(crate) fn answers(host: &Host, port: u16) -> bool {
    let url = format!("http://{}:{port}/v2/", host.address());
    let code = host.run("curl").args(["-s", "-o", "/dev/null", "-w", "%{http_code}", &url]).output();
    code.is_ok_and(|code| code.stdout == "401")
}

fn configuration(storage: &Path, passwords: &Path) -> String {
    format!(
        "version: 0.1
log: {{level: warn}}
storage:
  filesystem: {{rootdirectory: {}}}
  delete: {{enabled: true}}
http: {{addr: \"0.0.0.0:{PORT}\", secret: test}}
auth:
  htpasswd: {{realm: darter, path: {}}}
",
        storage.display(),
        passwords.display()
    )
}

fn header(head: &str, name: &str) -> Option<String> {
    let found = head
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.eq_ignore_ascii_case(name))?;
    Some(found.1.trim().to_owned())
}

/// The requests that a registry has logged.
pub(crate) fn requests_in(log: &str) -> Vec<Request> {
    log.lines().filter_map(request).collect()
}

/// Apache's combined format: `10.77.0.12 - - [time] "GET /v2/… HTTP/1.1" 200 1234 "" "agent"`.
fn request(line: &str) -> Option<Request> {
    let (head, rest) = line.split_once("] \"")?;
    let (what, rest) = rest.split_once("\" ")?;
    let mut what = what.split(' ');
    let mut rest = rest.split(' ');
    Some(Request {
        from: head.split(' ').next()?.to_owned(),
        method: what.next()?.to_owned(),
        path: what.next()?.to_owned(),
        status: rest.next()?.parse().ok()?,
        bytes: rest.next()?.parse().ok()?,
    })
}

/// Fails unless the registry has sent each layer of `image` exactly `times`.
pub fn layers_served(requests: &[Request], image: &Image, times: u64) -> Result<()> {
    for layer in &image.layers {
        let tail = format!("/blobs/{}", layer.blob.digest);
        let got = requests.iter().filter(|r| r.method == "GET" && r.status < 300 && r.path.ends_with(&tail));
        let bytes: u64 = got.map(|r| r.bytes).sum();
        if bytes != layer.blob.size * times {
            bail!(
                "the registry sent {bytes} bytes of layer {} of {} bytes, not {times} times",
                layer.blob.digest,
                layer.blob.size
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_access_log_is_a_request() {
        let line = r#"10.77.0.12 - - [22/Nov/2026:08:00:00 +0000] "GET /v2/t/sci/blobs/sha256:ab HTTP/1.1" 200 1234 "" "containerd/2.4""#;
        let request = request(line).expect("a request");
        assert_eq!((request.from.as_str(), request.status, request.bytes), ("10.77.0.12", 200, 1234));
        assert_eq!(request.path, "/v2/t/sci/blobs/sha256:ab");
    }
}
