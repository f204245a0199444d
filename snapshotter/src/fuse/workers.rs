//! A few threads that may block: they read pieces from the disk and decode them, so that the threads that take requests
//! from the kernel never do.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use darter_daemon::priority;
use parking_lot::{Condvar, Mutex};

use super::ending::Ending;

type Job = Box<dyn FnOnce() + Send>;

/// Jobs that may wait. When there are more, whoever brings one does it himself, and so takes no new requests meanwhile.
const JOBS_MAX: usize = 4096;

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// Threads that take jobs in the order in which they come.
pub(super) struct Workers {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Workers {
    /// A job that panics ends its thread, and with it the session.
    pub(super) fn start(count: usize, ending: &Ending) -> io::Result<Self> {
        let workers = Self { shared: Arc::default(), threads: Mutex::default() };
        for index in 0..count {
            let (shared, guard) = (workers.shared.clone(), ending.on_panic());
            let thread = std::thread::Builder::new().name(format!("fs-{index}"));
            workers.threads.lock().push(thread.spawn(move || {
                let _guard = guard;
                priority::answer_soon();
                shared.run();
            })?);
        }
        Ok(workers)
    }

    pub(super) fn submit(&self, job: Job) {
        let mut queue = self.shared.queue.lock();
        if queue.closed || queue.jobs.len() >= JOBS_MAX {
            drop(queue);
            return job();
        }
        queue.jobs.push_back(job);
        drop(queue);
        self.shared.changed.notify_one();
    }

    /// Does what is queued and ends the threads.
    pub(super) fn stop(&self) {
        self.shared.queue.lock().closed = true;
        self.shared.changed.notify_all();
        for thread in std::mem::take(&mut *self.threads.lock()) {
            let _panicked = thread.join();
        }
    }
}

impl Shared {
    fn run(&self) {
        while let Some(job) = self.next() {
            job();
        }
    }

    fn next(&self) -> Option<Job> {
        let mut queue = self.queue.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            if queue.closed {
                return None;
            }
            self.changed.wait(&mut queue);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn every_job_is_done_before_the_end() {
        let (workers, done) = (Workers::start(2, &Ending::default()).unwrap(), Arc::new(AtomicUsize::new(0)));
        for _ in 0..100 {
            let done = done.clone();
            workers.submit(Box::new(move || {
                done.fetch_add(1, Ordering::Relaxed);
            }));
        }
        workers.stop();
        assert_eq!(done.load(Ordering::Relaxed), 100);
    }

    #[test]
    fn a_panic_ends_the_session() {
        let ending = Ending::default();
        let workers = Workers::start(1, &ending).unwrap();
        workers.submit(Box::new(|| panic!("this panic belongs to the test")));
        workers.stop();
        assert!(ending.is_over());
    }
}
