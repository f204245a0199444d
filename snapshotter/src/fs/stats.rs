//! Counters of what was asked for.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! operations {
    ($($name:ident => $text:literal),+ $(,)?) => {
        /// A kind of request.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Operation { $($name),+ }

        impl Operation {
            /// All of them, in the order of their declaration.
            pub const ALL: &'static [Operation] = &[$(Operation::$name),+];

            pub fn as_str(self) -> &'static str {
                match self { $(Operation::$name => $text),+ }
            }
        }
    };
}

operations! {
    Lookup => "lookup",
    Attributes => "getattr",
    Readlink => "readlink",
    Open => "open",
    Read => "read",
    StatFs => "statfs",
    GetXattr => "getxattr",
    ListXattr => "listxattr",
    OpenDir => "opendir",
    ReadDir => "readdir",
    ReadDirPlus => "readdirplus",
    Seek => "lseek",
    Forget => "forget",
    Interrupt => "interrupt",
    Other => "other",
}

/// How often each [`Operation`] was asked for since the start.
#[derive(Default)]
pub struct Stats([AtomicU64; Operation::ALL.len()]);

impl Stats {
    pub fn count(&self, operation: Operation) {
        self.0[operation as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub fn get(&self, operation: Operation) -> u64 {
        self.0[operation as usize].load(Ordering::Relaxed)
    }

    /// Name and count of every operation.
    pub fn all(&self) -> Vec<(&'static str, u64)> {
        Operation::ALL.iter().map(|operation| (operation.as_str(), self.get(*operation))).collect()
    }
}
