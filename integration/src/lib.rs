//! darter-integration
