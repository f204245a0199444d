//! A program's life: runtime, work, exit code.

use std::future::Future;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;

use crate::tasks::Tasks;
use crate::{notify, shutdown};

/// How long work on blocking threads may hold up the end of the process.
const BLOCKING_GRACE: Duration = Duration::from_secs(2);

/// From now on what this process makes is for its user alone, unless it says otherwise: stores hold files of private images.
pub fn keep_private() {
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
}

/// Runs the whole program. `program` starts its parts, waits for [`crate::shutdown::wanted`] and stops them. An error
/// is printed as one line, `darter-peer: error: ...`, with its causes, and becomes exit code 1.
pub fn block_on_main<F>(program: F) -> ExitCode
where
    F: Future<Output = anyhow::Result<()>>,
{
    install_tls_provider();
    crate::memory::be_frugal();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&error.into()),
    };
    runtime.spawn(crate::telemetry::follow_signals());
    let outcome = runtime.block_on(program);
    runtime.shutdown_timeout(BLOCKING_GRACE);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report(&error),
    }
}

/// The life of a program of one part: `start` gives it unless a signal comes before, and `stop` ends it when a signal comes
/// or one of `tasks` failed, which is an error.
pub async fn serve<P, E>(
    tasks: &Tasks,
    start: impl Future<Output = Result<P, E>>,
    stop: impl AsyncFnOnce(P),
) -> anyhow::Result<()>
where
    Result<P, E>: Context<P, E>,
{
    keep_private();
    let started = tokio::select! {
        started = start => started,
        () = shutdown::signal() => return Ok(()),
    };
    let part = started.context("can't start")?;
    notify::ready(tasks);
    shutdown::wanted(tasks).await;
    stop(part).await;
    end(tasks)
}

/// The last word of a program that has stopped.
pub fn end(tasks: &Tasks) -> anyhow::Result<()> {
    anyhow::ensure!(!tasks.failed(), "a part of the program failed; the log says which");
    Ok(())
}

/// Makes aws-lc-rs the process's cryptography; every TLS part relies on it. Further calls change nothing.
pub fn install_tls_provider() {
    // An error only means that somebody installed one before.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

fn report(error: &anyhow::Error) -> ExitCode {
    eprintln!("{}: error: {}", program_name(), words(error));
    ExitCode::FAILURE
}

/// The error and its causes. Many errors quote their cause, which then need not be said again.
fn words(error: &anyhow::Error) -> String {
    let mut words = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !words.contains(&cause) {
            words = format!("{words}: {cause}");
        }
    }
    words
}

fn program_name() -> String {
    let path = std::env::args_os().next().map(std::path::PathBuf::from).unwrap_or_default();
    path.file_name().map_or_else(|| "darter".to_owned(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cause_is_said_once() {
        let quoting = crate::config::load::<Settings>(std::path::Path::new("/nonexistent")).unwrap_err();
        let text = words(&anyhow::Error::from(quoting).context("can't start"));
        assert!(text.starts_with("can't start: /nonexistent: "), "{text}");
        assert_eq!(text.matches("os error").count(), 1, "{text}");
    }

    #[derive(Debug, serde::Deserialize)]
    struct Settings {}

    #[test]
    fn error_becomes_exit_code_one() {
        let code = |outcome| format!("{:?}", block_on_main(async { outcome }));
        assert_eq!(code(Ok(())), format!("{:?}", ExitCode::SUCCESS));
        assert_eq!(code(Err(anyhow::anyhow!("on purpose"))), format!("{:?}", ExitCode::FAILURE));
    }
}
