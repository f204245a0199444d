//! k3s and RKE2 write containerd's configuration themselves, from a template that may extend their own.
//!
//! A template is no TOML until k3s fills it in, so ours is a block of lines between two marks behind their base. Which
//! snapshotter CRI uses is not for the template: k3s writes that table, and takes the name from its own configuration.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::plan::{self, Generation, Wanted};

const BASE: &str = "{{ template \"base\" . }}\n";
const BEGIN: &str = "# darter: begin (darter setup containerd --k3s --undo takes it away)\n";
const END: &str = "# darter: end\n";

/// Where k3s looks for the template, by containerd's generation.
pub fn template(generation: Generation) -> PathBuf {
    let name = match generation {
        Generation::One => "config.toml.tmpl",
        Generation::Two => "config-v3.toml.tmpl",
    };
    Path::new("/var/lib/rancher/k3s/agent/etc/containerd").join(name)
}

/// The template with Darter's lines.
pub fn apply(text: &str, wanted: &Wanted) -> Result<String> {
    let rest = undo(text);
    let base = if rest.is_empty() { BASE } else { &rest };
    let newline = if base.ends_with('\n') { "" } else { "\n" };
    Ok(format!("{base}{newline}{BEGIN}{}{END}", lines(wanted)?))
}

/// The template without them. It is empty when there was none but ours.
pub fn undo(text: &str) -> String {
    let Some((before, rest)) = text.split_once(BEGIN) else { return text.to_owned() };
    let after = rest.split_once(END).map_or("", |(_, after)| after);
    let left = format!("{before}{after}");
    if left == BASE { String::new() } else { left }
}

fn lines(wanted: &Wanted) -> Result<String> {
    let alone = plan::apply("", &Wanted { cri: false, ..wanted.clone() })?;
    // The base has said the version.
    Ok(alone.lines().filter(|line| !line.starts_with("version")).map(|line| format!("{line}\n")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted() -> Wanted {
        Wanted {
            generation: Generation::Two,
            name: "darter".into(),
            address: "/run/darter/darter.sock".into(),
            root: "/var/lib/darter".into(),
            cri: true,
        }
    }

    #[test]
    fn lines_follow_the_base_and_go_again() {
        for before in ["", "{{ template \"base\" . }}\n\n[debug]\n  level = \"warn\""] {
            let applied = apply(before, &wanted()).unwrap();
            assert!(applied.starts_with("{{ template \"base\" . }}\n"), "{applied}");
            assert_eq!(apply(&applied, &wanted()).unwrap(), applied);
            assert_eq!(undo(&applied).trim_end(), before);
        }
    }

    #[test]
    fn behind_a_base_that_sets_cri_up_it_is_valid_toml() {
        let base = "version = 3\nroot = \"/x\"\n[plugins.'io.containerd.cri.v1.images']\n  snapshotter = \"darter\"\n";
        let rendered = apply("", &wanted()).unwrap().replace(BASE, base);
        let document: toml_edit::DocumentMut = rendered.parse().unwrap();
        assert_eq!(document["proxy_plugins"]["darter"]["exports"]["root"].as_str(), Some("/var/lib/darter"));
    }
}
