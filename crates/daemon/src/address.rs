//! Addresses as people write them into a configuration, for `#[serde(deserialize_with = "…")]`: what can't be one is a mistake of the
//! file, told with how to write it, and no connection that fails for ever.

use std::net::SocketAddr;

use serde::de::Error;
use serde::{Deserialize, Deserializer};

/// `host:port`, where somebody else listens. An IPv6 address stands in brackets.
pub fn host_port<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let text = String::deserialize(from)?;
    check(&text).map_err(D::Error::custom)?;
    Ok(text)
}

/// The same; an empty text means that nothing was set.
pub fn host_port_or_empty<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let text = String::deserialize(from)?;
    if !text.is_empty() {
        check(&text).map_err(D::Error::custom)?;
    }
    Ok(text)
}

/// `address:port` of this host, to listen on.
pub fn listen<'de, D: Deserializer<'de>>(from: D) -> Result<SocketAddr, D::Error> {
    let text = String::deserialize(from)?;
    let wrong =
        |_| format!("{text:?} is no address to listen on: write ADDRESS:PORT, for example 0.0.0.0:7420");
    text.parse().map_err(wrong).map_err(D::Error::custom)
}

/// Whether a port and something like a host are there; whether the host exists is found out when it is connected to.
fn check(text: &str) -> Result<(), String> {
    let is_host = |host: &str| {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        !host.is_empty()
            && !host.contains(|c: char| c.is_whitespace() || "/@?#".contains(c))
            && (bare.is_some() || !host.contains([':', '[', ']']))
    };
    let Some((host, port)) = text.rsplit_once(':') else {
        return Err(format!("{text:?} has no port: write HOST:PORT (the manager's is 7400, a peer's 7420)"));
    };
    let is_port = port.parse::<u16>().is_ok_and(|port| port > 0);
    if is_host(host) && is_port {
        return Ok(());
    }
    Err(format!(
        "{text:?} is not of the form HOST:PORT, for example manager.example:7400 or [fd00::1]:7400, without http:// and path"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Settings {
        #[serde(deserialize_with = "host_port")]
        manager: String,
        #[serde(deserialize_with = "host_port_or_empty")]
        advertise: String,
        #[serde(deserialize_with = "listen")]
        listen: SocketAddr,
    }

    impl Default for Settings {
        fn default() -> Self {
            Self { manager: String::new(), advertise: String::new(), listen: ([127, 0, 0, 1], 1).into() }
        }
    }

    fn load(text: &str) -> Result<Settings, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, text).unwrap();
        crate::config::load(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn addresses_are_mistakes_of_the_file_all_at_once_each_with_how_to_write_it() {
        let error = load("manager = \"127.0.0.1\"\nadvertise = \"node:x\"\nlisten = \"nope\"\n").unwrap_err();
        for wanted in [
            "c.toml:1: manager: \"127.0.0.1\" has no port: write HOST:PORT",
            "c.toml:2: advertise: \"node:x\" is not of the form HOST:PORT",
            "c.toml:3: listen: \"nope\" is no address to listen on: write ADDRESS:PORT",
        ] {
            assert!(error.contains(wanted), "{error}");
        }
        assert!(load("manager = \"\"\n").unwrap_err().contains("has no port"));
    }

    #[test]
    fn an_address_that_need_not_be_set_may_be_empty() {
        let settings = load("manager = \"m:7400\"\nadvertise = \"\"\nlisten = \"[::]:7420\"\n").unwrap();
        assert_eq!((settings.manager.as_str(), settings.listen.port()), ("m:7400", 7420));
    }

    #[test]
    fn hosts_with_a_port_are_taken() {
        for good in ["127.0.0.1:7400", "manager.example:1", "[fd00::1]:7400", "m_1:65535"] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
    }

    #[test]
    fn what_nobody_can_connect_to_is_refused() {
        for bad in [
            "m",
            "m:",
            "m:0",
            "m:70000",
            ":7400",
            "fd00::1:7400",
            "http://m:7400",
            "m:7400/x",
            "m m:1",
            "[m:1",
        ] {
            assert!(check(bad).is_err(), "{bad:?} was taken");
        }
    }
}
