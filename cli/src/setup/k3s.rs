//! k3s and RKE2 write containerd's configuration themselves, from a template that may extend their own. They differ in the
//! names of their folders and units.
//!
//! A template is no TOML until k3s fills it in, so ours is a block of lines between two marks behind their base. Which
//! snapshotter CRI uses is not for the template: k3s writes that table, and takes the name from its own configuration.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::plan::{self, Generation, Wanted};
use crate::socket::K3S;

const BASE: &str = "{{ template \"base\" . }}\n";
const BEGIN: &str = "# darter: begin (darter setup containerd --k3s --undo takes it away)\n";
const END: &str = "# darter: end\n";

/// Below it each has the folder of its name.
pub const STATE: &str = "/var/lib/rancher";

/// Which of the two is on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Distribution {
    K3s,
    Rke2,
}

impl Distribution {
    /// The one whose folder is in `state`; k3s where that can't tell.
    pub fn found(state: &Path) -> Self {
        let has = |one: Self| state.join(one.name()).exists();
        if has(Self::Rke2) && !has(Self::K3s) { Self::Rke2 } else { Self::K3s }
    }

    fn name(self) -> &'static str {
        match self {
            Self::K3s => "k3s",
            Self::Rke2 => "rke2",
        }
    }

    fn units(self) -> &'static str {
        if self == Self::K3s { "k3s or k3s-agent" } else { "rke2-server or rke2-agent" }
    }

    /// Where containerd's files are made.
    fn folder(self) -> PathBuf {
        Path::new(STATE).join(self.name()).join("agent/etc/containerd")
    }

    /// Where it looks for the template, by containerd's generation.
    pub fn template(self, generation: Generation) -> PathBuf {
        self.folder().join(match generation {
            Generation::One => "config.toml.tmpl",
            Generation::Two => "config-v3.toml.tmpl",
        })
    }

    /// What is to be done when the template names Darter, or when it no longer does.
    pub fn next_steps(self, snapshotter: &str, applied: bool) -> String {
        let (name, units) = (self.name(), self.units());
        if !applied {
            return format!(
                "Next: take `snapshotter: {snapshotter}` out of /etc/rancher/{name}/config.yaml, then restart {units}."
            );
        }
        format!(
            "Next: have {name} use it with the line `snapshotter: {snapshotter}` in /etc/rancher/{name}/config.yaml, set\n\
             containerd_address = \"{K3S}\" and\n\
             hosts_dir = \"{}\" in /etc/darter/snapshotter.toml, then restart darter-snapshotter, and {units}.",
            self.folder().join("certs.d").display()
        )
    }
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
    fn rke2_is_told_from_k3s_by_its_folder_and_named_in_all_that_follows() {
        let state = tempfile::tempdir().unwrap();
        assert_eq!(Distribution::found(state.path()), Distribution::K3s);
        std::fs::create_dir(state.path().join("rke2")).unwrap();
        let found = Distribution::found(state.path());
        assert_eq!(found, Distribution::Rke2);
        let template = found.template(Generation::Two);
        assert_eq!(template, Path::new("/var/lib/rancher/rke2/agent/etc/containerd/config-v3.toml.tmpl"));
        let next = found.next_steps("darter", true);
        assert!(next.contains("/etc/rancher/rke2/config.yaml") && next.contains("rke2-agent"), "{next}");
        assert!(next.contains("/var/lib/rancher/rke2/agent/etc/containerd/certs.d"), "{next}");
        std::fs::create_dir(state.path().join("k3s")).unwrap();
        assert_eq!(Distribution::found(state.path()), Distribution::K3s);
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
