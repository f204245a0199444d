//! What the programs' sources say, by their tokens: which texts can reach a user, and where they stand.
//!
//! Collected are string literals that have a word and a space outside of their placeholders, where they stand
//!
//! - in `#[error("…")]`;
//! - in the macros `bail!`, `anyhow!`, `ensure!`, `warn!` and `error!`;
//! - in a call of `context`, `ok_or_else`, `map_err` and the like ([`SAYING_CALLS`]), of any constructor (`Err(…)`,
//!   `Fault::Failed(…)`, save `Ok` and `Some`), or of one of `Status`' own (`Status::internal(…)`), however deep;
//! - behind `reason:`, `words =` and the like ([`FIELDS`]): a structure's field, or a variable;
//! - as an arm of a `match`, right behind its `=>`, also in `format!`.
//!
//! Not collected is what is under `#[cfg(test)]`, in `expect` and `unreachable!` (an invariant), in `info!`, `debug!` and
//! `trace!`, what is printed and no error, what `darter doctor` finds `Good`, and the cures that it prints itself. Not found is a text that goes through a constant, or that a function returns
//! before it becomes an error. Those are few; `docs/errors.md` names them where somebody has thought of it.

use std::path::Path;

use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};

use crate::{files, repository};

/// The folders of what is shipped.
const SHIPPED: [&str; 7] = ["cli", "crates", "manager", "peer", "proto", "scheduler", "snapshotter"];
const SAYING_MACROS: [&str; 5] = ["bail", "anyhow", "ensure", "warn", "error"];
const SAYING_CALLS: [&str; 10] = [
    "context",
    "with_context",
    "ok_or",
    "ok_or_else",
    "map_err",
    "bad_request",
    "unknown",
    "missing",
    "error",
    "refuse",
];
const QUIET: [&str; 13] = [
    "expect",
    "unreachable",
    "info",
    "debug",
    "trace",
    "println",
    "print",
    "assert",
    "assert_eq",
    "debug_assert",
    "instrument",
    "info_span",
    "Good",
];
/// A finding of `darter doctor`: what is wrong, and then the cure.
const FIRST_ALONE: &str = "Bad";
const NO_ERRORS: [&str; 2] = ["Ok", "Some"];
const FIELDS: [&str; 6] = ["reason", "words", "message", "trouble", "what", "text"];

/// A text that can reach a user: each placeholder is an `…`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Text {
    pub words: String,
    /// `file:line`.
    pub place: String,
}

/// The sources of what is shipped: path within the repository, and text.
pub fn sources() -> Vec<(String, String)> {
    let root = repository();
    let all = SHIPPED.iter().flat_map(|folder| files(&root.join(folder), ".rs"));
    let name =
        |path: &Path| path.strip_prefix(&root).expect("it is below the repository").display().to_string();
    let shipped = all
        .map(|path| (name(&path), std::fs::read_to_string(&path).expect("a source can be read")))
        .filter(|(name, _)| {
            let only_tested = ["/testing.rs", "/fuzzing.rs"].iter().any(|end| name.ends_with(end));
            name.contains("/src/") && !name.contains("/tests") && !only_tested
        });
    shipped.collect()
}

/// Every text of a source that can reach a user.
pub fn texts(name: &str, source: &str) -> Vec<Text> {
    let stream: TokenStream = source.parse().unwrap_or_else(|error| panic!("{name}: {error}"));
    let mut walk = Walk { name, everything: false, found: Vec::new() };
    walk.stream(stream, false);
    walk.found
}

/// Every literal with a word and a space in it, wherever it stands outside of tests.
pub fn literals(name: &str, source: &str) -> Vec<String> {
    let stream: TokenStream = source.parse().unwrap_or_else(|error| panic!("{name}: {error}"));
    let mut walk = Walk { name, everything: true, found: Vec::new() };
    walk.stream(stream, true);
    walk.found.into_iter().map(|text| text.words).collect()
}

struct Walk<'a> {
    name: &'a str,
    /// Whether all literals are taken, whatever they are for.
    everything: bool,
    found: Vec<Text>,
}

impl Walk<'_> {
    /// `saying`: whether a literal here is said to somebody.
    fn stream(&mut self, stream: TokenStream, saying: bool) {
        let tokens: Vec<TokenTree> = stream.into_iter().collect();
        let (mut at, mut in_field) = (0, false);
        while let Some(token) = tokens.get(at) {
            match token {
                TokenTree::Punct(mark) if mark.as_char() == '#' => at = self.attribute(&tokens, at),
                TokenTree::Punct(mark) if matches!(mark.as_char(), ',' | ';') => in_field = false,
                TokenTree::Ident(name)
                    if FIELDS.iter().any(|field| name == field) && is_field(&tokens, at) =>
                {
                    in_field = true;
                }
                TokenTree::Ident(_) => {
                    if let Some((group, says)) = called(&tokens, at) {
                        let first_alone = !self.everything
                            && matches!(token, TokenTree::Ident(name) if name == FIRST_ALONE);
                        let told = if first_alone { before_comma(group.stream()) } else { group.stream() };
                        self.stream(told, self.everything || says.unwrap_or(saying || in_field));
                        at += tokens[at..]
                            .iter()
                            .position(|token| matches!(token, TokenTree::Group(_)))
                            .unwrap_or(0);
                    }
                }
                TokenTree::Punct(mark) if mark.as_char() == '>' && is_arm(&tokens, at) => in_field = true,
                TokenTree::Group(group) => self.stream(group.stream(), saying || in_field),
                TokenTree::Literal(literal) if saying || in_field => {
                    self.literal(&literal.to_string(), literal.span().start().line);
                }
                _ => {}
            }
            at += 1;
        }
    }

    /// Looks at the attribute that begins here; where it ends, or where the item ends that only tests have.
    fn attribute(&mut self, tokens: &[TokenTree], at: usize) -> usize {
        let Some(TokenTree::Group(group)) = tokens.get(at + 1) else { return at };
        let inner: Vec<TokenTree> = group.stream().into_iter().collect();
        let text = group.stream().to_string().replace(' ', "");
        if text == "cfg(test)" {
            let ends = |token: &TokenTree| match token {
                TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
                TokenTree::Punct(mark) => mark.as_char() == ';',
                _ => false,
            };
            return tokens[at..].iter().position(ends).map_or(tokens.len(), |length| at + length);
        }
        if let [TokenTree::Ident(name), TokenTree::Group(words)] = inner.as_slice()
            && name == "error"
            && let Some(TokenTree::Literal(literal)) = words.stream().into_iter().next()
        {
            self.literal(&literal.to_string(), literal.span().start().line);
        }
        at + 1
    }

    fn literal(&mut self, literal: &str, line: usize) {
        let Some(words) = unquoted(literal).map(|text| placeholders(&text)) else { return };
        let words = words.trim().to_owned();
        let told = words.replace('…', "");
        let has_word = told.split(|c: char| !c.is_alphabetic()).any(|word| word.len() > 2);
        if has_word && words.contains(' ') {
            self.found.push(Text { words, place: format!("{}:{line}", self.name) });
        }
    }
}

/// `name:`, but not `name::`; or `name =`, but not `name ==` or `name =>`.
fn is_field(tokens: &[TokenTree], at: usize) -> bool {
    let mark = |at: usize| match tokens.get(at) {
        Some(TokenTree::Punct(mark)) => mark.as_char(),
        _ => ' ',
    };
    match (mark(at + 1), mark(at + 2)) {
        (':', second) => second != ':',
        ('=', second) => !matches!(second, '=' | '>'),
        _ => false,
    }
}

/// `=>` with a text behind it.
fn is_arm(tokens: &[TokenTree], at: usize) -> bool {
    let after_mark = at > 0 && matches!(&tokens[at - 1], TokenTree::Punct(mark) if mark.as_char() == '=');
    let before_text = match tokens.get(at + 1) {
        Some(TokenTree::Literal(_)) => true,
        Some(TokenTree::Ident(name)) => name == "format",
        Some(TokenTree::Group(block)) => {
            matches!(block.stream().into_iter().next(), Some(TokenTree::Ident(name)) if name == "format")
        }
        _ => false,
    };
    after_mark && before_text
}

fn before_comma(stream: TokenStream) -> TokenStream {
    let is_comma = |token: &TokenTree| matches!(token, TokenTree::Punct(mark) if mark.as_char() == ',');
    stream.into_iter().take_while(|token| !is_comma(token)).collect()
}

/// What a call or macro that begins here is given, and whether literals in it are said: `None` where that is as outside.
fn called(tokens: &[TokenTree], at: usize) -> Option<(Group, Option<bool>)> {
    let TokenTree::Ident(name) = &tokens[at] else { return None };
    let name = name.to_string();
    let is_macro = matches!(tokens.get(at + 1), Some(TokenTree::Punct(mark)) if mark.as_char() == '!');
    let Some(TokenTree::Group(group)) = tokens.get(at + 1 + usize::from(is_macro)) else { return None };
    if !is_macro && group.delimiter() != Delimiter::Parenthesis {
        return None;
    }
    let of_status = at >= 3 && matches!(&tokens[at - 3], TokenTree::Ident(before) if before == "Status");
    let constructs =
        name.starts_with(|c: char| c.is_uppercase()) && name.contains(|c: char| c.is_lowercase());
    let says = match name.as_str() {
        quiet if QUIET.contains(&quiet) => Some(false),
        saying if is_macro => SAYING_MACROS.contains(&saying).then_some(true),
        none if NO_ERRORS.contains(&none) => None,
        saying => (SAYING_CALLS.contains(&saying) || of_status || constructs).then_some(true),
    };
    Some((group.clone(), says))
}

/// The text of a literal, if it is one of text.
pub fn unquoted(literal: &str) -> Option<String> {
    if let Some(raw) = literal.strip_prefix('r') {
        return Some(raw.trim_matches('#').trim_matches('"').to_owned());
    }
    let inner = literal.strip_prefix('"')?.strip_suffix('"')?;
    let (mut text, mut chars) = (String::new(), inner.chars().peekable());
    while let Some(c) = chars.next() {
        match (c, c == '\\') {
            (_, true) => match chars.next()? {
                'n' => text.push('\n'),
                't' => text.push('\t'),
                '\n' => while chars.next_if(|c| c.is_whitespace()).is_some() {},
                other => text.push(other),
            },
            (c, false) => text.push(c),
        }
    }
    Some(text)
}

/// `{}`, `{name}` and `{name:?}` become `…`.
fn placeholders(text: &str) -> String {
    let (mut told, mut rest) = (String::new(), text);
    while let Some(start) = rest.find(['{', '}']) {
        told.push_str(&rest[..start]);
        let inner = &rest[start..];
        if inner.starts_with("{{") || inner.starts_with("}}") {
            told.push_str(&inner[..1]);
            rest = &inner[2..];
            continue;
        }
        told.push('…');
        rest = inner.find('}').map_or("", |end| &inner[end + 1..]);
    }
    told + rest
}

#[test]
fn what_is_said_is_found_and_nothing_else() {
    let source = r#"
        /// Not this one.
        #[error("the {0} is gone: {source:?}")]
        fn f() {
            let _ = x.context("it was in context")?;
            tokio::select! { () = y => bail!("interrupted; again {id}"), }
            Fault::Failed(format!("it failed \
                                   for {n} s"));
            Err(Status::internal("its log says why"));
            y.expect("an invariant of ours");
            tracing::info!("it was said quietly");
            tracing::warn!(%error, "it was said aloud");
            Told { reason: "this is why".to_owned(), name: "and not this" };
            let words = format!("so it is put"); let name = "no error";
            match x { 1 => "an arm says it", 2 => format!("another of {x}"), _ => { f("and this not") } }
            Bad("the doctor found it".to_owned(), "and how to mend it"); Good("all is well");
            println!("just a line");
            let _ = ("oneword", Err("{}: {error}"));
        }
        #[cfg(test)]
        mod tests { fn g() { bail!("only in tests") } }
        fn h() { ok_or_else(|| "after the tests") }
    "#;
    let words: Vec<String> = texts("f.rs", source).into_iter().map(|text| text.words).collect();
    let wanted = [
        "the … is gone: …",
        "it was in context",
        "interrupted; again …",
        "it failed for … s",
        "its log says why",
        "it was said aloud",
        "this is why",
        "so it is put",
        "an arm says it",
        "another of …",
        "the doctor found it",
        "after the tests",
    ];
    assert_eq!(words, wanted);
}
