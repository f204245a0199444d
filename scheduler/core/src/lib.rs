//! darter-scheduler-core
