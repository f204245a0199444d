//! The little of Markdown that the tests need: sections, rows of tables, code in a line, headings, links.

/// What stands below the heading that is this line, up to the next of its level or a higher one.
pub fn section<'a>(page: &'a str, heading: &str) -> &'a str {
    let level = heading.chars().take_while(|c| *c == '#').count();
    let start = page.find(&format!("{heading}\n")).unwrap_or_else(|| panic!("no heading {heading:?}"));
    let below = &page[start + heading.len()..];
    let ends = |line: &str| {
        let marks = line.chars().take_while(|c| *c == '#').count();
        (1..=level).contains(&marks) && line[marks..].starts_with(' ')
    };
    let mut end = 0;
    for line in below.split_inclusive('\n') {
        if ends(line) {
            break;
        }
        end += line.len();
    }
    &below[..end]
}

/// The cells of each row of the tables in a text, without their heads.
pub fn rows(text: &str) -> Vec<Vec<String>> {
    let lines: Vec<&str> = text.lines().collect();
    let is_rule = |line: &str| line.starts_with("|---");
    let is_head = |at: usize| lines.get(at + 1).is_some_and(|next| is_rule(next));
    let rows = lines
        .iter()
        .enumerate()
        .filter(|(at, line)| line.starts_with('|') && !is_rule(line) && !is_head(*at));
    rows.map(|(_, line)| cells(line)).collect()
}

/// A `|` that belongs to a cell has a backslash before it.
fn cells(row: &str) -> Vec<String> {
    let inner = row.trim().trim_start_matches('|').trim_end_matches('|').replace("\\|", "\u{0}");
    inner.split('|').map(|cell| cell.trim().replace('\u{0}', "|")).collect()
}

/// What stands between backquotes; between double ones, it may have single ones in it.
pub fn code(text: &str) -> Vec<String> {
    let (mut found, mut rest) = (Vec::new(), text);
    while let Some(start) = rest.find('`') {
        let marks = rest[start..].chars().take_while(|c| *c == '`').count();
        let mark = &rest[start..start + marks];
        let inner = &rest[start + marks..];
        let Some(end) = inner.find(mark) else { break };
        let text = inner[..end].trim_matches(if marks > 1 { ' ' } else { '\u{0}' });
        found.push(text.to_owned());
        rest = &inner[end + marks..];
    }
    found
}

/// A page without its fenced blocks.
pub fn prose(page: &str) -> String {
    let mut fenced = false;
    let keep = |line: &&str| {
        let fence = line.starts_with("```");
        fenced ^= fence;
        !fenced && !fence
    };
    page.lines().filter(keep).collect::<Vec<_>>().join("\n")
}

/// What a link to each heading is, as GitHub makes it.
pub fn anchors(page: &str) -> Vec<String> {
    let prose = prose(page);
    let headings = prose.lines().filter(|line| line.starts_with('#') && line.contains("# "));
    headings.map(|line| anchor(line.trim_start_matches('#').trim())).collect()
}

fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// Where the links of a page lead, in order.
pub fn links(page: &str) -> Vec<String> {
    let prose = prose(page);
    let mut found = Vec::new();
    for (at, _) in prose.match_indices("](") {
        if let Some(end) = prose[at..].find(')') {
            found.push(prose[at + 2..at + end].to_owned());
        }
    }
    found
}

#[test]
fn what_is_looked_for_is_found() {
    let page = "# A\n\n## One\n| a | b |\n|---|---|\n| `x \\| y` | ``has `z` in it`` |\n\n### Deep, too\n[to](#one)\n\n## Two\n";
    assert_eq!(rows(section(page, "## One")), [["`x | y`", "``has `z` in it``"]]);
    assert_eq!(code("`x | y` and ``has `z` in it``"), ["x | y", "has `z` in it"]);
    assert!(section(page, "## One").contains("Deep") && !section(page, "## One").contains("Two"));
    assert_eq!(anchors(page), ["a", "one", "deep-too", "two"]);
    assert_eq!(links(page), ["#one"]);
}
