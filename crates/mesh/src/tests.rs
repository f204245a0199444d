//! Several peers in one process, over loopback and real TLS, with a registry in memory.

mod lies;
mod limits;
mod orders;
mod rights;
mod room;
mod schedule;
mod slow;
mod starts;
mod stories;
mod trails;
mod world;
