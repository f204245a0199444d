//! Threads for work on pieces that takes a processor or waits for the disk.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use parking_lot::Mutex;
use tokio::sync::{Semaphore, mpsc, oneshot};

type Job = Box<dyn FnOnce() + Send>;

/// Jobs that nobody waits for and that wait for their thread. Whoever brings one more waits.
const CALM_JOBS_MAX: usize = 32;

/// Not more work at once than makes sense, because each thread that has ever decoded a piece keeps memory for the next.
pub(crate) struct Work {
    permits: Semaphore,
    /// To the thread for what nobody waits for; it is started with its first job.
    calm: Mutex<Option<mpsc::Sender<Job>>>,
}

impl Default for Work {
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(2, usize::from);
        Self { permits: Semaphore::new((2 * processors).max(4)), calm: Mutex::default() }
    }
}

impl Work {
    /// Runs `work` on a thread for it; a panic in there goes on in the caller.
    pub(crate) async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let _permit = self.permits.acquire().await.expect("the semaphore is never closed");
        match tokio::task::spawn_blocking(work).await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => resume_unwind(panic),
                // The runtime is shutting down: nobody will look at an answer.
                Err(_) => std::future::pending().await,
            },
        }
    }

    /// Like [`Self::run`], but one after the other, and only with the processor time that nobody else wants.
    pub(crate) async fn run_calmly<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let Ok(thread) = self.calm_thread() else { return self.run(work).await };
        let (sender, done) = oneshot::channel();
        let job = Box::new(move || drop(sender.send(catch_unwind(AssertUnwindSafe(work)))));
        // The thread lives as long as this sender, and answers each job.
        let sent = thread.send(job).await;
        sent.unwrap_or_else(|_| unreachable!("the thread ends after its last sender"));
        match done.await.expect("each job is answered") {
            Ok(done) => done,
            Err(panic) => resume_unwind(panic),
        }
    }

    fn calm_thread(&self) -> io::Result<mpsc::Sender<Job>> {
        let mut calm = self.calm.lock();
        if let Some(sender) = &*calm {
            return Ok(sender.clone());
        }
        let (sender, mut jobs) = mpsc::channel::<Job>(CALM_JOBS_MAX);
        std::thread::Builder::new().name("calm".to_owned()).spawn(move || {
            darter_daemon::priority::step_back();
            while let Some(job) = jobs.blocking_recv() {
                job();
            }
        })?;
        Ok(calm.insert(sender).clone())
    }
}

/// Runs long work on a thread of its own that takes only the processor time that nobody else wants; `None` if it broke.
pub(crate) async fn alone<T: Send + 'static>(
    name: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (sender, done) = oneshot::channel();
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        darter_daemon::priority::step_back();
        // Nobody listens if the layer was closed meanwhile.
        let _ = sender.send(work());
    });
    if let Err(error) = thread {
        tracing::warn!(%error, name, "a thread can't be started");
        return None;
    }
    done.await.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn calm_work_is_done_in_order_and_a_panic_is_its_callers_alone() {
        let work = std::sync::Arc::new(Work::default());
        let other = work.clone();
        let panicked =
            tokio::spawn(async move { other.run_calmly(|| panic!("this panic belongs to the test")).await });
        assert!(panicked.await.unwrap_err().is_panic());
        assert_eq!(work.run_calmly(|| 7).await, 7);
        assert_eq!(work.run(|| 8).await, 8);
    }

    #[tokio::test]
    async fn work_that_nobody_waits_for_is_nice_and_the_rest_is_not() {
        let work = Work::default();
        let here = darter_daemon::priority::niceness();
        assert_eq!(work.run_calmly(darter_daemon::priority::niceness).await, 19);
        assert_eq!(alone("test", darter_daemon::priority::niceness).await, Some(19));
        assert_eq!(work.run(darter_daemon::priority::niceness).await, here);
    }
}
