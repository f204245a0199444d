//! darter-store
