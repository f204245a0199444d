//! The tasks of a program: each has a name, all stop together, a panic in one stops the program.
//!
//! Except for work on one thing that comes from elsewhere: a layer, a piece, a connection. Somebody who finds out how to
//! make it panic must not be able to stop every program that meets the thing, so it fails by itself ([`alone`]).
//!
//! A task ends by itself when [`Tasks::token`] is cancelled; one that has no own way to end is spawned with
//! [`Tasks::spawn_until_stop`] and is dropped then. What is left after the grace period is dropped at its next await.
//!
//! Work goes to the heap before anything is wrapped around it. An async wrapper holds what it was given up to twice, once as
//! its argument: a few of them around a future of some ten kilobytes, and moving and polling it takes most of a thread's stack.

use std::any::Any;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

/// Work that panicked by itself since the program started.
static BROKEN: AtomicU64 = AtomicU64::new(0);

/// Work panicked; it is logged and counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} broke off; this is a defect in Darter, and the log says where")]
pub struct Broken(pub &'static str);

/// Does work on one thing that comes from elsewhere. A panic in it becomes an error, for the caller to clean up.
pub fn alone<T>(
    name: &'static str,
    work: impl Future<Output = T>,
) -> impl Future<Output = Result<T, Broken>> {
    let work = AssertUnwindSafe(Box::pin(work)).catch_unwind();
    work.map(move |outcome| {
        outcome.map_err(|panic| {
            tracing::error!(task = name, message = message(&*panic), "a task panicked; the program goes on");
            BROKEN.fetch_add(1, Ordering::Relaxed);
            Broken(name)
        })
    })
}

/// How often [`alone`] caught a panic since the program started.
pub fn broken() -> u64 {
    BROKEN.load(Ordering::Relaxed)
}

/// A cheap handle to all tasks of a program.
#[derive(Clone)]
pub struct Tasks(Arc<Shared>);

struct Shared {
    runtime: Handle,
    tracker: TaskTracker,
    token: CancellationToken,
    /// Cancelled when the grace period is over.
    hard: CancellationToken,
    failed: AtomicBool,
}

impl Tasks {
    /// Must be called within a tokio runtime; the tasks run there, from whatever thread they are spawned.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self(Arc::new(Shared {
            runtime: Handle::current(),
            tracker: TaskTracker::new(),
            token: CancellationToken::new(),
            hard: CancellationToken::new(),
            failed: AtomicBool::new(false),
        }))
    }

    /// Starts a task that watches [`Tasks::token`] or ends soon by itself.
    pub fn spawn<F>(&self, name: &'static str, future: F) -> AbortHandle
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let shared = self.0.clone();
        let work = AssertUnwindSafe(Box::pin(future)).catch_unwind();
        let guarded = async move {
            if let Some(Err(panic)) = shared.hard.run_until_cancelled(work).await {
                shared.fail(name, &*panic);
            }
        };
        let span = tracing::info_span!("task", name);
        self.0.tracker.spawn_on(guarded.instrument(span), &self.0.runtime).abort_handle()
    }

    /// Starts a task that is dropped, at whatever await it is, when the program stops.
    pub fn spawn_until_stop<F>(&self, name: &'static str, future: F) -> AbortHandle
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (token, future) = (self.token(), Box::pin(future));
        self.spawn(name, async move {
            token.run_until_cancelled(future).await;
        })
    }

    /// Like [`Tasks::spawn_until_stop`], for work on one thing that comes from elsewhere: see [`alone`]. What others wait for
    /// must not depend on how it ends.
    pub fn spawn_alone<F>(&self, name: &'static str, future: F) -> AbortHandle
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.spawn_until_stop(name, alone(name, future).map(drop))
    }

    /// Runs work that blocks on a thread for such work; [`Tasks::stop`] waits for it, but can't end it.
    pub fn spawn_blocking<F>(&self, name: &'static str, work: F)
    where
        F: FnOnce() + Send + 'static,
    {
        let shared = self.0.clone();
        let guarded = move || {
            let _entered = tracing::info_span!("task", name).entered();
            if let Err(panic) = std::panic::catch_unwind(AssertUnwindSafe(work)) {
                shared.fail(name, &*panic);
            }
        };
        self.0.tracker.spawn_blocking_on(guarded, &self.0.runtime);
    }

    /// Cancelled when the program is to stop.
    pub fn token(&self) -> CancellationToken {
        self.0.token.clone()
    }

    /// Whether a task panicked.
    pub fn failed(&self) -> bool {
        self.0.failed.load(Ordering::Acquire)
    }

    /// Tells all tasks to stop, waits for them up to `grace`, then drops those that are left.
    pub async fn stop(self, grace: Duration) {
        self.0.token.cancel();
        self.0.tracker.close();
        if tokio::time::timeout(grace, self.0.tracker.wait()).await.is_err() {
            tracing::warn!(tasks = self.0.tracker.len(), "tasks did not stop in time and are dropped");
            self.0.hard.cancel();
            // Dropping takes an await; a task that blocks its thread must not hold up the stop.
            let _ = tokio::time::timeout(Duration::from_secs(1), self.0.tracker.wait()).await;
        }
    }
}

impl Shared {
    fn fail(&self, name: &'static str, panic: &(dyn Any + Send)) {
        tracing::error!(task = name, message = message(panic), "a task panicked; the program stops");
        self.failed.store(true, Ordering::Release);
        self.token.cancel();
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn panic_over_one_foreign_thing_stops_nothing_else_and_is_counted() {
        let (tasks, before) = (Tasks::new(), broken());
        let (held, was_dropped) = tokio::sync::oneshot::channel::<()>();
        tasks.spawn_alone("bad", async move {
            let _held = held;
            panic!("on purpose")
        });
        assert!(was_dropped.await.is_err());
        assert_eq!(alone("worse", async { panic!("on purpose") }).await, Err::<(), _>(Broken("worse")));
        assert_eq!(alone("good", async { 7 }).await, Ok(7));
        assert_eq!(broken() - before, 2);
        assert!(!tasks.failed() && !tasks.token().is_cancelled());
    }

    /// The stack is half of what tokio gives its threads.
    #[test]
    fn large_work_needs_little_stack() {
        let large = || async {
            let room = [1_u8; 64 << 10];
            tokio::task::yield_now().await;
            assert_eq!(room.iter().map(|byte| usize::from(*byte)).sum::<usize>(), 64 << 10);
        };
        let run = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let tasks = Tasks::new();
                tasks.spawn_alone("large", async move { alone("inner", large()).await.unwrap() });
                tasks.spawn("large", large());
                tokio::task::yield_now().await;
                tasks.stop(Duration::from_secs(60)).await;
            });
        };
        std::thread::Builder::new().stack_size(1 << 20).spawn(run).unwrap().join().unwrap();
    }

    #[tokio::test]
    async fn panic_cancels_all_and_is_remembered() {
        let tasks = Tasks::new();
        tasks.spawn("bad", async { panic!("on purpose") });
        tasks.token().cancelled().await;
        assert!(tasks.failed());
    }

    #[tokio::test]
    async fn panic_in_blocking_work_cancels_all() {
        let tasks = Tasks::new();
        tasks.spawn_blocking("bad", || panic!("on purpose"));
        tasks.token().cancelled().await;
        assert!(tasks.failed());
    }

    #[tokio::test]
    async fn stop_waits_for_a_task_that_watches_the_token() {
        let tasks = Tasks::new();
        let (done, was_done) = tokio::sync::oneshot::channel();
        let token = tasks.token();
        tasks.spawn("good", async move {
            token.cancelled().await;
            tokio::task::yield_now().await;
            done.send(()).unwrap();
        });
        tasks.clone().stop(Duration::from_secs(5)).await;
        was_done.await.unwrap();
        assert!(!tasks.failed());
    }

    #[tokio::test]
    async fn task_that_ignores_the_token_is_dropped_after_the_grace_period() {
        let tasks = Tasks::new();
        let (held, was_dropped) = tokio::sync::oneshot::channel::<()>();
        tasks.spawn("deaf", async move {
            let _held = held;
            std::future::pending::<()>().await;
        });
        tasks.stop(Duration::from_millis(1)).await;
        assert!(was_dropped.await.is_err());
    }

    #[tokio::test]
    async fn task_until_stop_is_dropped_at_once() {
        let tasks = Tasks::new();
        tasks.spawn_until_stop("endless", std::future::pending());
        let before = std::time::Instant::now();
        tasks.stop(Duration::from_secs(60)).await;
        assert!(before.elapsed() < Duration::from_secs(30));
    }

    #[tokio::test]
    async fn task_can_be_spawned_from_any_thread() {
        let tasks = Tasks::new();
        let (done, was_done) = tokio::sync::oneshot::channel();
        let other = tasks.clone();
        std::thread::spawn(move || other.spawn("far", async move { done.send(()).unwrap() }));
        was_done.await.unwrap();
    }
}
