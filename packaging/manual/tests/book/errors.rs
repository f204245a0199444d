//! Every text that can reach a user is in `docs/errors.md`, word for word; and what is there is said by some program.
//!
//! [`crate::source`] says what is collected. A message of the document is code in the first column of a table, with an `…` for
//! each part that differs from case to case. What need not be there stands here, in three lists, each with its reason.

use std::collections::{BTreeMap, BTreeSet};

use crate::source::{Text, literals, sources, texts};
use crate::{markdown, page};

/// Sources, by the beginning of their path, whose texts reach no user, and why.
const NEVER_MET: [(&str, &str); 4] = [
    ("scheduler/core/src/record.rs", "read by the replay of a recorded run, a tool for developers"),
    ("crates/registry/src/push.rs", "uploads are for tests: no program of ours makes any"),
    ("cli/src/progress.rs", "how far a pull is: no error"),
    ("cli/src/trace.rs", "columns of a table: no error"),
];

/// Sources whose texts are said only as the end of another message, which must be documented.
const ENDS: [(&str, &str); 6] = [
    ("crates/layer/src/map/", "the layer map is invalid: …"),
    ("crates/layer/src/wire.rs", "the layer map is invalid: …"),
    ("crates/layer/src/map/builder.rs", "the layer exceeds what the map can hold: …"),
    ("crates/layer/src/recipe.rs", "the layer exceeds what the map can hold: …"),
    ("crates/layer/src/cut.rs", "the layer exceeds what the map can hold: …"),
    ("snapshotter/src/snapshot/filter.rs", "filter … at byte …: …"),
];

/// What looks like a text and is none; by its beginning where that ends with a space.
const NO_MESSAGES: [&str; 16] = [
    "PRAGMA ",
    "Bearer …",
    // What `setup containerd` prints when it is done.
    "Next: ",
    // What is waited for, within "containerd has not answered … for … s".
    "the next part of a blob",
    // Measures within other texts.
    "… min",
    "… days",
    "… bytes",
    "… MB read",
    "… of … MB read",
    // Whose limits they are: in `darter status`, in `darter limits show`, in the audit log.
    "(set on the manager for all)",
    "(set on the manager for this node)",
    "node …",
    "seed …",
    "the cluster",
    // A list of tokens.
    "expired …",
    "for ever",
];

fn said() -> Vec<Text> {
    let met = |name: &str| !NEVER_MET.iter().any(|(path, _)| name.starts_with(path));
    let is_end = |name: &str, words: &str| {
        let mut ends = ENDS.iter().filter(|(path, _)| name.starts_with(path)).peekable();
        ends.peek().is_some() && ends.all(|(_, whole)| *whole != words)
    };
    let is_none = |words: &str| {
        NO_MESSAGES.iter().any(|none| words == *none || none.ends_with(' ') && words.starts_with(none))
    };
    let sources = sources().into_iter().filter(|(name, _)| met(name));
    let all = sources.flat_map(|(name, source)| {
        let found = texts(&name, &source);
        found.into_iter().filter(move |text| !is_end(&name, &text.words)).collect::<Vec<_>>()
    });
    all.filter(|text| !is_none(&text.words)).collect()
}

/// Messages of the document with the number of their lines.
fn documented() -> BTreeMap<String, usize> {
    let page = page("docs/errors.md");
    let line_of =
        |row: &[String]| page.lines().position(|line| line.contains(&row[0])).map_or(0, |at| at + 1);
    let rows = markdown::rows(&page);
    rows.iter().flat_map(|row| markdown::code(&row[0]).into_iter().map(|text| (text, line_of(row)))).collect()
}

#[test]
fn every_text_that_a_user_can_meet_is_in_the_document() {
    let documented = documented();
    let said = said();
    assert!(said.len() > 300, "only {} texts were found in the sources", said.len());
    let mut missing: BTreeMap<&str, &str> = BTreeMap::new();
    for text in said.iter().filter(|text| !documented.contains_key(&text.words)) {
        missing.entry(&text.words).or_insert(&text.place);
    }
    let lines: Vec<_> = missing.iter().map(|(words, place)| format!("{place}: {words}")).collect();
    assert!(
        lines.is_empty(),
        "{} texts are not in docs/errors.md; add each to the table of whoever says it, with cause and cure:\n{}",
        lines.len(),
        lines.join("\n")
    );
}

/// Said in whatever way: some texts are made where the collection above doesn't look.
#[test]
fn every_text_in_the_document_is_said() {
    let said: BTreeSet<String> =
        sources().into_iter().flat_map(|(name, source)| literals(&name, &source)).collect();
    let stale: Vec<_> = documented()
        .into_iter()
        .filter(|(words, _)| !said.contains(words))
        .map(|(words, line)| format!("docs/errors.md:{line}: {words}"))
        .collect();
    assert!(stale.is_empty(), "nobody says these any more:\n{}", stale.join("\n"));
}

#[test]
fn every_row_has_a_cure() {
    let page = page("docs/errors.md");
    let poor: Vec<_> = markdown::rows(&page)
        .into_iter()
        .filter(|row| row.len() != 2 || row[1].split_whitespace().count() < 4)
        .map(|row| row.join(" | "))
        .collect();
    assert!(poor.is_empty(), "these say neither cause nor cure:\n{}", poor.join("\n"));
}

#[test]
fn what_is_left_out_is_there() {
    let names: Vec<String> = sources().into_iter().map(|(name, _)| name).collect();
    let documented = documented();
    for (path, _) in NEVER_MET.iter().chain(&ENDS) {
        assert!(names.iter().any(|name| name.starts_with(path)), "{path} is gone");
    }
    for (path, whole) in ENDS {
        assert!(documented.contains_key(whole), "what {path} says ends {whole:?}, which is not documented");
    }
}
