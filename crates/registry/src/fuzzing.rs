//! What `fuzz/` feeds with hostile bytes: `WWW-Authenticate`. It panics where something does not hold that must hold for all
//! bytes. The tests below run it over every seed, cut and damaged, so that it doesn't rot.

use http::header::WWW_AUTHENTICATE;
use http::{HeaderMap, HeaderValue};

use crate::auth::{Challenge, challenge};

/// A header a line. A challenge that is written again as the specification has it is read as the same.
pub fn www_authenticate(bytes: &[u8]) {
    let values = bytes.split(|byte| *byte == b'\n').filter_map(|line| HeaderValue::from_bytes(line).ok());
    let headers: HeaderMap = values.map(|value| (WWW_AUTHENTICATE, value)).collect();
    let Some(found) = challenge(&headers) else { return };
    let Ok(value) = HeaderValue::try_from(written(&found)) else { return };
    assert_eq!(challenge(&HeaderMap::from_iter([(WWW_AUTHENTICATE, value)])), Some(found));
}

fn written(challenge: &Challenge) -> String {
    let Challenge::Bearer { realm, service, scope, error } = challenge else { return "Basic".to_owned() };
    let quoted = |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
    let mut text = format!("Bearer realm={}", quoted(realm.as_str()));
    for (key, value) in [("service", service), ("scope", scope), ("error", error)] {
        if let Some(value) = value {
            text += &format!(",{key}={}", quoted(value));
        }
    }
    text
}

pub fn seeds() -> Vec<Vec<u8>> {
    let seeds = [
        r#"Bearer realm="https://auth.example/token",service="registry",scope="repository:a:pull,push""#,
        r#"Basic realm="a \" b", Bearer realm="https://a.example/t", error = insufficient_scope"#,
        "Negotiate abc==\nBASIC realm=x\nBearer realm=https://a.example/t",
    ];
    seeds.map(|seed| seed.as_bytes().to_vec()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_hold_cut_and_damaged() {
        for seed in seeds() {
            www_authenticate(&seed);
            for at in 0..seed.len() {
                www_authenticate(&seed[..at]);
                for byte in *b"\"\\,= \t\n\xff" {
                    let mut damaged = seed.clone();
                    damaged[at] = byte;
                    www_authenticate(&damaged);
                }
            }
        }
    }
}
