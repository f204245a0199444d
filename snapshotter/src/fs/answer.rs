//! How an operation answers: at once, after work on this machine, or after a wait.

use std::future::Future;
use std::pin::Pin;

/// An answer, or the way to it.
pub enum Answer<T> {
    Ready(T),
    /// Needs the processor or the disk for a moment: run it on a thread that may block.
    Work(Box<dyn FnOnce() -> Answer<T> + Send>),
    /// Needs something that isn't on this machine: await it. It may be dropped when nobody wants the answer any more.
    Wait(Pin<Box<dyn Future<Output = T> + Send>>),
}

impl<T> Answer<T> {
    pub fn wait(future: impl Future<Output = T> + Send + 'static) -> Self {
        Answer::Wait(Box::pin(future))
    }

    pub fn work(job: impl FnOnce() -> Answer<T> + Send + 'static) -> Self {
        Answer::Work(Box::new(job))
    }

    /// The answer, translated by `change`, however it comes.
    pub fn map<U: 'static>(self, change: impl FnOnce(T) -> U + Send + 'static) -> Answer<U>
    where
        T: 'static,
    {
        match self {
            Answer::Ready(value) => Answer::Ready(change(value)),
            Answer::Work(job) => Answer::work(move || job().map(change)),
            Answer::Wait(future) => Answer::wait(async move { change(future.await) }),
        }
    }
}

/// Why an operation failed. `crate::fuse` decides on the errno.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FsError {
    #[error("the file is gone with its directory")]
    Stale,
    #[error("not a directory")]
    NotDirectory,
    #[error("a directory")]
    IsDirectory,
    #[error("not the right kind of file")]
    WrongKind,
    #[error("no such extended attribute")]
    NoAttribute,
    #[error("the content did not come or can't be right")]
    Io,
}
