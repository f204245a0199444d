//! darter-mesh
