//! Asks the manager over its REST API.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use reqwest::{Method, Url};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// No answer within this time is an error.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Where members connect, which is what `manager` means in the configurations; the REST API is elsewhere.
const MEMBERS_PORT: u16 = 7400;

/// Where the manager is, and who asks.
#[derive(Debug, clap::Args)]
pub struct Place {
    /// The manager's REST API, http://HOST:7480 or HOST:7480, or https:// where a proxy is before it; not `manager` of the
    /// configurations, which is where members connect
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:7480", env = "DARTER_MANAGER", value_parser = base)]
    manager: String,
    /// File with an API token that may do this; the manager wrote the first one at its first start [default:
    /// /var/lib/darter-manager/api-token, or /var/lib/darter/manager/api-token, which is standalone's]
    #[arg(long, value_name = "FILE", env = "DARTER_API_TOKEN_FILE")]
    token_file: Option<PathBuf>,
}

/// Where the first API token lies: the manager's, and that of `darter standalone`.
const FIRST_TOKENS: [&str; 2] = ["/var/lib/darter-manager/api-token", "/var/lib/darter/manager/api-token"];

pub struct Manager {
    client: reqwest::Client,
    base: String,
    token: String,
}

impl Place {
    /// Fails if the token can't be read; nobody is asked yet.
    pub fn open(&self) -> Result<Manager> {
        let token = match &self.token_file {
            Some(file) => read_first(&[file.as_path()])?,
            None => read_first(&FIRST_TOKENS.map(Path::new))?,
        };
        let client = reqwest::Client::builder().timeout(TIMEOUT).no_proxy().build()?;
        Ok(Manager { client, base: self.manager.clone(), token: token.trim().to_owned() })
    }
}

/// What the first of these files that is there holds.
fn read_first(files: &[&Path]) -> Result<String> {
    for file in files {
        match std::fs::read_to_string(file) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            read => {
                return read.with_context(|| {
                    format!(
                        "the manager's API token could not be read from {}; name its file with --token-file",
                        file.display()
                    )
                });
            }
        }
    }
    let names: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
    bail!("the manager's API token is not in {}; name its file with --token-file", names.join(" or "))
}

/// The address of the API without a slash at its end. What has no scheme is plain HTTP, as the manager speaks it.
fn base(text: &str) -> Result<String, String> {
    let wrong = |why: &str| {
        Err(format!("{text:?} {why}: write http://HOST:7480, or https://HOST where a proxy is before it"))
    };
    let has_port = text.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let whole = match text.split_once("://") {
        Some(("http" | "https", _)) => text.to_owned(),
        Some(_) => return wrong("is neither http nor https"),
        None if has_port => format!("http://{text}"),
        None => return wrong("has no port"),
    };
    match Url::parse(&whole) {
        Ok(url) if url.query().is_none() && url.fragment().is_none() => {
            Ok(whole.trim_end_matches('/').to_owned())
        }
        _ => wrong("is no address"),
    }
}

/// What is said of an address where nobody answers as a manager does.
fn nobody_at(base: &str) -> String {
    if Url::parse(base).is_ok_and(|url| url.port() == Some(MEMBERS_PORT)) {
        return format!(
            "{base} is where members connect; the REST API has another port, 7480 unless the manager's http_listen says otherwise: \
             name it with --manager"
        );
    }
    format!("no manager answers at {base}; name it with --manager")
}

impl Manager {
    /// `path` is what follows `/api/v1`.
    pub async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<T> {
        let mut request = self.client.request(method, format!("{}/api/v1{path}", self.base));
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = request.bearer_auth(&self.token).send().await.with_context(|| nobody_at(&self.base))?;
        let status = answer.status();
        let body = answer.bytes().await.context("the manager's answer broke off")?;
        if !status.is_success() {
            #[derive(Deserialize)]
            struct Refusal {
                error: String,
            }
            let words = serde_json::from_slice::<Refusal>(&body).map(|refusal| refusal.error);
            bail!(
                "the manager refused ({status}): {}",
                words.unwrap_or_else(|_| String::from_utf8_lossy(&body).into_owned())
            );
        }
        serde_json::from_slice(&body).context("the manager's answer is not what this version of darter knows")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_without_a_scheme_is_plain_http() {
        for (text, wanted) in [
            ("127.0.0.1:7480", "http://127.0.0.1:7480"),
            ("localhost:7480", "http://localhost:7480"),
            ("[::1]:7480", "http://[::1]:7480"),
            ("http://manager.example:7480/", "http://manager.example:7480"),
            ("https://darter.example", "https://darter.example"),
            ("https://darter.example/darter/", "https://darter.example/darter"),
        ] {
            assert_eq!(base(text).as_deref(), Ok(wanted), "{text}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_form_that_is_wanted() {
        for (text, why) in [
            ("manager.example", "has no port"),
            ("", "has no port"),
            ("grpc://manager.example:7480", "is neither http nor https"),
            ("http://", "is no address"),
            ("a b:7480", "is no address"),
            ("http://manager.example:7480/?a=b", "is no address"),
        ] {
            let error = base(text).unwrap_err();
            assert!(error.contains(why) && error.contains("http://HOST:7480"), "{error}");
        }
    }

    #[test]
    fn token_is_read_from_the_first_file_that_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (folder.path().join("one"), folder.path().join("other"));
        let error = read_first(&[one.as_path(), other.as_path()]).unwrap_err().to_string();
        assert!(error.contains("one or ") && error.contains("other; name its file"), "{error}");
        std::fs::write(&other, "second").unwrap();
        assert_eq!(read_first(&[one.as_path(), other.as_path()]).unwrap(), "second");
        std::fs::write(&one, "first").unwrap();
        assert_eq!(read_first(&[one.as_path(), other.as_path()]).unwrap(), "first");
        // What is there and can't be read is not passed over for another manager's.
        std::fs::remove_file(&one).unwrap();
        std::fs::create_dir(&one).unwrap();
        let error = read_first(&[one.as_path(), other.as_path()]).unwrap_err().to_string();
        assert!(error.contains("could not be read from"), "{error}");
    }

    #[test]
    fn port_of_members_is_told_from_a_manager_that_is_away() {
        assert!(nobody_at("http://manager.example:7400").contains("where members connect"));
        assert!(nobody_at("http://manager.example:7480").starts_with("no manager answers at"));
    }
}
