//! darter-daemon
