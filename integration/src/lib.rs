//! The harness of Darter's whole-system tests, its demo and its benchmark.
//!
//! It makes worlds of network namespaces, registries, containerds of two generations and Darter's programs in them; images
//! with entries as odd as tar allows; and comparisons of what a container sees. It uses the programs as a user does:
//! by their command lines, files and sockets.

pub mod builders;
pub mod cluster;
pub mod collector;
pub mod command;
pub mod containerd;
pub mod darter;
pub mod edge;
pub mod http;
pub mod ill;
pub mod image;
pub mod machine;
pub mod procfs;
pub mod registry;
pub mod sci;
pub mod steps;
pub mod stub;
pub mod sweep;
pub mod tar;
pub mod token;
pub mod tree;
pub mod world;
