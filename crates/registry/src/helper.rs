//! Credential helpers: programs that Docker's configuration names instead of a password (`credHelpers`, `credsStore`).
//!
//! `docker-credential-NAME get` reads a registry's name from its input and answers with JSON (docker-credential-helpers, "Development").
//! Some of them ask a cloud, so an answer is kept for some minutes, and none is waited for without end.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::runtime::{Builder, Handle, RuntimeFlavor};
use tokio::time::timeout;

use crate::credential::Credential;

/// What a helper said is taken for true for so long: shorter than any token that one gives lives.
const KEPT_FOR: Duration = Duration::from_secs(300);
/// That it has nothing is believed for so long.
const NOTHING_FOR: Duration = Duration::from_secs(30);
/// A helper that takes longer is ended.
const PATIENCE: Duration = Duration::from_secs(10);
/// Answers that are kept; at more all are forgotten.
const KEPT_MAX: usize = 1024;

/// How the helpers name a registry that Docker knows by an older name.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

type Kept = HashMap<(String, String), (Instant, Option<Credential>)>;

/// What helpers have said.
#[derive(Default)]
pub(crate) struct Helpers {
    kept: Mutex<Kept>,
    /// Where they are; empty: on the path.
    folder: PathBuf,
}

#[derive(serde::Deserialize)]
struct Answer {
    #[serde(rename = "Username", default)]
    username: String,
    #[serde(rename = "Secret", default)]
    secret: String,
}

impl Helpers {
    /// What the helper of this name has for the registry. It may block for [`PATIENCE`].
    pub(crate) fn credential(&self, helper: &str, authority: &str) -> Option<Credential> {
        let key = (helper.to_owned(), authority.to_owned());
        if let Some((since, kept)) = self.kept.lock().get(&key)
            && since.elapsed() < if kept.is_some() { KEPT_FOR } else { NOTHING_FOR }
        {
            return kept.clone();
        }
        let found = beside(|| ask_blocking(&self.folder, helper, authority));
        let found =
            found.inspect_err(|error| tracing::warn!(helper, authority, error, "a credential helper failed"));
        let found = found.ok().flatten();
        let mut kept = self.kept.lock();
        if kept.len() >= KEPT_MAX {
            kept.clear();
        }
        kept.insert(key, (Instant::now(), found.clone()));
        found
    }
}

/// Lets other tasks of this thread go on elsewhere.
fn beside<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

/// On a thread of its own, since a runtime can't wait within another one.
fn ask_blocking(folder: &Path, helper: &str, authority: &str) -> Result<Option<Credential>, String> {
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let runtime =
                Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
            runtime.block_on(ask(folder, helper, authority))
        });
        asking.join().unwrap_or_else(|_| Err("it could not be asked".to_owned()))
    })
}

async fn ask(folder: &Path, helper: &str, authority: &str) -> Result<Option<Credential>, String> {
    if helper.contains('/') {
        return Err("a helper's name has no slash".to_owned());
    }
    let mut child = Command::new(folder.join(format!("docker-credential-{helper}")))
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("docker-credential-{helper} can't be started: {error}"))?;
    let server = if authority == "docker.io" { DOCKER_HUB } else { authority };
    if let Some(mut input) = child.stdin.take() {
        // One that doesn't read its input may end before; then its answer counts.
        let _ = input.write_all(server.as_bytes()).await;
    }
    let ended = timeout(PATIENCE, child.wait_with_output()).await;
    let ended = ended.map_err(|_| format!("no answer within {} s", PATIENCE.as_secs()))?;
    let ended = ended.map_err(|error| error.to_string())?;
    if !ended.status.success() {
        // This is how a helper says that it knows no such registry.
        return Ok(None);
    }
    // The error's own text could quote the secret.
    let answer: Answer =
        serde_json::from_slice(&ended.stdout).map_err(|_| "its answer is not what is expected")?;
    Ok(match answer.username.as_str() {
        "" => None,
        "<token>" => Some(Credential::IdentityToken(answer.secret)),
        _ => Some(Credential::Basic { username: answer.username, password: answer.secret }),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// Helpers in a folder of the test's own.
    fn helpers(all: &[(&str, &str)]) -> (Helpers, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        for (name, script) in all {
            let file = folder.path().join(format!("docker-credential-{name}"));
            std::fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        (Helpers { folder: folder.path().to_owned(), ..Helpers::default() }, folder)
    }

    #[test]
    fn answer_is_asked_for_once_and_kept() {
        let script = r#"read s; echo x >> "$0.calls"; echo "{\"Username\":\"me\",\"Secret\":\"of $s\"}""#;
        let (helpers, folder) = helpers(&[("counts", script)]);
        let expected = Credential::from_user("me:of r.example:5000");
        assert_eq!(helpers.credential("counts", "r.example:5000"), expected);
        assert_eq!(helpers.credential("counts", "r.example:5000"), expected);
        let calls = folder.path().join("docker-credential-counts.calls");
        assert_eq!(std::fs::read_to_string(calls).unwrap(), "x\n");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn tokens_refusals_and_rubbish_are_told_apart() {
        let (helpers, _folder) = helpers(&[
            ("token", r#"echo '{"Username":"<token>","Secret":"refresh"}'"#),
            ("nothing", "echo 'credentials not found in native keychain'; exit 1"),
            ("rubbish", "echo hello"),
        ]);
        let token = Some(Credential::IdentityToken("refresh".to_owned()));
        assert_eq!(helpers.credential("token", "r"), token);
        for name in ["nothing", "rubbish", "no-such", "../bad"] {
            assert_eq!(helpers.credential(name, "r"), None, "{name}");
        }
    }
}
