//! Text files beside the certificate that keep what the manager said last: a first line `NAME 1 <BLAKE3 of the rest>`, then
//! the rest. One that is damaged counts as none: the manager will say it again.

use std::io;
use std::path::Path;

use crate::pem;

pub(super) fn save(path: &Path, head: &str, body: &str) -> io::Result<()> {
    pem::write_private(path, sealed(head, body).as_bytes())
}

/// What `decode` makes of the file; the default if there is none, or if it is damaged.
pub(super) fn load<T: Default>(path: &Path, head: &str, decode: impl Fn(&str) -> Option<T>) -> T {
    let Ok(text) = std::fs::read_to_string(path) else { return T::default() };
    opened(head, &text).and_then(decode).unwrap_or_else(|| {
        tracing::warn!(path = %path.display(), "what the manager said last is damaged here and not used");
        T::default()
    })
}

pub(super) fn sealed(head: &str, body: &str) -> String {
    format!("{head}{}\n{body}", blake3::hash(body.as_bytes()).to_hex())
}

/// What was sealed, if every bit of it is as it was.
pub(super) fn opened<'a>(head: &str, text: &'a str) -> Option<&'a str> {
    let (sum, body) = text.strip_prefix(head)?.split_once('\n')?;
    (sum == blake3::hash(body.as_bytes()).to_hex().as_str()).then_some(body)
}
