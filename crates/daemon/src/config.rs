//! Configuration files: one TOML file a program.
//!
//! A program's structure has `#[serde(default, deny_unknown_fields)]`, so that a file says only what differs and a
//! misspelt key is an error. Every error names the file, the line and the key.

use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Why a configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// `key` is empty where the mistake belongs to no key.
    #[error("{}:{line}: {key}{}{message}", path.display(), if key.is_empty() { "" } else { ": " })]
    Parse { path: PathBuf, line: usize, key: String, message: String },
}

/// Reads the file at `path`, which must be there.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    toml::from_str(&text).map_err(|error| parse_error(path, &text, &error))
}

/// Like [`load`], but a file that is not there means that everything has its default.
pub fn load_or_default<T: DeserializeOwned + Default>(path: &Path) -> Result<T, ConfigError> {
    match load(path) {
        Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(T::default()),
        other => other,
    }
}

fn parse_error(path: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
    let at = error.span().map_or(0, |span| span.start).min(text.len());
    let before = &text.as_bytes()[..at];
    let line = before.iter().filter(|b| **b == b'\n').count() + 1;
    let key = key_at(text, line);
    ConfigError::Parse { path: path.to_owned(), line, key, message: error.message().trim().to_owned() }
}

/// The key on this line with the table that it stands in, for example `limits.upload`.
fn key_at(text: &str, line: usize) -> String {
    let lines: Vec<&str> = text.lines().take(line).collect();
    let table_of = |line: &&str| {
        let inner = line.trim().strip_prefix('[')?.split(']').next()?;
        Some(inner.trim_start_matches('[').trim().to_owned())
    };
    let table = lines.iter().rev().find_map(table_of).unwrap_or_default();
    let key = match lines.last().and_then(|line| line.split_once('=')) {
        Some((key, _)) => key.trim(),
        None => return table,
    };
    if table.is_empty() { key.to_owned() } else { format!("{table}.{key}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, PartialEq, serde::Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Settings {
        name: String,
        limits: Limits,
    }

    #[derive(Debug, Default, PartialEq, serde::Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Limits {
        upload: u32,
    }

    fn load_text(text: &str) -> Result<Settings, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("peer.toml");
        std::fs::write(&path, text).unwrap();
        load(&path)
    }

    #[test]
    fn what_the_file_omits_has_its_default() {
        let settings = load_text("[limits]\nupload = 3\n").unwrap();
        assert_eq!(settings, Settings { name: String::new(), limits: Limits { upload: 3 } });
    }

    #[test]
    fn unknown_key_is_named_with_file_and_line() {
        let error = load_text("name = \"a\"\n\n[limits]\nuplaod = 3\n").unwrap_err().to_string();
        assert!(error.contains("peer.toml:4: limits.uplaod: "), "{error}");
        assert!(error.contains("unknown field"), "{error}");
    }

    #[test]
    fn wrong_type_is_named_with_file_and_line() {
        let error = load_text("name = 7\n").unwrap_err().to_string();
        assert!(error.contains("peer.toml:1: name: "), "{error}");
    }

    #[test]
    fn missing_file_is_an_error_or_the_default() {
        let path = Path::new("/nonexistent/darter.toml");
        assert!(load::<Settings>(path).unwrap_err().to_string().starts_with("/nonexistent/darter.toml: "));
        assert_eq!(load_or_default::<Settings>(path).unwrap(), Settings::default());
    }
}
