//! When to stop.

use tokio::signal::unix::{SignalKind, signal as listen};

use crate::notify;
use crate::tasks::Tasks;

/// Waits for SIGTERM or SIGINT.
pub async fn signal() {
    let mut terminate = listen(SignalKind::terminate()).expect("a signal handler can be installed");
    let mut interrupt = listen(SignalKind::interrupt()).expect("a signal handler can be installed");
    let name = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    tracing::info!(signal = name, "asked to stop");
}

/// Waits for [`signal`], or until the tasks stop by themselves because one of them failed. Systemd is told.
pub async fn wanted(tasks: &Tasks) {
    tokio::select! {
        () = signal() => {}
        () = tasks.token().cancelled_owned() => {}
    }
    notify::stopping();
}
