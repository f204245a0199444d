//! Names of images as people write them, read by Docker's rules.

use std::fmt;
use std::str::FromStr;

use darter_types::{Digest, Registry, Repository, Scheme};

/// Why a text names no image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid reference format: {text:?}: {reason}")]
pub struct ReferenceError {
    text: String,
    reason: String,
}

/// What a manifest is asked for by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Reference {
    Tag(String),
    Digest(Digest),
}

impl From<Digest> for Reference {
    fn from(digest: Digest) -> Self {
        Self::Digest(digest)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

/// The full name of an image: `docker.io/library/alpine:latest` for `alpine`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ImageRef {
    /// Host, with `:port` if one was written; `docker.io` for Docker's own.
    pub registry_authority: String,
    pub name: String,
    /// `latest` where neither a tag nor a digest was written.
    pub tag: Option<String>,
    pub digest: Option<Digest>,
}

impl ImageRef {
    /// The digest if there is one, else the tag.
    pub fn reference(&self) -> Reference {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => Reference::Digest(*digest),
            (None, Some(tag)) => Reference::Tag(tag.clone()),
            (None, None) => Reference::Tag("latest".to_owned()),
        }
    }
}

impl FromStr for ImageRef {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let refuse = |reason: String| ReferenceError { text: text.chars().take(300).collect(), reason };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse().map_err(|e| refuse(format!("{e}")))?)),
            None => (text, None),
        };
        let (path, tag) = split_tag(rest);
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(refuse("the tag must be up to 128 of A-Z, a-z, 0-9, '_', '.' and '-'".to_owned()));
        }
        let (registry_authority, name) = split_domain(path);
        let registry =
            Registry::new(Scheme::Https, &registry_authority).map_err(|e| refuse(e.to_string()))?;
        Repository::new(registry, &name).map_err(|e| refuse(e.to_string()))?;
        let latest = digest.is_none().then_some("latest");
        Ok(Self { registry_authority, name, tag: tag.or(latest).map(str::to_owned), digest })
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry_authority, self.name)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// A colon behind the last slash starts a tag; one before it belongs to a port.
fn split_tag(text: &str) -> (&str, Option<&str>) {
    let last = text.rfind('/').map_or(0, |slash| slash + 1);
    match text[last..].split_once(':') {
        Some((name, tag)) => (&text[..last + name.len()], Some(tag)),
        None => (text, None),
    }
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    tag.len() <= 128
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

/// The first component is a host if it has a dot, a colon or an upper-case letter, or is `localhost`.
fn split_domain(path: &str) -> (String, String) {
    let is_host = |part: &str| {
        part == "localhost" || part.contains(['.', ':']) || part.bytes().any(|b| b.is_ascii_uppercase())
    };
    let (host, name) = match path.split_once('/') {
        Some((host, name)) if is_host(host) => (host.to_ascii_lowercase(), name),
        _ => ("docker.io".to_owned(), path),
    };
    let host = if host == "index.docker.io" { "docker.io".to_owned() } else { host };
    let name =
        if host == "docker.io" && !name.contains('/') { format!("library/{name}") } else { name.to_owned() };
    (host, name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(text: &str) -> String {
        text.parse::<ImageRef>().unwrap().to_string()
    }

    #[test]
    fn short_names_are_docker_hubs() {
        assert_eq!(full("alpine"), "docker.io/library/alpine:latest");
        assert_eq!(full("team/app:1.2"), "docker.io/team/app:1.2");
        assert_eq!(full("index.docker.io/alpine"), "docker.io/library/alpine:latest");
    }

    #[test]
    fn ports_are_no_tags() {
        assert_eq!(full("localhost:5000/app"), "localhost:5000/app:latest");
        assert_eq!(full("127.0.0.1:5000/a/b:c"), "127.0.0.1:5000/a/b:c");
        assert_eq!(full("[::1]:5000/a"), "[::1]:5000/a:latest");
    }

    #[test]
    fn digest_wins_over_tag() {
        let digest = Digest::of(b"x");
        let image: ImageRef = format!("r.example/a:t@{digest}").parse().unwrap();
        assert_eq!(image.reference(), Reference::Digest(digest));
        assert_eq!(image.to_string(), format!("r.example/a:t@{digest}"));
        let bare: ImageRef = format!("r.example/a@{digest}").parse().unwrap();
        assert_eq!(bare.tag, None);
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in ["", "a:", "a:-x", "r.example/A", "r.example/", "a@sha256:00", "r.example/../a", "a b"] {
            assert!(bad.parse::<ImageRef>().is_err(), "{bad:?} was taken");
        }
    }
}
