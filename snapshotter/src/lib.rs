//! darter-snapshotter
