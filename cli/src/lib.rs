//! darter-cli
