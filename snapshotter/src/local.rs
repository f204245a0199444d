//! gRPC on containerd's socket for programs on the same machine: `darter pull` tells how it reaches an image's repository.

use darter_mesh::credential_from_wire;
use darter_proto::convert::{WireError, check_protocol};
use darter_proto::v1::local_server::{Local, LocalServer};
use darter_proto::v1::{GrantAnswer, GrantRequest};
use darter_registry::{Credential, ImageRef};
use darter_types::Repository;
use tonic::{Request, Response, Status};

use crate::start::LazySlot;

/// Takes grants for the lazy half; without a mesh nobody needs them.
pub(crate) struct Grants {
    slot: LazySlot,
}

impl Grants {
    pub fn server(slot: LazySlot) -> LocalServer<Self> {
        LocalServer::new(Self { slot })
    }
}

#[tonic::async_trait]
impl Local for Grants {
    async fn grant(&self, request: Request<GrantRequest>) -> Result<Response<GrantAnswer>, Status> {
        let is_named = request.get_ref().named;
        let (image, repository, credential) = checked(request.into_inner())?;
        if let Some(parts) = self.slot.get() {
            if let Some(named) = credential.as_ref().filter(|_| is_named) {
                parts.credentials.lend(&image, named);
            }
            parts.credentials.grant(image, repository, credential);
        }
        Ok(Response::new(GrantAnswer {}))
    }
}

fn checked(request: GrantRequest) -> Result<(ImageRef, Repository, Option<Credential>), WireError> {
    check_protocol(request.protocol)?;
    let image = request.image.parse().map_err(|error| WireError::invalid("image", error))?;
    let repository = request.repository.parse().map_err(|error| WireError::invalid("repository", error))?;
    Ok((image, repository, credential_from_wire(request.credential)))
}
