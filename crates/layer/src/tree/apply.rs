//! stub
/// Why containerd would refuse a layer of the chain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct ApplyError {
    /// Which layer, from 0, the lowest.
    pub layer: usize,
    /// In containerd's words where it has some.
    pub reason: String,
}
