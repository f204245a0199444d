//! The rules, without clock, network or database: what they need to know is told to them.

pub(crate) mod access;
pub(crate) mod harbor;
pub(crate) mod job;
pub(crate) mod limits;
pub(crate) mod liveness;
pub(crate) mod names;
pub(crate) mod order;
pub(crate) mod seeds;
pub(crate) mod tokens;
