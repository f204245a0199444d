//! darter-peer
