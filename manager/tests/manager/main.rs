//! A manager and those who deal with it, over real sockets.

mod attendance;
mod jobs;
mod joining;
mod limits;
mod nodes;
mod preheats;
mod renewal;
mod rest;
mod world;
