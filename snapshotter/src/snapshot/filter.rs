//! containerd's filter language (`pkg/filters`): selectors joined by commas, all of which must match.
//!
//! A selector is a field path, alone (is there such a field?) or with `==`, `!=` or `~=` and a value. Path parts and values
//! may be quoted; a pattern for `~=` may also stand between `|` or `/`.

use regex::Regex;

use super::{Info, SnapshotError};

/// One filter of a List request.
#[derive(Debug)]
pub struct Filter {
    selectors: Vec<Selector>,
}

#[derive(Debug)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

impl Filter {
    pub fn parse(text: &str) -> Result<Filter, SnapshotError> {
        let mut parser = Parser { text, at: 0 };
        let selectors = parser.selectors().map_err(|reason| {
            SnapshotError::Invalid(format!("filter {text:?} at byte {}: {reason}", parser.at))
        })?;
        Ok(Filter { selectors })
    }

    /// No filters match everything; else one match is enough.
    pub fn any(filters: &[Filter], info: &Info) -> bool {
        filters.is_empty() || filters.iter().any(|filter| filter.matches(info))
    }

    fn matches(&self, info: &Info) -> bool {
        self.selectors.iter().all(|selector| selector.matches(info))
    }

    /// The value that `labels."containerd.io/snapshot.ref"` must have, if the filter names one: it makes a look-up cheap.
    pub fn equals(&self, path: &[&str]) -> Option<&str> {
        self.selectors.iter().find_map(|selector| match &selector.test {
            Test::Equal(value) if selector.path == path => Some(value.as_str()),
            _ => None,
        })
    }
}

impl Selector {
    fn matches(&self, info: &Info) -> bool {
        let value = field(info, &self.path);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted),
            Test::NotEqual(unwanted) => value != Some(unwanted),
            Test::Matches(pattern) => pattern.is_match(value.unwrap_or_default()),
        }
    }
}

fn field<'a>(info: &'a Info, path: &[String]) -> Option<&'a str> {
    match path.first()?.as_str() {
        "kind" => Some(info.kind.as_str()),
        "name" => Some(&info.name),
        "parent" => Some(&info.parent),
        "labels" => info.labels.get(&path[1..].join(".")).map(String::as_str),
        _ => None,
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

type Parsed<T> = Result<T, &'static str>;

impl Parser<'_> {
    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn take(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn selectors(&mut self) -> Parsed<Vec<Selector>> {
        let mut selectors = Vec::new();
        if self.rest().is_empty() {
            return Ok(selectors);
        }
        loop {
            selectors.push(self.selector()?);
            if self.rest().is_empty() {
                return Ok(selectors);
            }
            if !self.take(",") {
                return Err("a comma or the end is expected");
            }
        }
    }

    fn selector(&mut self) -> Parsed<Selector> {
        let mut path = vec![self.field()?];
        while self.take(".") {
            path.push(self.field()?);
        }
        let test = if self.take("==") {
            Test::Equal(self.value("\"")?)
        } else if self.take("!=") {
            Test::NotEqual(self.value("\"")?)
        } else if self.take("~=") {
            let pattern = self.value("\"|/")?;
            Test::Matches(Regex::new(&pattern).map_err(|_| "the pattern is no regular expression")?)
        } else {
            Test::Present
        };
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Parsed<String> {
        if self.rest().starts_with('"') {
            return self.quoted();
        }
        let rest = self.rest();
        let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(rest.len());
        let name = rest[..end].to_owned();
        self.at += end;
        if name.starts_with(|c: char| c.is_ascii_alphabetic()) {
            Ok(name)
        } else {
            Err("a field is expected")
        }
    }

    fn value(&mut self, quotes: &str) -> Parsed<String> {
        let rest = self.rest();
        if rest.chars().next().is_some_and(|c| quotes.contains(c)) {
            return self.quoted();
        }
        let end = rest.find(|c: char| c == ',' || c.is_whitespace()).unwrap_or(rest.len());
        let value = rest[..end].to_owned();
        self.at += end;
        if value.is_empty() { Err("a value is expected") } else { Ok(value) }
    }

    /// What stands between two of the character that comes next, with Go's escapes. In patterns between `|` or `/` only
    /// that character itself can be escaped, so that a pattern reads as it is written.
    fn quoted(&mut self) -> Parsed<String> {
        let mut chars = self.text[self.at..].char_indices();
        let (_, quote) = chars.next().ok_or("a quote is expected")?;
        let mut out = String::new();
        while let Some((offset, c)) = chars.next() {
            match c {
                _ if c == quote => {
                    self.at += offset + c.len_utf8();
                    return Ok(out);
                }
                '\\' if quote == '"' => out.push(escape(&mut chars)?),
                '\\' => match chars.next() {
                    Some((_, next)) if next == quote => out.push(next),
                    Some((_, next)) => out.extend(['\\', next]),
                    None => break,
                },
                _ => out.push(c),
            }
        }
        Err("the closing quote is missing")
    }
}

fn escape(chars: &mut std::str::CharIndices<'_>) -> Parsed<char> {
    let (_, c) = chars.next().ok_or("the closing quote is missing")?;
    let digits = match c {
        'n' => return Ok('\n'),
        't' => return Ok('\t'),
        'r' => return Ok('\r'),
        '\\' | '"' | '\'' => return Ok(c),
        'x' => 2,
        'u' => 4,
        'U' => 8,
        _ => return Err("an unknown escape"),
    };
    let hex: String = chars.by_ref().take(digits).map(|(_, c)| c).collect();
    u32::from_str_radix(&hex, 16).ok().and_then(char::from_u32).ok_or("a bad escape")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Kind;

    fn info() -> Info {
        let labels = [("containerd.io/snapshot.ref".to_owned(), "sha256:aa".to_owned())].into();
        Info {
            name: "n".into(),
            parent: "p".into(),
            kind: Kind::Committed,
            created_ns: 0,
            updated_ns: 0,
            labels,
        }
    }

    fn matches(text: &str) -> bool {
        Filter::parse(text).unwrap().matches(&info())
    }

    #[test]
    fn the_filter_of_the_lazy_protocol_finds_its_snapshot() {
        assert!(matches(r#"labels."containerd.io/snapshot.ref"==sha256:aa,parent==p"#));
        assert!(!matches(r#"labels."containerd.io/snapshot.ref"==sha256:aa,parent=="""#));
    }

    #[test]
    fn commas_mean_all_and_several_filters_mean_any() {
        assert!(!matches("kind==committed,name==x"));
        let filters = [Filter::parse("name==x").unwrap(), Filter::parse("kind==committed").unwrap()];
        assert!(Filter::any(&filters, &info()));
        assert!(Filter::any(&[], &info()));
    }

    #[test]
    fn presence_inequality_and_patterns() {
        assert!(matches(r#"labels."containerd.io/snapshot.ref""#));
        assert!(!matches("labels.other"));
        assert!(matches("labels.other!=x"));
        assert!(matches(r#"name~="^n$""#) && matches("name~=|^[nm]$|"));
        assert!(matches(r"name~=/^\w$/"));
        assert!(matches(r#"name!="\x6d""#) && !matches(r#"name!="\x6e""#));
    }

    #[test]
    fn an_empty_filter_matches_everything() {
        assert!(matches(""));
    }

    #[test]
    fn broken_filters_say_where() {
        for bad in ["==x", "name==", "name==\"x", "name~=[", "name x", "a..b", r#"name=="\q""#] {
            let error = Filter::parse(bad).unwrap_err();
            assert!(matches!(error, SnapshotError::Invalid(_)), "{bad:?}: {error}");
        }
    }
}
