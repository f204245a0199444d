//! PEM files with a key and certificates (RFC 7468), written so that only their owner can read them and all at once.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};

use crate::IdentityError;

/// The columns of a line of base64 (RFC 7468, section 2).
const LINE: usize = 64;

fn section(label: &str, der: &[u8]) -> String {
    let body = STANDARD.encode(der);
    let mut out = format!("-----BEGIN {label}-----\n");
    for line in body.as_bytes().chunks(LINE) {
        out.push_str(std::str::from_utf8(line).expect("base64 is ASCII"));
        out.push('\n');
    }
    out.push_str(&format!("-----END {label}-----\n"));
    out
}

/// Writes one PKCS #8 key and the certificates that follow it.
pub(crate) fn write(
    path: &Path,
    key: &[u8],
    certificates: &[CertificateDer<'_>],
) -> Result<(), IdentityError> {
    let mut text = section("PRIVATE KEY", key);
    for certificate in certificates {
        text.push_str(&section("CERTIFICATE", certificate));
    }
    write_private(path, text.as_bytes())
        .map_err(|source| IdentityError::File { path: path.to_owned(), source })
}

/// Replaces `path` as a whole or not at all; readable by its owner only, and so is its folder if it had to be made.
pub fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let temporary = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    fs::File::open(folder)?.sync_all()
}

/// The key and the certificates of a file; `None` if there is no such file.
pub(crate) fn read(path: &Path) -> Result<Option<(Vec<u8>, Vec<CertificateDer<'static>>)>, IdentityError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(IdentityError::File { path: path.to_owned(), source }),
    };
    let damaged = |reason: String| IdentityError::Damaged { path: path.to_owned(), reason };
    let key = PrivatePkcs8KeyDer::from_pem_slice(&text).map_err(|error| damaged(error.to_string()))?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let certificates = certificates.map_err(|error| damaged(error.to_string()))?;
    Ok(Some((key.secret_pkcs8_der().to_vec(), certificates)))
}
