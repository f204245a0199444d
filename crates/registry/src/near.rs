//! Addresses that are another place on each machine: its own loopback, and its link, where clouds tell machines secrets. A
//! registry that is elsewhere has no business to send us there. Private networks are no such places: registries and their
//! storage often are in one.

use std::net::IpAddr;
use std::time::Duration;

use url::{Host, Url};

/// How long a name may take to be looked up; the connection has a patience of its own.
const LOOKUP: Duration = Duration::from_secs(3);

/// Whether `from`, which is elsewhere, sends us to such an address. A name that can't be looked up here is a proxy's affair.
/// The connection looks it up once more: a name that changes in between is not noticed.
pub(crate) async fn leads_astray(from: &Url, to: &Url) -> bool {
    from.host() != to.host() && is_near(to).await && !is_near(from).await
}

async fn is_near(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(address)) => is_near_address(address.into()),
        Some(Host::Ipv6(address)) => is_near_address(address.into()),
        Some(Host::Domain(name)) => {
            let port = url.port_or_known_default().unwrap_or(443);
            let found = tokio::time::timeout(LOOKUP, tokio::net::lookup_host((name, port))).await;
            found.is_ok_and(|found| {
                found.is_ok_and(|mut all| all.any(|address| is_near_address(address.ip())))
            })
        }
        None => false,
    }
}

fn is_near_address(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => address.is_loopback() || address.is_link_local() || address.is_unspecified(),
        IpAddr::V6(address) => {
            address.is_loopback() || address.is_unicast_link_local() || address.is_unspecified()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_who_is_there_leads_to_this_machine_or_its_link() {
        let leads =
            async |from: &str, to: &str| leads_astray(&from.parse().unwrap(), &to.parse().unwrap()).await;
        for to in [
            "http://127.0.0.1:8080/x",
            "http://localhost/x",
            "http://169.254.169.254/latest",
            "http://[::1]/",
            "http://[::ffff:127.0.0.1]/",
            "http://[fe80::1]/",
            "http://0.0.0.0/",
            "http://2130706433/",
        ] {
            assert!(leads("https://192.0.2.1/v2/", to).await, "{to}");
            assert!(leads("https://10.0.0.1/v2/", to).await, "{to}");
            assert!(!leads("http://127.0.0.2:5000/v2/", to).await, "{to}");
        }
        for to in ["https://192.0.2.2/", "http://10.0.0.2:9000/", "https://[2001:db8::1]/"] {
            assert!(!leads("https://192.0.2.1/v2/", to).await, "{to}");
        }
    }
}
