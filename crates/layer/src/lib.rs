//! darter-layer
