//! What can go wrong with the mesh and with one layer in it.

use std::net::SocketAddr;

use darter_identity::IdentityError;

use crate::make::Fault;

/// Why the mesh could not start.
#[derive(Debug, thiserror::Error)]
pub enum MeshError {
    #[error("can't listen on {address}: {error}")]
    Listen { address: SocketAddr, error: std::io::Error },
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// Why a layer, or a piece of it, can't be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayerError {
    /// No try later and no other peer would help: the layer can't be lazy. The reason is for people.
    #[error("{reason}")]
    Impossible { reason: String },
    /// Nobody could give it now; a later try may succeed.
    #[error("{reason}")]
    Unavailable { reason: String },
}

impl LayerError {
    pub(crate) fn impossible(reason: impl Into<String>) -> Self {
        LayerError::Impossible { reason: reason.into() }
    }
    pub(crate) fn unavailable(reason: impl Into<String>) -> Self {
        LayerError::Unavailable { reason: reason.into() }
    }
}

impl From<Fault> for LayerError {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Impossible(reason) | Fault::Absent(reason) | Fault::Denied(reason) => {
                LayerError::Impossible { reason }
            }
            Fault::Failed(reason) => LayerError::Unavailable { reason },
        }
    }
}
