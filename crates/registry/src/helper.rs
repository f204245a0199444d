//! Credential helpers: programs that Docker's configuration names instead of a password (`credHelpers`, `credsStore`).
//!
//! `docker-credential-NAME get` reads a registry's name from its input and answers with JSON (docker-credential-helpers, "Development").
//! Some of them ask a cloud, so an answer is kept for some minutes, a helper is asked once however many wait for what it says
//! of a registry, and none is waited for without end. Asking goes on when nobody waits any more: the next one finds the answer.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use darter_daemon::tasks::alone;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use parking_lot::Mutex;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::credential::Credential;

/// What a helper said is taken for true for so long: shorter than any token that one gives lives.
const KEPT_FOR: Duration = Duration::from_secs(300);
/// After that it is asked again, and what it said counts until it has answered, for so long in all.
const STALE_FOR: Duration = Duration::from_secs(1800);
/// That it has nothing is believed for so long.
const NOTHING_FOR: Duration = Duration::from_secs(30);
/// A helper that takes longer is ended, the wait for its turn included.
const PATIENCE: Duration = Duration::from_secs(10);
/// Helpers that run at a time; who finds them busy waits for its turn.
const RUNNING_MAX: usize = 16;
/// Registries that answers are kept for; at more all are forgotten.
const KEPT_MAX: usize = 1024;

/// How the helpers name a registry that Docker knows by an older name.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// A helper's name, and the registry that it is asked about.
type Key = (String, String);

/// An answer that several may wait for.
type Flight = Shared<BoxFuture<'static, Option<Credential>>>;

/// What helpers have said, and what they are being asked.
#[derive(Clone)]
pub(crate) struct Helpers(Arc<Inner>);

struct Inner {
    known: Mutex<HashMap<Key, Known>>,
    running: Semaphore,
    /// Where they are; empty: on the path.
    folder: PathBuf,
    patience: Duration,
}

#[derive(Default)]
struct Known {
    said: Option<Said>,
    asking: Option<Flight>,
    /// When it failed while what it had said before still counted.
    failed_at: Option<Instant>,
}

struct Said {
    at: Instant,
    credential: Option<Credential>,
    /// It was ended because it didn't answer.
    was_silent: bool,
}

impl Said {
    fn holds(&self) -> bool {
        self.at.elapsed() < if self.credential.is_some() { KEPT_FOR } else { NOTHING_FOR }
    }

    /// Whether it counts while the helper is being asked again.
    fn counts_meanwhile(&self) -> bool {
        self.was_silent || (self.credential.is_some() && self.at.elapsed() < STALE_FOR)
    }
}

/// Why a helper gave no answer.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("no answer within {} s", .0.as_secs_f32())]
    Silent(Duration),
    #[error("{0}")]
    Broken(String),
}

#[derive(serde::Deserialize)]
struct Answer {
    #[serde(rename = "Username", default)]
    username: String,
    #[serde(rename = "Secret", default)]
    secret: String,
}

impl Default for Helpers {
    fn default() -> Self {
        Self::new(PathBuf::new(), PATIENCE)
    }
}

impl Helpers {
    fn new(folder: PathBuf, patience: Duration) -> Self {
        let running = Semaphore::new(RUNNING_MAX);
        Self(Arc::new(Inner { known: Mutex::default(), running, folder, patience }))
    }

    /// What the helper of this name has for the registry. What is known is told without a wait. One that didn't answer
    /// is asked again after a while, but nobody waits for it before it has answered.
    pub(crate) async fn credential(&self, helper: &str, authority: &str) -> Option<Credential> {
        match self.known_or_asked(helper, authority) {
            Ok(known) => known,
            Err(flight) => flight.await,
        }
    }

    /// Sees to it that the answer is known soon.
    pub(crate) fn ask_ahead(&self, helper: &str, authority: &str) {
        let _ = self.known_or_asked(helper, authority);
    }

    fn known_or_asked(&self, helper: &str, authority: &str) -> Result<Option<Credential>, Flight> {
        let mut all = self.0.known.lock();
        let known = entry(&mut all, (helper.to_owned(), authority.to_owned()));
        if let Some(said) = known.said.as_ref().filter(|said| said.holds()) {
            return Ok(said.credential.clone());
        }
        let is_resting = known.failed_at.is_some_and(|at| at.elapsed() < NOTHING_FOR);
        if let Some(said) = known.said.as_ref().filter(|said| is_resting && said.counts_meanwhile()) {
            return Ok(said.credential.clone());
        }
        let flight = known.asking.get_or_insert_with(|| self.start(helper, authority)).clone();
        match known.said.as_ref().filter(|said| said.counts_meanwhile()) {
            Some(said) => Ok(said.credential.clone()),
            None => Err(flight),
        }
    }

    fn start(&self, helper: &str, authority: &str) -> Flight {
        let (inner, helper, authority) = (self.0.clone(), helper.to_owned(), authority.to_owned());
        let asking = tokio::spawn(async move { inner.ask(helper, authority).await });
        // It fails only when the program stops.
        asking.map(|ended| ended.ok().flatten()).boxed().shared()
    }
}

/// The place for what is known under this key.
fn entry(all: &mut HashMap<Key, Known>, key: Key) -> &mut Known {
    if all.len() >= KEPT_MAX && !all.contains_key(&key) {
        all.clear();
    }
    all.entry(key).or_default()
}

impl Inner {
    /// Asks, and writes the answer down.
    async fn ask(&self, helper: String, authority: String) -> Option<Credential> {
        let asking = async {
            // The semaphore is never closed.
            let _turn = self.running.acquire().await;
            ask(&self.folder, &helper, &authority).await.map_err(Fault::Broken)
        };
        let silent = |_| Err(Fault::Silent(self.patience));
        let ended = alone("credential helper", timeout(self.patience, asking)).await;
        let found = match ended {
            Ok(ended) => ended.unwrap_or_else(silent),
            Err(broken) => Err(Fault::Broken(broken.to_string())),
        };
        if let Err(error) = &found {
            tracing::warn!(helper, authority, %error, "a credential helper failed");
        }
        let was_silent = matches!(found, Err(Fault::Silent(_)));
        let mut all = self.known.lock();
        let known = entry(&mut all, (helper, authority));
        known.asking = None;
        // What it has said before counts on while it can't say anything: only an answer takes that away.
        let before = known.said.as_ref().filter(|said| said.credential.is_some() && said.counts_meanwhile());
        if let (Err(_), Some(before)) = (&found, before) {
            known.failed_at = Some(Instant::now());
            return before.credential.clone();
        }
        known.failed_at = None;
        let credential = found.ok().flatten();
        known.said = Some(Said { at: Instant::now(), credential: credential.clone(), was_silent });
        credential
    }
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
    let ended = child.wait_with_output().await.map_err(|error| error.to_string())?;
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
    fn helpers(all: &[(&str, &str)], patience: Duration) -> (Helpers, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        for (name, script) in all {
            let file = folder.path().join(format!("docker-credential-{name}"));
            std::fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        (Helpers::new(folder.path().to_owned(), patience), folder)
    }

    /// As if what is known had been said so long ago.
    fn since(helpers: &Helpers, key: &Key, time: Duration) {
        let then = Instant::now().checked_sub(time).unwrap();
        helpers.0.known.lock().get_mut(key).unwrap().said.as_mut().unwrap().at = then;
    }

    fn calls(folder: &tempfile::TempDir, name: &str) -> usize {
        let file = folder.path().join(format!("docker-credential-{name}.calls"));
        std::fs::read_to_string(file).unwrap_or_default().lines().count()
    }

    #[tokio::test]
    async fn answer_is_asked_for_once_and_kept() {
        let script = r#"read s; echo x >> "$0.calls"; echo "{\"Username\":\"me\",\"Secret\":\"of $s\"}""#;
        let (helpers, folder) = helpers(&[("counts", script)], PATIENCE);
        let expected = Credential::from_user("me:of r.example:5000");
        let asked = (0..8).map(|_| helpers.credential("counts", "r.example:5000"));
        for answer in futures_util::future::join_all(asked).await {
            assert_eq!(answer, expected);
        }
        // What is known is there without a wait.
        assert_eq!(helpers.credential("counts", "r.example:5000").now_or_never(), Some(expected.clone()));
        assert_eq!(calls(&folder, "counts"), 1);
        // Some minutes later it is asked again, and what it said counts meanwhile; after an hour no more.
        let key = ("counts".to_owned(), "r.example:5000".to_owned());
        since(&helpers, &key, KEPT_FOR);
        assert_eq!(helpers.credential("counts", "r.example:5000").now_or_never(), Some(expected.clone()));
        assert!(helpers.0.known.lock()[&key].asking.is_some());
        since(&helpers, &key, STALE_FOR);
        assert_eq!(helpers.credential("counts", "r.example:5000").now_or_never(), None);
        assert_eq!(helpers.credential("counts", "r.example:5000").await, expected);
        assert_eq!(calls(&folder, "counts"), 2);
    }

    #[tokio::test]
    async fn answer_counts_on_while_the_helper_fails() {
        let script = r#"echo x >> "$0.calls"; [ $(wc -l < "$0.calls") = 1 ] && echo '{"Username":"a","Secret":"b"}' || echo rubbish"#;
        let (helpers, folder) = helpers(&[("breaks", script)], PATIENCE);
        let expected = Credential::from_user("a:b");
        assert_eq!(helpers.credential("breaks", "r").await, expected);
        let key = ("breaks".to_owned(), "r".to_owned());
        since(&helpers, &key, KEPT_FOR);
        assert_eq!(helpers.credential("breaks", "r").await, expected);
        while helpers.0.known.lock()[&key].failed_at.is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // It rests before it is asked again.
        assert_eq!(helpers.credential("breaks", "r").now_or_never(), Some(expected));
        assert_eq!(calls(&folder, "breaks"), 2);
        // What it said has aged: it counts no more.
        since(&helpers, &key, STALE_FOR);
        assert_eq!(helpers.credential("breaks", "r").await, None);
        assert_eq!(calls(&folder, "breaks"), 3);
    }

    #[tokio::test]
    async fn asking_goes_on_when_nobody_waits() {
        let (helpers, _folder) = helpers(&[("slow", r#"echo '{"Username":"a","Secret":"b"}'"#)], PATIENCE);
        assert_eq!(helpers.credential("slow", "r").now_or_never(), None);
        let key = ("slow".to_owned(), "r".to_owned());
        while helpers.0.known.lock()[&key].said.is_none() {
            tokio::task::yield_now().await;
        }
        assert_eq!(helpers.credential("slow", "r").now_or_never(), Some(Credential::from_user("a:b")));
    }

    #[tokio::test]
    async fn silent_helper_is_ended_and_then_waited_for_no_more() {
        let script = r#"echo x >> "$0.calls"; exec sleep 600"#;
        let (helpers, folder) = helpers(&[("hangs", script)], Duration::from_millis(300));
        let asked = (0..4).map(|_| helpers.credential("hangs", "r"));
        assert!(futures_util::future::join_all(asked).await.iter().all(Option::is_none));
        assert_eq!(calls(&folder, "hangs"), 1);
        // Long after: it is asked again, and nobody waits.
        let key = ("hangs".to_owned(), "r".to_owned());
        since(&helpers, &key, NOTHING_FOR);
        assert_eq!(helpers.credential("hangs", "r").now_or_never(), Some(None));
        assert!(helpers.0.known.lock()[&key].asking.is_some());
    }

    #[tokio::test]
    async fn tokens_refusals_and_rubbish_are_told_apart() {
        let all = [
            ("token", r#"echo '{"Username":"<token>","Secret":"refresh"}'"#),
            ("nothing", "echo 'credentials not found in native keychain'; exit 1"),
            ("rubbish", "echo hello"),
        ];
        let (helpers, _folder) = helpers(&all, PATIENCE);
        let token = Some(Credential::IdentityToken("refresh".to_owned()));
        assert_eq!(helpers.credential("token", "r").await, token);
        for name in ["nothing", "rubbish", "no-such", "../bad"] {
            assert_eq!(helpers.credential(name, "r").await, None, "{name}");
        }
    }
}
