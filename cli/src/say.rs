//! What the command prints. Whoever reads it may have had enough, as `head` has: then the command ends quietly, where the
//! standard library's own macros panic.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write};

macro_rules! println {
    ($($words:tt)*) => { $crate::say::line(format_args!($($words)*)) };
}

macro_rules! print {
    ($($words:tt)*) => { $crate::say::words(format_args!($($words)*)) };
}

/// As for a program that ends by SIGPIPE: what was to follow was not done.
const UNREAD: i32 = 128 + 13;

pub(crate) fn line(text: Arguments<'_>) {
    words(format_args!("{text}\n"));
}

pub(crate) fn words(text: Arguments<'_>) {
    match std::io::stdout().lock().write_fmt(text) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(UNREAD),
        // There is nobody left to tell it to but the exit code.
        Err(_) => std::process::exit(1),
        Ok(()) => {}
    }
}
