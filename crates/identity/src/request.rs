//! Who sent a gRPC request, for handlers behind a [`crate::Listener`].

use darter_types::Role;
use tonic::{Request, Status};

use crate::{Member, PeerInfo};

/// The member at the other end; `None` if it showed no certificate.
pub fn member<T>(request: &Request<T>) -> Option<&Member> {
    request.extensions().get::<PeerInfo>()?.member.as_ref()
}

/// The member at the other end, if it is in one of `roles`; else the status to answer.
pub fn require<T>(request: &Request<T>, roles: &[Role]) -> Result<Member, Status> {
    let member = member(request)
        .ok_or_else(|| Status::unauthenticated("this call asks for a certificate: join first"))?;
    if roles.contains(&member.role) {
        return Ok(member.clone());
    }
    let allowed = roles.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(" or ");
    Err(Status::permission_denied(format!("{member} may not make this call: it is for a {allowed}")))
}
