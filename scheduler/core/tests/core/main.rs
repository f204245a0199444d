//! The scheduler's rules, seen from outside: events in, actions out.

mod choosing;
mod making;
mod random;
mod replay;
mod room;
mod world;
