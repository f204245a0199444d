//! The manager: the cluster's CA, who belongs to it and who is alive, what they may move, and orders to seeds to preheat images.
//!
//! Nothing in a running mesh waits for it: members keep what it said last and go on while it is down. It is the only
//! program with a database, and it holds no layer and reads from no registry.
//!
//! `core` has the rules and is pure; `db` is storage behind one trait; `grpc` and `http` translate; `roster` knows who
//! attends now; `preheats` drives orders, `limits` tells members what they may move. Dependencies go to `identity`, `daemon`, `proto` and `types`.

mod config;
mod core;
mod db;
pub mod flags;
mod folder;
mod grpc;
mod http;
mod limits;
mod metrics;
mod preheats;
mod root;
mod roster;
mod start;

pub use config::{Config, of_command, parse_life};
pub use core::access::{AccessError, ApiRole, ApiScope};
pub use core::limits::{RATE_MAX, RATE_MIN};
pub use core::order::TIMEOUT_MAX;
pub use db::StorageError;
pub use root::{ApiTokenWish, list_api_tokens, mint_api_token, mint_token, release, remove_api_token};
pub use start::{Handle, ManagerError, start};
