//! Asks the manager over its REST API.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use reqwest::Method;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// No answer within this time is an error.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Where the manager is, and who asks.
#[derive(Debug, clap::Args)]
pub struct Place {
    /// The manager's REST API
    #[arg(long, default_value = "http://127.0.0.1:7480", env = "DARTER_MANAGER")]
    manager: String,
    /// File with an API token that may do this; the manager wrote the first one at its first start
    #[arg(long, default_value = "/var/lib/darter-manager/api-token", env = "DARTER_API_TOKEN_FILE")]
    token_file: PathBuf,
}

pub struct Manager {
    client: reqwest::Client,
    base: String,
    token: String,
}

impl Place {
    /// Fails if the token can't be read; nobody is asked yet.
    pub fn open(&self) -> Result<Manager> {
        let token = std::fs::read_to_string(&self.token_file).with_context(|| {
            format!(
                "the manager's API token could not be read from {}; name its file with --token-file",
                self.token_file.display()
            )
        })?;
        let client = reqwest::Client::builder().timeout(TIMEOUT).no_proxy().build()?;
        let base = self.manager.trim_end_matches('/').to_owned();
        Ok(Manager { client, base, token: token.trim().to_owned() })
    }
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
        let answer = request
            .bearer_auth(&self.token)
            .send()
            .await
            .with_context(|| format!("no manager answers at {}; name it with --manager", self.base))?;
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
