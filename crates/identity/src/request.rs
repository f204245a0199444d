//! Who sent a gRPC request, for handlers behind a [`crate::Listener`], and what it is a part of.

use darter_daemon::traces::{HEADER, Trail};
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

/// A request to another member that tells it what it is a part of, if that is followed.
pub fn followed<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    if let Some(header) = Trail::current().to_header() {
        let value = header.parse().expect("a header of digits can be sent");
        request.metadata_mut().insert(HEADER, value);
    }
    request
}

/// What the sender says that its request is a part of. It may say anything: see `Step::for_member`.
pub fn trail<T>(request: &Request<T>) -> Trail {
    let header = request.metadata().get(HEADER).and_then(|value| value.to_str().ok());
    header.map(Trail::from_header).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_says_what_it_is_a_part_of_or_nothing() {
        let mut request = Request::new(());
        assert_eq!(trail(&request), Trail::NONE);
        let header = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        request.metadata_mut().insert(HEADER, header.parse().unwrap());
        assert_eq!(trail(&request).to_header().as_deref(), Some(header));
        request.metadata_mut().insert(HEADER, "a lie".parse().unwrap());
        assert_eq!(trail(&request), Trail::NONE);
        assert!(followed(()).metadata().is_empty(), "nothing is followed here");
    }
}
