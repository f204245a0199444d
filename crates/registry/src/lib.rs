//! darter-registry
