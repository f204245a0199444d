//! The client against servers that really speak HTTP, on loopback.

mod auth;
mod blob;
mod hosts;
mod manifest;
mod mirrors;
mod real;
mod server;

use std::time::Duration;

use darter_registry::{Client, Credential, Options, Patience};
use darter_types::Repository;

use server::Server;

/// Tries again soon and gives up soon.
fn patience() -> Patience {
    Patience {
        connect: Duration::from_secs(5),
        contact: Duration::from_secs(1),
        stall: Duration::from_secs(5),
        answer: Duration::from_secs(1),
        resume: Duration::from_secs(5),
        wait_min: Duration::from_millis(1),
        wait_max: Duration::from_millis(20),
    }
}

fn client() -> Client {
    Client::new(Options { patience: patience(), ..Options::default() }).unwrap()
}

fn repository(server: &Server) -> Repository {
    format!("http://{}/team/app", server.authority).parse().unwrap()
}

fn user() -> Credential {
    Credential::from_user("me:hunter2").unwrap()
}

/// `me:hunter2`, encoded.
const BASIC: &str = "Basic bWU6aHVudGVyMg==";

/// Neither the password nor a token may be in what is shown to people.
fn assert_no_secret(error: &darter_registry::RegistryError) {
    for text in [error.to_string(), format!("{error:?}")] {
        for secret in ["hunter2", "bWU6aHVudGVyMg==", "the-token", "signature"] {
            assert!(!text.contains(secret), "{text}");
        }
    }
}
