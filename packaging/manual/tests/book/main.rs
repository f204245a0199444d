//! The book (`docs/`) against the code: settings, environment, errors, links. What is there and not told fails, and the other
//! way round.

mod environment;
mod errors;
mod links;
mod markdown;
mod settings;
mod source;

use std::fs;
use std::path::{Path, PathBuf};

/// The folder of the whole repository.
fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the repository is there")
}

fn page(name: &str) -> String {
    let path = repository().join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Files below `folder` whose names end so, in order. Neither hidden folders nor what is built.
fn files(folder: &Path, end: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in
        fs::read_dir(folder).expect("a folder can be read").map(|entry| entry.expect("an entry can be read"))
    {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if name.starts_with('.') || name == "target" {
            continue;
        }
        match entry.file_type().expect("an entry has a kind").is_dir() {
            true => found.extend(files(&path, end)),
            false if name.ends_with(end) => found.push(path),
            false => {}
        }
    }
    found.sort();
    found
}
