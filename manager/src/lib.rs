//! darter-manager
