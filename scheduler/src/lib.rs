//! darter-scheduler
