//! darter-identity
