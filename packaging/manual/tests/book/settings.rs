//! `docs/settings.md` and `packaging/etc/*.toml` against the programs' own defaults.
//!
//! The keys come from the code: each program's default configuration, written as TOML. A key that is in one of the three and not
//! in all of them, a default that differs, and a type that the document gives wrong fail, by the name of the key and the file.

use std::collections::BTreeMap;

use serde::Serialize;
use toml::{Table, Value};

use crate::{markdown, page};

const DOCUMENT: &str = "docs/settings.md";

/// Keys with their tables (`limits.upload`), and their values.
type Settings = BTreeMap<String, Value>;

/// Each program as the document heads its table, its sample, and what it does without a file.
fn programs() -> Vec<(&'static str, &'static str, Settings)> {
    vec![
        (
            "## darter-snapshotter",
            "packaging/etc/snapshotter.toml",
            defaults(darter_snapshotter::Config::default()),
        ),
        ("## darter-peer", "packaging/etc/peer.toml", defaults(darter_peer::Config::default())),
        (
            "## darter-scheduler",
            "packaging/etc/scheduler.toml",
            defaults(darter_scheduler::Config::default()),
        ),
        ("## darter-manager", "packaging/etc/manager.toml", defaults(darter_manager::Config::default())),
    ]
}

fn defaults(config: impl Serialize) -> Settings {
    flat(&Table::try_from(config).expect("a configuration can be written as TOML"))
}

fn flat(table: &Table) -> Settings {
    let mut all = Settings::new();
    for (key, value) in table {
        match value.as_table() {
            Some(inner) => {
                all.extend(flat(inner).into_iter().map(|(name, value)| (format!("{key}.{name}"), value)))
            }
            None => drop(all.insert(key.clone(), value.clone())),
        }
    }
    all
}

/// The rows below a program's heading: key, type, default, meaning.
fn documented(heading: &str) -> BTreeMap<String, Vec<String>> {
    let page = page(DOCUMENT);
    let rows = markdown::rows(markdown::section(&page, heading));
    rows.into_iter().map(|row| (row[0].trim_matches('`').to_owned(), row)).collect()
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "text",
        Value::Integer(_) | Value::Float(_) => "number",
        Value::Boolean(_) => "true or false",
        Value::Array(_) => "list",
        Value::Datetime(_) | Value::Table(_) => "another",
    }
}

#[test]
fn every_setting_is_in_the_document_with_its_default() {
    let mut wrong = Vec::new();
    for (heading, _, defaults) in programs() {
        let documented = documented(heading);
        for (key, value) in &defaults {
            let Some(row) = documented.get(key) else {
                wrong.push(format!("{heading}: {key} (default {value}) has no row in {DOCUMENT}"));
                continue;
            };
            if row.len() != 4 || row[3].len() < 20 {
                wrong.push(format!(
                    "{heading}: the row of {key} in {DOCUMENT} needs key, type, default and meaning"
                ));
            } else if row[2] != format!("`{value}`") {
                wrong
                    .push(format!("{heading}: {DOCUMENT} says that {key} is {}, the code `{value}`", row[2]));
            } else if !row[1].starts_with(kind(value)) {
                wrong.push(format!(
                    "{heading}: {DOCUMENT} says that {key} is a {}, it is a {}",
                    row[1],
                    kind(value)
                ));
            }
        }
        let gone = documented.keys().filter(|key| !defaults.contains_key(*key));
        wrong.extend(
            gone.map(|key| format!("{heading}: {DOCUMENT} has {key}, which the program doesn't know")),
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A number names its unit, so that nobody writes seconds where milliseconds are meant.
#[test]
fn every_number_has_its_unit() {
    let units =
        [("_ms", "milliseconds"), ("_seconds", "seconds"), ("_bytes", "bytes"), ("_percent", "percent")];
    let mut wrong = Vec::new();
    for (heading, ..) in programs() {
        for (key, row) in documented(heading) {
            if let Some((_, unit)) = units.iter().find(|(end, _)| key.ends_with(end))
                && !row[1].contains(unit)
            {
                wrong.push(format!("{heading}: the type of {key} in {DOCUMENT} does not say {unit}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_sample_shows_every_setting_with_its_default() {
    let mut wrong = Vec::new();
    for (_, sample, defaults) in programs() {
        let shown = flat(&page(sample).parse().unwrap());
        for (key, value) in &defaults {
            match shown.get(key) {
                Some(same) if same == value => {}
                Some(other) => wrong.push(format!("{sample}: {key} = {other}, in the code it is {value}")),
                None => wrong.push(format!("{sample}: {key} (default {value}) is not shown")),
            }
        }
        let gone = shown.keys().filter(|key| !defaults.contains_key(*key));
        wrong.extend(gone.map(|key| format!("{sample}: {key} is not known to the program")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
