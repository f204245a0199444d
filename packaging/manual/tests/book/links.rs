//! Links of every page lead to a file that is there, and to a heading that it has.

use crate::{files, markdown, repository};

#[test]
fn every_relative_link_and_anchor_leads_somewhere() {
    let root = repository();
    let (mut dead, mut checked) = (Vec::new(), 0);
    for path in files(&root, ".md") {
        let page = std::fs::read_to_string(&path).unwrap();
        let name = path.strip_prefix(&root).unwrap().display().to_string();
        for link in markdown::links(&page) {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            checked += 1;
            let (file, anchor) =
                link.split_once('#').map_or((link.as_str(), None), |(file, to)| (file, Some(to)));
            let target = if file.is_empty() { path.clone() } else { path.with_file_name("").join(file) };
            let there = match anchor {
                None => target.exists(),
                Some(anchor) => std::fs::read_to_string(&target)
                    .is_ok_and(|page| markdown::anchors(&page).iter().any(|one| one == anchor)),
            };
            if !there {
                dead.push(format!("{name}: {link}"));
            }
        }
    }
    assert!(checked > 20, "only {checked} links were found");
    assert!(dead.is_empty(), "these lead nowhere:\n{}", dead.join("\n"));
}

#[test]
fn the_book_names_all_of_its_pages() {
    let root = repository();
    let index = markdown::links(&crate::page("docs/README.md"));
    let pages = files(&root.join("docs"), ".md");
    let names = pages.iter().map(|path| path.strip_prefix(root.join("docs")).unwrap().display().to_string());
    let missing: Vec<_> = names
        .filter(|name| name != "README.md" && !name.starts_with("decisions/") && !index.contains(name))
        .collect();
    assert!(missing.is_empty(), "docs/README.md does not name {missing:?}");
}
