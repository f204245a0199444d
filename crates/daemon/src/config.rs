//! Configuration files: one TOML file a program.
//!
//! A program's structure has `#[serde(default, deny_unknown_fields)]`, so that a file says only what differs and a
//! misspelt key is an error. Every mistake of a file is told, with the file, the line and the key.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue, Deserializer};

/// More mistakes than this in one file are not told.
const MISTAKES_MAX: usize = 50;

/// Why a configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// All of them, each on a line of its own: `file:line: key: what is wrong`.
    #[error("{}", lines(path, mistakes))]
    Parse { path: PathBuf, mistakes: Vec<Mistake> },
}

/// One thing that is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    pub line: usize,
    /// Empty where the mistake belongs to no key.
    pub key: String,
    pub message: String,
}

fn lines(path: &Path, mistakes: &[Mistake]) -> String {
    let line = |mistake: &Mistake| {
        let Mistake { line, key, message } = mistake;
        let colon = if key.is_empty() { "" } else { ": " };
        format!("{}:{line}: {key}{colon}{message}", path.display())
    };
    mistakes.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// What a program's command line gives, which must be there, or else the usual file, which need not be.
pub fn load_given<T: DeserializeOwned + Default>(
    given: Option<&Path>,
    usual: &str,
) -> Result<T, ConfigError> {
    given.map_or_else(|| load_or_default(Path::new(usual)), load)
}

/// Reads the file at `path`, which must be there.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    parse(&text).map_err(|mistakes| ConfigError::Parse { path: path.to_owned(), mistakes })
}

/// Whatever is wrong is noted and taken out, until the rest is right: nobody shall have to start a program three times to
/// learn of three mistakes.
fn parse<T: DeserializeOwned>(text: &str) -> Result<T, Vec<Mistake>> {
    let (mut table, errors) = DeTable::parse_recoverable(text);
    let mut mistakes: Vec<_> = errors.iter().map(|error| mistake(text, error)).collect();
    let no_toml: BTreeSet<usize> = mistakes.iter().map(|mistake| mistake.line).collect();
    loop {
        let error = match T::deserialize(Deserializer::from(table.clone())) {
            Ok(value) if mistakes.is_empty() => return Ok(value),
            Ok(_) => break,
            Err(error) => error,
        };
        mistakes.push(mistake(text, &error));
        let taken_out = error.span().is_some_and(|span| take_out(table.get_mut(), span.start));
        if !taken_out || mistakes.len() >= MISTAKES_MAX {
            break;
        }
    }
    once_a_line(&mut mistakes, &no_toml);
    mistakes.sort_by_key(|mistake| mistake.line);
    mistakes.dedup();
    Err(mistakes)
}

/// What is left of a line that is no TOML is not what its writer meant: of these `lines` the first mistake is told alone.
fn once_a_line(mistakes: &mut Vec<Mistake>, lines: &BTreeSet<usize>) {
    let mut told = BTreeSet::new();
    mistakes.retain(|mistake| !lines.contains(&mistake.line) || told.insert(mistake.line));
}

/// Removes the innermost entry that this place in the text belongs to.
fn take_out(table: &mut DeTable<'_>, at: usize) -> bool {
    let has = |(key, value): &(&Spanned<Cow<'_, str>>, &Spanned<DeValue<'_>>)| {
        key.span().contains(&at) || value.span().contains(&at)
    };
    for (_, value) in table.iter_mut() {
        if let DeValue::Table(inner) = value.get_mut()
            && take_out(inner, at)
        {
            return true;
        }
    }
    let found = table.iter().find(has).map(|(key, _)| key.clone());
    found.is_some_and(|key| table.remove(&key).is_some())
}

/// Like [`load`], but a file that is not there means that everything has its default.
pub fn load_or_default<T: DeserializeOwned + Default>(path: &Path) -> Result<T, ConfigError> {
    match load(path) {
        Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(T::default()),
        other => other,
    }
}

fn mistake(text: &str, error: &toml::de::Error) -> Mistake {
    let at = error.span().map_or(0, |span| span.start).min(text.len());
    let line = text.as_bytes()[..at].iter().filter(|byte| **byte == b'\n').count() + 1;
    Mistake { line, key: key_at(text, line), message: in_short(error.message().trim()) }
}

/// Of an unknown key the parser names all that it knows: the pages have them, with what they mean.
fn in_short(message: &str) -> String {
    match message.split_once(", expected one of ") {
        Some((unknown, _)) if unknown.starts_with("unknown field") => {
            format!("{unknown}: docs/settings.md has all keys")
        }
        _ => message.to_owned(),
    }
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
    fn known_keys_are_not_listed_with_each_unknown_one() {
        let listed = "unknown field `a`, expected one of `b`, `c`, `d`";
        assert_eq!(in_short(listed), "unknown field `a`: docs/settings.md has all keys");
        assert_eq!(
            in_short("unknown variant `a`, expected one of `b`, `c`"),
            "unknown variant `a`, expected one of `b`, `c`"
        );
    }

    #[test]
    fn line_that_is_no_toml_is_told_once() {
        let mistake = |line, message: &str| Mistake { line, key: String::new(), message: message.to_owned() };
        let mut mistakes =
            vec![mistake(1, "no TOML"), mistake(1, "unknown"), mistake(2, "one"), mistake(2, "two")];
        once_a_line(&mut mistakes, &BTreeSet::from([1]));
        assert_eq!(mistakes, [mistake(1, "no TOML"), mistake(2, "one"), mistake(2, "two")]);
    }

    #[test]
    fn wrong_type_is_named_with_file_and_line() {
        let error = load_text("name = 7\n").unwrap_err().to_string();
        assert!(error.contains("peer.toml:1: name: "), "{error}");
    }

    #[test]
    fn all_mistakes_of_a_file_are_told_at_once() {
        let text =
            "naem = \"a\"\nname = 7\n\n[limits]\nupload = -3\nlists = [\n  1,\n]\n\n[limit]\nupload = 1\n";
        let error = load_text(text).unwrap_err().to_string();
        let places: Vec<_> = error.lines().map(|line| line.split_once(".toml:").unwrap().1).collect();
        let wanted = [
            "1: naem: unknown",
            "2: name: invalid type",
            "5: limits.upload: invalid value",
            "6: limits.lists: unknown",
        ];
        assert_eq!(places.len(), 5, "{error}");
        for (place, wanted) in places.iter().zip(wanted) {
            assert!(place.starts_with(wanted), "{error}");
        }
        assert!(places[4].starts_with("10: limit: unknown"), "{error}");
    }

    #[test]
    fn a_line_that_is_no_toml_hides_no_other_mistake() {
        let error =
            load_text("name = \"a\nuplaod = 3\n\n[limits]\nupload = \"x\"\n").unwrap_err().to_string();
        assert!(error.contains("peer.toml:1: ") && error.contains("peer.toml:5: limits.upload: "), "{error}");
    }

    #[test]
    fn missing_file_is_an_error_or_the_default() {
        let path = Path::new("/nonexistent/darter.toml");
        assert!(load::<Settings>(path).unwrap_err().to_string().starts_with("/nonexistent/darter.toml: "));
        assert_eq!(load_or_default::<Settings>(path).unwrap(), Settings::default());
    }
}
