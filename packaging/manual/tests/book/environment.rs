//! Every environment variable that a program reads is in `docs/settings.md`, and no other.
//!
//! A variable's name is a literal in capitals in a file that reads the environment (`env::var`, `var_os`, clap's `env =`), or one
//! that begins with `DARTER_` or `OTEL_` anywhere. That a name is built from parts is not found; what is known when a program is
//! built (`CARGO_…`) is none.

use std::collections::{BTreeMap, BTreeSet};

use proc_macro2::{TokenStream, TokenTree};

use crate::source::{sources, unquoted};
use crate::{markdown, page};

/// All but those that stand for a flag's value in its help (`value_name = "DIR"`).
fn literals(stream: TokenStream, into: &mut Vec<String>) {
    let mut is_name = false;
    for token in stream {
        match token {
            TokenTree::Group(group) => literals(group.stream(), into),
            TokenTree::Ident(name) => is_name = name == "value_name",
            TokenTree::Literal(literal) if !is_name => into.extend(unquoted(&literal.to_string())),
            TokenTree::Literal(_) => is_name = false,
            TokenTree::Punct(_) => {}
        }
    }
}

fn is_name(text: &str) -> bool {
    let letters = text.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_');
    letters && text.len() > 3 && text.starts_with(|c: char| c.is_ascii_uppercase())
        || text.ends_with("_proxy")
}

/// Each variable, and a file that reads it.
fn read() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for (name, source) in sources() {
        let code = source.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        let reads = ["env::var", "var_os(", "env = \""].iter().any(|word| code.contains(word));
        let mut texts = Vec::new();
        literals(code.parse().expect("a source is Rust"), &mut texts);
        let is_ours = |text: &str| text.starts_with("DARTER_") || text.starts_with("OTEL_");
        let is_read =
            |text: &String| is_name(text) && !text.starts_with("CARGO_") && (reads || is_ours(text));
        let names = texts.into_iter().filter(is_read);
        found.extend(names.map(|text| (text, name.clone())));
    }
    found
}

#[test]
fn every_environment_variable_is_in_the_document() {
    let page = page("docs/settings.md");
    let rows = markdown::rows(markdown::section(&page, "## Environment"));
    let documented: BTreeSet<String> = rows.iter().flat_map(|row| markdown::code(&row[0])).collect();
    let read = read();
    let missing: Vec<_> = read.iter().filter(|(name, _)| !documented.contains(*name)).collect();
    let gone: Vec<_> = documented.iter().filter(|name| !read.contains_key(*name)).collect();
    assert!(missing.is_empty(), "docs/settings.md, Environment, lacks (variable, file): {missing:?}");
    assert!(gone.is_empty(), "docs/settings.md, Environment, has what no program reads: {gone:?}");
}
